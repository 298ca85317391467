//! The register of domains that libvirt has told us of: a file each, `STATE/domains/UUID.json`.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::state::State;

/// Nothing that we write is longer.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// What a domain does, as far as libvirt told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainState {
    Starting,
    Running,
    /// It comes from another host, or from a saved state.
    Arriving,
    Stopped,
    Released,
}

/// What is known of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    pub name: String,
    pub uuid: String,
    pub state: DomainState,
    pub last_event: String,
    pub last_event_at: Timestamp,
    pub first_seen: Timestamp,
}

fn path(state: &State, uuid: &str) -> PathBuf {
    state.root().join("domains").join(format!("{uuid}.json"))
}

/// What is known of one domain. A record that cannot be read is none.
pub fn get(state: &State, uuid: &str) -> Option<Known> {
    read(&path(state, uuid))
}

fn read(path: &std::path::Path) -> Option<Known> {
    if std::fs::metadata(path).ok()?.len() > RECORD_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Replaces a record, whole or not at all. It is not waited for until it is on disk: a power cut
/// ends the domain, too, and its next start tells of it again.
pub fn put(state: &State, known: &Known) -> std::io::Result<()> {
    let path = path(state, &known.uuid);
    crate::state::make_private_dir(&state.root().join("domains"))?;
    let new = path.with_extension(format!("{}.new", std::process::id()));
    std::fs::write(&new, serde_json::to_vec(known)?)?;
    std::fs::rename(new, path)
}

/// All domains, by name.
pub fn all(state: &State) -> Vec<Known> {
    let Ok(entries) = std::fs::read_dir(state.root().join("domains")) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let records = paths.filter(|path| path.extension().is_some_and(|e| e == "json"));
    let mut all: Vec<Known> = records.filter_map(|path| read(&path)).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_damaged_ones_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        assert!(all(&state).is_empty());
        let known = Known {
            name: "a".into(),
            uuid: "u-1".into(),
            state: DomainState::Running,
            last_event: "started".into(),
            last_event_at: Timestamp::UNIX_EPOCH,
            first_seen: Timestamp::UNIX_EPOCH,
        };
        put(&state, &known).unwrap();
        std::fs::write(dir.path().join("domains/u-2.json"), "nonsense").unwrap();
        assert_eq!(get(&state, "u-1"), Some(known.clone()));
        assert_eq!(all(&state), [known]);
    }
}
