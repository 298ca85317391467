//! Trust but verify: before an incremental read, the bitmap is tested against the disk.

use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::{ChangedKind, Control, Flow};
use icecore_qmp::bitmap::{Doubt, Sentinels};
use icecore_repository::{BlockId, BlockIndex, DiskReader, Repository};

use super::{Base, Readable};
use crate::failure::{Failure, Outcome};
use crate::nbd;

/// Clean blocks that are read and compared in each incremental.
const SAMPLES: usize = 16;

/// Stretch of the disk whose holes are held at once.
const STRETCH_BYTES: u64 = 8 << 30;

/// What the test came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trial {
    pub doubt: Option<Doubt>,
    pub sampled_blocks: u64,
    pub read_bytes: u64,
}

/// Tests a bitmap: its sentinels must be set, and clean blocks must be what the parent holds.
pub async fn test(
    repository: &Repository,
    parent: &DiskReader,
    readable: &Readable,
    base: &Base,
    paranoid: bool,
    tried: &str,
) -> Outcome<Trial> {
    let mut control = nbd::control(&readable.uri, readable.dirty.as_deref(), tried).await?;
    let mut trial = Trial { doubt: None, sampled_blocks: 0, read_bytes: 0 };
    let sentinels = Sentinels::new(base.size_bytes, base.granularity);
    for range in sentinels.ranges() {
        let range = Extent::new(range.start, range.end - range.start);
        if dirty_bytes(&mut control, readable, range, tried).await? != range.length {
            trial.doubt = Some(Doubt::Contradiction);
            return Ok(trial);
        }
    }
    if paranoid && holes_contradict(&mut control, readable, parent, tried).await? {
        trial.doubt = Some(Doubt::Contradiction);
        return Ok(trial);
    }
    for index in samples(parent, tried)? {
        let Some(id) = clean_block(repository, &mut control, readable, parent, index, tried).await?
        else {
            continue;
        };
        trial.sampled_blocks += 1;
        trial.read_bytes += u64::from(parent.block_size().bytes());
        if id != parent_id(parent, index, tried)? {
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
    readable: &Readable,
    parent: &DiskReader,
    tried: &str,
) -> Outcome<bool> {
    let Some(allocation) = control.session().context(nbd::ALLOCATION) else { return Ok(false) };
    let block = u64::from(parent.block_size().bytes());
    let size = parent.size_bytes().min(readable.size_bytes);
    let mut at = 0;
    while at < size {
        let stretch = Extent::new(at, STRETCH_BYTES.min(size - at));
        let mut zeroes = Vec::new();
        let asked = control.changed(stretch, None, Some(allocation), |extent| {
            if extent.kind == ChangedKind::Zero {
                zeroes.push((extent.offset.div_ceil(block), (extent.offset + extent.length) / block));
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
                if dirty_bytes(control, readable, range, tried).await? == 0 {
                    return Ok(true);
                }
            }
        }
        at = stretch.end();
    }
    Ok(false)
}

/// The id of a block as the disk holds it, if the bitmap calls all of it clean.
async fn clean_block(
    repository: &Repository,
    control: &mut Control,
    readable: &Readable,
    parent: &DiskReader,
    index: BlockIndex,
    tried: &str,
) -> Outcome<Option<BlockId>> {
    let block = u64::from(parent.block_size().bytes());
    let start = index.0 * block;
    let length = block.min(parent.size_bytes().min(readable.size_bytes).saturating_sub(start));
    // The last, short block of a disk that grew is another block now.
    if length == 0 || (length < block && parent.size_bytes() != readable.size_bytes) {
        return Ok(None);
    }
    let range = Extent::new(start, length);
    if dirty_bytes(control, readable, range, tried).await? != 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; length as usize];
    control.read(start, &mut bytes).await.map_err(|e| Failure::failed(tried, e))?;
    Ok(Some(repository.hasher().block_id(&bytes)))
}

async fn dirty_bytes(
    control: &mut Control,
    readable: &Readable,
    range: Extent,
    tried: &str,
) -> Outcome<u64> {
    let name = readable.dirty.as_deref().unwrap_or_default();
    let context = format!("qemu:dirty-bitmap:{name}");
    let Some(id) = control.session().context(&context) else {
        return Err(Failure::failed(tried, format!("the bitmap {name} is not exported")));
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

/// Random blocks, each moved on to the next one that holds data where there is one.
fn samples(parent: &DiskReader, tried: &str) -> Outcome<Vec<BlockIndex>> {
    let blocks = parent.size_bytes().div_ceil(u64::from(parent.block_size().bytes()));
    let mut chosen = Vec::with_capacity(SAMPLES);
    if blocks == 0 {
        return Ok(chosen);
    }
    for _ in 0..SAMPLES {
        let random = getrandom::u64().map_err(|e| Failure::failed(tried, e))?;
        let from = BlockIndex(random % blocks);
        chosen.push(next_data(parent, from, tried)?.unwrap_or(from));
    }
    chosen.sort_unstable();
    chosen.dedup();
    Ok(chosen)
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
