//! Which blocks a rollback writes: what changed since a point that is known, and what that point
//! and the wanted one hold differently.

use icecore_io_engine::{BlockRange, BlockRanges, LaneSet, Options, compare_blocks};
use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::{Control, Flow};
use icecore_qmp::bitmap::Sentinels;
use icecore_repository::{BlockHasher, BlockIndex, DiskReader, Error};

use crate::capture::{Base, Recorder};
use crate::failure::{Failure, Outcome};

/// Ranges of one disk's plan, all held before the first block is written: 16 MiB. Where there would
/// be more, the nearest ones become one, and what lies between them is written, too.
const RANGES_MAX: usize = 1 << 20;
/// Stretch of a bitmap that is asked for at once.
const STRETCH_BYTES: u64 = 8 << 30;

/// Blocks to be written: ascending, disjoint ranges in bounded memory. It may hold more than was
/// added, never less.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    list: Vec<BlockRange>,
    /// Ranges no further apart than this are one.
    gap: u64,
    max: usize,
}

impl Default for Ranges {
    fn default() -> Self {
        Self::with_max(RANGES_MAX)
    }
}

impl Ranges {
    fn with_max(max: usize) -> Self {
        Self { list: Vec::new(), gap: 0, max }
    }

    /// Adds blocks that begin no earlier than the last range did.
    pub fn add(&mut self, first: u64, count: u64) {
        match self.list.last_mut() {
            Some(last) if first <= last.first + last.count + self.gap => {
                last.count = last.count.max((first + count).saturating_sub(last.first));
            }
            _ => self.list.push(BlockRange { first, count }),
        }
        while self.list.len() > self.max {
            self.gap = (self.gap * 2).max(1);
            let gap = self.gap;
            self.list.dedup_by(|next, last| {
                let near = next.first <= last.first + last.count + gap;
                if near {
                    last.count = next.first + next.count - last.first;
                }
                near
            });
        }
    }

    /// The ranges.
    pub fn iter(&self) -> impl Iterator<Item = BlockRange> + Send {
        self.list.iter().copied()
    }

    /// Their bytes on a disk of `size` bytes.
    pub fn bytes(&self, block: u64, size: u64) -> u64 {
        let of = |range: BlockRange| {
            let end = ((range.first + range.count) * block).min(size);
            end.saturating_sub(range.first * block)
        };
        self.iter().map(of).sum()
    }
}

/// Blocks that the bitmap calls dirty, ascending; `None` when its sentinels say that it is not to be
/// trusted.
pub async fn dirty(
    control: &mut Control,
    bitmap: &str,
    base: &Base,
    size: u64,
    block: u64,
    tried: &str,
) -> Outcome<Option<Ranges>> {
    let context = format!("qemu:dirty-bitmap:{bitmap}");
    let Some(id) = control.session().context(&context) else {
        return Err(Failure::failed(tried, format!("the bitmap {bitmap} is not exported")));
    };
    let mut watch = Sentinels::new(base.size_bytes, base.granularity).watch();
    let mut found = Ranges::default();
    let mut at = 0;
    while at < size {
        let stretch = Extent::new(at, STRETCH_BYTES.min(size - at));
        let asked = control.changed(stretch, Some(id), None, |changed| {
            watch.dirty(changed.offset..changed.offset + changed.length);
            let first = changed.offset / block;
            let end = (changed.offset + changed.length).div_ceil(block);
            found.add(first, end - first);
            Flow::Continue(())
        });
        asked.await.map_err(|e| Failure::failed(tried, e))?;
        at = stretch.end();
    }
    let sound = base.recorder == Recorder::Libvirt || watch.finish().is_ok();
    Ok(sound.then_some(found))
}

/// The union of ranges and single blocks, which ascend.
pub fn union(
    ranges: Ranges,
    blocks: impl Iterator<Item = Result<BlockIndex, Error>>,
) -> Result<Ranges, Error> {
    let mut merged = Ranges { list: Vec::new(), ..ranges };
    let mut ranges = ranges.list.into_iter().peekable();
    for block in blocks {
        let block = block?.0;
        while let Some(range) = ranges.next_if(|range| range.first <= block) {
            merged.add(range.first, range.count);
        }
        merged.add(block, 1);
    }
    ranges.for_each(|range| merged.add(range.first, range.count));
    Ok(merged)
}

/// Reads the blocks of `among` and compares them with the wanted point.
pub fn compared(
    set: &mut LaneSet,
    wanted: &DiskReader,
    hasher: BlockHasher,
    among: &Ranges,
    options: &Options,
) -> Result<Compared, icecore_io_engine::EngineError> {
    let mut found = Compared::default();
    let (block, size) = (u64::from(wanted.block_size().bytes()), wanted.size_bytes());
    let ranges = || -> BlockRanges<'_> { Box::new(among.iter().map(Ok)) };
    let differs = |index: BlockIndex| {
        found.ranges.add(index.0, 1);
        found.bytes += block.min(size - index.0 * block);
    };
    compare_blocks(set, wanted, hasher, &ranges, differs, options)?;
    Ok(found)
}

/// What a comparison found.
#[derive(Debug, Default)]
pub struct Compared {
    /// The blocks that differ, and perhaps some between them.
    pub ranges: Ranges,
    /// Bytes of the blocks that differ.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_union_holds_exactly_what_either_holds(
            pieces in proptest::collection::vec((1u64..5, 1u64..5), 0..12),
            blocks in proptest::collection::btree_set(0u64..80, 0..30),
        ) {
            let mut ranges = Ranges::default();
            let mut at = 0;
            for (gap, count) in pieces {
                at += gap;
                ranges.add(at, count);
                at += count;
            }
            let mut model: Vec<u64> = blocks.iter().copied().collect();
            ranges.iter().for_each(|r| model.extend(r.first..r.first + r.count));
            model.sort_unstable();
            model.dedup();
            let blocks = blocks.into_iter().map(|b| Ok(BlockIndex(b)));
            let merged = union(ranges, blocks).unwrap();
            let flat: Vec<u64> =
                merged.iter().flat_map(|r| r.first..r.first + r.count).collect();
            prop_assert_eq!(flat, model);
            prop_assert!(merged.list.windows(2).all(|w| w[0].first + w[0].count < w[1].first));
        }
    }

    proptest! {
        #[test]
        fn few_ranges_hold_all_that_was_added_and_little_else(
            gaps in proptest::collection::vec(1u64..9, 0..200),
        ) {
            let mut ranges = Ranges::with_max(8);
            let (mut at, mut added) = (0, Vec::new());
            for gap in gaps {
                at += gap;
                ranges.add(at, 1);
                added.push(at);
                at += 1;
                prop_assert!(ranges.list.len() <= 8);
            }
            let held = |block: &u64| {
                ranges.iter().any(|r| r.first <= *block && *block < r.first + r.count)
            };
            prop_assert!(added.iter().all(held));
            prop_assert!(ranges.list.windows(2).all(|w| w[0].first + w[0].count < w[1].first));
            if added.len() <= 8 {
                prop_assert_eq!(ranges.bytes(1, at), added.len() as u64);
            }
        }
    }

    #[test]
    fn the_short_last_block_counts_what_it_has() {
        let mut ranges = Ranges::default();
        ranges.add(0, 1);
        ranges.add(2, 1);
        assert_eq!(ranges.bytes(100, 250), 150);
    }
}
