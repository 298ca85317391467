//! A byte budget that is never exceeded: the semaphore between stages and between pipelines.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::limits::WAKE;

/// A number of bytes that stages reserve before they hold memory, and give back afterwards.
///
/// Reserving and releasing take no lock unless someone waits.
#[derive(Debug)]
pub struct Budget {
    total: u64,
    used: AtomicU64,
    peak: AtomicU64,
    waiting: AtomicU32,
    lock: Mutex<()>,
    freed: Condvar,
}

/// Why a reservation was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// More was asked for than there is altogether; waiting would never end.
    #[error("{asked} bytes of memory were asked for but the limit is {total}; raise --memory")]
    TooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes there are.
        total: u64,
    },
    /// The caller was cancelled while it waited.
    #[error("cancelled while waiting for memory")]
    Cancelled,
}

impl Budget {
    /// A budget of `total` bytes.
    pub fn new(total: u64) -> Arc<Self> {
        Arc::new(Self {
            total,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            lock: Mutex::new(()),
            freed: Condvar::new(),
        })
    }

    /// All bytes, reserved or not.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes reserved now.
    pub fn used(&self) -> u64 {
        self.used.load(SeqCst)
    }

    /// Most bytes that were ever reserved at once.
    pub fn peak(&self) -> u64 {
        self.peak.load(SeqCst)
    }

    /// Reserves `bytes` if they are free now.
    pub fn try_reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.total);
        let before = self.used.fetch_update(SeqCst, SeqCst, fits).ok()?;
        self.peak.fetch_max(before + bytes, SeqCst);
        Some(Reservation { budget: Arc::clone(self), bytes })
    }

    /// Reserves `bytes`, waiting until they are free or `cancelled` says to stop (asked at least
    /// every 200 ms).
    pub fn reserve(
        self: &Arc<Self>,
        bytes: u64,
        cancelled: impl Fn() -> bool,
    ) -> Result<Reservation, BudgetError> {
        if bytes > self.total {
            return Err(BudgetError::TooLarge { asked: bytes, total: self.total });
        }
        if let Some(reservation) = self.try_reserve(bytes) {
            return Ok(reservation);
        }
        self.waiting.fetch_add(1, SeqCst);
        let outcome = self.wait_for(bytes, cancelled);
        self.waiting.fetch_sub(1, SeqCst);
        outcome
    }

    fn wait_for(
        self: &Arc<Self>,
        bytes: u64,
        cancelled: impl Fn() -> bool,
    ) -> Result<Reservation, BudgetError> {
        let mut guard = self.locked();
        loop {
            if cancelled() {
                return Err(BudgetError::Cancelled);
            }
            if let Some(reservation) = self.try_reserve(bytes) {
                return Ok(reservation);
            }
            let waited = self.freed.wait_timeout(guard, WAKE);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, SeqCst);
        if self.waiting.load(SeqCst) > 0 {
            // A waiter that has just failed to reserve holds the lock until it sleeps: taking it
            // here makes sure that it is not missed.
            drop(self.locked());
            self.freed.notify_all();
        }
    }

    fn locked(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes taken from a [`Budget`]; given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Reservation {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Keeps at most `bytes` and gives the rest back.
    pub fn shrink_to(&mut self, bytes: u64) {
        if let Some(surplus) = self.bytes.checked_sub(bytes) {
            self.bytes = bytes;
            self.budget.release(surplus);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    #[test]
    fn holds_no_more_than_its_total() {
        let budget = Budget::new(100);
        let mut first = budget.try_reserve(60).unwrap();
        assert!(budget.try_reserve(41).is_none());
        let second = budget.try_reserve(40).unwrap();
        first.shrink_to(10);
        assert_eq!(budget.used(), 50);
        first.shrink_to(90);
        assert_eq!(first.bytes(), 10, "shrinking never grows");
        drop((first, second));
        assert_eq!((budget.used(), budget.peak()), (0, 100));
    }

    #[test]
    fn refuses_what_can_never_fit() {
        let error = Budget::new(10).reserve(11, || false).unwrap_err();
        assert_eq!(error, BudgetError::TooLarge { asked: 11, total: 10 });
        assert!(Budget::new(10).try_reserve(u64::MAX).is_none(), "no overflow");
    }

    #[test]
    fn waiting_ends_by_cancellation() {
        let budget = Budget::new(10);
        let _all = budget.try_reserve(10).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| budget.reserve(1, || stop.load(SeqCst)));
            stop.store(true, SeqCst);
            assert_eq!(waiter.join().unwrap().unwrap_err(), BudgetError::Cancelled);
        });
    }

    #[test]
    fn a_release_wakes_the_waiter_and_the_total_holds_under_contention() {
        let budget = Budget::new(64);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for seed in 1..=4u64 {
                let budget = &budget;
                scope.spawn(move || {
                    for round in 0..2000u64 {
                        let bytes = 1 + (seed * 7919 + round * 31) % 48;
                        let held = budget.reserve(bytes, || false).unwrap();
                        assert!(budget.used() <= 64);
                        drop(held);
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
        assert!(budget.peak() <= 64);
        assert!(started.elapsed() < Duration::from_secs(20), "waiters sleep through releases");
    }
}
