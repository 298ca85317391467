//! Builds the run of a new point and, in the same pass, the disk's content root.

use std::sync::Arc;

use crate::content::{self, FANOUT, NodeHash, TreeBuilder, ZERO_NODE};
use crate::error::Result;
use crate::geometry::{BlockIndex, BlockSize};
use crate::ids::ContentRoot;

use super::reader::RunReader;
use super::view::{MapView, Region};
use super::writer::RunWriter;
use super::{PAGE_BLOCKS, PageSlots, REGION_BLOCKS, REGION_PAGES, Slot, empty_page};

/// Takes the changed blocks of a disk in ascending order.
pub(crate) struct DeltaWriter {
    /// The parent's map; none for a first point, where zeroes need not be said.
    parent: Option<MapView>,
    writer: RunWriter,
    tree: TreeBuilder,
    region: Option<OpenRegion>,
    /// Regions below this one are in the tree.
    next_region: u32,
}

struct OpenRegion {
    number: u32,
    inherited: Option<Region>,
    leaves: Box<[NodeHash; FANOUT]>,
    page: Option<u8>,
    slots: Box<PageSlots>,
}

impl DeltaWriter {
    /// `parent`: the runs of the parent's map, newest first.
    pub(crate) fn new(parent: Option<&[Arc<RunReader>]>, writer: RunWriter) -> Self {
        Self {
            parent: parent.map(MapView::new),
            writer,
            tree: TreeBuilder::new(),
            region: None,
            next_region: 0,
        }
    }

    /// Records a block; indices ascend strictly.
    pub(crate) fn put(&mut self, index: BlockIndex, slot: Slot) -> Result<()> {
        if self.parent.is_none() && slot == Slot::Zero {
            return Ok(());
        }
        let page = index.0 / PAGE_BLOCKS;
        // A disk has at most 2^32 blocks.
        self.enter((page / REGION_PAGES) as u32)?;
        let page = (page % REGION_PAGES) as u8;
        if self.region.as_ref().is_some_and(|region| region.page != Some(page)) {
            self.end_page()?;
        }
        if let Some(region) = &mut self.region {
            region.page = Some(page);
            region.slots[(index.0 % PAGE_BLOCKS) as usize] = Some(slot);
        }
        Ok(())
    }

    /// Records a range of zeroes; whole regions cost one record.
    pub(crate) fn put_zeroes(&mut self, first: BlockIndex, count: u64) -> Result<()> {
        if self.parent.is_none() {
            return Ok(());
        }
        let (mut at, end) = (first.0, first.0 + count);
        while at < end {
            if at.is_multiple_of(REGION_BLOCKS) && end - at >= REGION_BLOCKS {
                self.zero_region((at / REGION_BLOCKS) as u32)?;
                at += REGION_BLOCKS;
            } else {
                self.put(BlockIndex(at), Slot::Zero)?;
                at += 1;
            }
        }
        Ok(())
    }

    /// The unfinished run and the content root.
    pub(crate) fn finish(
        mut self,
        size_bytes: u64,
        block_size: BlockSize,
    ) -> Result<(RunWriter, ContentRoot)> {
        self.end_region()?;
        self.inherit_until(None);
        Ok((self.writer, self.tree.finish(size_bytes, block_size)))
    }

    fn enter(&mut self, number: u32) -> Result<()> {
        if self.region.as_ref().is_some_and(|region| region.number == number) {
            return Ok(());
        }
        self.end_region()?;
        self.inherit_until(Some(number));
        let mut leaves = Box::new([ZERO_NODE; FANOUT]);
        let inherited = match &self.parent {
            Some(parent) => Some(parent.region(number)?),
            None => None,
        };
        if let Some(inherited) = &inherited {
            inherited.leaves(&mut leaves);
        }
        let slots = empty_page();
        self.region = Some(OpenRegion { number, inherited, leaves, page: None, slots });
        Ok(())
    }

    fn zero_region(&mut self, number: u32) -> Result<()> {
        if self.parent.as_ref().is_some_and(|parent| parent.node(number) == ZERO_NODE) {
            return Ok(());
        }
        self.end_region()?;
        self.inherit_until(Some(number));
        self.writer.zero_region(number);
        self.next_region = number + 1;
        Ok(())
    }

    /// Adds the parent's untouched regions below `stop` to the tree.
    fn inherit_until(&mut self, stop: Option<u32>) {
        let Some(parent) = &self.parent else { return };
        while let Some(number) = parent.next_region(self.next_region) {
            if stop.is_some_and(|stop| number >= stop) {
                break;
            }
            self.tree.push(2, u64::from(number), &parent.node(number));
            self.next_region = number + 1;
        }
    }

    fn end_page(&mut self) -> Result<()> {
        let Some(region) = &mut self.region else { return Ok(()) };
        let Some(page) = region.page.take() else { return Ok(()) };
        let mut whole = region.slots.clone();
        if let (Some(parent), Some(inherited)) = (&mut self.parent, &region.inherited) {
            let mut below = empty_page();
            parent.lay(inherited, page, &mut below)?;
            for ((slot, whole), below) in region.slots.iter_mut().zip(&mut *whole).zip(&*below) {
                // What is zero and was zero need not be said again.
                if *slot == Some(Slot::Zero) && !matches!(below, Some(Slot::Data(..))) {
                    *slot = None;
                }
                *whole = whole.or(*below);
            }
            if region.slots.iter().all(Option::is_none) {
                return Ok(());
            }
        }
        let leaf = leaf(&whole);
        self.writer.page(page, &region.slots, leaf)?;
        region.leaves[page as usize] = leaf;
        region.slots.fill(None);
        Ok(())
    }

    fn end_region(&mut self) -> Result<()> {
        self.end_page()?;
        let Some(region) = self.region.take() else { return Ok(()) };
        let node = content::node(1, &region.leaves);
        self.tree.push(2, u64::from(region.number), &node);
        self.next_region = region.number + 1;
        if self.writer.has_pages() { self.writer.end_region(region.number, node) } else { Ok(()) }
    }
}

/// Content hash of a page whose open blocks are zero.
fn leaf(slots: &PageSlots) -> NodeHash {
    let mut ids = [ZERO_NODE; FANOUT];
    for (id, slot) in ids.iter_mut().zip(slots) {
        if let Some(Slot::Data(block, _)) = slot {
            *id = block.0;
        }
    }
    content::node(0, &ids)
}
