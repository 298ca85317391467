//! Trust but verify: before an incremental read, the bitmap is tested against the disk.

use std::collections::BTreeSet;
use std::ops::Range;

use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::{ChangedKind, Control, Flow};
use icecore_qmp::bitmap::{Doubt, Sentinels};
use icecore_repository::{BlockId, BlockIndex, DiskReader, Repository};

use super::{Base, Data, DirtyMap, Readable};
use crate::failure::{Failure, Outcome};
use crate::nbd;

/// Clean blocks that are read and compared in each incremental.
const SAMPLES: usize = 8;

/// Stretch of the disk whose holes are held at once.
const STRETCH_BYTES: u64 = 8 << 30;

/// What the test came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trial {
    pub doubt: Option<Doubt>,
    pub sampled_blocks: u64,
}

/// Blocks to sample, as byte ranges of the disk: random ones, each moved on to the next one that
/// holds data where there is one. The last block of a disk that grew is another one now.
pub fn samples(parent: &DiskReader, size: u64, tried: &str) -> Outcome<Vec<Range<u64>>> {
    let block = u64::from(parent.block_size().bytes());
    let comparable = match parent.size_bytes() == size {
        true => size.div_ceil(block),
        false => parent.size_bytes().min(size) / block,
    };
    let mut chosen = BTreeSet::new();
    for _ in 0..if comparable == 0 { 0 } else { SAMPLES } {
        let random = getrandom::u64().map_err(|e| Failure::failed(tried, e))?;
        let from = BlockIndex(random % comparable);
        let next = next_data(parent, from, tried)?.filter(|next| next.0 < comparable);
        chosen.insert(next.unwrap_or(from).0);
    }
    Ok(chosen.into_iter().map(|at| at * block..((at + 1) * block).min(size)).collect())
}

/// Tests a bitmap: its sentinels must be set, and those of the `samples` that it calls clean must
/// be what the parent holds.
pub async fn test(
    repository: &Repository,
    parent: &DiskReader,
    readable: &Readable,
    base: &Base,
    samples: &[Range<u64>],
    paranoid: bool,
    tried: &str,
) -> Outcome<Trial> {
    let Some(map) = &readable.dirty else {
        return Err(Failure::failed(tried, "QEMU does not show the dirty bitmap"));
    };
    let mut control = nbd::control(&map.uri, Some(&map.bitmap), tried).await?;
    let mut trial = Trial { doubt: None, sampled_blocks: 0 };
    for range in Sentinels::new(base.size_bytes, base.granularity).ranges() {
        let range = Extent::new(range.start, range.end - range.start);
        if dirty_bytes(&mut control, map, range, tried).await? != range.length {
            trial.doubt = Some(Doubt::Contradiction);
            return Ok(trial);
        }
    }
    if paranoid && holes_contradict(&mut control, map, readable, parent, tried).await? {
        trial.doubt = Some(Doubt::Contradiction);
        return Ok(trial);
    }
    for sample in samples {
        let range = Extent::new(sample.start, sample.end - sample.start);
        if dirty_bytes(&mut control, map, range, tried).await? != 0 {
            continue;
        }
        let mut bytes = vec![0; range.length as usize];
        match &readable.data {
            Data::Export(_) => {
                let read = control.read(range.offset, &mut bytes).await;
                read.map_err(|e| Failure::failed(tried, e))?;
            }
            Data::Spool(spool) => {
                let read = spool.read_at(range.offset, &mut bytes);
                read.map_err(|e| Failure::failed(tried, e))?;
            }
        }
        trial.sampled_blocks += 1;
        let index = BlockIndex(range.offset / u64::from(parent.block_size().bytes()));
        if repository.hasher().block_id(&bytes) != parent_id(parent, index, tried)? {
            trial.doubt = Some(Doubt::Contradiction);
            return Ok(trial);
        }
    }
    Ok(trial)
}

/// Whether a block that the bitmap calls clean is a hole where the parent holds data. Walks the
/// whole allocation map.
async fn holes_contradict(
    control: &mut Control,
    map: &DirtyMap,
    readable: &Readable,
    parent: &DiskReader,
    tried: &str,
) -> Outcome<bool> {
    // A map without data has no allocation to tell of.
    let Data::Export(_) = readable.data else { return Ok(false) };
    let Some(allocation) = control.session().context(nbd::ALLOCATION) else { return Ok(false) };
    let block = u64::from(parent.block_size().bytes());
    let size = parent.size_bytes().min(readable.size_bytes);
    let mut at = 0;
    while at < size {
        let stretch = Extent::new(at, STRETCH_BYTES.min(size - at));
        let mut zeroes = Vec::new();
        let asked = control.changed(stretch, None, Some(allocation), |extent| {
            if extent.kind == ChangedKind::Zero {
                zeroes
                    .push((extent.offset.div_ceil(block), (extent.offset + extent.length) / block));
            }
            Flow::Continue(())
        });
        asked.await.map_err(|e| Failure::failed(tried, e))?;
        for (first, end) in zeroes {
            for entry in parent.entries(BlockIndex(first)) {
                let index = entry.map_err(|e| Failure::from_repository(tried, e))?.index;
                if index.0 >= end {
                    break;
                }
                let range = Extent::new(index.0 * block, block.min(size - index.0 * block));
                if dirty_bytes(control, map, range, tried).await? == 0 {
                    return Ok(true);
                }
            }
        }
        at = stretch.end();
    }
    Ok(false)
}

async fn dirty_bytes(
    control: &mut Control,
    map: &DirtyMap,
    range: Extent,
    tried: &str,
) -> Outcome<u64> {
    let context = format!("qemu:dirty-bitmap:{}", map.bitmap);
    let Some(id) = control.session().context(&context) else {
        return Err(Failure::failed(tried, format!("the bitmap {} is not exported", map.bitmap)));
    };
    let mut dirty = 0;
    let count = |changed: icecore_nbd_client::Changed| {
        dirty += changed.length;
        Flow::Continue(())
    };
    let asked = control.changed(range, Some(id), None, count).await;
    asked.map_err(|e| Failure::failed(tried, e))?;
    Ok(dirty)
}

fn next_data(parent: &DiskReader, from: BlockIndex, tried: &str) -> Outcome<Option<BlockIndex>> {
    let failed = |e| Failure::from_repository(tried, e);
    match parent.entries(from).next() {
        Some(entry) => Ok(Some(entry.map_err(failed)?.index)),
        None => Ok(None),
    }
}

fn parent_id(parent: &DiskReader, index: BlockIndex, tried: &str) -> Outcome<BlockId> {
    let failed = |e| Failure::from_repository(tried, e);
    match parent.entries(index).next() {
        Some(entry) => {
            let entry = entry.map_err(failed)?;
            Ok(if entry.index == index { entry.id } else { BlockId::ZERO })
        }
        None => Ok(BlockId::ZERO),
    }
}
