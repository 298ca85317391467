//! One disk of a point being written: the parent's blocks in one hand, the ordered sink in another.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::encoder::Encoders;
use crate::error::{Error, Result};
use crate::geometry::{BlockIndex, BlockSize};
use crate::ids::{DiskId, PointId};
use crate::lock::PointLock;
use crate::map::{DeltaWriter, PageCursor, RunReader, Slot};
use crate::point::{DiskSummary, Encoded, ParentBlock, RunRef};
use crate::session::{FinishedDisk, Placed, Session};

/// A disk to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskStart {
    /// The disk.
    pub disk: DiskId,
    /// Its size at the instant.
    pub size_bytes: u64,
    /// The point of the same chain that it is a delta to; none: every block that is not pushed is
    /// zero.
    pub parent: Option<PointId>,
}

/// The three hands of a disk being written; each may live in a thread of its own.
pub struct DiskWriter {
    /// What the parent holds, for the planner or the reader.
    pub cursor: ParentCursor,
    /// Encoders for the workers.
    pub encoders: Encoders,
    /// Where encoded blocks are pushed in order.
    pub sink: DiskSink,
}

/// What of the parent's disk may be inherited.
#[derive(Clone, Copy)]
pub(crate) struct Inheritance {
    /// Blocks below are whole on both disks.
    below: u64,
    /// The parent's blocks.
    parent_blocks: u64,
    /// A block that has another length on the two disks: it must be pushed.
    boundary: Option<BlockIndex>,
}

impl Inheritance {
    /// Of a disk of `size_bytes` whose parent had `parent_bytes`.
    pub(crate) fn new(block_size: BlockSize, size_bytes: u64, parent_bytes: u64) -> Result<Self> {
        let parent_blocks = block_size.blocks(parent_bytes)?;
        if size_bytes == parent_bytes {
            return Ok(Self { below: parent_blocks, parent_blocks, boundary: None });
        }
        let common = size_bytes.min(parent_bytes);
        let size = u64::from(block_size.bytes());
        let below = common / size;
        let boundary = (!common.is_multiple_of(size)).then_some(BlockIndex(below));
        Ok(Self { below, parent_blocks, boundary })
    }
}

/// The parent's map of a disk.
pub(crate) struct Parent {
    pub(crate) inheritance: Inheritance,
    pub(crate) references: Vec<RunRef>,
    /// How long the parent's objects are locked.
    pub(crate) lock: Option<PointLock>,
    pub(crate) runs: Vec<Arc<RunReader>>,
}

/// Streams what the parent holds; asked in ascending order it reads its map once.
pub struct ParentCursor {
    session: Arc<Session>,
    parent: Option<(Inheritance, PageCursor)>,
}

impl ParentCursor {
    pub(crate) fn new(session: Arc<Session>, parent: Option<&Parent>) -> Self {
        let cursor = |parent: &Parent| (parent.inheritance, PageCursor::new(&parent.runs));
        Self { session, parent: parent.map(cursor) }
    }

    /// What the parent holds in `count` blocks from `first` on. Blocks that cannot be inherited
    /// (beyond its end, of another length there, or in a pack that was found damaged) are
    /// [`ParentBlock::Absent`].
    ///
    /// # Errors
    /// `Damaged` when the parent's map is: then the disk is to be read whole, without a parent.
    pub fn parent_blocks(&mut self, first: BlockIndex, count: u32) -> Result<Vec<ParentBlock>> {
        (first.0..first.0.saturating_add(count.into()))
            .map(|at| self.block(BlockIndex(at)))
            .collect()
    }

    fn block(&mut self, index: BlockIndex) -> Result<ParentBlock> {
        match &mut self.parent {
            Some((inheritance, cursor)) if index.0 < inheritance.below => {
                Ok(match cursor.slot(index)? {
                    Some(Slot::Data(_, location))
                        if self.session.quarantined.contains(&location.pack) =>
                    {
                        ParentBlock::Absent
                    }
                    Some(Slot::Data(id, _)) => ParentBlock::Data(id),
                    Some(Slot::Zero) | None => ParentBlock::Zero,
                })
            }
            _ => Ok(ParentBlock::Absent),
        }
    }
}

/// Takes the blocks of a disk in ascending order. What is not pushed is inherited from the parent;
/// it is zero where there is no parent or beyond the parent's end.
pub struct DiskSink {
    session: Arc<Session>,
    disk: DiskId,
    size_bytes: u64,
    parent_id: Option<PointId>,
    parent: Option<Parent>,
    map: DeltaWriter,
    blocks: u64,
    next: BlockIndex,
    boundary_pushed: bool,
    /// Packs that are not known to be durable, and our first block in each; ascending.
    open: VecDeque<(u64, BlockIndex)>,
    summary: DiskSummary,
}

impl DiskSink {
    pub(crate) fn new(
        session: Arc<Session>,
        start: DiskStart,
        parent: Option<Parent>,
    ) -> Result<Self> {
        let blocks = session.block_size().blocks(start.size_bytes)?;
        let map = session.delta(parent.as_ref().map(|parent| &parent.runs[..]))?;
        Ok(Self {
            session,
            disk: start.disk,
            size_bytes: start.size_bytes,
            parent_id: start.parent,
            parent,
            map,
            blocks,
            next: BlockIndex(0),
            boundary_pushed: false,
            open: VecDeque::new(),
            summary: DiskSummary::default(),
        })
    }

    /// Takes one block; indices ascend strictly.
    ///
    /// # Errors
    /// `Push` when the block cannot be here; the store's, and then the whole point is lost.
    pub fn push(&mut self, index: BlockIndex, block: Encoded) -> Result<()> {
        self.advance(index, 1)?;
        let bytes = u64::from(self.session.block_size().block_bytes(self.size_bytes, index));
        match block {
            Encoded::Same => self.same(index),
            Encoded::Zero => {
                self.summary.zero_bytes += bytes;
                self.session.guard(|| self.map.put(index, Slot::Zero))
            }
            Encoded::Known { id, location } => {
                self.summary.blocks_known += 1;
                self.summary.data_bytes += bytes;
                let pack = self.session.open_pack(location.pack);
                self.note_open(index, pack);
                self.session.guard(|| self.map.put(index, Slot::Data(id, location)))
            }
            Encoded::New { id, frame } => {
                if u64::from(frame.raw_bytes) != bytes {
                    return Err(self.wrong(index, "it was encoded with another length"));
                }
                let placed = self.session.place(&id, &frame)?;
                if placed.stored {
                    self.session.spend(frame.bytes.len() as u64)?;
                }
                self.count(&placed, bytes, frame.bytes.len() as u64);
                self.note_open(index, placed.open_pack);
                self.session.guard(|| self.map.put(index, Slot::Data(id, placed.location)))
            }
        }
    }

    /// Takes a range of zeroes; cheap whatever its length.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_zero_range(&mut self, first: BlockIndex, count: u64) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        self.advance(first, count)?;
        let size = u64::from(self.session.block_size().bytes());
        let stop = (first.0 + count).saturating_mul(size).min(self.size_bytes);
        self.summary.zero_bytes += stop - first.0 * size;
        self.session.guard(|| self.map.put_zeroes(first, count))
    }

    /// Every block below this one that was pushed lies in durable packs.
    #[must_use]
    pub fn durable_below(&mut self) -> BlockIndex {
        while self.open.front().is_some_and(|(pack, _)| self.session.is_durable(*pack)) {
            self.open.pop_front();
        }
        // A block that repeats one of another disk may lie in an older pack than one before it.
        self.open.iter().map(|(_, first)| *first).min().unwrap_or(self.next)
    }

    /// Ends the disk. Its map is stored when the point is committed.
    ///
    /// # Errors
    /// `Push` when a block that has another length than the parent's was not pushed; the store's.
    pub fn finish(mut self) -> Result<DiskSummary> {
        let size = self.session.block_size();
        if let Some(parent) = &self.parent {
            let Inheritance { parent_blocks, boundary, .. } = parent.inheritance;
            if let Some(boundary) = boundary.filter(|_| !self.boundary_pushed) {
                let slot = PageCursor::new(&parent.runs).slot(boundary)?;
                if matches!(slot, Some(Slot::Data(..))) {
                    let why = "the disk was resized within it, so it must be read again";
                    return Err(self.wrong(boundary, why));
                }
            }
            // What was cut off must not come back when the disk grows again.
            let cut = parent_blocks.saturating_sub(self.blocks);
            self.session.guard(|| self.map.put_zeroes(BlockIndex(self.blocks), cut))?;
        }
        let finished = self.session.guard(|| self.map.finish(self.size_bytes, size));
        let (run, content_root) = finished?;
        let summary = DiskSummary { content_root, ..self.summary };
        self.session.finished(FinishedDisk {
            disk: self.disk,
            size_bytes: self.size_bytes,
            parent_id: self.parent_id,
            parent: self.parent,
            run,
            summary,
        });
        Ok(summary)
    }

    fn same(&mut self, index: BlockIndex) -> Result<()> {
        let below = self.parent.as_ref().map_or(0, |parent| parent.inheritance.below);
        if index.0 >= below {
            return Err(self.wrong(index, "there is no parent's block that it could equal"));
        }
        self.summary.blocks_same += 1;
        Ok(())
    }

    fn advance(&mut self, first: BlockIndex, count: u64) -> Result<()> {
        self.session.check_sound()?;
        if first < self.next {
            return Err(self.wrong(first, "blocks must be pushed in ascending order"));
        }
        let stop = first.0.checked_add(count).filter(|stop| *stop <= self.blocks);
        let Some(stop) = stop else {
            return Err(self.wrong(first, "it reaches beyond the end of the disk"));
        };
        let boundary = self.parent.as_ref().and_then(|parent| parent.inheritance.boundary);
        self.boundary_pushed |= boundary.is_some_and(|at| (first.0..stop).contains(&at.0));
        self.next = BlockIndex(stop);
        Ok(())
    }

    fn count(&mut self, placed: &Placed, bytes: u64, stored_bytes: u64) {
        self.summary.data_bytes += bytes;
        if placed.stored {
            self.summary.blocks_new += 1;
            self.summary.new_bytes += bytes;
            self.summary.stored_bytes += stored_bytes;
        } else {
            self.summary.blocks_known += 1;
        }
    }

    fn note_open(&mut self, index: BlockIndex, pack: Option<u64>) {
        let Some(pack) = pack else { return };
        if let Err(place) = self.open.binary_search_by_key(&pack, |(noted, _)| *noted) {
            self.open.insert(place, (pack, index));
        }
    }

    fn wrong(&self, index: BlockIndex, why: &'static str) -> Error {
        Error::Push { disk: self.disk.clone(), index, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inherited_when_a_disk_is_resized() {
        let size = BlockSize::new(4096).unwrap();
        let check = |new: u64, old: u64| {
            let inheritance = Inheritance::new(size, new, old).unwrap();
            (inheritance.below, inheritance.boundary.map(|at| at.0))
        };
        assert_eq!(check(8192, 8192), (2, None));
        assert_eq!(check(5000, 5000), (2, None), "a short last block of the same length");
        assert_eq!(check(8192, 5000), (1, Some(1)), "it grew within the last block");
        assert_eq!(check(5000, 8192), (1, Some(1)), "it shrank into the last block");
        assert_eq!(check(16_384, 8192), (2, None));
        assert_eq!(check(0, 8192), (0, None));
    }
}
