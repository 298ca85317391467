//! A backup from beginning to end, whatever kind of capture it reads from.
//!
//! Order: decide, take the instant, read, let go of the instant, commit, put the bitmaps in order.

mod disk;
mod report;
mod side_by_side;

use std::sync::Arc;
use std::time::Instant;

use icecore_io_engine::{Pace, Pacing, Priority};
use icecore_qmp::bitmap::{BitmapName, Granularity, NamePart};
use icecore_repository::{
    BeginPoint, CapsulePart, ChainChoice, ChainId, DiskId, DiskMeta, Error as RepositoryError,
    Point, PointMeta, PointWriter, Repository, VmName, WriterInfo,
};
use jiff::Timestamp;

use crate::capture::decide::{Decision, Level, decide};
use crate::capture::{Capture, Fate, SeenDisk, Taken, Task};
use crate::context::Context;
use crate::failure::{Failure, Outcome, Status};
use crate::governor::Watch;
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::report::{BackupReport, Unprotected};
use crate::state::JobStatus;

/// What the user asked for, validated.
#[derive(Debug, Clone)]
pub struct Request {
    pub vm: VmName,
    pub level: Level,
    pub disks: Vec<DiskId>,
    pub exclude: Vec<DiskId>,
    pub chain: Option<ChainId>,
    pub label: Option<String>,
    pub description: Option<String>,
    pub rate_limit: Option<u64>,
    /// The bytes that the point may store, by a quota.
    pub stored_limit: Option<u64>,
    /// Fail when a disk would be read whole although it has a parent.
    pub strict: bool,
    pub paranoid: bool,
    pub dry_run: bool,
    /// Whether a running guest is protected from this backup.
    pub governor: Governed,
    /// How much the threads that work give way.
    pub priority: Priority,
}

/// See [`Request::governor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Governed {
    Yes,
    No,
}

impl Request {
    /// How fast the disks may be read, all of them together.
    pub fn pacing(&self) -> Arc<Pacing> {
        Pacing::new(Pace { bytes_per_second: self.rate_limit, ..Pace::FREE })
    }
}

/// A disk that will be in the point.
struct Chosen {
    index: usize,
    seen: SeenDisk,
    decision: Decision,
}

/// Everything that the steps of one backup share.
pub struct Backup<'a, C> {
    pub context: &'a Context,
    pub repository: &'a Repository,
    pub request: &'a Request,
    pub capture: &'a mut C,
    pub job: &'a mut Job,
    pub interrupt: &'a Interrupt,
    /// See [`Request::pacing`].
    pub pacing: Arc<Pacing>,
}

impl<C: Capture> Backup<'_, C> {
    /// Takes the point. Whatever happens, the instant is let go of and the bitmaps are in order
    /// when this returns.
    pub async fn run(mut self) -> Outcome<BackupReport> {
        let started = Instant::now();
        let created_at = self.job.record.started_at;
        let picked = self.pick()?;
        let chain = self.chain()?;
        // Announced before any parent is looked at: from now on no gc takes one away.
        let writer = self.begin(chain.clone())?;
        let (chosen, tasks) = match self.prepare(picked, chain.as_ref(), writer.as_ref()) {
            Ok(prepared) => prepared,
            Err(failure) => return Err(self.give_up(writer, failure).await),
        };
        let guest = self.capture.guest().filter(|_| self.request.governor == Governed::Yes);
        let mut watch = Watch::new(guest, &self.pacing);
        self.context.board.watch(watch.view());
        let read = self.capture_and_read(&chosen, &tasks, writer.as_ref(), &mut watch).await;
        watch.end();
        let (taken, disks) = match read {
            Ok(read) => read,
            Err(failure) => return Err(self.give_up(writer, watch.explained(failure)).await),
        };
        let metas = disks.iter().zip(&tasks).map(|(disk, task)| disk.meta(task.bitmap.as_ref()));
        let meta = self.meta(created_at, &taken, metas.collect());
        let unprotected = self.unprotected(&chosen);
        let governor = watch.report();
        let Some(writer) = writer else {
            self.capture.settle(Fate::NotCommitted).await?;
            let report = report::dry(self.job, &meta, disks, unprotected, started.elapsed());
            return Ok(BackupReport { governor, store: self.repository.traffic(), ..report });
        };
        let point = self.commit(writer, meta).await?;
        let report = report::committed(self.job, &point, disks, unprotected, started.elapsed());
        Ok(BackupReport { governor, store: self.repository.traffic(), ..report })
    }

    /// How each disk is read, and what that asks of the capture.
    fn prepare(
        &mut self,
        picked: Vec<(usize, SeenDisk)>,
        chain: Option<&ChainId>,
        writer: Option<&PointWriter>,
    ) -> Outcome<(Vec<Chosen>, Vec<Task>)> {
        let mut chosen = Vec::with_capacity(picked.len());
        let parents = self.parents(chain, &picked)?;
        for ((index, seen), parent) in picked.into_iter().zip(parents) {
            let damaged = match &parent {
                Some(point) => self.is_damaged(point, &seen)?,
                None => false,
            };
            let decision = decide(self.request.level, &seen, parent.as_ref(), damaged);
            chosen.push(Chosen { index, seen, decision });
        }
        self.require_no_fallback(&chosen)?;
        let parent = chosen.iter().filter_map(|disk| disk.decision.parent.clone()).max();
        self.job.record.parent = parent.map(|point| point.to_string());
        self.job.save(self.context)?;
        let tasks = chosen.iter().map(|disk| {
            let (index, base) = (disk.index, disk.decision.base.clone());
            Ok(Task { index, base, bitmap: self.bitmap(&disk.seen, writer)? })
        });
        let tasks = tasks.collect::<Outcome<_>>()?;
        Ok((chosen, tasks))
    }

    fn tried(&self) -> String {
        format!("back up {} to {}", self.request.vm, self.job.record.repository)
    }

    /// The disks that will be in the point; nothing is changed yet.
    fn pick(&self) -> Outcome<Vec<(usize, SeenDisk)>> {
        let seen = self.capture.disks();
        for named in self.request.disks.iter().chain(&self.request.exclude) {
            if !seen.iter().any(|disk| &disk.id == named) {
                let there: Vec<_> = seen.iter().map(|disk| disk.id.to_string()).collect();
                let why = format!("the VM has no disk {named}; it has {}", there.join(", "));
                return Err(Failure::usage(self.tried(), why));
            }
        }
        let mut picked = Vec::new();
        for (index, disk) in seen.iter().enumerate().filter(|(_, disk)| self.is_wanted(disk)) {
            match &disk.refusal {
                Some(_) if disk.read_only && !self.request.disks.contains(&disk.id) => {}
                Some(why) => {
                    return Err(Failure::refused(self.tried(), format!("disk {}: {why}", disk.id))
                        .next(format!("leave it out with --exclude-disk {}", disk.id)));
                }
                None => picked.push((index, disk.clone())),
            }
        }
        if picked.is_empty() {
            return Err(Failure::refused(self.tried(), "no disk of the VM can be backed up")
                .next("see 'icecore vm show' for the reason of each"));
        }
        Ok(picked)
    }

    fn is_wanted(&self, disk: &SeenDisk) -> bool {
        let named = self.request.disks.is_empty() || self.request.disks.contains(&disk.id);
        named && !self.request.exclude.contains(&disk.id)
    }

    fn require_no_fallback(&self, chosen: &[Chosen]) -> Outcome<()> {
        let fallback = chosen.iter().find(|disk| disk.decision.is_fallback());
        match (self.request.strict, fallback.and_then(|disk| disk.decision.doubt.zip(Some(disk)))) {
            (true, Some((doubt, disk))) => {
                Err(fallback_refused(&self.tried(), &disk.seen.id, doubt))
            }
            _ => Ok(()),
        }
    }

    /// The chain that grows; none for a new one.
    fn chain(&self) -> Outcome<Option<ChainId>> {
        if self.request.level == Level::Full {
            return match &self.request.chain {
                None => Ok(None),
                Some(_) => Err(Failure::usage(
                    self.tried(),
                    "--level full starts a chain of its own, so --chain cannot be kept",
                )),
            };
        }
        let failed = |e| Failure::from_repository(self.tried(), e);
        let newest = self.repository.newest_of(&self.request.vm, self.request.chain.as_ref());
        let found = newest.map_err(failed)?.map(|point| point.chain);
        match (&found, &self.request.chain, self.request.level) {
            (None, Some(chain), _) => {
                let why = format!("{} has no chain {chain}", self.request.vm);
                Err(Failure::refused(self.tried(), why).next("see 'icecore chain list'"))
            }
            (None, None, Level::Incremental) => {
                let why = format!(
                    "{} has no chain yet, and --level incremental never starts one",
                    self.request.vm
                );
                Err(Failure::refused(self.tried(), why).next("take a first point without --level"))
            }
            _ => Ok(found),
        }
    }

    /// The parent of each disk, in their order.
    fn parents(
        &self,
        chain: Option<&ChainId>,
        disks: &[(usize, SeenDisk)],
    ) -> Outcome<Vec<Option<Point>>> {
        let Some(chain) = chain else { return Ok(vec![None; disks.len()]) };
        let ids: Vec<&DiskId> = disks.iter().map(|(_, disk)| &disk.id).collect();
        self.repository
            .newest_with_disks(&self.request.vm, Some(chain), &ids)
            .map_err(|e| Failure::from_repository(self.tried(), e))
    }

    /// Whether a check has found damage in what the parent holds of a disk.
    fn is_damaged(&self, parent: &Point, disk: &SeenDisk) -> Outcome<bool> {
        match self.repository.disk_is_damaged(parent, &disk.id) {
            Ok(damaged) => Ok(damaged),
            Err(error) if error.damage().is_some() => Ok(true),
            Err(error) => Err(Failure::from_repository(self.tried(), error)),
        }
    }

    /// Begins the point; a dry run has none.
    fn begin(&mut self, chain: Option<ChainId>) -> Outcome<Option<PointWriter>> {
        self.job.record.chain = chain.as_ref().map(ToString::to_string);
        if self.request.dry_run {
            return Ok(None);
        }
        let chain = chain.map_or(ChainChoice::New, ChainChoice::Existing);
        let begin = BeginPoint { vm: self.request.vm.clone(), chain, now: Timestamp::now() };
        let writer = self
            .repository
            .begin_point(begin)
            .map_err(|e| Failure::from_repository(self.tried(), e))?;
        if let Some(bytes) = self.request.stored_limit {
            writer.limit_stored(bytes);
        }
        self.job.record.point = Some(writer.id().to_string());
        self.job.record.chain = Some(writer.chain().to_string());
        Ok(Some(writer))
    }

    /// The bitmap that a disk gets; none where none can record, and in a dry run.
    fn bitmap(&self, disk: &SeenDisk, writer: Option<&PointWriter>) -> Outcome<Option<BitmapName>> {
        let Some(writer) = writer.filter(|_| disk.records) else { return Ok(None) };
        let part = |text: String| NamePart::new(text).map_err(|e| Failure::failed(self.tried(), e));
        Ok(Some(BitmapName {
            repository: part(self.repository.id().to_string())?,
            chain: part(writer.chain().to_string())?,
            point: part(writer.id().to_string())?,
            disk: part(disk.id.to_string())?,
        }))
    }

    async fn capture_and_read(
        &mut self,
        chosen: &[Chosen],
        tasks: &[Task],
        writer: Option<&PointWriter>,
        watch: &mut Watch,
    ) -> Outcome<(Taken, Vec<disk::DiskResult>)> {
        watch.before_instant().await;
        let taken = self.capture.take(tasks).await?;
        watch.begin();
        self.interrupt.check(&self.tried())?;
        // Written beside: the guest is free again, and the disks need not wait for it.
        let noted = self.job.note_status(self.context, JobStatus::Captured);
        let read = self.read_disks(chosen, writer).await;
        noted.await.map_err(|e| Failure::failed(self.tried(), e))??;
        let results = match read {
            Ok(results) => results,
            Err(failure) => return Err(self.explained(failure).await),
        };
        self.capture.release().await?;
        Ok((taken, results))
    }

    /// What reading stumbled over may only be the consequence of something else.
    async fn explained(&self, failure: Failure) -> Failure {
        if failure.status != Status::Failed {
            return failure;
        }
        match self.capture.lost().await {
            Some(why) => Failure { why: format!("{why} ({})", failure.why), ..failure },
            None => failure,
        }
    }

    /// Binary parts of the capsule, which may hold secrets of the guest.
    fn parts(&self) -> Vec<CapsulePart> {
        let parts = self.capture.parts();
        if !parts.is_empty() && !self.repository.is_encrypted() {
            tracing::warn!(
                "the firmware's variables and the TPM's state may hold secrets and are stored in clear; \
                 an encrypted repository ('icecore repo init --encrypt') would seal them"
            );
        }
        parts
    }

    /// Ends a run that failed before its commit.
    async fn give_up(&mut self, writer: Option<PointWriter>, failure: Failure) -> Failure {
        let settled = self.capture.settle(Fate::NotCommitted).await;
        if let Some(writer) = writer {
            writer.abort();
        }
        match settled {
            Ok(()) => failure,
            // The first failure is the one to report; what could not be undone is added.
            Err(also) => {
                let why = format!("{}; {}", failure.why, also.why);
                Failure { why, unclean: failure.unclean || also.unclean, ..failure }
            }
        }
    }

    fn meta(&self, created_at: Timestamp, taken: &Taken, disks: Vec<DiskMeta>) -> PointMeta {
        PointMeta {
            created_at,
            captured_at: taken.captured_at,
            label: self.request.label.clone(),
            description: self.request.description.clone(),
            consistency: taken.consistency.clone(),
            capsule: self.capture.capsule(),
            disks,
            writer: WriterInfo {
                host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
                version: env!("CARGO_PKG_VERSION").into(),
            },
            parts: self.parts(),
        }
    }

    async fn commit(&mut self, writer: PointWriter, meta: PointMeta) -> Outcome<Point> {
        let committed = tokio::task::spawn_blocking(move || writer.commit(meta)).await;
        let committed = committed.map_err(|e| Failure::failed(self.tried(), e))?;
        let (fate, outcome) = match committed {
            Ok(point) => (Fate::Committed, Ok(point)),
            Err(e @ RepositoryError::CommitUnknown { .. }) => match self.confirm() {
                Some(point) => (Fate::Committed, Ok(point)),
                None => (Fate::Unknown, Err(e)),
            },
            Err(e) => (Fate::NotCommitted, Err(e)),
        };
        let settled = self.capture.settle(fate).await;
        let point = outcome.map_err(|e| Failure::from_repository(self.tried(), e))?;
        if let Err(failure) = settled {
            // The point is there; a bitmap too many costs nothing but room until the next run.
            tracing::warn!("the point is committed, but: {failure}");
        }
        Ok(point)
    }

    /// Asks the repository for a point whose commit ended in doubt.
    fn confirm(&self) -> Option<Point> {
        let id = self.job.record.point.as_ref()?.parse().ok()?;
        self.repository.confirm_point(&id).ok().flatten()
    }

    fn unprotected(&self, chosen: &[Chosen]) -> Vec<Unprotected> {
        let mut all = self.capture.unprotected();
        let seen = self.capture.disks().iter().enumerate();
        for (_, disk) in seen.filter(|(index, _)| !chosen.iter().any(|c| c.index == *index)) {
            let why = disk.refusal.clone().unwrap_or_else(|| "it was not asked for".into());
            all.push(Unprotected { disk: disk.id.to_string(), why });
        }
        all
    }
}

/// The granularity of new bitmaps: that of a point's blocks, within what QEMU allows.
pub fn granularity(repository: &Repository) -> Granularity {
    let block = u64::from(repository.block_size().bytes());
    Granularity::new(block).unwrap_or(Granularity::DEFAULT)
}

fn fallback_refused(tried: &str, disk: &DiskId, doubt: icecore_qmp::bitmap::Doubt) -> Failure {
    let why = format!("disk {disk} would be read whole ({}): {doubt}", doubt.name());
    Failure::failed(tried, why).next("allow it with --on-fallback run")
}
