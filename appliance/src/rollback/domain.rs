//! The rollback of a domain of libvirt: frozen where it can be and stopped, rolled back by its
//! images, started again.

use std::time::Duration;

use icecore_repository::PointDisk;

use super::{Rollback, RolledBack};
use crate::backup::Request as BackupRequest;
use crate::failure::{Failure, Outcome};
use crate::hook;
use crate::image::RunDir;
use crate::libvirt::half_written::{self, HalfWritten};
use crate::libvirt::warden::WardenClient;
use crate::libvirt::xml::Agent;
use crate::libvirt::{CaptureForm, Domain, PoweredOff, State, xml};
use crate::state::LibvirtRun;

/// How long the agent may take to freeze; the rollback goes on without.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);
/// From the freeze to the end of QEMU, which flushes its images first.
const FROZEN_MAX: Duration = Duration::from_secs(60);

impl Rollback<'_> {
    /// Rolls a domain back. What is there when it stops is the safety point. Until the first block
    /// is written a failure starts it again.
    pub async fn domain(
        &mut self,
        domain: &Domain,
        form: CaptureForm,
        warden: WardenClient,
        safety: BackupRequest,
    ) -> Outcome<RolledBack> {
        let state = domain.state().map_err(|e| e.failure(self.tried))?;
        let ran = match state {
            State::ShutOff => false,
            State::Running | State::Paused | State::IoError => true,
            State::Other => {
                let why = "the domain is on its way from one state to another";
                return Err(Failure::refused(self.tried, why).next("try again when it is there"));
            }
        };
        let state_dir = &self.context.state;
        let earlier = half_written::get(state_dir, &domain.name)?;
        let earlier = earlier.filter(|mark| mark.uuid == domain.uuid);
        // One that an earlier run has stopped, and was cut off over, is to run again, too.
        let restart = ran || earlier.is_some_and(|mark| mark.ran);
        let (job, point) = (self.job.id(), self.point.id.to_string());
        let repository = &self.job.record.repository;
        self.mark = Some(HalfWritten::new(domain, job, &point, repository, restart));
        if !hook::guards(state_dir) {
            tracing::warn!(
                "libvirt's hook is not installed, or not for this state directory ('icecore hook \
                 install'): should this run be cut off, nothing keeps {} from starting half-written",
                domain.name
            );
        }
        if ran {
            self.require_stoppable(domain)?;
            self.stop(domain, &warden, state)?;
        }
        let rolled = self.powered_off(domain, form, safety).await;
        let half_written = !self.job.record.writing.is_empty();
        match rolled {
            Ok(done) if !restart || !self.request.restart || self.request.dry_run => Ok(done),
            Ok(_) if half_written::get(&self.context.state, &domain.name)?.is_some() => {
                Err(self.still_half_written(domain))
            }
            Ok(done) => match domain.start() {
                Ok(()) => Ok(RolledBack { vm_restarted: true, ..done }),
                Err(e) => {
                    let why = format!("rolled back and verified, but it does not start: {e}");
                    Err(Failure::failed(self.tried, why).next("see 'virsh start'"))
                }
            },
            Err(failure) if ran && !half_written => Err(started_again(domain, failure)),
            Err(failure) => Err(failure),
        }
    }

    /// The disks of this run are done; those of an earlier one that was cut off are not.
    fn still_half_written(&self, domain: &Domain) -> Failure {
        let mark = half_written::get(&self.context.state, &domain.name).ok().flatten();
        let why = mark.map(|mark| mark.why()).unwrap_or_default();
        let why = format!("these disks are rolled back and verified, but {why}");
        Failure::failed(self.tried, why).next("roll all of its disks back")
    }

    /// What can be known to fail is known before the guest is stopped.
    fn require_stoppable(&self, domain: &Domain) -> Outcome<()> {
        let refused = |why: String| Failure::refused(self.tried, why);
        if self.request.dry_run {
            return Err(refused("a dry run reads the domain's images, and it runs".into())
                .next("shut it off for the dry run, or run 'icecore diff'"));
        }
        if !domain.is_persistent().map_err(|e| e.failure(self.tried))? {
            return Err(refused("the domain is transient: it would be gone when it stops".into()));
        }
        self.require_same_images(domain)?;
        let sizes = domain.capacities().map_err(|e| e.failure(self.tried))?;
        let fits = |disk: &&PointDisk| {
            let now = sizes.get(disk.disk.as_str());
            now == Some(&disk.size_bytes) || (self.request.resize && now.is_some())
        };
        let wanted = self.point.disks.iter().filter(|disk| {
            self.request.disks.is_empty() || self.request.disks.contains(&disk.disk)
        });
        match wanted.into_iter().find(|disk| !fits(disk)) {
            None => Ok(()),
            Some(disk) => Err(refused(format!(
                "disk {} is missing or has another size than at the point",
                disk.disk
            ))
            .next("choose disks with --disk, or allow it with --resize")),
        }
    }

    /// What is rolled back is what the domain would start with: it has to be what it runs with.
    fn require_same_images(&self, domain: &Domain) -> Outcome<()> {
        let running = domain.describe(self.tried)?;
        let text = domain.inactive_xml().map_err(|e| e.failure(self.tried))?;
        let starting = xml::parse(&text).map_err(|e| Failure::failed(self.tried, e))?;
        let differs = running.disks.iter().find(|disk| {
            !starting.disks.iter().any(|one| one.target == disk.target && one.path == disk.path)
        });
        match differs {
            None => Ok(()),
            Some(disk) => {
                let why = format!(
                    "disk {} would be another image at the domain's next start than it is now",
                    disk.target
                );
                Err(Failure::refused(self.tried, why)
                    .next("make its definition agree with what runs ('virsh edit')"))
            }
        }
    }

    fn stop(&mut self, domain: &Domain, warden: &WardenClient, state: State) -> Outcome<()> {
        let agent = domain.describe(self.tried)?.agent;
        let freezes = state == State::Running && agent == Agent::Connected;
        self.job.record.libvirt = Some(LibvirtRun {
            uri: domain.virsh.uri().to_owned(),
            uuid: domain.uuid.clone(),
            freezes,
            restart: true,
            form: CaptureForm::Job,
        });
        self.job.save(self.context)?;
        if freezes {
            warden.freezing(FREEZE_LIMIT + FROZEN_MAX, self.tried)?;
            if let Err(e) = domain.freeze(FREEZE_LIMIT) {
                tracing::warn!("the guest is stopped without a freeze: {e}");
            }
        }
        if let Err(e) = domain.destroy() {
            // The warden thaws; the domain runs on.
            return Err(e.failure(self.tried));
        }
        warden.thawed(self.tried)
    }

    async fn powered_off(
        &mut self,
        domain: &Domain,
        form: CaptureForm,
        safety: BackupRequest,
    ) -> Outcome<RolledBack> {
        let off = PoweredOff::of(domain, form, self.tried)?;
        self.machine = Some(off.machine.clone());
        let rolled = self.images(&off.images, safety).await;
        let dir = RunDir::of(self.context, self.job.id())?;
        if let Err(failure) = off.reconcile(self.repository, &dir, self.tried) {
            // The next point of a disk whose checkpoint is lost is a whole read.
            tracing::warn!("{failure}");
        }
        rolled
    }
}

fn started_again(domain: &Domain, failure: Failure) -> Failure {
    match domain.start() {
        Ok(()) => {
            let why = format!("{}; nothing was written, and the domain runs again", failure.why);
            Failure { why, ..failure }
        }
        Err(e) => {
            let why = format!("{}; nothing was written, but it does not start: {e}", failure.why);
            Failure { why, ..failure }.unclean()
        }
    }
}
