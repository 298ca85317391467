//! What a store cost: requests and bytes, counted where they leave and arrive.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Requests and bytes between this process and a store, since the store was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Requests that store something (PUT, POST).
    pub writes: u64,
    /// Requests that read content (GET, HEAD).
    pub reads: u64,
    /// Requests that list.
    pub lists: u64,
    /// Requests that delete.
    pub deletes: u64,
    /// Those of all these that repeated one that had failed.
    pub retries: u64,
    /// Bytes of content sent.
    pub sent_bytes: u64,
    /// Bytes of content received.
    pub received_bytes: u64,
}

impl Traffic {
    /// All requests.
    #[must_use]
    pub const fn requests(&self) -> u64 {
        self.writes + self.reads + self.lists + self.deletes
    }
}

/// What a request does, as stores charge for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Charge {
    Write,
    Read,
    List,
    Delete,
}

/// Counts as requests are made, from any thread.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    writes: AtomicU64,
    reads: AtomicU64,
    lists: AtomicU64,
    deletes: AtomicU64,
    retries: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

impl Meter {
    pub(crate) fn request(&self, charge: Charge, sent_bytes: u64) {
        let counter = match charge {
            Charge::Write => &self.writes,
            Charge::Read => &self.reads,
            Charge::List => &self.lists,
            Charge::Delete => &self.deletes,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.sent_bytes.fetch_add(sent_bytes, Ordering::Relaxed);
    }

    pub(crate) fn retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Traffic {
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            writes: now(&self.writes),
            reads: now(&self.reads),
            lists: now(&self.lists),
            deletes: now(&self.deletes),
            retries: now(&self.retries),
            sent_bytes: now(&self.sent_bytes),
            received_bytes: now(&self.received_bytes),
        }
    }
}
