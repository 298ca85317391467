//! Which backend is used: chosen by the operator or by trying.

use std::io;

use io_uring::{IoUring, Probe, opcode};

use crate::error::EngineError;

/// What the operator asks for (`--io-engine auto|uring|threads`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring for connections where it works, else threads.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// One thread per lane.
    Threads,
}

/// What drives the lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// One io_uring for all lanes of a disk.
    Uring,
    /// One thread per lane.
    Threads,
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Uring => "uring",
            Self::Threads => "threads",
        })
    }
}

impl std::str::FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "threads" => Ok(Self::Threads),
            other => Err(format!("{other:?} is no engine; use auto, uring or threads")),
        }
    }
}

impl EngineChoice {
    /// Finds out by trying, at run time: a sysctl, seccomp or a container may forbid io_uring.
    ///
    /// # Errors
    /// [`EngineError::NoUring`] where io_uring was demanded and is not available.
    pub fn resolve(self) -> Result<Engine, EngineError> {
        match (self, self != Self::Threads) {
            (_, false) => Ok(Engine::Threads),
            (choice, _) => match probe() {
                Ok(()) => Ok(Engine::Uring),
                Err(source) if choice == Self::Uring => Err(EngineError::NoUring { source }),
                Err(error) => {
                    tracing::info!(%error, "io_uring is not available, threads are used");
                    Ok(Engine::Threads)
                }
            },
        }
    }
}

/// As large as the ring of four lanes, so that a limit on its memory shows.
const PROBE_ENTRIES: u32 = 128;

/// Whether a ring can be made and knows the operations that are used (all are in Linux 5.15).
fn probe() -> io::Result<()> {
    let ring = IoUring::new(PROBE_ENTRIES)?;
    let mut known = Probe::new();
    ring.submitter().register_probe(&mut known)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Send::CODE,
        opcode::Recv::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    if !ring.params().is_feature_ext_arg() || !needed.iter().all(|op| known.is_supported(*op)) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than 5.15"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_choices() {
        assert_eq!("threads".parse(), Ok(EngineChoice::Threads));
        assert!("fast".parse::<EngineChoice>().unwrap_err().contains("auto"));
        assert_eq!(EngineChoice::Threads.resolve().unwrap(), Engine::Threads);
        let auto = EngineChoice::Auto.resolve().unwrap();
        assert_eq!(auto == Engine::Uring, EngineChoice::Uring.resolve().is_ok());
    }
}
