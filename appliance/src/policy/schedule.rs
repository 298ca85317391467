//! Which runs are due. Pure: the daemon gives the time and what was dealt with before.
//!
//! What is remembered of a VM in a schedule is the last moment that was dealt with, not when its job
//! ran. So a clock that jumps forwards yields at most one run, whatever was missed, and one that
//! jumps backwards yields no moment twice. A mark that lies further ahead than any correction of a
//! clock is a mistake of an earlier clock, and is set back: a year without a backup would be worse
//! than one too many.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::calendar::Calendar;
use super::window::TimeRange;
use crate::config::{Config, Missed, ScheduleConfig, ScheduledLevel};

/// A run that begins so long after its moment is on time: a tick may wait for a busy host.
pub const GRACE: SignedDuration = SignedDuration::from_mins(5);
/// Clocks are set back by no more than a day of confusion and an hour of summer time.
pub const CLOCK_MARGIN: SignedDuration = SignedDuration::from_hours(25);
/// A window that does not open within a week does not open.
const OPENS_WITHIN_MINUTES: usize = 8 * 24 * 60;

/// The moments that were dealt with, by schedule and VM; kept by whoever calls [`tick`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Marks(pub BTreeMap<String, BTreeMap<String, Timestamp>>);

/// A run to begin now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DueRun {
    /// The schedule.
    pub schedule: String,
    /// The VM.
    pub vm: String,
    /// A configured repository.
    pub repository: String,
    /// How much is read.
    #[serde(skip)]
    pub level: ScheduledLevel,
    /// The moment of the schedule that it is for.
    pub moment: Timestamp,
}

/// A run that was not begun at its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MissedRun {
    /// The schedule.
    pub schedule: String,
    /// The VM.
    pub vm: String,
    /// The moment.
    pub moment: Timestamp,
    /// Whether it begins now.
    pub made_up: bool,
}

/// What a look at the clock came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tick {
    /// Runs to begin.
    pub runs: Vec<DueRun>,
    /// Runs that were not begun at their time.
    pub missed: Vec<MissedRun>,
    /// To be kept before the runs begin: what is kept is not begun again.
    pub marks: Marks,
}

/// Decides what is due for all schedules; `vms` are the VMs that are known now.
pub fn tick(config: &Config, vms: &[String], marks: &Marks, now: Timestamp) -> Tick {
    let mut tick = Tick::default();
    for (name, schedule) in &config.schedule {
        let Some(plan) = Plan::of(schedule) else { continue };
        let before = marks.0.get(name);
        // A VM that is not known now (its libvirt does not answer) is not new when it is back.
        let kept = tick.marks.0.entry(name.clone()).or_insert(before.cloned().unwrap_or_default());
        for vm in Config::vms_of(schedule, vms) {
            let previous = before.and_then(|marks| marks.get(vm)).copied();
            let (step, mark) = plan.step(offset(name, vm, schedule.jitter), previous, now);
            kept.insert(vm.to_owned(), mark);
            let (moment, runs, late) = match step {
                Step::Wait => continue,
                Step::Run { moment, late } => (moment, true, late),
                Step::Skip { moment } => (moment, false, true),
            };
            let (schedule_name, vm) = (name.clone(), vm.to_owned());
            if late {
                let (schedule, vm) = (schedule_name.clone(), vm.clone());
                tick.missed.push(MissedRun { schedule, vm, moment, made_up: runs });
            }
            if runs {
                let (repository, level) = (schedule.repository.to_string(), schedule.level);
                tick.runs.push(DueRun { schedule: schedule_name, vm, repository, level, moment });
            }
        }
    }
    tick
}

/// How long after a moment a VM has its turn: always the same, and spread over `jitter`.
pub fn offset(schedule: &str, vm: &str, jitter: Duration) -> SignedDuration {
    let seconds = jitter.as_secs();
    if seconds == 0 {
        return SignedDuration::ZERO;
    }
    let hash = blake3::hash(format!("{schedule}\0{vm}").as_bytes());
    let (number, _) = hash.as_bytes().split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
    let spread = u64::from_le_bytes(*number) % seconds;
    SignedDuration::from_secs(i64::try_from(spread).unwrap_or(0))
}

/// What one schedule asks for, without its VMs.
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    moments: &'a Calendar,
    zone: TimeZone,
    window: &'a [TimeRange],
    blackout: &'a [TimeRange],
    missed: Missed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Wait,
    Run { moment: Timestamp, late: bool },
    Skip { moment: Timestamp },
}

impl<'a> Plan<'a> {
    /// The plan of a schedule; none where it names no moments (such a configuration is refused).
    pub fn of(schedule: &'a ScheduleConfig) -> Option<Self> {
        Some(Self {
            moments: schedule.moments()?,
            zone: schedule.zone(),
            window: &schedule.window,
            blackout: &schedule.blackout,
            missed: schedule.missed,
        })
    }

    /// What to do now for one VM, and the mark to keep.
    fn step(
        &self,
        offset: SignedDuration,
        previous: Option<Timestamp>,
        now: Timestamp,
    ) -> (Step, Timestamp) {
        // A VM that is seen for the first time waits for its next moment.
        let Some(previous) = previous else { return (Step::Wait, now) };
        if previous.duration_since(now) > CLOCK_MARGIN {
            return (Step::Wait, now);
        }
        let Ok(turn) = now.checked_sub(offset) else { return (Step::Wait, previous) };
        let due =
            if turn > previous { self.moments.last(previous, turn, &self.zone) } else { None };
        let Some(moment) = due else { return (Step::Wait, previous) };
        let late = turn.duration_since(moment) > GRACE;
        match (self.is_open(now), self.missed) {
            (true, Missed::Skip) if late => (Step::Skip { moment }, moment),
            (true, _) => (Step::Run { moment, late }, moment),
            (false, Missed::Skip) => (Step::Skip { moment }, moment),
            // It begins when the window opens.
            (false, Missed::Run) => (Step::Wait, previous),
        }
    }

    /// Whether runs may begin at this time.
    pub fn is_open(&self, at: Timestamp) -> bool {
        let civil = self.zone.to_datetime(at);
        let within = |ranges: &[TimeRange]| ranges.iter().any(|range| range.contains(civil));
        (self.window.is_empty() || within(self.window)) && !within(self.blackout)
    }

    /// When a VM with this offset has its next turn; none when there is none.
    pub fn next(&self, offset: SignedDuration, after: Timestamp) -> Option<Timestamp> {
        let mut from = after.checked_sub(offset).ok()?;
        // With `skip`, moments outside of the window are passed over.
        for _ in 0..OPENS_WITHIN_MINUTES {
            let moment = self.moments.next(from, &self.zone)?;
            let turn = moment.checked_add(offset).ok()?;
            match self.missed {
                _ if self.is_open(turn) => return Some(turn),
                Missed::Run => return self.opens(turn),
                Missed::Skip => from = moment,
            }
        }
        None
    }

    fn opens(&self, from: Timestamp) -> Option<Timestamp> {
        let minute =
            |n: usize| from.checked_add(SignedDuration::from_mins(i64::try_from(n).ok()?)).ok();
        (1..OPENS_WITHIN_MINUTES).filter_map(minute).find(|at| self.is_open(*at))
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
