//! When the warden has to act: pure, time is an argument.

use std::time::{Duration, Instant};

use super::{JobWatch, Order};

/// A worker whose data threads show no life for so long may have replies unread: QEMU, and with it
/// the guest, would wait for it at its next drain.
pub const STALL: Duration = Duration::from_secs(2);

/// What has to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Duty {
    Nothing,
    /// The guest was frozen for as long as it may be.
    Thaw,
    /// The job ends, for this reason.
    EndJob(String),
}

/// How much scratch is used and how much room is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub used_bytes: u64,
    pub free_bytes: u64,
}

/// What has been begun and not ended.
#[derive(Debug, Default)]
pub struct Watch {
    thaw_at: Option<Instant>,
    job: Option<JobWatch>,
    pulse: Option<(u64, Instant)>,
}

impl Watch {
    /// Takes in what the worker said.
    pub fn told(&mut self, order: Order, now: Instant) {
        match order {
            Order::Domain { .. } => {}
            Order::Freezing { limit_ms } => {
                self.thaw_at = Some(now + Duration::from_millis(limit_ms));
            }
            Order::Thawed => self.thaw_at = None,
            Order::Job(job) => {
                self.job = Some(job);
                self.pulse = None;
            }
            Order::Ended => self.job = None,
            Order::Pulse(counter) => {
                if self.pulse.is_none_or(|(last, _)| last != counter) {
                    self.pulse = Some((counter, now));
                }
            }
        }
    }

    /// Whether a guest may be frozen.
    pub fn frozen(&self) -> bool {
        self.thaw_at.is_some()
    }

    /// The job that may be there.
    pub fn job(&self) -> Option<&JobWatch> {
        self.job.as_ref()
    }

    /// The guest is thawed, or somebody else sees to it.
    pub fn forget_freeze(&mut self) {
        self.thaw_at = None;
    }

    /// The job is gone.
    pub fn forget_job(&mut self) -> Option<JobWatch> {
        self.job.take()
    }

    /// What has to be done. `room` is that of the job's scratch, where it could be seen.
    pub fn duty(&self, room: Option<Room>, now: Instant) -> Duty {
        if self.thaw_at.is_some_and(|at| now >= at) {
            return Duty::Thaw;
        }
        let Some(job) = &self.job else { return Duty::Nothing };
        // Before the first pulse nothing is connected yet.
        if let Some((_, since)) = self.pulse
            && now.saturating_duration_since(since) >= STALL
        {
            let why = format!("icecore showed no sign of life for {STALL:?}");
            return Duty::EndJob(why);
        }
        match room {
            Some(room) if room.used_bytes >= job.limit_bytes => Duty::EndJob(format!(
                "the guest overwrote so much that the scratch took {} bytes, the most it may take \
                 before there would be danger for the guest",
                room.used_bytes
            )),
            Some(room) if room.free_bytes < job.reserve_bytes => Duty::EndJob(format!(
                "the scratch's file system has only {} bytes free: the guest's writes would fail \
                 when it is full",
                room.free_bytes
            )),
            _ => Duty::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> JobWatch {
        JobWatch {
            socket: "/s/nbd.sock".into(),
            dir: "/s".into(),
            scratch: Vec::new(),
            limit_bytes: 100,
            reserve_bytes: 10,
        }
    }

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_freeze_has_an_end() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        watch.told(Order::Freezing { limit_ms: 500 }, start);
        assert_eq!(watch.duty(None, at(start, 499)), Duty::Nothing);
        assert_eq!(watch.duty(None, at(start, 500)), Duty::Thaw);
        watch.told(Order::Thawed, at(start, 500));
        assert_eq!(watch.duty(None, at(start, 9999)), Duty::Nothing);
        assert!(!watch.frozen());
    }

    #[test]
    fn a_worker_without_a_pulse_loses_its_job() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        watch.told(Order::Job(job()), start);
        assert_eq!(watch.duty(None, at(start, 60_000)), Duty::Nothing, "not connected yet");
        watch.told(Order::Pulse(1), at(start, 60_000));
        watch.told(Order::Pulse(1), at(start, 61_999));
        assert_eq!(watch.duty(None, at(start, 61_999)), Duty::Nothing);
        assert!(matches!(watch.duty(None, at(start, 62_000)), Duty::EndJob(_)));
        watch.told(Order::Pulse(2), at(start, 62_000));
        assert_eq!(watch.duty(None, at(start, 62_001)), Duty::Nothing);
    }

    #[test]
    fn scratch_ends_the_job_before_it_is_full() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        watch.told(Order::Job(job()), start);
        let duty =
            |used_bytes, free_bytes| watch.duty(Some(Room { used_bytes, free_bytes }), start);
        assert_eq!(duty(99, 10), Duty::Nothing);
        assert!(matches!(duty(100, 10), Duty::EndJob(_)));
        assert!(matches!(duty(0, 9), Duty::EndJob(_)));
    }
}
