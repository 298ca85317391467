//! Reading one disk of the instant into the point.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use icecore_io_engine::{
    BackupStats, EngineError, Lane, LaneSet, Options, PlanItem, ReadItem, backup, dry_run,
};
use icecore_nbd_client::Control;
use icecore_qmp::bitmap::BitmapName;
use icecore_repository::{
    BlockIndex, DiskId, DiskMeta, DiskReader, DiskStart, DiskWriter, Repository,
};

use super::side_by_side::Reading;
use super::{Chosen, fallback_refused, granularity};
use crate::capture::changes::{self, Scope};
use crate::capture::decide::{Decision, remembered};
use crate::capture::spool::Spool;
use crate::capture::trim::Trimmer;
use crate::capture::trust::{self, Trial};
use crate::capture::{Capture, Data, DirtyMap, Readable, Recorder};
use crate::data::{self, Activity};
use crate::failure::{Failure, Outcome};
use crate::nbd::{self, Lanes};
use crate::report::Latency;

/// Lanes on a spool, for the thread backend.
const SPOOL_LANES: usize = 2;

/// What is to be read of a disk.
type Items = Box<dyn Iterator<Item = PlanItem> + Send>;

/// What came of one disk.
#[derive(Debug, Clone)]
pub struct DiskResult {
    pub id: DiskId,
    pub decision: Decision,
    pub size_bytes: u64,
    pub dirty_bytes: u64,
    pub read_bytes: u64,
    pub zero_bytes: u64,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    pub sampled_blocks: u64,
    pub latency: Latency,
    pub took: Duration,
    identity: String,
    granularity: u64,
    recorder: Recorder,
}

impl DiskResult {
    /// The facts that the manifest keeps.
    pub fn meta(&self, bitmap: Option<&BitmapName>) -> DiskMeta {
        DiskMeta {
            disk: self.id.clone(),
            mode: self.decision.mode(),
            reason: self.decision.doubt.map(|doubt| doubt.name().to_owned()),
            dirty_bytes: self.dirty_bytes,
            read_bytes: self.read_bytes,
            zero_bytes: self.zero_bytes,
            sampled_blocks: self.sampled_blocks,
            identity: self.identity.clone(),
            bitmap: bitmap.map(ToString::to_string),
            granularity: bitmap.map(|_| self.granularity),
            seconds: self.took.as_secs_f64(),
            extra: bitmap.map(|_| remembered(self.recorder)).unwrap_or_default(),
        }
    }
}

/// What the data plane did, stored or not.
struct Moved {
    read_bytes: u64,
    zero_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
    latency: Latency,
}

impl<C: Capture> Reading<'_, C> {
    /// Reads the `at`-th chosen disk.
    pub(super) async fn disk(&self, at: usize, disk: &Chosen) -> Outcome<DiskResult> {
        let started = Instant::now();
        let parent = self.parent_reader(disk)?;
        let samples = match &parent {
            Some(parent) => trust::samples(parent, disk.seen.size_bytes, &self.tried)?,
            None => Vec::new(),
        };
        let base = disk.decision.base.as_ref();
        let readable = self.capture.lock().await.open(at, base, &samples).await?;
        let (decision, trial) = self.trusted(disk, parent.as_ref(), &readable, &samples).await?;
        let readable = match (&decision.base, base) {
            (None, Some(_)) => self.capture.lock().await.open(at, None, &[]).await?,
            _ => readable,
        };
        if let Some(doubt) = decision.doubt {
            tracing::info!(disk = %disk.seen.id, reason = doubt.name(), "read whole: {doubt}");
        }
        self.check()?;
        let (moved, dirty_bytes) = self.move_data(at, disk, &decision, &readable).await?;
        self.capture.lock().await.close(at);
        let identity = match self.parent_identity(&decision, &disk.seen.id)? {
            Some(parent) => disk.seen.identity_beside(&parent).to_string(),
            None => disk.seen.identity.to_string(),
        };
        Ok(DiskResult {
            id: disk.seen.id.clone(),
            size_bytes: readable.size_bytes,
            dirty_bytes: if decision.base.is_some() { dirty_bytes } else { readable.size_bytes },
            decision,
            read_bytes: moved.read_bytes,
            zero_bytes: moved.zero_bytes,
            new_bytes: moved.new_bytes,
            stored_bytes: moved.stored_bytes,
            sampled_blocks: trial.sampled_blocks,
            latency: moved.latency,
            took: started.elapsed(),
            identity,
            granularity: disk.seen.recorder.granularity(granularity(self.repository)).bytes(),
            recorder: disk.seen.recorder,
        })
    }

    fn parent_identity(
        &self,
        decision: &Decision,
        disk: &DiskId,
    ) -> Outcome<Option<icecore_qmp::inventory::Identity>> {
        let Some(parent) = &decision.parent else { return Ok(None) };
        let point =
            self.repository.point(parent).map_err(|e| Failure::from_repository(&self.tried, e))?;
        let meta = point.meta.disks.into_iter().find(|meta| &meta.disk == disk);
        Ok(meta.map(|meta| icecore_qmp::inventory::Identity(meta.identity)))
    }

    /// The parent of a disk that is to be read incrementally.
    fn parent_reader(&self, disk: &Chosen) -> Outcome<Option<DiskReader>> {
        let (Some(_), Some(parent)) = (&disk.decision.base, &disk.decision.parent) else {
            return Ok(None);
        };
        let failed = |e| Failure::from_repository(&self.tried, e);
        let point = self.repository.point(parent).map_err(failed)?;
        self.repository.disk_reader(&point, &disk.seen.id).map(Some).map_err(failed)
    }

    /// Tests the bitmap that the decision relies on; what contradicts it makes the read whole.
    async fn trusted(
        &self,
        disk: &Chosen,
        parent: Option<&DiskReader>,
        readable: &Readable,
        samples: &[Range<u64>],
    ) -> Outcome<(Decision, Trial)> {
        let decision = disk.decision.clone();
        let (Some(base), Some(parent)) = (&decision.base, parent) else {
            return Ok((decision, Trial { doubt: None, sampled_blocks: 0 }));
        };
        let paranoid = self.request.paranoid;
        let (repository, tried) = (self.repository, &self.tried);
        let trial =
            trust::test(repository, parent, readable, base, samples, paranoid, tried).await?;
        match trial.doubt {
            None => Ok((decision, trial)),
            Some(doubt) => {
                tracing::warn!(disk = %disk.seen.id, "{doubt}; the disk is read whole");
                if self.request.strict {
                    return Err(fallback_refused(&self.tried, &disk.seen.id, doubt));
                }
                Ok((decision.whole(doubt), trial))
            }
        }
    }

    async fn move_data(
        &self,
        at: usize,
        disk: &Chosen,
        decision: &Decision,
        readable: &Readable,
    ) -> Outcome<(Moved, u64)> {
        let tried = format!("read disk {} of {}", disk.seen.id, self.request.vm);
        let (lanes, items) = self.source(decision, readable, &tried).await?;
        let set =
            LaneSet::new(lanes.set, self.context.engine).map_err(|e| Failure::failed(&tried, e))?;
        let _hang_up = lanes.hang_up;
        let (items, counted) = Counted::new(items);
        let activity = self.activity.clone();
        let mut options = self.memory.options(&activity.stop);
        options.control.pulse = Arc::clone(&activity.pulse);
        options.control.pacing = Arc::clone(&self.pacing);
        options.priority = self.request.priority;
        options.control.progress = Arc::clone(&self.counted[at]);
        let run = DataRun { set, items, options, size: readable.size_bytes, activity };
        let moved = match self.writer {
            None => run.hash_only(self.repository).await,
            Some(writer) => {
                let start = DiskStart {
                    disk: disk.seen.id.clone(),
                    size_bytes: readable.size_bytes,
                    parent: decision.parent.clone(),
                };
                let disk_writer =
                    writer.disk(start).map_err(|e| Failure::from_repository(&tried, e))?;
                run.store(self.repository, disk_writer, &readable.data).await
            }
        };
        let moved = moved.map_err(|e| data_failure(&tried, e))?;
        // With what was pushed came samples, which did not change.
        let dirty_bytes = match &readable.dirty {
            Some(DirtyMap::Listed(dirty)) => dirty.iter().map(|d| d.end - d.start).sum(),
            _ => counted.load(Ordering::Relaxed),
        };
        Ok((moved, dirty_bytes))
    }

    /// Where a disk's data come from, and what of them is to be read.
    async fn source(
        &self,
        decision: &Decision,
        readable: &Readable,
        tried: &str,
    ) -> Outcome<(Lanes, Items)> {
        match &readable.data {
            Data::Export(uri) => {
                let bitmap = match &readable.dirty {
                    Some(DirtyMap::Export { bitmap }) => Some(bitmap.as_str()),
                    _ => None,
                };
                let control = nbd::control(uri, bitmap, tried).await?;
                require_size(&control, readable.size_bytes, tried)?;
                let scope = match (&decision.base, bitmap) {
                    (Some(base), Some(name)) => {
                        Scope::Bitmap { name: name.into(), grown_from: base.size_bytes }
                    }
                    _ => Scope::Whole,
                };
                let changes = changes::stream(control, scope, readable.size_bytes);
                Ok((nbd::lanes(uri, tried).await?, Box::new(changes)))
            }
            Data::Spool(spool) => {
                require_all_pushed(spool, decision, readable, tried)?;
                let file = spool.file().map_err(|e| Failure::failed(tried, e))?;
                let set = Lane::files(file, SPOOL_LANES).map_err(|e| Failure::failed(tried, e))?;
                let lanes = Lanes { set, hang_up: Vec::new() };
                Ok((lanes, Box::new(spool.items().into_iter().map(Ok))))
            }
        }
    }
}

/// One run of the data plane over a disk.
struct DataRun<I> {
    set: LaneSet,
    items: I,
    options: Options,
    size: u64,
    activity: Activity,
}

impl<I: Iterator<Item = PlanItem> + Send + 'static> DataRun<I> {
    /// Reads and hashes, stores nothing.
    async fn hash_only(self, repository: &Repository) -> Result<Moved, EngineError> {
        let Self { mut set, items, options, size, activity } = self;
        let (block_size, hasher) = (repository.block_size(), repository.hasher());
        data::watched(&activity, move || {
            let stats = dry_run(&mut set, size, block_size, hasher, items, &options)?;
            let counted = &options.control.progress;
            Ok(Moved {
                read_bytes: counted.read_bytes.load(Ordering::Relaxed),
                zero_bytes: counted.zero_bytes.load(Ordering::Relaxed),
                new_bytes: 0,
                stored_bytes: 0,
                latency: data::latency(&stats.latency),
            })
        })
        .await
    }

    /// Reads and stores; gives scratch space back as packs become durable.
    async fn store(
        self,
        repository: &Repository,
        writer: DiskWriter,
        source: &Data,
    ) -> Result<Moved, EngineError> {
        let Self { mut set, items, options, size, activity } = self;
        let block_size = repository.block_size();
        let block = u64::from(block_size.bytes());
        let trimmer = match source {
            Data::Export(uri) => Trimmer::start(uri).await,
            Data::Spool(_) => None,
        };
        let mark = trimmer.as_ref().map_or_else(Arc::default, Trimmer::mark);
        let durable = move |index: BlockIndex| {
            mark.store(index.0.saturating_mul(block).min(size), Ordering::Relaxed);
        };
        let stored = data::watched(&activity, move || {
            let stats = backup(&mut set, size, block_size, writer, items, &options, durable);
            stats.map(|stats| moved(&stats))
        })
        .await;
        if let Some(trimmer) = trimmer {
            trimmer.stop().await;
        }
        stored
    }
}

/// A granule that is dirty and was not wholly pushed fails the disk.
fn require_all_pushed(
    spool: &Spool,
    decision: &Decision,
    readable: &Readable,
    tried: &str,
) -> Outcome<()> {
    let (Some(base), Some(DirtyMap::Listed(dirty))) = (&decision.base, &readable.dirty) else {
        return Ok(());
    };
    let grown = base.size_bytes..readable.size_bytes;
    for range in dirty.iter().chain((!grown.is_empty()).then_some(&grown)) {
        if let Some(at) = spool.missing(range.start, range.end - range.start) {
            let why = format!("the byte at {at} changed and QEMU did not push it");
            return Err(Failure::failed(tried, why));
        }
    }
    Ok(())
}

fn moved(stats: &BackupStats) -> Moved {
    Moved {
        read_bytes: stats.read_bytes,
        zero_bytes: stats.summary.zero_bytes,
        new_bytes: stats.summary.new_bytes,
        stored_bytes: stats.summary.stored_bytes,
        latency: data::latency(&stats.latency),
    }
}

/// The size is asked again where the data come from: a disk that changed since is not read.
fn require_size(control: &Control, size: u64, tried: &str) -> Outcome<()> {
    match control.export().size_bytes {
        found if found == size => Ok(()),
        found => {
            let why = format!("the disk changed its size from {size} to {found} bytes");
            Err(Failure::failed(tried, why).next("take the backup again"))
        }
    }
}

/// What a failed read means for the user.
fn data_failure(tried: &str, error: EngineError) -> Failure {
    let text = error.to_string();
    match error {
        EngineError::Cancelled => Failure::interrupted(tried),
        EngineError::Repository { source, .. } => Failure::from_repository(tried, source),
        EngineError::Io { cause: icecore_io_engine::Cause::Wire(wire), .. }
            if wire.errno == Some(rustix::io::Errno::INVAL.raw_os_error()) =>
        {
            Failure::failed(
                tried,
                format!(
                    "QEMU gave the snapshot up ({text}): the scratch is full, or its storage \
                     answered too slowly for the guest's writes, which went on"
                ),
            )
            .next("give more room with --scratch-limit or another --scratch directory")
        }
        _ => Failure::failed(tried, text),
    }
}

/// Counts the bytes that a plan names while it passes them on.
struct Counted<I> {
    items: I,
    dirty: Arc<std::sync::atomic::AtomicU64>,
}

impl<I> Counted<I> {
    fn new(items: I) -> (Self, Arc<std::sync::atomic::AtomicU64>) {
        let dirty = Arc::default();
        (Self { items, dirty: Arc::clone(&dirty) }, dirty)
    }
}

impl<I: Iterator<Item = PlanItem>> Iterator for Counted<I> {
    type Item = PlanItem;

    fn next(&mut self) -> Option<PlanItem> {
        let item = self.items.next()?;
        if let Ok(ReadItem::Data(span) | ReadItem::Zero(span)) = &item {
            self.dirty.fetch_add(span.len, Ordering::Relaxed);
        }
        Some(item)
    }
}
