//! How fast a run may ask: one object for all its lanes and disks.
//!
//! It holds requests back before they are sent and never touches a reply: an unread reply makes the
//! guest wait, a request that was not sent harms nobody. Both the operator's limit and a governor
//! set it, at any time; the stricter one counts.

use std::sync::atomic::{AtomicU32, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::WAKE;

/// How much may be asked of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Bytes per second; none is no limit.
    pub bytes_per_second: Option<u64>,
    /// Requests under way at one time, over all lanes and disks; 0 is a pause.
    pub in_flight: u32,
    /// Largest request, in bytes; a block is asked for in any case. A request of the guest waits
    /// for the one of ours in front of it.
    pub request_bytes: u32,
}

impl Pace {
    /// As fast as it goes.
    pub const FREE: Self =
        Self { bytes_per_second: None, in_flight: u32::MAX, request_bytes: u32::MAX };
    /// Nothing more is asked.
    pub const PAUSE: Self = Self { in_flight: 0, ..Self::FREE };

    /// The stricter of the two in each respect.
    fn and(self, other: Self) -> Self {
        let rates = [self.bytes_per_second, other.bytes_per_second];
        Self {
            bytes_per_second: rates.into_iter().flatten().min(),
            in_flight: self.in_flight.min(other.in_flight),
            request_bytes: self.request_bytes.min(other.request_bytes),
        }
    }
}

/// Holds requests back so that a run keeps to a [`Pace`]; share it among all disks of a run.
#[derive(Debug)]
pub struct Pacing {
    state: Mutex<State>,
    /// Beside the lock: whoever reads replies gives tickets back, and must not wait for a thread of
    /// low priority that holds it.
    in_flight: AtomicU32,
    /// Rung when a request may have become possible.
    room: Condvar,
}

/// Longest wait for the end of a request: its ring is not heard by those who do not wait yet.
const ROOM_WAIT: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct State {
    limit: Pace,
    governed: Pace,
    meter: Meter,
    asked: u64,
    closed: bool,
}

impl Pacing {
    /// Keeps to the operator's `limit`, and to what [`govern`](Self::govern) asks for later.
    pub fn new(limit: Pace) -> Arc<Self> {
        let (governed, meter) = (Pace::FREE, Meter::default());
        let state = Mutex::new(State { limit, governed, meter, asked: 0, closed: false });
        Arc::new(Self { state, in_flight: AtomicU32::new(0), room: Condvar::new() })
    }

    /// Sets what a governor allows from now on. What is under way goes on.
    pub fn govern(&self, pace: Pace) {
        self.locked().governed = pace;
        self.room.notify_all();
    }

    /// Bytes asked for so far.
    pub fn asked_bytes(&self) -> u64 {
        self.locked().asked
    }

    /// Largest request that may be asked for now, in bytes.
    pub(crate) fn request_bytes(&self) -> u32 {
        let state = self.locked();
        state.limit.and(state.governed).request_bytes
    }

    /// Nothing is asked for any more: what would ask ends with
    /// [`EngineError::Cancelled`](crate::EngineError::Cancelled).
    pub fn close(&self) {
        self.locked().closed = true;
        self.room.notify_all();
    }

    /// Waits until `bytes` more may be asked for and counts them as under way until the ticket is
    /// dropped; none once it is closed, or if `stopped` said so first.
    pub(crate) fn enter(
        self: &Arc<Self>,
        bytes: u64,
        mut stopped: impl FnMut() -> bool,
    ) -> Option<Ticket> {
        let mut state = self.locked();
        while !state.closed && !stopped() {
            let now = Instant::now();
            let wait = state.wait(now, self.in_flight.load(Acquire));
            if wait.is_zero() {
                state.meter.take(bytes);
                self.in_flight.fetch_add(1, AcqRel);
                state.asked += bytes;
                return Some(Ticket(Arc::clone(self)));
            }
            let woken = self.room.wait_timeout(state, wait.min(WAKE));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// How long to wait at `now` at least before something may be asked for.
    fn wait(&mut self, now: Instant, in_flight: u32) -> Duration {
        let pace = self.limit.and(self.governed);
        let due = self.meter.wait(now, pace.bytes_per_second);
        match pace.in_flight {
            0 => WAKE,
            most if in_flight < most => due,
            _ => due.max(ROOM_WAIT),
        }
    }
}

/// One request under way.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<Pacing>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, AcqRel);
        self.0.room.notify_one();
    }
}

/// Spreads bytes over time so that they keep to a rate which may change. Pure: time is an argument.
#[derive(Debug, Default)]
struct Meter {
    /// Bytes that may be taken; below 0 what was taken in advance. They grow with time.
    credit: f64,
    seen: Option<Instant>,
}

impl Meter {
    /// What may be taken at once after a pause.
    const BURST: Duration = Duration::from_millis(100);

    /// How long to wait at `now` until more may be taken at `rate` bytes per second.
    fn wait(&mut self, now: Instant, rate: Option<u64>) -> Duration {
        let Some(rate) = rate.map(|rate| rate.max(1) as f64) else {
            *self = Self::default();
            return Duration::ZERO;
        };
        let burst = rate * Self::BURST.as_secs_f64();
        let grown = match self.seen {
            Some(seen) => rate * now.saturating_duration_since(seen).as_secs_f64(),
            None => burst,
        };
        self.seen = Some(now);
        self.credit = (self.credit + grown).min(burst);
        // Below a microsecond it is rounding.
        match Duration::try_from_secs_f64(-self.credit / rate) {
            Ok(wait) if wait > Duration::from_micros(1) => wait,
            Ok(_) | Err(_) => Duration::ZERO,
        }
    }

    /// Accounts for what is asked for.
    fn take(&mut self, bytes: u64) {
        self.credit -= bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Takes `count` MiB as soon as each may be taken.
    fn take_all(meter: &mut Meter, mut now: Instant, count: u32, rate: u64) -> Instant {
        for _ in 0..count {
            loop {
                let wait = meter.wait(now, Some(rate));
                now += wait;
                if wait.is_zero() {
                    break;
                }
            }
            meter.take(MIB);
        }
        now
    }

    #[test]
    fn a_meter_keeps_the_rate_and_allows_a_short_burst() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let mut now = take_all(&mut meter, start, 100, 10 * MIB);
        let seconds = (now - start).as_secs_f64();
        assert!((9.7..10.0).contains(&seconds), "100 MiB at 10 MiB/s took {seconds} s");
        now += Duration::from_secs(60);
        let burst = take_all(&mut meter, now, 2, 10 * MIB) - now;
        assert_eq!(burst, Duration::ZERO, "two begin within 100 ms");
        assert!(meter.wait(now, Some(10 * MIB)) > Duration::from_millis(90));
        assert_eq!(meter.wait(now, None), Duration::ZERO, "no limit");
    }

    #[test]
    fn a_debt_made_at_one_rate_is_paid_at_the_next() {
        let (mut meter, now) = (Meter::default(), Instant::now());
        meter.wait(now, Some(MIB));
        meter.take(60 * MIB);
        assert!(meter.wait(now, Some(MIB)) > Duration::from_secs(59));
        assert!(meter.wait(now, Some(600 * MIB)) < Duration::from_millis(110));
    }

    #[test]
    fn the_stricter_of_operator_and_governor_counts() {
        let pace = |bytes, in_flight| Pace { bytes_per_second: bytes, in_flight, ..Pace::FREE };
        assert_eq!(pace(Some(5), 3).and(pace(None, 9)), pace(Some(5), 3));
        assert_eq!(pace(Some(5), 3).and(pace(Some(4), u32::MAX)), pace(Some(4), 3));
        assert_eq!(Pace::FREE.and(Pace::PAUSE), Pace::PAUSE);
    }

    #[test]
    fn a_pause_holds_everyone_until_it_ends_or_the_run_does() {
        let pacing = Pacing::new(Pace::FREE);
        pacing.govern(Pace::PAUSE);
        let polls = AtomicU32::new(0);
        assert!(pacing.enter(1, || polls.fetch_add(1, SeqCst) == 2).is_none(), "the run ended");
        std::thread::scope(|scope| {
            let held = scope.spawn(|| pacing.enter(1, || false));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!held.is_finished());
            pacing.govern(Pace::FREE);
            assert!(held.join().unwrap().is_some());
        });
        pacing.close();
        assert!(pacing.enter(1, || false).is_none(), "closed");
        assert_eq!(pacing.asked_bytes(), 1);
    }

    #[test]
    fn no_more_than_allowed_are_under_way_over_all_threads() {
        let pacing = Pacing::new(Pace { in_flight: 3, ..Pace::FREE });
        let (now, most) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let ticket = pacing.enter(MIB, || false);
                        most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(1, SeqCst);
                        drop(ticket);
                    }
                });
            }
        });
        assert!((1..=3).contains(&most.load(SeqCst)), "{most:?}");
    }
}
