//! Reading for the sake of hashes: dry runs, and the proof that a target holds what it should.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use icecore_repository::{
    BlockHasher, BlockId, BlockIndex, BlockSize, ContentHasher, ContentRoot, DiskReader, Entry,
};

use crate::backend::LaneSet;
use crate::error::{EngineError, Span};
use crate::pipeline::Options;
use crate::pipeline::read::{Job, Piece, Purpose, read};
use crate::plan::{Blocks, Kind, PlanError, PlanItem, Planner, ReadItem, Run};
use crate::source::{Cursor, RangesOf};
use crate::stats::Latency;

/// What reading and hashing a disk found.
#[derive(Debug, Clone)]
pub struct HashStats {
    /// The content root of what was read; what was not read counts as zero.
    pub root: ContentRoot,
    /// Bytes of blocks that are not zero.
    pub data_bytes: u64,
    /// Latencies of the reads.
    pub latency: Latency,
    /// How long it took.
    pub took: Duration,
}

/// Reads what `plan` names, tests it for zeroes and hashes it, and stores nothing.
///
/// `size` is the disk's, in bytes.
///
/// # Errors
/// The first failure of any part.
pub fn dry_run(
    set: &mut LaneSet,
    size: u64,
    block_size: BlockSize,
    hasher: BlockHasher,
    plan: impl Iterator<Item = PlanItem> + Send,
    options: &Options,
) -> Result<HashStats, EngineError> {
    let started = Instant::now();
    let disk = Blocks { size, block: block_size.bytes() };
    let mut content = ContentHasher::new(size, block_size);
    let mut data_bytes = 0;
    let worker = move |piece: Piece<'_, ()>| {
        let id = |nth| piece.block(nth).map_or(BlockId::ZERO, |block| hasher.block_id(block));
        Ok(((0..piece.run.count).map(id).collect::<Vec<_>>(), 0))
    };
    let job = Job {
        prepare: |_| Ok(()),
        workers: vec![worker; options.workers.max(1)],
        sink: |run: Run, ids: Option<Vec<BlockId>>| {
            for (index, id) in (run.first..).zip(ids.unwrap_or_default()) {
                if id != BlockId::ZERO {
                    content.push(BlockIndex(index), &id);
                    data_bytes += disk.span(index, 1).len;
                }
            }
            Ok(())
        },
        purpose: Purpose::Hash,
    };
    let latency = read(set, disk, Planner::new(plan, disk), options, job)?;
    Ok(HashStats { root: content.finish(), data_bytes, latency, took: started.elapsed() })
}

/// The plan that reads a whole disk of `size` bytes.
pub fn whole_disk(size: u64) -> impl Iterator<Item = PlanItem> + Send {
    std::iter::once(Ok(ReadItem::Data(Span::new(0, size))))
}

/// Reads the whole target and compares its content root with that of the point.
pub(crate) fn prove_root(
    set: &mut LaneSet,
    point: &DiskReader,
    hasher: BlockHasher,
    options: &Options,
) -> Result<HashStats, EngineError> {
    let size = point.size_bytes();
    let progress = &options.control.progress;
    let mut at = 0;
    let plan = set.may_hold_data(size).inspect(|item| {
        if let Ok(ReadItem::Data(span)) = item {
            progress.skipped_bytes.fetch_add(span.offset.saturating_sub(at), Relaxed);
            at = span.offset + span.len;
        }
    });
    let found = dry_run(set, size, point.block_size(), hasher, plan, options)?;
    match point.content_root() {
        expected if expected == found.root => Ok(found),
        expected => Err(EngineError::RootDiffers { expected, found: found.root }),
    }
}

/// Reads the blocks of `ranges` and compares their ids with those of the point. `differs` hears of
/// each block whose content is another, ascending.
///
/// # Errors
/// The first failure of any part. A difference is none.
pub fn compare_blocks(
    set: &mut LaneSet,
    point: &DiskReader,
    hasher: BlockHasher,
    ranges: RangesOf<'_>,
    mut differs: impl FnMut(BlockIndex) + Send,
    options: &Options,
) -> Result<Latency, EngineError> {
    let disk = Blocks { size: point.size_bytes(), block: point.block_size().bytes() };
    let mut cursor = Cursor::new(point, disk);
    let plan = ranges().map(|range| {
        let range = range.map_err(PlanError::Source)?;
        Ok(Run { kind: Kind::Data, first: range.first, count: disk.checked(range)? })
    });
    let job = Job {
        prepare: |run: Run| cursor.collect(run.first, run.count),
        workers: vec![
            move |piece: Piece<'_, Vec<Entry>>| Ok((compare(&piece, hasher), 0));
            options.workers.max(1)
        ],
        sink: |_, found: Option<Vec<u64>>| {
            found.into_iter().flatten().for_each(|index| differs(BlockIndex(index)));
            Ok(())
        },
        purpose: Purpose::Hash,
    };
    read(set, disk, plan, options, job)
}

/// As [`compare_blocks`], where a difference is an error.
///
/// # Errors
/// The first failure of any part, or [`EngineError::BlocksDiffer`].
pub fn require_blocks(
    set: &mut LaneSet,
    point: &DiskReader,
    hasher: BlockHasher,
    ranges: RangesOf<'_>,
    options: &Options,
) -> Result<Latency, EngineError> {
    let (mut first, mut count) = (None, 0);
    let differs = |index: BlockIndex| {
        first.get_or_insert(index.0);
        count += 1;
    };
    let latency = compare_blocks(set, point, hasher, ranges, differs, options)?;
    first.map_or(Ok(latency), |first| Err(EngineError::BlocksDiffer { count, first }))
}

/// The numbers of the blocks of `piece` that differ from the entries prepared for it.
fn compare(piece: &Piece<'_, Vec<Entry>>, hasher: BlockHasher) -> Vec<u64> {
    let mut expected = piece.prepared.iter().peekable();
    let mut differing = Vec::new();
    for nth in 0..piece.run.count {
        let index = piece.run.first + nth;
        let want = expected.next_if(|entry| entry.index.0 == index);
        let want = want.map_or(BlockId::ZERO, |entry| entry.id);
        let found = piece.block(nth).map_or(BlockId::ZERO, |block| hasher.block_id(block));
        if found != want {
            differing.push(index);
        }
    }
    differing
}
