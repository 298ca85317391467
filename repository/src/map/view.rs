//! Several runs laid over each other, newest first, walked in ascending order.

use std::sync::Arc;

use crate::content::{FANOUT, NodeHash, ZERO_NODE};
use crate::error::Result;
use crate::geometry::BlockIndex;

use super::layout::IndexRecord;
use super::reader::{RunCursor, RunReader};
use super::{PAGE_BLOCKS, PageSlots, REGION_PAGES, Slot, empty_page};

/// A map as one user walks it.
pub(crate) struct MapView {
    cursors: Vec<RunCursor>,
}

/// One region of a map with the indexes of all runs that matter in it.
pub(crate) struct Region {
    pub(crate) number: u32,
    layers: Vec<Layer>,
    /// A run says that the region is zero and hides all older ones.
    zero_below: bool,
}

struct Layer {
    cursor: usize,
    records: Vec<IndexRecord>,
}

impl Layer {
    fn record(&self, page: u8) -> Option<&IndexRecord> {
        let at = self.records.binary_search_by_key(&page, |record| record.page).ok()?;
        self.records.get(at)
    }
}

impl MapView {
    /// `runs`: newest first.
    pub(crate) fn new(runs: &[Arc<RunReader>]) -> Self {
        Self { cursors: runs.iter().cloned().map(RunCursor::new).collect() }
    }

    /// The first region at or after `from` that any run mentions.
    pub(crate) fn next_region(&self, from: u32) -> Option<u32> {
        self.cursors.iter().filter_map(|cursor| cursor.run.next_region(from)).min()
    }

    /// Content hash of a region.
    pub(crate) fn node(&self, region: u32) -> NodeHash {
        self.cursors.iter().find_map(|cursor| cursor.run.node(region)).unwrap_or(ZERO_NODE)
    }

    /// Loads the indexes of a region.
    pub(crate) fn region(&self, number: u32) -> Result<Region> {
        let mut region = Region { number, layers: Vec::new(), zero_below: false };
        for (at, cursor) in self.cursors.iter().enumerate() {
            let Some(record) = cursor.run.region(number) else { continue };
            if record.piece.is_all_zero() {
                region.zero_below = true;
                break;
            }
            region.layers.push(Layer { cursor: at, records: cursor.run.index(record)? });
        }
        Ok(region)
    }

    /// Fills the blocks of a page that are still open; what no run mentions stays open.
    pub(crate) fn lay(&mut self, region: &Region, page: u8, slots: &mut PageSlots) -> Result<()> {
        for layer in &region.layers {
            if slots.iter().all(Option::is_some) {
                return Ok(());
            }
            if let Some(record) = layer.record(page) {
                self.cursors[layer.cursor].page(&record.piece, slots)?;
            }
        }
        if region.zero_below {
            slots.iter_mut().for_each(|slot| {
                slot.get_or_insert(Slot::Zero);
            });
        }
        Ok(())
    }
}

impl Region {
    /// The first page at or after `from` that any run mentions; pages that are zero only because
    /// the whole region was zeroed count as mentioned.
    pub(crate) fn next_page(&self, from: u16) -> Option<u8> {
        if self.zero_below {
            return u8::try_from(from).ok();
        }
        let first = |layer: &Layer| {
            let at = layer.records.partition_point(|record| u16::from(record.page) < from);
            layer.records.get(at).map(|record| record.page)
        };
        self.layers.iter().filter_map(first).min()
    }

    /// Whether nothing but zero is known of the whole region.
    pub(crate) fn is_all_zero(&self) -> bool {
        self.layers.is_empty()
    }

    /// Content hash of a page's blocks, by the newest run that mentions it.
    pub(crate) fn leaf(&self, page: u8) -> NodeHash {
        let newest = self.layers.iter().find_map(|layer| layer.record(page));
        newest.map_or(ZERO_NODE, |record| record.leaf)
    }

    /// The hashes of all pages.
    pub(crate) fn leaves(&self, leaves: &mut [NodeHash; FANOUT]) {
        leaves.fill(ZERO_NODE);
        for layer in self.layers.iter().rev() {
            for record in &layer.records {
                leaves[record.page as usize] = record.leaf;
            }
        }
    }
}

/// Looks pages up in ascending order, keeping the last region and page.
pub(crate) struct PageCursor {
    view: MapView,
    region: Option<Region>,
    page: Option<u64>,
    slots: Box<PageSlots>,
}

impl PageCursor {
    pub(crate) fn new(runs: &[Arc<RunReader>]) -> Self {
        Self { view: MapView::new(runs), region: None, page: None, slots: empty_page() }
    }

    /// What the map says of a block; none: nothing, so it is zero.
    pub(crate) fn slot(&mut self, index: BlockIndex) -> Result<Option<Slot>> {
        let page = index.0 / PAGE_BLOCKS;
        if self.page != Some(page) {
            self.load(page)?;
        }
        Ok(self.slots[(index.0 % PAGE_BLOCKS) as usize])
    }

    /// The first block at or after `from` that lies in a page which the map mentions.
    pub(crate) fn next_mentioned(&mut self, from: BlockIndex) -> Result<Option<BlockIndex>> {
        let mut page = from.0 / PAGE_BLOCKS;
        loop {
            // A disk has at most 2^16 regions.
            let Ok(number) = u32::try_from(page / REGION_PAGES) else { return Ok(None) };
            let Some(next) = self.view.next_region(number) else { return Ok(None) };
            page = page.max(u64::from(next) * REGION_PAGES);
            let region = self.enter(next)?;
            let within = (page % REGION_PAGES) as u16;
            let found = if region.is_all_zero() { None } else { region.next_page(within) };
            if let Some(found) = found {
                let start = (u64::from(next) * REGION_PAGES + u64::from(found)) * PAGE_BLOCKS;
                return Ok(Some(BlockIndex(start.max(from.0))));
            }
            page = (u64::from(next) + 1) * REGION_PAGES;
        }
    }

    fn load(&mut self, page: u64) -> Result<()> {
        self.page = None;
        self.slots.fill(None);
        let number = u32::try_from(page / REGION_PAGES).unwrap_or(u32::MAX);
        self.enter(number)?;
        if let Some(region) = &self.region {
            self.view.lay(region, (page % REGION_PAGES) as u8, &mut self.slots)?;
        }
        self.page = Some(page);
        Ok(())
    }

    fn enter(&mut self, number: u32) -> Result<&Region> {
        let region = match self.region.take() {
            Some(region) if region.number == number => region,
            _ => self.view.region(number)?,
        };
        Ok(self.region.insert(region))
    }
}
