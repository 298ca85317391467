//! Intents: each step that changes QEMU, the repository or a target is on record before it is taken.
//!
//! What is intended with a running QEMU need not outlive a power cut: QEMU does not either. It is
//! written, so that it outlives us. What is intended with an image is synced, too.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::durable::sync_parent;
use super::{JobId, State};
use crate::failure::{Failure, Outcome};

/// An intent log past this size is not one of ours.
const INTENTS_BYTES_MAX: u64 = 16 << 20;

/// The append-only log of one run.
#[derive(Debug)]
pub struct IntentLog {
    file: File,
    path: PathBuf,
    /// The name of the file is durable.
    named: bool,
}

impl IntentLog {
    /// Starts the log of `job`.
    pub fn create(state: &State, job: &JobId) -> Outcome<Self> {
        let path = state.dir("jobs")?.join(format!("{job}.intents"));
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let file = file.map_err(|e| failure("start", &path, e))?;
        Ok(Self { file, path, named: false })
    }

    /// Appends an intent; it outlives this process when this returns.
    pub fn record<T: Serialize>(&mut self, intent: &T) -> Outcome<()> {
        let mut line =
            serde_json::to_vec(intent).map_err(|e| failure("write", &self.path, e.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|e| failure("write", &self.path, e))
    }

    /// Appends an intent; it and all before it outlive a power cut when this returns.
    pub fn record_durably<T: Serialize>(&mut self, intent: &T) -> Outcome<()> {
        self.record(intent)?;
        let sync = || {
            self.file.sync_data()?;
            if self.named { Ok(()) } else { sync_parent(&self.path) }
        };
        sync().map_err(|e| failure("write", &self.path, e))?;
        self.named = true;
        Ok(())
    }
}

/// The intents of `job`, or `None` where it left no log. A torn last line is an intent whose step
/// was never taken; damage anywhere else is an error.
pub fn read<T: DeserializeOwned>(state: &State, job: &JobId) -> Outcome<Option<Vec<T>>> {
    let path = state.root().join("jobs").join(format!("{job}.intents"));
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(meta) if meta.len() > INTENTS_BYTES_MAX => {
            return Err(failure("read", &path, std::io::Error::other("the log is far too long")));
        }
        _ => {}
    }
    let bytes = std::fs::read(&path).map_err(|e| failure("read", &path, e))?;
    parse(&bytes).map(Some).map_err(|e| {
        failure("read", &path, e.into())
            .next("look at the VM with 'icecore doctor', then remove the file by hand")
    })
}

/// Removes the log of a run that recovery has dealt with.
pub fn forget(state: &State, job: &JobId) -> Outcome<()> {
    let path = state.root().join("jobs").join(format!("{job}.intents"));
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failure("remove", &path, e)),
        _ => Ok(()),
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<Vec<T>, serde_json::Error> {
    let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let lines = bytes[..whole].split(|b| *b == b'\n').filter(|line| !line.is_empty());
    lines.map(serde_json::from_slice).collect()
}

fn failure(what: &str, path: &Path, e: std::io::Error) -> Failure {
    Failure::failed(format!("{what} the intent log {}", path.display()), e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_last_line_is_no_intent_and_damage_before_it_is_an_error() {
        assert_eq!(parse::<u32>(b"1\n2\n3").unwrap(), vec![1, 2]);
        assert!(parse::<u32>(b"1\nx\n3\n").is_err());
        assert_eq!(parse::<u32>(b"").unwrap(), Vec::<u32>::new());
    }

    #[test]
    fn intents_come_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        let job = JobId::new(jiff::Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(read::<u32>(&state, &job).unwrap(), None);
        let mut log = IntentLog::create(&state, &job).unwrap();
        log.record(&7).unwrap();
        log.record_durably(&9).unwrap();
        assert_eq!(read::<u32>(&state, &job).unwrap(), Some(vec![7, 9]));
        forget(&state, &job).unwrap();
        assert_eq!(read::<u32>(&state, &job).unwrap(), None);
    }
}
