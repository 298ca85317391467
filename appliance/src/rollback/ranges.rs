//! Which blocks a rollback writes: what changed since a point that is known, and what that point
//! and the wanted one hold differently.

use icecore_io_engine::{BlockRange, LaneSet, Options};
use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::{Control, Flow};
use icecore_qmp::bitmap::Sentinels;
use icecore_repository::{BlockHasher, BlockIndex, DiskReader, Error};

use crate::capture::Base;
use crate::failure::{Failure, Outcome};

/// Blocks compared at once where no bitmap is of use: as many as the data plane names.
const WINDOW_BLOCKS: u64 = icecore_io_engine::limits::MAX_NAMED_BLOCKS as u64;
/// Stretch of a bitmap that is asked for at once.
const STRETCH_BYTES: u64 = 8 << 30;

/// Blocks that the bitmap calls dirty, ascending; `None` when its sentinels say that it is not to be
/// trusted.
pub async fn dirty(
    control: &mut Control,
    bitmap: &str,
    base: &Base,
    size: u64,
    block: u64,
    tried: &str,
) -> Outcome<Option<Vec<BlockRange>>> {
    let context = format!("qemu:dirty-bitmap:{bitmap}");
    let Some(id) = control.session().context(&context) else {
        return Err(Failure::failed(tried, format!("the bitmap {bitmap} is not exported")));
    };
    let mut watch = Sentinels::new(base.size_bytes, base.granularity).watch();
    let mut found: Vec<BlockRange> = Vec::new();
    let mut at = 0;
    while at < size {
        let stretch = Extent::new(at, STRETCH_BYTES.min(size - at));
        let asked = control.changed(stretch, Some(id), None, |changed| {
            watch.dirty(changed.offset..changed.offset + changed.length);
            let first = changed.offset / block;
            let end = (changed.offset + changed.length).div_ceil(block);
            add(&mut found, first, end - first);
            Flow::Continue(())
        });
        asked.await.map_err(|e| Failure::failed(tried, e))?;
        at = stretch.end();
    }
    Ok(watch.finish().is_ok().then_some(found))
}

/// The union of ranges and single blocks, both ascending.
pub fn union(
    ranges: Vec<BlockRange>,
    blocks: impl Iterator<Item = Result<BlockIndex, Error>>,
) -> Result<Vec<BlockRange>, Error> {
    let mut merged = Vec::with_capacity(ranges.len());
    let mut ranges = ranges.into_iter().peekable();
    for block in blocks {
        let block = block?.0;
        while let Some(range) = ranges.next_if(|range| range.first <= block) {
            add(&mut merged, range.first, range.count);
        }
        add(&mut merged, block, 1);
    }
    ranges.for_each(|range| add(&mut merged, range.first, range.count));
    Ok(merged)
}

/// Adds blocks that begin no earlier than the last range did.
fn add(ranges: &mut Vec<BlockRange>, first: u64, count: u64) {
    match ranges.last_mut() {
        Some(last) if first <= last.first + last.count => {
            last.count = last.count.max((first + count).saturating_sub(last.first));
        }
        _ => ranges.push(BlockRange { first, count }),
    }
}

/// Reads the whole disk and compares it with the wanted point, where no bitmap is of use.
pub fn compared(
    set: &mut LaneSet,
    wanted: &DiskReader,
    hasher: BlockHasher,
    options: &Options,
) -> Result<Vec<BlockRange>, icecore_io_engine::EngineError> {
    let blocks = wanted.size_bytes().div_ceil(u64::from(wanted.block_size().bytes()));
    let mut differing = Vec::new();
    let mut first = 0;
    while first < blocks {
        let window = BlockRange { first, count: WINDOW_BLOCKS.min(blocks - first) };
        let ranges =
            || -> icecore_io_engine::BlockRanges<'_> { Box::new(std::iter::once(Ok(window))) };
        let (found, _) = icecore_io_engine::compare_blocks(set, wanted, hasher, &ranges, options)?;
        found.first.iter().for_each(|index| add(&mut differing, index.0, 1));
        first += window.count;
    }
    Ok(differing)
}

/// The bytes of ranges on a disk of `size` bytes.
pub fn bytes(ranges: &[BlockRange], block: u64, size: u64) -> u64 {
    let of = |range: &BlockRange| {
        let end = ((range.first + range.count) * block).min(size);
        end.saturating_sub(range.first * block)
    };
    ranges.iter().map(of).sum()
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
            let mut ranges = Vec::new();
            let mut at = 0;
            for (gap, count) in pieces {
                at += gap;
                ranges.push(BlockRange { first: at, count });
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
            prop_assert!(merged.windows(2).all(|w| w[0].first + w[0].count < w[1].first));
        }
    }

    #[test]
    fn the_short_last_block_counts_what_it_has() {
        let ranges = [BlockRange { first: 0, count: 1 }, BlockRange { first: 2, count: 1 }];
        assert_eq!(bytes(&ranges, 100, 250), 150);
    }
}
