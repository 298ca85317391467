//! What is done about a run on a domain that ended without a word. The decision is pure.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::checkpoint::{self, Checkpoint, CheckpointName};
use super::{Domain, Kind, State, VirshError};

/// A job is gone within a second of its abort. libvirt may hold its end back by 30 s at a time while
/// a guest opens and closes its ports, and a libvirt that is started again takes some seconds.
const JOB_END_WAIT: Duration = Duration::from_secs(120);
/// How often it looks whether the job is gone.
const LOOK: Duration = Duration::from_millis(100);
/// How often it asks for the end.
const ASK: Duration = Duration::from_secs(10);

/// Whether the run's point is in the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    Committed,
    NotCommitted,
    Unknown,
}

/// What is known of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// It may have been ended with the guest frozen.
    pub froze: bool,
    /// It stopped the domain and wrote nothing.
    pub restart: bool,
    pub commit: Commit,
    pub checkpoint: Option<CheckpointName>,
}

/// What libvirt shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub running: bool,
    /// A backup job on this run's socket.
    pub job: bool,
    pub checkpoints: Vec<Checkpoint>,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    Thaw,
    AbortJob,
    DeleteCheckpoint(String),
    Start,
}

/// Decides.
pub fn effects(facts: &Facts, observed: &Observed) -> Vec<Effect> {
    let mut effects = Vec::new();
    if observed.running && facts.froze {
        effects.push(Effect::Thaw);
    }
    if observed.running && observed.job {
        effects.push(Effect::AbortJob);
    }
    if observed.running {
        effects.extend(superfluous(facts, observed).into_iter().map(Effect::DeleteCheckpoint));
    }
    if !observed.running && facts.restart {
        effects.push(Effect::Start);
    }
    effects
}

/// Checkpoints that go. libvirt deletes none while the domain is off; those that stay are found by
/// the next run and by `doctor`.
fn superfluous(facts: &Facts, observed: &Observed) -> Vec<String> {
    let Some(new) = &facts.checkpoint else { return Vec::new() };
    let name = new.to_string();
    let Some(found) = observed.checkpoints.iter().find(|one| one.name == name) else {
        return Vec::new();
    };
    match facts.commit {
        Commit::Unknown => Vec::new(),
        Commit::NotCommitted => vec![name],
        Commit::Committed => {
            let covered: Vec<String> = found.disks.iter().map(|disk| disk.target.clone()).collect();
            checkpoint::superseded(&observed.checkpoints, new, &covered)
        }
    }
}

/// Carries one effect out; `socket` is the run's.
pub fn carry_out(domain: &Domain, effect: &Effect, socket: &Path) -> Result<(), VirshError> {
    match effect {
        Effect::Thaw => match domain.thaw() {
            // Nobody is there who could be frozen.
            Err(e) if e.kind == Kind::NotRunning => Ok(()),
            other => other.map(drop),
        },
        Effect::AbortJob => abort(domain, socket),
        Effect::DeleteCheckpoint(name) => domain.delete_checkpoint(name),
        Effect::Start => domain.start(),
    }
}

/// Ends the job on `socket` and waits until it is gone; one of somebody else is left.
pub fn abort(domain: &Domain, socket: &Path) -> Result<(), VirshError> {
    let started = Instant::now();
    let mut asked: Option<Instant> = None;
    let is_ours = |job: &Option<Option<PathBuf>>| {
        job.as_ref().is_some_and(|found| found.as_deref() == Some(socket))
    };
    loop {
        match domain.backup_job() {
            Ok(job) if !is_ours(&job) => return Ok(()),
            Err(e) if started.elapsed() > JOB_END_WAIT => return Err(e),
            Ok(_) if started.elapsed() > JOB_END_WAIT => {
                let said = "the backup job does not end".into();
                return Err(VirshError { kind: Kind::TimedOut, said });
            }
            Ok(_) if asked.is_none_or(|at| at.elapsed() > ASK) => {
                // Looked at again before it counts.
                let _ = domain.abort_job();
                asked = Some(Instant::now());
            }
            _ => {}
        }
        std::thread::sleep(LOOK);
    }
}

/// Looks at a domain; `None` where it is gone.
pub fn observe(
    domain: &Domain,
    socket: &Path,
    tried: &str,
) -> crate::failure::Outcome<Option<Observed>> {
    let running = match domain.state() {
        Ok(state) => state != State::ShutOff,
        Err(e) if e.kind == Kind::NoDomain => return Ok(None),
        Err(e) => return Err(e.failure(tried)),
    };
    let job = domain.backup_job().map_err(|e| e.failure(tried))?.flatten();
    let checkpoints = domain.our_checkpoints(false, tried)?;
    Ok(Some(Observed { running, job: job.as_deref() == Some(socket), checkpoints }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::checkpoint::CheckpointDisk;

    fn checkpoint(point: &str) -> Checkpoint {
        let disks = vec![CheckpointDisk { target: "vda".into(), dirty_bytes: None }];
        Checkpoint { name: format!("icecore.r.c.{point}"), disks }
    }

    /// Every combination of what can be known and seen.
    fn all() -> Vec<(Facts, Observed)> {
        let bools = [false, true];
        let mut cases = Vec::new();
        for bits in 0..32u8 {
            let bit = |at: u8| bools[usize::from(bits >> at & 1)];
            for commit in [Commit::Committed, Commit::NotCommitted, Commit::Unknown] {
                let mut checkpoints = vec![checkpoint("old")];
                checkpoints.extend(bit(4).then(|| checkpoint("new")));
                let name = "icecore.r.c.new".parse().ok();
                let facts = Facts { froze: bit(0), restart: bit(1), commit, checkpoint: name };
                cases.push((facts, Observed { running: bit(2), job: bit(3), checkpoints }));
            }
        }
        cases
    }

    #[test]
    fn the_guest_comes_first_and_doubt_deletes_nothing() {
        for (facts, seen) in all() {
            let effects = effects(&facts, &seen);
            let thaws = effects.contains(&Effect::Thaw);
            assert_eq!(thaws, facts.froze && seen.running, "{facts:?} {seen:?}");
            assert!(!thaws || effects[0] == Effect::Thaw);
            assert_eq!(effects.contains(&Effect::AbortJob), seen.job && seen.running);
            assert_eq!(effects.contains(&Effect::Start), facts.restart && !seen.running);
            let deleted: Vec<_> =
                effects.iter().filter(|e| matches!(e, Effect::DeleteCheckpoint(_))).collect();
            let there = seen.checkpoints.len() == 2 && seen.running;
            let expected = match (facts.commit, there) {
                (Commit::Committed, true) => vec!["icecore.r.c.old"],
                (Commit::NotCommitted, true) => vec!["icecore.r.c.new"],
                _ => vec![],
            };
            let expected: Vec<_> =
                expected.into_iter().map(|n| Effect::DeleteCheckpoint(n.into())).collect();
            assert_eq!(deleted, expected.iter().collect::<Vec<_>>(), "{facts:?} {seen:?}");
        }
    }
}
