//! What the rest of the program holds of a run: cancel, pulse, limits, progress; and the place
//! where the first error of all its threads is kept.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::EngineError;
use crate::limits::STALL_AFTER;
use crate::pacing::{Pace, Pacing};

/// Counters of a run, each raised when the work is complete, never when it is begun. In bytes.
#[derive(Debug, Default)]
pub struct Progress {
    /// Read from the source, or read back from the target.
    pub read_bytes: AtomicU64,
    /// Handed to the repository in order (zero ranges included), or written to the target; reading
    /// back and dry runs count in `read_bytes` only.
    pub done_bytes: AtomicU64,
    /// Of `done_bytes`, what was zero.
    pub zero_bytes: AtomicU64,
    /// Of a restore, what needs neither writing (the target is blank there, and shall be) nor
    /// reading back (it says that it is a hole).
    pub skipped_bytes: AtomicU64,
}

/// The handles by which a run is watched and steered while it goes on; clones share them.
#[derive(Debug, Clone)]
pub struct Control {
    /// Set to end the run with [`EngineError::Cancelled`]; seen within 200 ms.
    pub cancel: Arc<AtomicBool>,
    /// Raised by each data thread whenever it wakes, at least every 200 ms. A watchdog that sees
    /// it stand still knows that replies may lie unread.
    pub pulse: Arc<AtomicU64>,
    /// How fast data may be asked for; other runs may share it.
    pub pacing: Arc<Pacing>,
    /// How far the run is.
    pub progress: Arc<Progress>,
    /// A lane that completes nothing for so long has failed.
    pub stall_after: Duration,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            cancel: Arc::default(),
            pulse: Arc::default(),
            pacing: Pacing::new(Pace::FREE),
            progress: Arc::default(),
            stall_after: STALL_AFTER,
        }
    }
}

/// The end of a run: the first error of any thread, and the sign for all others to stop.
pub(crate) struct Halt {
    pub(crate) control: Control,
    stop: AtomicBool,
    first: Mutex<Option<EngineError>>,
}

impl Halt {
    pub(crate) fn new(control: Control) -> Self {
        Self { control, stop: AtomicBool::new(false), first: Mutex::new(None) }
    }

    /// Keeps `error` if it is the first, and stops everyone.
    pub(crate) fn fail(&self, error: EngineError) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(error);
        }
        self.stop.store(true, Relaxed);
    }

    /// Whether to stop; turns a cancellation into the run's error.
    pub(crate) fn stopped(&self) -> bool {
        if self.stop.load(Relaxed) {
            return true;
        }
        if self.control.cancel.load(Relaxed) {
            self.fail(EngineError::Cancelled);
            return true;
        }
        false
    }

    /// Says that a data thread is alive, and whether it shall stop.
    pub(crate) fn pulse(&self) -> bool {
        self.control.pulse.fetch_add(1, Relaxed);
        self.stopped()
    }

    /// Keeps the error of `outcome`, if it is one.
    pub(crate) fn note<T>(&self, outcome: Result<T, EngineError>) -> Option<T> {
        outcome.map_err(|error| self.fail(error)).ok()
    }

    /// The first error, if there was any.
    pub(crate) fn outcome(&self) -> Result<(), EngineError> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        match first.take() {
            Some(error) => Err(error),
            None if self.stop.load(Relaxed) => Err(EngineError::Cancelled),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_kept() {
        let halt = Halt::new(Control::default());
        assert!(!halt.stopped());
        halt.fail(EngineError::Lanes("first".into()));
        halt.control.cancel.store(true, Relaxed);
        assert!(halt.pulse());
        assert_eq!(halt.control.pulse.load(Relaxed), 1);
        assert!(matches!(halt.outcome(), Err(EngineError::Lanes(_))));
    }
}
