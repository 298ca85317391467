//! Whether the writers that gc waits for are alive, ended or silent. Pure: gc hands in what it saw
//! and how long it has been watching by its own monotonic clock.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::WriterId;

/// The writers that were announced at one moment, until each has ended or fallen silent.
#[derive(Debug, Clone)]
pub struct Watch {
    patience: Duration,
    writers: BTreeMap<WriterId, Seen>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    beat: Option<u64>,
    changed_at: Duration,
}

/// What is known after an observation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Watched {
    /// Their counters moved within the patience, or it is too early to tell.
    pub alive: Vec<WriterId>,
    /// Their counters stood still for the whole patience: to be revoked.
    pub silent: Vec<WriterId>,
}

impl Watch {
    /// Begins to watch these writers; `now` is 0 here. The patience must be several heartbeats.
    pub fn new(writers: impl IntoIterator<Item = WriterId>, patience: Duration) -> Self {
        let seen = Seen { beat: None, changed_at: Duration::ZERO };
        Self { patience, writers: writers.into_iter().map(|writer| (writer, seen)).collect() }
    }

    /// Takes in who is announced and how far the counters are, `now` after the beginning.
    pub fn observe(
        &mut self,
        now: Duration,
        announced: &[WriterId],
        beats: &[(WriterId, u64)],
    ) -> Watched {
        let announced: std::collections::BTreeSet<_> = announced.iter().collect();
        self.writers.retain(|writer, _| announced.contains(writer));
        for (writer, beat) in beats {
            if let Some(seen) = self.writers.get_mut(writer)
                && seen.beat < Some(*beat)
            {
                *seen = Seen { beat: Some(*beat), changed_at: now };
            }
        }
        let mut watched = Watched::default();
        for (writer, seen) in &self.writers {
            let silent = now.saturating_sub(seen.changed_at) >= self.patience;
            let list = if silent { &mut watched.silent } else { &mut watched.alive };
            list.push(writer.clone());
        }
        watched
    }

    /// Stops watching a writer that was revoked.
    pub fn forget(&mut self, writer: &WriterId) {
        self.writers.remove(writer);
    }

    /// True when all have ended or were revoked.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.writers.is_empty()
    }
}
