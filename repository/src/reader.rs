//! One disk of a point, read as a stream of its DATA blocks.

use std::sync::Arc;

use crate::content::FANOUT;
use crate::decoder::{BlockDecoder, JOURNEY_BYTES_MAX, Manner};
use crate::envelope::Form;
use crate::error::{Damage, DamageKind, Result};
use crate::geometry::{BlockIndex, BlockSize};
use crate::ids::{BlockId, ContentRoot};
use crate::map::scrub_stored;
use crate::map::{
    MapView, PAGE_BLOCKS, PageCursor, PageSlots, REGION_BLOCKS, RunReader, Slot, empty_page,
};
use crate::names;
use crate::point::{Entry, PointDisk, RunRef};
use crate::repository::Inner;
use crate::store::Store;

/// A disk of a point.
pub struct DiskReader {
    inner: Arc<Inner>,
    disk: PointDisk,
    blocks: u64,
    runs: Vec<Arc<RunReader>>,
}

/// Opens the runs of a map, newest first.
pub(crate) fn open_runs(inner: &Inner, runs: &[RunRef]) -> Result<Vec<Arc<RunReader>>> {
    runs.iter().map(|run| Ok(Arc::new(open_run(inner, run)?))).collect()
}

/// Opens a run of a map, with what this host may have kept of it.
pub(crate) fn open_run(inner: &Inner, run: &RunRef) -> Result<RunReader> {
    let open = |store: &Arc<dyn Store>| RunReader::open(store, &inner.sealing, run);
    let form = if inner.config.is_encrypted() { Form::Encrypted } else { Form::Plain };
    let is_sound = |store: &Arc<dyn Store>| {
        scrub_stored(store, form, &inner.config.id, run.run, run.bytes).is_ok()
    };
    inner.open_kept(&names::run(run.run)?, open, is_sound)
}

/// Opens the runs of a map at the store, for whoever builds upon them: what this host has kept says
/// nothing of whether they are still there.
pub(crate) fn open_stored_runs(inner: &Inner, runs: &[RunRef]) -> Result<Vec<Arc<RunReader>>> {
    let open = |run| Ok(Arc::new(RunReader::open(&inner.store, &inner.sealing, run)?));
    runs.iter().map(open).collect()
}

impl DiskReader {
    pub(crate) fn open(inner: Arc<Inner>, disk: &PointDisk) -> Result<Self> {
        let runs = open_runs(&inner, &disk.runs)?;
        let blocks = inner.config.block_size.blocks(disk.size_bytes)?;
        Ok(Self { inner, disk: disk.clone(), blocks, runs })
    }

    /// Size of the disk at the point's instant.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.disk.size_bytes
    }

    /// Size of its blocks.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.inner.config.block_size
    }

    /// Proof of its content.
    #[must_use]
    pub fn content_root(&self) -> ContentRoot {
        self.disk.content_root
    }

    /// How many blocks it has.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What its map says of block after block, asked in ascending order.
    pub(crate) fn cursor(&self) -> PageCursor {
        PageCursor::new(&self.runs)
    }

    /// The DATA blocks from `from` on, ascending; everything else is zero.
    #[must_use]
    pub fn entries(&self, from: BlockIndex) -> Entries {
        Entries { cursor: PageCursor::new(&self.runs), next: Some(from), blocks: self.blocks }
    }

    /// The blocks whose content differs between two disks, ascending. What lies beyond the end of
    /// one of them counts as zero there; a last block of another length differs unless it is zero.
    #[must_use]
    pub fn diff(&self, other: &Self) -> Diff {
        Diff {
            views: [MapView::new(&self.runs), MapView::new(&other.runs)],
            region: 0,
            found: Vec::new().into_iter(),
        }
    }

    /// Something that fetches the blocks of the entries; one per thread.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn decoder(&self) -> Result<BlockDecoder> {
        BlockDecoder::new(Arc::clone(&self.inner), self.disk.size_bytes, Manner::Stepwise)
    }

    /// As [`decoder`](Self::decoder), for those who know what they need and ask for much of it at
    /// once, from [`fetchers`](Self::fetchers) threads.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn fetcher(&self) -> Result<BlockDecoder> {
        BlockDecoder::new(Arc::clone(&self.inner), self.disk.size_bytes, Manner::Planned)
    }

    /// How many fetchers are worth having, and how many bytes of the disk each had better be asked
    /// for at once: where each request is a journey, several overlap, and each brings much.
    #[must_use]
    pub fn fetchers(&self) -> (usize, u64) {
        match self.inner.store.readers() {
            0 => (1, 0),
            several => (several, JOURNEY_BYTES_MAX),
        }
    }
}

/// See [`DiskReader::entries`]. After an error it ends.
pub struct Entries {
    cursor: PageCursor,
    next: Option<BlockIndex>,
    blocks: u64,
}

impl Entries {
    fn step(&mut self) -> Result<Option<Entry>> {
        let Some(mut at) = self.next.take() else { return Ok(None) };
        while let Some(start) = self.cursor.next_mentioned(at)? {
            let page_end = (start.0 / PAGE_BLOCKS + 1) * PAGE_BLOCKS;
            for index in (start.0..page_end).map(BlockIndex) {
                if let Some(Slot::Data(id, location)) = self.cursor.slot(index)? {
                    self.check(index)?;
                    self.next = Some(BlockIndex(index.0 + 1));
                    return Ok(Some(Entry { index, id, location }));
                }
            }
            at = BlockIndex(page_end);
        }
        Ok(None)
    }

    fn check(&self, index: BlockIndex) -> Result<()> {
        if index.0 < self.blocks {
            return Ok(());
        }
        let detail = format!("{index} lies beyond the end of the disk");
        Err(Damage::new("the map of a disk", DamageKind::Inconsistent, detail).into())
    }
}

impl Iterator for Entries {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

/// See [`DiskReader::diff`]. Skips equal regions and pages by their hashes. After an error it ends.
pub struct Diff {
    views: [MapView; 2],
    region: u32,
    found: std::vec::IntoIter<BlockIndex>,
}

impl Diff {
    fn step(&mut self) -> Result<Option<BlockIndex>> {
        loop {
            if let Some(index) = self.found.next() {
                return Ok(Some(index));
            }
            let next = self.views.iter().filter_map(|view| view.next_region(self.region)).min();
            let Some(number) = next else { return Ok(None) };
            self.region = number + 1;
            if self.views[0].node(number) != self.views[1].node(number) {
                self.found = self.compare_region(number)?.into_iter();
            }
        }
    }

    /// The differing blocks of one region: at most 65,536 of them.
    fn compare_region(&mut self, number: u32) -> Result<Vec<BlockIndex>> {
        let [left, right] = &mut self.views;
        let regions = [left.region(number)?, right.region(number)?];
        let mut differing = Vec::new();
        for page in 0..=u8::MAX {
            if regions[0].leaf(page) == regions[1].leaf(page) {
                continue;
            }
            let (mut one, mut two) = (empty_page(), empty_page());
            left.lay(&regions[0], page, &mut one)?;
            right.lay(&regions[1], page, &mut two)?;
            let first = u64::from(number) * REGION_BLOCKS + u64::from(page) * PAGE_BLOCKS;
            let differs = |at: &usize| id(&one, *at) != id(&two, *at);
            let blocks = (0..FANOUT).filter(differs).map(|at| BlockIndex(first + at as u64));
            differing.extend(blocks);
        }
        Ok(differing)
    }
}

fn id(slots: &PageSlots, at: usize) -> BlockId {
    match slots[at] {
        Some(Slot::Data(id, _)) => id,
        Some(Slot::Zero) | None => BlockId::ZERO,
    }
}

impl Iterator for Diff {
    type Item = Result<BlockIndex>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.region = u32::MAX;
        }
        step.transpose()
    }
}
