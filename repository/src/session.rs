//! What the hands of one point writer share: the open pack, the dedup index, the first failure.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::block::Compression;
use crate::dedup::LazyDedup;
use crate::error::{Error, Result};
use crate::geometry::BlockSize;
use crate::ids::{BlockId, DiskId, PackId, PointId, RunId};
use crate::map::{DeltaWriter, RunReader, RunWriter};
use crate::packs::Packs;
use crate::point::{DiskSummary, Frame, Location};
use crate::repository::{Inner, random};
use crate::sink::Parent;

/// Where a new block went.
pub(crate) struct Placed {
    pub(crate) location: Location,
    /// False when another disk or worker had stored it meanwhile.
    pub(crate) stored: bool,
    /// Number of the pack it lies in, if that may not be durable yet.
    pub(crate) open_pack: Option<u64>,
}

/// A disk that waits for the commit.
pub(crate) struct FinishedDisk {
    pub(crate) disk: DiskId,
    pub(crate) size_bytes: u64,
    pub(crate) parent_id: Option<PointId>,
    pub(crate) parent: Option<Parent>,
    pub(crate) run: RunWriter,
    pub(crate) summary: DiskSummary,
}

#[derive(Default)]
struct Disks {
    started: BTreeSet<DiskId>,
    order: Vec<DiskId>,
    finished: Vec<FinishedDisk>,
}

/// What a point may store, where there is a limit, and what it has stored.
#[derive(Default)]
struct Allowance(OnceLock<(u64, AtomicU64)>);

/// Shared by the hands of one point writer.
pub(crate) struct Session {
    pub(crate) inner: Arc<Inner>,
    pub(crate) point: PointId,
    pub(crate) dedup: LazyDedup,
    /// Damaged packs: what lies in them is stored anew.
    pub(crate) quarantined: BTreeSet<PackId>,
    packs: Mutex<Packs>,
    disks: Mutex<Disks>,
    failure: Mutex<Option<String>>,
    allowance: Allowance,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    pub(crate) fn new(
        inner: Arc<Inner>,
        point: PointId,
        dedup: LazyDedup,
        quarantined: BTreeSet<PackId>,
    ) -> Self {
        let (packs, disks, failure, allowance) = Default::default();
        Self { inner, point, dedup, quarantined, packs, disks, failure, allowance }
    }

    /// Allows the point to store so many bytes of blocks and no more.
    pub(crate) fn allow(&self, bytes: u64) {
        self.allowance.0.get_or_init(|| (bytes, AtomicU64::new(0)));
    }

    /// Counts bytes of a block that was stored against what is allowed.
    pub(crate) fn spend(&self, bytes: u64) -> Result<()> {
        let Some((limit, spent)) = self.allowance.0.get() else { return Ok(()) };
        let before = spent.fetch_add(bytes, Ordering::Relaxed);
        self.guard(|| match before.checked_add(bytes) {
            Some(sum) if sum <= *limit => Ok(()),
            _ => Err(Error::OverLimit { point: self.point.clone(), bytes: *limit }),
        })
    }

    pub(crate) fn compression(&self) -> Compression {
        self.inner.config.compression
    }

    pub(crate) fn block_size(&self) -> BlockSize {
        self.inner.config.block_size
    }

    pub(crate) fn run_writer(&self) -> Result<RunWriter> {
        let store = Arc::clone(&self.inner.store);
        RunWriter::new(store, &self.inner.sealing, RunId(random()?))
    }

    pub(crate) fn delta(&self, parent: Option<&[Arc<RunReader>]>) -> Result<DeltaWriter> {
        Ok(DeltaWriter::new(parent, self.run_writer()?))
    }

    /// Runs something whose failure makes the whole point worthless.
    pub(crate) fn guard<T>(&self, operation: impl FnOnce() -> Result<T>) -> Result<T> {
        operation().inspect_err(|error| {
            lock(&self.failure).get_or_insert_with(|| error.to_string());
        })
    }

    /// Fails when anything before has failed: what was written then cannot be trusted.
    pub(crate) fn check_sound(&self) -> Result<()> {
        match &*lock(&self.failure) {
            None => Ok(()),
            Some(why) => Err(Error::Poisoned { point: self.point.clone(), why: why.clone() }),
        }
    }

    /// Stores a new block, unless somebody did meanwhile.
    pub(crate) fn place(&self, id: &BlockId, frame: &Frame) -> Result<Placed> {
        self.guard(|| {
            let mut packs = lock(&self.packs);
            if let Some(location) = self.dedup.find(id) {
                let open_pack = packs.number_if_not_durable(location.pack);
                return Ok(Placed { location, stored: false, open_pack });
            }
            let (location, number) = packs.push(&self.inner, id, frame)?;
            self.dedup.insert(id, location);
            Ok(Placed { location, stored: true, open_pack: Some(number) })
        })
    }

    /// The number of this pack if it is one of ours that is not durable.
    pub(crate) fn open_pack(&self, pack: PackId) -> Option<u64> {
        lock(&self.packs).number_if_not_durable(pack)
    }

    /// The number of packs that are known to be durable.
    pub(crate) fn durable_packs(&self) -> u64 {
        lock(&self.packs).durable()
    }

    /// What is known of blocks in durable packs, to be saved, where it is more than was loaded.
    pub(crate) fn save_dedup(&self) -> Option<Vec<u8>> {
        // Held for so long, so that no pack is begun meanwhile.
        let packs = lock(&self.packs);
        self.dedup.save_if_more(|pack| packs.number_if_not_durable(pack).is_none())
    }

    /// All packs of this point.
    pub(crate) fn own_packs(&self) -> BTreeSet<PackId> {
        lock(&self.packs).made().clone()
    }

    pub(crate) fn is_durable(&self, pack: u64) -> bool {
        self.durable_packs() > pack
    }

    /// Makes all packs durable; returns packs and bytes written.
    pub(crate) fn close_packs(&self) -> Result<(u64, u64)> {
        self.guard(|| lock(&self.packs).close_all())
    }

    /// Notes that a disk is begun; false when it was before.
    pub(crate) fn start(&self, disk: &DiskId) -> bool {
        let mut disks = lock(&self.disks);
        let new = disks.started.insert(disk.clone());
        if new {
            disks.order.push(disk.clone());
        }
        new
    }

    pub(crate) fn finished(&self, disk: FinishedDisk) {
        lock(&self.disks).finished.push(disk);
    }

    /// All finished disks in the order in which they were started, or the first unfinished one.
    pub(crate) fn take_finished(&self) -> Result<Vec<FinishedDisk>, DiskId> {
        let mut disks = lock(&self.disks);
        let mut finished = std::mem::take(&mut disks.finished);
        let place = |disk: &DiskId| disks.order.iter().position(|started| started == disk);
        finished.sort_by_key(|disk| place(&disk.disk));
        let open = disks.order.iter().find(|id| !finished.iter().any(|disk| &disk.disk == *id));
        match open {
            Some(open) => Err(open.clone()),
            None => Ok(finished),
        }
    }
}
