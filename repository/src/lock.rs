//! For how long objects are locked, and whose locks a new point has to extend. Pure.
//!
//! A point is locked for the repository's period, counted from its commit; all that it reaches is
//! locked at least as long. Objects get a quarter of the period more than that: so what point after
//! point takes over is extended every few points, and not at each.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// So much of the period objects are locked beyond it: one extension of everything in this time.
const RESERVE_PART: u64 = 4;
/// The longest period: a hundred years, which is what servers take.
const PERIOD_MAX: Duration = Duration::from_secs(36_500 * 86_400);

/// Who may take a locked object away before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockMode {
    /// Whoever the store's owner has given the right to.
    Governance,
    /// Nobody, the store's owner neither.
    Compliance,
}

impl LockMode {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Governance => "governance",
            Self::Compliance => "compliance",
        }
    }
}

impl fmt::Display for LockMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LockMode {
    type Err = BadLock;

    fn from_str(text: &str) -> Result<Self, BadLock> {
        [Self::Governance, Self::Compliance]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or(BadLock("a mode of locks is governance or compliance"))
    }
}

/// A lock that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadLock(&'static str);

/// How the objects of a repository are locked; fixed when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockPolicy {
    mode: LockMode,
    seconds: u64,
}

impl LockPolicy {
    /// Locks of this kind for so long after the commit of a point.
    ///
    /// # Errors
    /// [`BadLock`] for less than a second or more than a hundred years.
    pub fn new(mode: LockMode, period: Duration) -> Result<Self, BadLock> {
        match period.as_secs() {
            0 => Err(BadLock("a lock lasts a second at least")),
            _ if period > PERIOD_MAX => Err(BadLock("a lock lasts a hundred years at most")),
            seconds => Ok(Self { mode, seconds }),
        }
    }

    /// Whether it is one that [`new`](Self::new) gives.
    pub(crate) fn is_sound(self) -> bool {
        Self::new(self.mode, self.period()).is_ok()
    }

    /// Who may break it.
    #[must_use]
    pub const fn mode(self) -> LockMode {
        self.mode
    }

    /// How long a point is locked.
    #[must_use]
    pub const fn period(self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// Until when something is locked at `now`.
    #[must_use]
    pub fn horizon(self, now: Timestamp) -> Horizon {
        let point = later(now, self.seconds);
        Horizon { point, objects: later(point, self.seconds / RESERVE_PART) }
    }

    /// Whether objects of this name are locked: coordination lives by deleting.
    #[must_use]
    pub fn applies_to(name: &str) -> bool {
        !name.starts_with(crate::writers::COORDINATION)
    }
}

/// Rounded up to a whole second, since stores know no parts of one.
fn later(from: Timestamp, seconds: u64) -> Timestamp {
    let whole = from.as_second().saturating_add(i64::from(from.subsec_nanosecond() != 0));
    let whole = Timestamp::from_second(whole).unwrap_or(Timestamp::MAX);
    let seconds = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
    whole.saturating_add(seconds).unwrap_or(Timestamp::MAX)
}

/// Until when a point that is committed now is locked, and what it reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Horizon {
    /// The point.
    pub point: Timestamp,
    /// Objects that are made or extended now.
    pub objects: Timestamp,
}

/// What a point's manifest says of locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointLock {
    /// Until then the point is not deleted.
    pub until: Timestamp,
    /// Until then, at least, all that it reaches was locked when it was committed.
    pub objects_until: Timestamp,
}

/// Objects of which is known until when they are locked: those of a parent, or one's own.
#[derive(Clone, Debug)]
pub(crate) struct LockedUntil<T> {
    pub(crate) objects: BTreeSet<T>,
    pub(crate) until: Timestamp,
}

/// What has to be done before a point may be committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extension<T> {
    /// These are to be locked until the horizon of objects.
    pub(crate) objects: BTreeSet<T>,
    /// What the manifest may then say.
    pub(crate) lock: PointLock,
}

/// Which of the objects that a point reaches have to be extended. One of which nothing is known is.
pub(crate) fn extension<T: Ord + Clone>(
    horizon: Horizon,
    reached: BTreeSet<T>,
    known: &[LockedUntil<T>],
) -> Extension<T> {
    let mut locked: BTreeMap<&T, Timestamp> = BTreeMap::new();
    for source in known.iter().filter(|source| source.until >= horizon.point) {
        for object in &source.objects {
            let until = locked.entry(object).or_insert(source.until);
            *until = source.until.max(*until);
        }
    }
    let kept = reached.iter().filter_map(|object| locked.get(object).copied()).min();
    let objects_until = kept.unwrap_or(horizon.objects).min(horizon.objects);
    let objects = reached.iter().filter(|object| !locked.contains_key(object)).cloned().collect();
    Extension { objects, lock: PointLock { until: horizon.point, objects_until } }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(seconds: u64) -> LockPolicy {
        LockPolicy::new(LockMode::Governance, Duration::from_secs(seconds)).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn periods_have_bounds_and_dates_are_whole_seconds() {
        assert!(LockPolicy::new(LockMode::Compliance, Duration::from_millis(900)).is_err());
        assert!(
            LockPolicy::new(LockMode::Compliance, PERIOD_MAX + Duration::from_secs(1)).is_err()
        );
        let horizon = policy(100).horizon(Timestamp::from_millisecond(1_001).unwrap());
        assert_eq!((horizon.point, horizon.objects), (at(102), at(127)));
        let end = policy(100).horizon(Timestamp::MAX);
        assert_eq!(end.objects, Timestamp::MAX);
        assert!(
            "governance".parse() == Ok(LockMode::Governance) && "none".parse::<LockMode>().is_err()
        );
    }

    #[test]
    fn coordination_is_free() {
        assert!(
            ["config", "packs/00/x", "points/x", "keys/x"].into_iter().all(LockPolicy::applies_to)
        );
        assert!(!LockPolicy::applies_to("coordination/beats/x.1"));
    }

    /// One backup: how long after the one before, how long it takes, whose objects it takes over (of
    /// points so many back), what it finds by deduplication, how many it writes.
    type Backup = (i64, i64, Vec<usize>, Vec<u16>, u16);

    fn backup() -> impl Strategy<Value = Backup> {
        (
            0..400_i64,
            0..150_i64,
            prop::collection::vec(0..4_usize, 0..3),
            prop::collection::vec(any::<u16>(), 0..4),
            0..6_u16,
        )
    }

    proptest! {
        /// Whatever is built on what: a committed point's objects are locked as long as it is, what
        /// it says of them is true, and no lock is ever shortened.
        #[test]
        fn all_that_a_point_reaches_is_locked_as_long_as_it(
            seconds in 1..300_u64,
            backups in prop::collection::vec(backup(), 1..30),
        ) {
            let policy = policy(seconds);
            let mut store: BTreeMap<u16, Timestamp> = BTreeMap::new();
            let mut points: Vec<(PointLock, BTreeSet<u16>)> = Vec::new();
            let mut now = 0;
            for (pause, takes, parents, found, writes) in backups {
                now += pause;
                let begun = policy.horizon(at(now)).objects;
                let own: BTreeSet<u16> = (0..writes).map(|n| store.len() as u16 + n).collect();
                // What a store does with a new object, at some time after the beginning.
                store.extend(own.iter().map(|object| (*object, begun)));
                now += takes;
                let horizon = policy.horizon(at(now));
                let mut reached = own.clone();
                let mut known = vec![LockedUntil { objects: own, until: begun }];
                for back in parents {
                    let Some(parent) = points.len().checked_sub(back + 1) else { continue };
                    let (lock, objects) = points[parent].clone();
                    reached.extend(objects.iter().copied());
                    known.push(LockedUntil { objects, until: lock.objects_until });
                }
                let found = found.iter().filter_map(|n| n.checked_rem(store.len() as u16));
                reached.extend(found);
                let Extension { objects, lock } = extension(horizon, reached.clone(), &known);
                for object in &objects {
                    let until = store.get_mut(object).unwrap();
                    *until = horizon.objects.max(*until);
                }
                prop_assert!(lock.until == horizon.point && lock.objects_until >= lock.until);
                prop_assert!(reached.iter().all(|object| store[object] >= lock.objects_until));
                points.push((lock, reached));
            }
            for (lock, objects) in &points {
                prop_assert!(objects.iter().all(|object| store[object] >= lock.objects_until));
            }
        }

        /// A chain of points in short steps extends what it takes over once in a quarter of the
        /// period, not each time.
        #[test]
        fn extensions_are_rare(steps in 20..200_i64) {
            let policy = policy(1000);
            let reached: BTreeSet<u8> = (0..5).collect();
            let (mut until, mut extended) = (policy.horizon(at(0)).objects, 0);
            for step in 1..=steps {
                let known = [LockedUntil { objects: reached.clone(), until }];
                let done = extension(policy.horizon(at(step * 10)), reached.clone(), &known);
                extended += i64::from(!done.objects.is_empty());
                until = done.lock.objects_until;
            }
            prop_assert!(extended <= steps * 10 / 250);
        }
    }
}
