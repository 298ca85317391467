//! Which of the waiting jobs begin now. Pure: jobs that run, limits and time are arguments.
//!
//! One job at a time works on a VM. Within the limits of the host and of each repository a party (a
//! VM; for checks and gc, a repository) whose turn is longest ago comes first, so that a hundred
//! jobs for one VM do not keep another one waiting.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::state::JobId;

/// Jobs at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub host: usize,
    pub repository: usize,
}

/// For whom a job works.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    Vm(String),
    /// A check or a gc: one at a time on a repository.
    Repository(String),
    /// A restore: nothing else works on its target, or its worker is refused.
    Alone(JobId),
}

/// What the decision needs to know of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    pub party: Party,
    pub repository: String,
    pub share: Option<Share>,
}

/// The jobs of one schedule, of which only so many run at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    pub schedule: String,
    pub at_once: usize,
}

#[derive(Debug, Clone)]
struct Waiting {
    job: JobId,
    work: Work,
    not_before: Option<Timestamp>,
}

/// The jobs that wait, in the order in which they came.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Vec<Waiting>,
    turns: BTreeMap<Party, u64>,
    turn: u64,
}

impl Queue {
    /// Adds a job at the end.
    pub fn push(&mut self, job: JobId, work: Work, not_before: Option<Timestamp>) {
        self.waiting.push(Waiting { job, work, not_before });
    }

    /// Takes a job out; false when it did not wait.
    pub fn remove(&mut self, job: &JobId) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| &waiting.job != job);
        self.waiting.len() != before
    }

    /// Whether one that waits is such a one.
    pub fn any(&self, is_such: impl Fn(&Work) -> bool) -> bool {
        self.waiting.iter().any(|waiting| is_such(&waiting.work))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Takes out the next job that may begin beside `running`.
    pub fn next(
        &mut self,
        running: &[Work],
        limits: Limits,
        now: Timestamp,
    ) -> Option<(JobId, Work)> {
        if running.len() >= limits.host {
            return None;
        }
        let eligible = self.waiting.iter().enumerate().filter(|(_, waiting)| {
            waiting.not_before.is_none_or(|at| at <= now) && fits(&waiting.work, running, limits)
        });
        let turn_of = |work: &Work| self.turns.get(&work.party).copied().unwrap_or(0);
        let (at, _) = eligible.min_by_key(|(at, waiting)| (turn_of(&waiting.work), *at))?;
        let Waiting { job, work, .. } = self.waiting.remove(at);
        self.turn += 1;
        self.turns.insert(work.party.clone(), self.turn);
        self.forget_turns();
        Some((job, work))
    }

    /// A party of which nothing waits has no claim to remember, but the last one served.
    fn forget_turns(&mut self) {
        let (waiting, last) = (&self.waiting, self.turn);
        self.turns.retain(|party, turn| {
            *turn == last || waiting.iter().any(|waiting| &waiting.work.party == party)
        });
    }

    /// When the next job that is held back may begin.
    pub fn next_moment(&self, now: Timestamp) -> Option<Timestamp> {
        let moments = self.waiting.iter().filter_map(|waiting| waiting.not_before);
        moments.filter(|moment| *moment > now).min()
    }
}

fn fits(work: &Work, running: &[Work], limits: Limits) -> bool {
    let on_repository = running.iter().filter(|other| other.repository == work.repository).count();
    let in_share = |share: &Share| {
        let of_schedule = running.iter().filter_map(|other| other.share.as_ref());
        of_schedule.filter(|other| other.schedule == share.schedule).count() < share.at_once
    };
    on_repository < limits.repository
        && work.share.as_ref().is_none_or(in_share)
        && !running.iter().any(|other| other.party == work.party)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(number: usize) -> JobId {
        format!("20250101000000-{number:08x}").parse().unwrap()
    }

    fn work(vm: u8, repository: u8) -> Work {
        let party = Party::Vm(format!("vm{vm}"));
        Work { party, repository: format!("r{repository}"), share: None }
    }

    #[test]
    fn a_schedule_runs_no_more_at_once_than_it_says_and_holds_nobody_else_up() {
        let limits = Limits { host: 9, repository: 9 };
        let mut queue = Queue::default();
        for vm in 0..4u8 {
            let share = Some(Share { schedule: "nightly".into(), at_once: 2 });
            queue.push(id(vm.into()), Work { share, ..work(vm, 1) }, None);
        }
        queue.push(id(4), work(4, 1), None);
        let mut running = Vec::new();
        let begun = drain(&mut queue, &mut running, limits);
        assert_eq!(begun.iter().filter(|work| work.share.is_some()).count(), 2);
        assert_eq!((begun.len(), queue.len()), (3, 2));
    }

    fn drain(queue: &mut Queue, running: &mut Vec<Work>, limits: Limits) -> Vec<Work> {
        let mut begun = Vec::new();
        while let Some((_, work)) = queue.next(running, limits, Timestamp::UNIX_EPOCH) {
            running.push(work.clone());
            begun.push(work);
        }
        begun
    }

    #[test]
    fn a_flood_for_one_vm_lets_another_one_through() {
        let limits = Limits { host: 1, repository: 1 };
        let mut queue = Queue::default();
        for number in 0..100 {
            queue.push(id(number), work(1, 1), None);
        }
        assert_eq!(queue.next(&[], limits, Timestamp::UNIX_EPOCH).unwrap().0, id(0));
        queue.push(id(100), work(2, 1), None);
        assert_eq!(queue.next(&[], limits, Timestamp::UNIX_EPOCH).unwrap().0, id(100));
        assert_eq!(queue.next(&[], limits, Timestamp::UNIX_EPOCH).unwrap().0, id(1));
    }

    #[test]
    fn what_is_held_back_waits_for_its_moment() {
        let limits = Limits { host: 4, repository: 4 };
        let later: Timestamp = "2025-01-01T00:00:00Z".parse().unwrap();
        let mut queue = Queue::default();
        queue.push(id(1), work(1, 1), Some(later));
        assert_eq!(queue.next(&[], limits, Timestamp::UNIX_EPOCH), None);
        assert_eq!(queue.next_moment(Timestamp::UNIX_EPOCH), Some(later));
        assert_eq!(queue.next(&[], limits, later).unwrap().0, id(1));
        assert_eq!(queue.next_moment(Timestamp::UNIX_EPOCH), None);
    }

    proptest! {
        #[test]
        fn limits_hold_and_no_room_is_wasted(
            jobs in prop::collection::vec((0u8..6, 0u8..4), 0..40),
            host in 1usize..6,
            repository in 1usize..4,
        ) {
            let limits = Limits { host, repository };
            let mut queue = Queue::default();
            for (number, (vm, repository)) in jobs.iter().enumerate() {
                queue.push(id(number), work(*vm, *repository), None);
            }
            let mut running = Vec::new();
            let mut begun = 0;
            // Each round all that can begin does, then the oldest ends.
            for _ in 0..=jobs.len() {
                begun += drain(&mut queue, &mut running, limits).len();
                prop_assert!(running.len() <= host);
                for (at, one) in running.iter().enumerate() {
                    let same = running.iter().filter(|other| other.repository == one.repository);
                    prop_assert!(same.count() <= repository);
                    prop_assert!(running[..at].iter().all(|other| other.party != one.party));
                }
                if running.len() < host {
                    let left = queue.waiting.iter();
                    prop_assert!(left.clone().all(|w| !fits(&w.work, &running, limits)));
                }
                if !running.is_empty() {
                    running.remove(0);
                }
            }
            prop_assert_eq!(begun, jobs.len());
            prop_assert_eq!(queue.len(), 0);
        }
    }
}
