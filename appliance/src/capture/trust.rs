//! Trust but verify: before an incremental read, the bitmap is tested against the disk.

use std::collections::BTreeSet;
use std::ops::Range;

use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::{ChangedKind, Flow};
use icecore_qmp::bitmap::{Doubt, Sentinels};
use icecore_repository::{BlockId, BlockIndex, DiskReader, Repository};

use super::spool::Spool;
use super::{Base, Data, DirtyMap, Readable, Recorder};
use crate::failure::{Failure, Outcome};
use crate::nbd::{self, Questions};

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
    let mut witness = Witness::connect(readable, map, tried).await?;
    let mut trial = Trial { doubt: None, sampled_blocks: 0 };
    // libvirt's bitmaps have none: what they would tell (that the disk shrank and grew back) shows in
    // its holes.
    let (sentinels, paranoid) = match base.recorder {
        Recorder::Icecore => (Some(Sentinels::new(base.size_bytes, base.granularity)), paranoid),
        Recorder::Libvirt => (None, true),
    };
    for range in sentinels.into_iter().flat_map(Sentinels::ranges) {
        let range = Extent::new(range.start, range.end - range.start);
        if witness.dirty_bytes(range, tried).await? != range.length {
            trial.doubt = Some(Doubt::Contradiction);
            return Ok(trial);
        }
    }
    let size = parent.size_bytes().min(readable.size_bytes);
    if paranoid && witness.holes_contradict(parent, size, tried).await? {
        trial.doubt = Some(Doubt::Contradiction);
        return Ok(trial);
    }
    for sample in samples {
        let range = Extent::new(sample.start, sample.end - sample.start);
        if witness.dirty_bytes(range, tried).await? != 0 {
            continue;
        }
        let bytes = witness.read(range, tried).await?;
        trial.sampled_blocks += 1;
        let index = BlockIndex(range.offset / u64::from(parent.block_size().bytes()));
        if repository.hasher().block_id(&bytes) != parent_id(parent, index, tried)? {
            trial.doubt = Some(Doubt::Contradiction);
            return Ok(trial);
        }
    }
    Ok(trial)
}

/// The disk and its bitmap, to be asked about small ranges.
enum Witness<'a> {
    Export { control: Box<Questions>, bitmap: &'a str },
    Pushed { spool: &'a Spool, dirty: &'a [Range<u64>] },
}

impl<'a> Witness<'a> {
    async fn connect(readable: &'a Readable, map: &'a DirtyMap, tried: &str) -> Outcome<Self> {
        match (&readable.data, map) {
            (Data::Export(uri), DirtyMap::Export { bitmap }) => {
                let control = nbd::control(uri, Some(bitmap), tried).await?;
                Ok(Self::Export { control: Box::new(control), bitmap })
            }
            (Data::Spool(spool), DirtyMap::Listed(dirty)) => Ok(Self::Pushed { spool, dirty }),
            _ => Err(Failure::failed(tried, "the bitmap is not where the data are")),
        }
    }

    async fn dirty_bytes(&mut self, range: Extent, tried: &str) -> Outcome<u64> {
        let (control, bitmap) = match self {
            Self::Export { control, bitmap } => (control, bitmap),
            Self::Pushed { dirty, .. } => return Ok(overlap(dirty, range)),
        };
        let Some(id) = control.session().context(&format!("qemu:dirty-bitmap:{bitmap}")) else {
            return Err(Failure::failed(tried, format!("the bitmap {bitmap} is not exported")));
        };
        let mut bytes = 0;
        let count = |changed: icecore_nbd_client::Changed| {
            bytes += changed.length;
            Flow::Continue(())
        };
        let asked = control.changed(range, Some(id), None, count).await;
        asked.map_err(|e| Failure::failed(tried, e))?;
        Ok(bytes)
    }

    async fn read(&mut self, range: Extent, tried: &str) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; range.length as usize];
        match self {
            Self::Export { control, .. } => {
                let read = control.read(range.offset, &mut bytes).await;
                read.map_err(|e| Failure::failed(tried, e))?;
            }
            Self::Pushed { spool, .. } => {
                let read = spool.read_at(range.offset, &mut bytes);
                read.map_err(|e| Failure::failed(tried, e))?;
            }
        }
        Ok(bytes)
    }

    /// Whether a block that the bitmap calls clean is a hole where the parent holds data. Walks
    /// the whole allocation map; what was pushed has none.
    async fn holes_contradict(
        &mut self,
        parent: &DiskReader,
        size: u64,
        tried: &str,
    ) -> Outcome<bool> {
        let mut at = 0;
        while at < size {
            let stretch = Extent::new(at, STRETCH_BYTES.min(size - at));
            for hole in self.holes(stretch, tried).await? {
                if self.hides_data(parent, hole, size, tried).await? {
                    return Ok(true);
                }
            }
            at = stretch.end();
        }
        Ok(false)
    }

    async fn holes(&mut self, stretch: Extent, tried: &str) -> Outcome<Vec<Extent>> {
        let Self::Export { control, .. } = self else { return Ok(Vec::new()) };
        let allocation = control.session().context(nbd::ALLOCATION);
        let mut holes = Vec::new();
        let asked = control.changed(stretch, None, allocation, |extent| {
            if extent.kind == ChangedKind::Zero {
                holes.push(Extent::new(extent.offset, extent.length));
            }
            Flow::Continue(())
        });
        asked.await.map_err(|e| Failure::failed(tried, e))?;
        Ok(holes)
    }

    async fn hides_data(
        &mut self,
        parent: &DiskReader,
        hole: Extent,
        size: u64,
        tried: &str,
    ) -> Outcome<bool> {
        let block = u64::from(parent.block_size().bytes());
        for entry in parent.entries(BlockIndex(hole.offset.div_ceil(block))) {
            let index = entry.map_err(|e| Failure::from_repository(tried, e))?.index;
            let range = Extent::new(index.0 * block, block.min(size - index.0 * block));
            if range.end() > hole.end() {
                break;
            }
            if self.dirty_bytes(range, tried).await? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// How many bytes of `range` lie in ascending, disjoint ranges.
pub fn overlap(dirty: &[Range<u64>], range: Extent) -> u64 {
    let first = dirty.partition_point(|dirty| dirty.end <= range.offset);
    let within = dirty[first..].iter().take_while(|dirty| dirty.start < range.end());
    within.map(|d| d.end.min(range.end()) - d.start.max(range.offset)).sum()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_counted_in_bytes() {
        let dirty = [0..10, 20..30, 40..50];
        assert_eq!(overlap(&dirty, Extent::new(5, 20)), 10);
        assert_eq!(overlap(&dirty, Extent::new(10, 10)), 0);
        assert_eq!(overlap(&dirty, Extent::new(0, 100)), 30);
        assert_eq!(overlap(&[], Extent::new(0, 100)), 0);
    }
}
