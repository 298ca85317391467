//! Writing the differing blocks of one disk, and the proof of it.

use std::time::Instant;

use icecore_io_engine::{
    BlockRange, BlockRanges, EngineError, LaneSet, Options, TargetState, Verify, dry_run,
    require_blocks, restore, whole_disk,
};
use icecore_repository::{BlockHasher, DiskId, DiskReader};

use super::ranges::Ranges;
use super::{Plan, Rollback, RolledBackDisk};
use crate::data;
use crate::failure::{Failure, Outcome};
use crate::nbd::{self, Peer};
use crate::progress::{Meter, Progress};
use crate::restore;

/// Blocks of the rest that are read and compared, where not everything is.
const SAMPLES: usize = 16;

impl Rollback<'_> {
    /// Writes the blocks of `plan` from the wanted point to the export, reads them back and samples the rest (or
    /// reads everything).
    pub(super) async fn write(
        &self,
        disk: &DiskId,
        uri: &Peer,
        plan: Plan,
    ) -> Outcome<RolledBackDisk> {
        let started = Instant::now();
        let tried = format!("write disk {disk} back to {}", self.point.id);
        let wanted = self.reader(self.point, disk)?;
        let block = u64::from(wanted.block_size().bytes());
        let Plan { ranges, bytes: differing_bytes } = plan;
        let to_write = ranges.bytes(block, wanted.size_bytes());
        let lanes = nbd::lanes_of_size(uri, wanted.size_bytes(), &tried).await?;
        let mut set =
            LaneSet::new(lanes.set, self.context.engine).map_err(|e| Failure::failed(&tried, e))?;
        let hang_up = lanes.hang_up;
        // From the first write on there is only one way: an interrupt is heard when it is done.
        let mut options = data::options(self.context, self.repository, &Default::default());
        let activity = self.job.activity();
        options.control.pulse = activity.pulse.clone();
        let meter = Meter::new(to_write, options.control.progress.clone()).with_read_back();
        let _shown = Progress::show(format!("rolling back {disk}"), meter, self.context);
        let (hasher, full) = (self.repository.hasher(), self.request.verify_full);
        let samples = samples(wanted.size_bytes().div_ceil(block), &tried)?;
        let written_bytes = data::watched(&activity, move || {
            let written = differing(&wanted, hasher, &mut set, &ranges, &options)?;
            match full {
                true => prove_all(&wanted, hasher, &mut set, &options)?,
                false => prove_some(&wanted, hasher, &mut set, &samples, &options)?,
            }
            Ok(written)
        })
        .await
        .map_err(|e| restore::failure(&tried, e))?;
        drop(hang_up);
        Ok(RolledBackDisk {
            disk: disk.to_string(),
            differing_bytes,
            written_bytes,
            verified: true,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

fn differing(
    wanted: &DiskReader,
    hasher: BlockHasher,
    set: &mut LaneSet,
    blocks: &Ranges,
    options: &Options,
) -> Result<u64, EngineError> {
    let ranges = || -> BlockRanges<'_> { Box::new(blocks.iter().map(Ok)) };
    let state = TargetState::Unknown;
    let stats = restore(wanted, hasher, set, state, Some(&ranges), Verify::ReadBack, options)?;
    Ok(stats.written_bytes)
}

fn prove_all(
    wanted: &DiskReader,
    hasher: BlockHasher,
    set: &mut LaneSet,
    options: &Options,
) -> Result<(), EngineError> {
    let size = wanted.size_bytes();
    let found = dry_run(set, size, wanted.block_size(), hasher, whole_disk(size), options)?.root;
    match wanted.content_root() {
        expected if expected == found => Ok(()),
        expected => Err(EngineError::RootDiffers { expected, found }),
    }
}

fn prove_some(
    wanted: &DiskReader,
    hasher: BlockHasher,
    set: &mut LaneSet,
    samples: &[BlockRange],
    options: &Options,
) -> Result<(), EngineError> {
    let ranges = || -> BlockRanges<'_> { Box::new(samples.iter().copied().map(Ok)) };
    require_blocks(set, wanted, hasher, &ranges, options).map(drop)
}

fn samples(blocks: u64, tried: &str) -> Outcome<Vec<BlockRange>> {
    let mut chosen = std::collections::BTreeSet::new();
    for _ in 0..if blocks == 0 { 0 } else { SAMPLES } {
        let random = getrandom::u64().map_err(|e| Failure::failed(tried, e))?;
        chosen.insert(random % blocks);
    }
    Ok(chosen.into_iter().map(|first| BlockRange { first, count: 1 }).collect())
}
