//! The capture of a running domain as a bare QEMU is captured: the graph of [`qmp`](super::super::qmp),
//! put in through libvirt's monitor passthrough.
//!
//! libvirt does not know of the graph. So none is put in while a job is at work on the domain, and
//! it is taken out at once when one begins.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::inventory::Identity;
use icecore_repository::{CapsulePart, ConsistencyLevel, DiskId};
use tokio::task::JoinHandle;

use crate::capture::qmp::{QmpCapture, Settings};
use crate::capture::{Base, Capture, Fate, Readable, SeenDisk, Taken, Task};
use crate::failure::{Failure, Outcome};
use crate::governor::Guest;
use crate::libvirt::checkpoint::CheckpointName;
use crate::libvirt::xml::{Agent, Description, DomainDisk};
use crate::libvirt::{Domain, State, capsule, emulator};
use crate::report::Unprotected;
use crate::state::IntentLog;

/// How often it is looked whether a job of somebody else has begun.
const LOOK: Duration = Duration::from_secs(2);

/// The capture.
pub struct DirectCapture {
    inner: QmpCapture,
    domain: Domain,
    guardian: GuardianClient,
    description: Description,
    capsule: serde_json::Value,
    parts: Vec<CapsulePart>,
    disks: Vec<SeenDisk>,
    /// Why the guest cannot be frozen.
    unfrozen: Option<String>,
    repository: String,
    tried: String,
    /// The job that began meanwhile.
    intruder: Arc<Mutex<Option<String>>>,
    /// Ends when it is aborted.
    sentry: Option<JoinHandle<()>>,
}

/// Why a domain's guest cannot be frozen, where that is known beforehand.
pub fn unfreezable(state: State, agent: Agent) -> Option<String> {
    let why = match (state, agent) {
        (State::Running, Agent::Connected) => return None,
        (State::Running, Agent::None) => "the domain has no channel for a guest agent",
        (State::Running, Agent::Silent) => "no guest agent has opened its channel",
        _ => "the domain is paused",
    };
    Some(why.into())
}

/// Refuses a domain on which somebody else is at work.
pub fn require_idle(domain: &Domain, tried: &str) -> Outcome<()> {
    match domain.job_of_others().map_err(|e| e.failure(tried))? {
        None => Ok(()),
        Some(job) => {
            let why = format!("a job is at work on the domain: {job}");
            Err(Failure::refused(tried, why)
                .next("wait for it, or see 'virsh domjobinfo' and 'virsh blockjob'")
                .transient())
        }
    }
}

impl DirectCapture {
    /// Looks at the domain behind `guardian`, which is connected.
    pub async fn open(
        domain: Domain,
        description: Description,
        guardian: GuardianClient,
        settings: Settings,
        log: IntentLog,
    ) -> Outcome<Self> {
        let tried = settings.tried.clone();
        let state = domain.state().map_err(|e| e.failure(&tried))?;
        let emulator = emulator::of_running(&domain);
        let repository = settings.repository.to_string();
        let inner = QmpCapture::open(guardian.clone(), settings, log).await?;
        Ok(Self {
            disks: named_by_libvirt(inner.disks(), &description.disks, &tried)?,
            capsule: capsule::of(&domain, &description, emulator.as_ref(), &tried)?,
            parts: Vec::new(),
            unfrozen: unfreezable(state, description.agent),
            inner,
            domain,
            guardian,
            description,
            repository,
            tried,
            intruder: Arc::default(),
            sentry: None,
        })
    }

    fn intruder(&self) -> Option<String> {
        self.intruder.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stop_sentry(&mut self) {
        if let Some(sentry) = self.sentry.take() {
            sentry.abort();
        }
    }

    /// Checkpoints that this repository's runs in libvirt's form have left on the captured disks.
    fn retire_checkpoints(&self, tasks: &[Task]) -> Outcome<()> {
        let captured =
            |target: &str| tasks.iter().any(|task| self.disks[task.index].id.as_str() == target);
        for checkpoint in self.domain.our_checkpoints(false, &self.tried)? {
            let name = checkpoint.name.parse::<CheckpointName>();
            let ours = name.is_ok_and(|name| name.repository.as_str() == self.repository);
            if ours && checkpoint.disks.iter().all(|disk| captured(&disk.target)) {
                let gone = self.domain.delete_checkpoint(&checkpoint.name);
                gone.map_err(|e| e.failure(&self.tried))?;
            }
        }
        Ok(())
    }
}

/// The disks under the names that libvirt gives them, which hold whether the domain runs or not.
fn named_by_libvirt(
    seen: &[SeenDisk],
    known: &[DomainDisk],
    tried: &str,
) -> Outcome<Vec<SeenDisk>> {
    let named = seen.iter().map(|disk| {
        let of_it = |one: &&DomainDisk| one.alias.as_deref() == Some(disk.id.as_str());
        let Some(known) = known.iter().find(of_it) else {
            // One that somebody has plugged in past libvirt.
            let refusal = Some("libvirt does not know this disk".to_owned());
            return Ok(SeenDisk { refusal, ..disk.clone() });
        };
        let id: DiskId = known.target.parse().map_err(|e| Failure::failed(tried, e))?;
        Ok(SeenDisk {
            id,
            identity: Identity(known.identity()),
            refusal: known.refusal.clone().or_else(|| disk.refusal.clone()),
            ..disk.clone()
        })
    });
    named.collect()
}

/// Takes the graph out when somebody begins a job on the domain: it would work on images that are
/// under our filter, or move to another host without it.
fn keep_watch(
    domain: Domain,
    guardian: GuardianClient,
    intruder: Arc<Mutex<Option<String>>>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOOK).await;
            let asked = domain.clone();
            let seen = tokio::task::spawn_blocking(move || asked.job_of_others()).await;
            // A libvirt that does not answer now is asked again.
            let Ok(Ok(Some(job))) = seen else { continue };
            let why = format!("the backup was given up for another job on the domain: {job}");
            *intruder.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
            // Again and again while it is seen: the graph may come only after the first time. What
            // cannot be undone now is undone when the run ends, or tried again.
            let _ = guardian.abort().await;
        }
    })
}

impl Capture for DirectCapture {
    fn disks(&self) -> &[SeenDisk] {
        &self.disks
    }

    fn unprotected(&self) -> Vec<Unprotected> {
        let devices = self.description.unprotected.iter().cloned();
        devices.map(|(disk, why)| Unprotected { disk, why }).collect()
    }

    fn capsule(&self) -> serde_json::Value {
        self.capsule.clone()
    }

    fn parts(&self) -> Vec<CapsulePart> {
        self.parts.clone()
    }

    async fn take(&mut self, tasks: &[Task]) -> Outcome<Taken> {
        // Time has gone by since the run began.
        let asked = self.domain.clone();
        let idle = tokio::task::spawn_blocking(move || require_idle(&asked, "take the point"));
        idle.await.map_err(|e| Failure::failed("take the point", e))??;
        let (domain, guardian) = (self.domain.clone(), self.guardian.clone());
        self.sentry = Some(keep_watch(domain, guardian, Arc::clone(&self.intruder)));
        let mut taken = self.inner.take(tasks).await?;
        let intruder = self.intruder.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(why) = intruder {
            let _ = self.guardian.abort().await;
            return Err(Failure::failed("take the point", why).transient());
        }
        self.parts = capsule::parts(&self.domain, &self.description);
        if taken.consistency.level == ConsistencyLevel::Crash && self.unfrozen.is_some() {
            taken.consistency.why.clone_from(&self.unfrozen);
        }
        Ok(taken)
    }

    async fn open(
        &mut self,
        at: usize,
        base: Option<&Base>,
        samples: &[Range<u64>],
    ) -> Outcome<Readable> {
        self.inner.open(at, base, samples).await
    }

    fn guest(&self) -> Option<Guest> {
        self.inner.guest()
    }

    fn close(&mut self, at: usize) {
        self.inner.close(at);
    }

    async fn lost(&self) -> Option<String> {
        match self.intruder() {
            Some(why) => Some(why),
            None => self.inner.lost().await,
        }
    }

    async fn release(&mut self) -> Outcome<()> {
        self.stop_sentry();
        self.inner.release().await?;
        match self.intruder() {
            None => Ok(()),
            Some(why) => Err(Failure::failed(&self.tried, why)),
        }
    }

    async fn settle(&mut self, fate: Fate) -> Outcome<()> {
        self.stop_sentry();
        self.inner.settle(fate).await?;
        match fate {
            Fate::Committed => self.retire_checkpoints(self.inner.tasks()),
            Fate::NotCommitted | Fate::Unknown => Ok(()),
        }
    }
}

impl Drop for DirectCapture {
    fn drop(&mut self) {
        self.stop_sentry();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_a_guest_is_not_frozen_is_known_beforehand() {
        assert_eq!(unfreezable(State::Running, Agent::Connected), None);
        for (state, agent) in [
            (State::Running, Agent::None),
            (State::Running, Agent::Silent),
            (State::Paused, Agent::Connected),
        ] {
            assert!(unfreezable(state, agent).is_some(), "{state:?} {agent:?}");
        }
    }
}
