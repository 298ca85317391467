//! What the rest of the program holds of a run: cancel, pulse, limits, progress; and the place
//! where the first error of all its threads is kept.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::EngineError;
use crate::limits::{STALL_AFTER, WAKE};

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
}

/// The handles by which a run is watched and steered while it goes on; clones share them.
#[derive(Debug, Clone)]
pub struct Control {
    /// Set to end the run with [`EngineError::Cancelled`]; seen within 200 ms.
    pub cancel: Arc<AtomicBool>,
    /// Raised by each data thread whenever it wakes, at least every 200 ms. A watchdog that sees
    /// it stand still knows that replies may lie unread.
    pub pulse: Arc<AtomicU64>,
    /// Bytes per second that may be requested; 0 is no limit. May change at any time.
    pub rate: Arc<AtomicU64>,
    /// Requests in flight on each lane; at least 1 is kept. May change at any time.
    pub depth: Arc<AtomicU32>,
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
            rate: Arc::default(),
            depth: Arc::new(AtomicU32::new(crate::limits::LANE_DEPTH)),
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

/// Spreads requests over time so that they keep to a rate. Pure: time is an argument.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    due: Option<Instant>,
}

impl Pacer {
    /// What may be sent at once after a pause.
    const BURST: Duration = Duration::from_millis(100);

    /// How long to wait at `now` before `len` bytes may be requested at `rate` bytes per second,
    /// and accounts for them.
    pub(crate) fn wait(&mut self, now: Instant, len: u64, rate: u64) -> Duration {
        if rate == 0 {
            self.due = None;
            return Duration::ZERO;
        }
        let earliest = now.checked_sub(Self::BURST).unwrap_or(now);
        let due = self.due.map_or(earliest, |due| due.max(earliest));
        self.due = Some(due + Duration::from_secs_f64(len as f64 / rate as f64));
        due.saturating_duration_since(now)
    }
}

/// Sleeps as long as the rate of `halt`'s control asks for before `len` bytes are requested.
pub(crate) fn pace(pacer: &mut Pacer, halt: &Halt, len: u64) {
    let until = Instant::now() + pacer.wait(Instant::now(), len, halt.control.rate.load(Relaxed));
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || halt.stopped() {
            return;
        }
        std::thread::sleep(left.min(WAKE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pacer_keeps_the_rate_and_allows_a_short_burst() {
        let (mut pacer, start) = (Pacer::default(), Instant::now());
        let mut now = start;
        for _ in 0..100 {
            now += pacer.wait(now, 1 << 20, 10 << 20);
        }
        let seconds = (now - start).as_secs_f64();
        assert!((9.7..10.0).contains(&seconds), "100 MiB at 10 MiB/s took {seconds} s");
        now += Duration::from_secs(60);
        assert_eq!(pacer.wait(now, 1 << 20, 10 << 20), Duration::ZERO);
        assert_eq!(pacer.wait(now, 1 << 20, 10 << 20), Duration::ZERO);
        assert!(pacer.wait(now, 1 << 20, 10 << 20) > Duration::from_millis(90));
        assert_eq!(pacer.wait(now, 1 << 30, 0), Duration::ZERO, "no limit");
    }

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
