//! The instant: room for scratch, freeze, backup job and checkpoint, thaw.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use icecore_repository::{Consistency, ConsistencyLevel};

use super::{Freeze, LibvirtCapture, owner};
use crate::capture::Task;
use crate::capture::scratch::{FREE_PERCENT_MIN, ScratchDir, Space, space};
use crate::failure::{Failure, Outcome};
use crate::libvirt::Kind;
use crate::libvirt::checkpoint::{self, CheckpointName};
use crate::libvirt::job::{self, JobDisk};
use crate::libvirt::xml::Agent;
use crate::names::human_bytes;

/// The guest stays frozen no longer than this whatever happens to us: beginning a job takes 0.3 s.
const FROZEN_MAX: Duration = Duration::from_secs(10);
/// The job ends when scratch has taken so many per cent of what it may take: a guest that writes
/// 2 GB/s writes 200 MB until that is noticed.
const WATERMARK_PERCENT: u64 = 75;
/// The job ends when its file system has less than this share free.
const RESERVE_PERCENT: u64 = 5;

/// The files that are handed to libvirt.
pub(super) struct Prepared {
    job: PathBuf,
    checkpoint: Option<PathBuf>,
}

/// How the freeze went.
pub(super) struct Frozen {
    filesystems: u32,
    why_not: Option<String>,
    /// The guest may be frozen.
    pending: bool,
}

impl LibvirtCapture {
    /// Everything that can be done before the guest is frozen.
    pub(super) fn prepare(&mut self) -> Outcome<Prepared> {
        let owner = owner(&self.description);
        let scratch = ScratchDir::make(&self.settings.scratch, &self.settings.run, owner)?;
        let space = space(scratch.path())?;
        let tried = self.settings.tried.clone();
        let sizes = self.tasks.iter().map(|task| self.disks[task.index].size_bytes);
        let limits = Limits::of(sizes, self.settings.scratch_limit, space, &tried)?;
        let path_of = |target: &str| scratch.path().join(format!("{target}.qcow2"));
        let disks: Vec<JobDisk> = self
            .tasks
            .iter()
            .map(|task| {
                let target = self.target(task).target.clone();
                let since = task.base.as_ref().map(|base| CheckpointName::of(&base.bitmap));
                JobDisk { scratch: path_of(&target), target, since }
            })
            .collect();
        let socket = scratch.path().join("nbd.sock");
        let (_, others) = self.split_targets(|_| true);
        let request = job::request(&socket, &disks, &others);
        let prepared = Prepared {
            job: file(scratch.path(), "job.xml", &request, &tried)?,
            checkpoint: self.prepare_checkpoint(scratch.path(), &tried)?,
        };
        let files = disks.into_iter().map(|disk| disk.scratch).collect();
        let places = (socket.as_path(), scratch.path());
        self.warden.job(places, files, limits.watermark, limits.reserve, &tried)?;
        self.job = true;
        self.scratch = Some(scratch);
        Ok(prepared)
    }

    fn prepare_checkpoint(&mut self, dir: &Path, tried: &str) -> Outcome<Option<PathBuf>> {
        let bitmap = self.tasks.iter().find_map(|task| task.bitmap.as_ref());
        let Some(name) = bitmap.map(CheckpointName::of) else { return Ok(None) };
        let (covered, others) = self.split_targets(|task: &Task| task.bitmap.is_some());
        let request = checkpoint::request(&name, &covered, &others);
        let path = file(dir, "checkpoint.xml", &request, tried)?;
        self.checkpoint = Some(name);
        Ok(Some(path))
    }

    /// Freezes the guest where that is wanted and possible.
    pub(super) fn freeze(&self) -> Outcome<Frozen> {
        let (limit, required) = match self.settings.freeze {
            Freeze::No => return Ok(Frozen::not("no freeze was asked for")),
            Freeze::Try(limit) => (limit, false),
            Freeze::Require(limit) => (limit, true),
        };
        let frozen = match (self.was_running, self.description.agent) {
            (false, _) => Frozen::not("the domain is paused"),
            (_, Agent::None) => Frozen::not("the domain has no channel for a guest agent"),
            (_, Agent::Silent) => Frozen::not("no guest agent has opened its channel"),
            (true, Agent::Connected) => self.freeze_within(limit)?,
        };
        if !required || frozen.filesystems > 0 {
            return Ok(frozen);
        }
        let why = frozen.why_not.clone().unwrap_or_else(|| "the agent froze nothing".into());
        let (_, thawed) = self.thaw(frozen, Instant::now());
        thawed?;
        Err(Failure::failed(&self.settings.tried, format!("the guest was not frozen: {why}")))
    }

    fn freeze_within(&self, limit: Duration) -> Outcome<Frozen> {
        self.warden.freezing(limit + FROZEN_MAX, &self.settings.tried)?;
        Ok(match self.domain.freeze(limit) {
            Ok(0) => {
                let none = "the agent found no filesystem to freeze".to_owned();
                Frozen { filesystems: 0, why_not: Some(none), pending: true }
            }
            Ok(filesystems) => Frozen { filesystems, why_not: None, pending: true },
            // It may still freeze: what was asked for cannot be taken back.
            Err(e) => {
                let pending = e.kind != Kind::Agent;
                Frozen { filesystems: 0, why_not: Some(e.to_string()), pending }
            }
        })
    }

    /// Begins the job and, in the same instant, the checkpoint.
    pub(super) fn begin(&self, prepared: &Prepared) -> Outcome<()> {
        let begun = self.domain.begin_backup(&prepared.job, prepared.checkpoint.as_deref());
        begun.map_err(|e| {
            let unknown = matches!(e.kind, Kind::TimedOut | Kind::Unreachable);
            let failure = e.failure(&self.settings.tried);
            // It may begin yet: the next start of any command looks again.
            if unknown { failure.unclean() } else { failure }
        })
    }

    /// Thaws; gives what the instant was worth and whether the guest is known to run on.
    pub(super) fn thaw(&self, frozen: Frozen, started: Instant) -> (Consistency, Outcome<()>) {
        let mut thawed = Ok(());
        let mut why = frozen.why_not;
        let mut filesystems = frozen.filesystems;
        if frozen.pending {
            match self.domain.thaw() {
                Ok(0) if filesystems > 0 => {
                    filesystems = 0;
                    why = Some("the guest was thawed before its disks were held still".into());
                    thawed = self.warden.thawed(&self.settings.tried);
                }
                Ok(_) => thawed = self.warden.thawed(&self.settings.tried),
                // The warden goes on trying.
                Err(e) => tracing::warn!("the guest is not known to be thawed yet: {e}"),
            }
        } else if self.settings.freeze != Freeze::No {
            thawed = self.warden.thawed(&self.settings.tried);
        }
        let froze = filesystems > 0;
        let consistency = Consistency {
            level: if froze { ConsistencyLevel::Filesystem } else { ConsistencyLevel::Crash },
            frozen_filesystems: filesystems,
            freeze_ms: if froze { started.elapsed().as_secs_f64() * 1000.0 } else { 0.0 },
            pause_ms: 0.0,
            why: if froze { None } else { why },
        };
        (consistency, thawed)
    }
}

impl Frozen {
    fn not(why: &str) -> Self {
        Self { filesystems: 0, why_not: Some(why.into()), pending: false }
    }
}

/// When the warden ends the job.
struct Limits {
    watermark: u64,
    reserve: u64,
}

impl Limits {
    /// Whole disks have to fit; with less by the operator's word, the job ends well before it is
    /// used up.
    fn of(
        sizes: impl Iterator<Item = u64>,
        limit: Option<u64>,
        space: Space,
        tried: &str,
    ) -> Outcome<Self> {
        // A qcow2 of a disk needs some more than the disk: 1 MiB and 0.1 %.
        let whole = |size: u64| size.saturating_add(size / 1024).saturating_add(1 << 20);
        let needed: u64 = sizes.map(|size| whole(size).min(limit.unwrap_or(u64::MAX))).sum();
        let room = space.free.saturating_sub(space.total / 100 * FREE_PERCENT_MIN);
        if needed > room {
            let why = format!(
                "libvirt's backup needs room for all that the guest may overwrite: {} of scratch, and \
                 there are {} ({FREE_PERCENT_MIN} % of the file system stay free)",
                human_bytes(needed),
                human_bytes(room)
            );
            return Err(Failure::failed(tried, why).next(
                "name a directory with more room with --scratch, or say with --scratch-limit how \
                 much may be used: the backup is given up well before that is full",
            ));
        }
        let watermark = match limit {
            Some(_) => needed / 100 * WATERMARK_PERCENT,
            None => u64::MAX,
        };
        Ok(Self { watermark, reserve: space.total / 100 * RESERVE_PERCENT })
    }
}

fn file(dir: &Path, name: &str, text: &str, tried: &str) -> Outcome<PathBuf> {
    let path = dir.join(name);
    std::fs::write(&path, text).map_err(|e| Failure::failed(tried, e))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_disks_have_to_fit_unless_the_operator_says_otherwise() {
        let space = Space { free: 40 << 30, total: 100 << 30 };
        let limits = |limit| Limits::of([64 << 30, 1 << 30].into_iter(), limit, space, "t");
        let refused = limits(None).err().unwrap();
        assert!(refused.why.contains("room"), "{refused}");
        let watermark = limits(Some(2 << 30)).unwrap().watermark;
        assert!(watermark < 3 << 30 && watermark > 2 << 30, "{watermark}");
        let small = Limits::of([1 << 30].into_iter(), None, space, "t").unwrap();
        assert_eq!((small.watermark, small.reserve), (u64::MAX, space.total / 100 * 5));
    }
}
