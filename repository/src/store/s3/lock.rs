//! Creating a name once at a server that overwrites: by a lock object, put and then listed.
//!
//! Each contender creates a lock of its own beside the name, lists the locks of that name, and goes on
//! only if its own is the only one; else it removes its own, waits and begins anew. Two cannot both
//! go on: if the listing of one misses the lock of the other, that lock was put after this listing
//! began, so the other's listing comes later still and shows the first one's lock, or the first one
//! had ended before, and then the name is seen to be taken. It needs a server whose listings show
//! what was put before.
//!
//! Whoever dies leaves his lock. Others remove one that they have seen for [`PATIENCE`], each by his
//! own clock; a holder sends nothing and waits for nothing once it has held its lock for [`LEASE`], and
//! then reports failure. What remains is a server that carries a request out more
//! than `PATIENCE - LEASE` after the connection was given up.

use std::collections::BTreeMap;
use std::time::Duration;

/// How long a holder may take, from before its lock is put until the object is answered for.
pub(super) const LEASE: Duration = Duration::from_secs(20);
/// How long a lock is respected: well beyond the lease of whoever put it.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The longest a contender waits for its turn: for one dead holder, and then for the living.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(180);
/// The first pause of contenders that met; each later one is longer.
const PAUSE_FIRST: Duration = Duration::from_millis(40);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What a look at the locks of a name asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Turn {
    /// Ours is the only one.
    Ours,
    /// Others are there, and these of them are left from the dead.
    Theirs { dead: Vec<String> },
}

/// What one contender has seen so far.
#[derive(Debug, Default)]
pub(super) struct Contest {
    seen: BTreeMap<String, Duration>,
    rounds: u32,
}

impl Contest {
    /// Takes in a listing of the locks of the name, made at `now` by the contender's clock.
    pub(super) fn look(&mut self, own: &str, locks: &[String], now: Duration) -> Turn {
        self.rounds += 1;
        self.seen.retain(|lock, _| locks.contains(lock));
        let others = || locks.iter().filter(|lock| *lock != own);
        for lock in others() {
            self.seen.entry(lock.clone()).or_insert(now);
        }
        let is_ours = locks.iter().any(|lock| lock == own);
        if is_ours && self.seen.is_empty() {
            return Turn::Ours;
        }
        let dead = |lock: &&String| {
            self.seen.get(*lock).is_some_and(|since| now.saturating_sub(*since) >= PATIENCE)
        };
        Turn::Theirs { dead: others().filter(dead).cloned().collect() }
    }

    /// How long to stand aside before the next round; `luck` is any number.
    pub(super) fn pause(&self, luck: u32) -> Duration {
        let doubled = 2u32.saturating_pow(self.rounds.saturating_sub(1).min(16));
        let longest = PAUSE_FIRST.saturating_mul(doubled).min(PAUSE_MAX);
        longest.mul_f64(f64::from(luck) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn locks(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_lock_is_broken_only_after_the_patience() {
        let mut contest = Contest::default();
        let look = |contest: &mut Contest, names: &[&str], seconds| {
            contest.look("me", &locks(names), Duration::from_secs(seconds))
        };
        assert_eq!(look(&mut contest, &["me"], 0), Turn::Ours);
        let nobody_dead = Turn::Theirs { dead: Vec::new() };
        assert_eq!(look(&mut contest, &["me", "it"], 10), nobody_dead);
        assert_eq!(look(&mut contest, &["me", "it"], 69), nobody_dead);
        assert_eq!(look(&mut contest, &["me", "it"], 70), Turn::Theirs { dead: locks(&["it"]) });
        assert_eq!(look(&mut contest, &["me"], 71), Turn::Ours);
        assert_eq!(look(&mut contest, &["me", "it"], 200), nobody_dead, "it came back: seen anew");
        assert_eq!(look(&mut contest, &[], 201), nobody_dead, "ours was taken away");
    }

    /// Steps of contenders on one name, in any order, one request a step.
    #[derive(Clone, Copy, PartialEq)]
    enum At {
        Look,
        Put,
        List,
        LookAgain,
        Create,
        Remove,
        Done,
    }

    proptest! {
        #[test]
        fn of_any_order_of_steps_only_one_creates(
            order in prop::collection::vec(0usize..4, 0..400),
        ) {
            let mut at = [At::Look; 4];
            let mut contests: Vec<Contest> = (0..4).map(|_| Contest::default()).collect();
            let mut held: BTreeSet<String> = BTreeSet::new();
            let (mut exists, mut created) = (false, 0);
            for who in order {
                let own = format!("lock{who}");
                at[who] = match at[who] {
                    At::Look if exists => At::Done,
                    At::Look => At::Put,
                    At::Put => { held.insert(own); At::List }
                    At::List => {
                        let seen: Vec<String> = held.iter().cloned().collect();
                        // Less than the patience goes by.
                        match contests[who].look(&own, &seen, Duration::ZERO) {
                            Turn::Ours => At::LookAgain,
                            Turn::Theirs { .. } => At::Remove,
                        }
                    }
                    At::LookAgain if exists => At::Remove,
                    At::LookAgain => At::Create,
                    At::Create => { exists = true; created += 1; At::Remove }
                    At::Remove => { held.remove(&own); At::Look }
                    At::Done => At::Done,
                };
            }
            prop_assert!(created <= 1);
        }
    }
}
