//! Low priority for the threads that work, so that guests go first.
#![allow(unsafe_code)]

use std::io;

/// How much the engine's worker threads give way to everything else on the host.
///
/// The threads that read replies keep the normal CPU priority in either case: they need little,
/// and a guest could wait for what they leave unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// Nice 10, lowest best-effort IO class.
    #[default]
    Low,
    /// As the process.
    Normal,
}

/// Nice value of low priority: an eighth of a normal thread's share, never nothing.
const NICE: i32 = 10;
/// `ioprio_set` target: a thread.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// Best effort (class 2 in the upper bits), level 7 of 0..=7.
const IOPRIO_LOW: libc::c_int = (2 << 13) | 7;

impl Priority {
    /// Applies it to the calling thread; a refusal is logged, never fatal.
    pub fn apply(self) {
        if self == Self::Low
            && let Err(error) = lower_cpu().and_then(|()| lower_io())
        {
            tracing::debug!(%error, "the thread keeps its normal priority");
        }
    }
}

fn lower_cpu() -> io::Result<()> {
    let current = rustix::process::getpriority_process(None)?;
    // On Linux "the calling process" is the calling thread here.
    Ok(rustix::process::setpriority_process(None, current.max(NICE))?)
}

fn lower_io() -> io::Result<()> {
    // SAFETY: ioprio_set takes three integers and touches no memory; 0 is the calling thread.
    let outcome = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_LOW) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_calling_thread_gives_way() {
        let before = rustix::process::getpriority_process(None).unwrap();
        let lowered = std::thread::spawn(|| {
            Priority::Low.apply();
            rustix::process::getpriority_process(None).unwrap()
        });
        assert!(lowered.join().unwrap() >= NICE);
        assert_eq!(rustix::process::getpriority_process(None).unwrap(), before);
    }
}
