//! When a worker counts as dead. Pure: time is an argument.

use std::time::Duration;

/// While QEMU serves or pushes data of ours, an unread reply makes the guest wait: so the
/// worker's counter has to move this often.
pub const STALL_WHILE_LIVE: Duration = Duration::from_secs(2);

/// At other times of a run nothing waits for the worker, but it may be stopped for good.
pub const STALL_WHILE_QUIET: Duration = Duration::from_secs(60);

/// What depends on the worker now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Live {
    /// Nothing of ours is in QEMU.
    Nothing,
    /// Nodes are, and nothing moves through them.
    Graph,
    /// Exports or push jobs are.
    Data,
}

/// Watches the worker's counter.
#[derive(Debug, Clone)]
pub struct Watch {
    counter: u64,
    moved_at: Duration,
}

impl Watch {
    /// Begins at `now`, a time since any fixed moment.
    pub fn new(now: Duration) -> Self {
        Self { counter: 0, moved_at: now }
    }

    /// The worker said this.
    pub fn pulse(&mut self, counter: u64, now: Duration) {
        if counter != self.counter {
            self.counter = counter;
            self.moved_at = now;
        }
    }

    /// The worker asked for something, or was answered: its time begins anew.
    pub fn request(&mut self, now: Duration) {
        self.moved_at = now;
    }

    /// The worker is taken for dead.
    pub fn stalled(&self, live: Live, now: Duration) -> bool {
        let allowed = match live {
            Live::Nothing => return false,
            Live::Graph => STALL_WHILE_QUIET,
            Live::Data => STALL_WHILE_LIVE,
        };
        now.saturating_sub(self.moved_at) > allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_stands_still_is_a_stall() {
        let at = Duration::from_millis;
        let mut watch = Watch::new(at(0));
        watch.pulse(1, at(1000));
        watch.pulse(1, at(2500));
        assert!(!watch.stalled(Live::Data, at(3000)));
        assert!(watch.stalled(Live::Data, at(3001)));
        assert!(!watch.stalled(Live::Graph, at(3001)));
        assert!(!watch.stalled(Live::Nothing, at(1 << 40)));
        watch.pulse(2, at(3001));
        assert!(!watch.stalled(Live::Data, at(5001)));
        watch.request(at(6000));
        assert!(!watch.stalled(Live::Data, at(8000)));
    }
}
