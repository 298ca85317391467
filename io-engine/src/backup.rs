//! Backup: from the plan of a disk to blocks pushed into the repository in order.

use std::time::{Duration, Instant};

use icecore_repository::{
    BlockEncoder, BlockIndex, BlockSize, DiskSink, DiskSummary, DiskWriter, Encoded, ParentBlock,
};

use crate::backend::LaneSet;
use crate::error::EngineError;
use crate::pipeline::Options;
use crate::pipeline::read::{Job, Piece, Purpose, read};
use crate::plan::{Blocks, PlanItem, Planner, Run};
use crate::stats::Latency;

/// What a backup of one disk did.
#[derive(Debug, Clone)]
pub struct BackupStats {
    /// What the repository says of the disk, its content root among it.
    pub summary: DiskSummary,
    /// Bytes read because they may have changed.
    pub read_bytes: u64,
    /// Bytes recorded as zero without being read.
    pub zero_range_bytes: u64,
    /// Latencies of the reads.
    pub latency: Latency,
    /// How long it took.
    pub took: Duration,
}

/// Backs one disk up: reads what `plan` names from `set`, pushes it into `writer` in order and
/// finishes that. The point still has to be committed.
///
/// `size` is the disk's, in bytes. `on_durable` is called (in the sink's thread) as blocks become
/// durable: everything read so far below its argument need not be kept by the source any more.
///
/// # Errors
/// The first failure of any part; the point must then be given up.
pub fn backup(
    set: &mut LaneSet,
    size: u64,
    block_size: BlockSize,
    writer: DiskWriter,
    plan: impl Iterator<Item = PlanItem> + Send,
    options: &Options,
    on_durable: impl FnMut(BlockIndex) + Send,
) -> Result<BackupStats, EngineError> {
    let started = Instant::now();
    let disk = Blocks { size, block: block_size.bytes() };
    let DiskWriter { mut cursor, encoders, sink } = writer;
    let make = |_| {
        let encoder = encoders.encoder().map_err(|source| failed(disk, 0, 1, source))?;
        Ok(encode_with(encoder))
    };
    let workers = (0..options.workers.max(1)).map(make).collect::<Result<Vec<_>, EngineError>>()?;
    let mut order =
        InOrder { disk, sink, on_durable, durable: BlockIndex(0), tally: Tally::default() };
    let job = Job {
        prepare: |run: Run| {
            // Pieces have at most a few thousand blocks.
            cursor
                .parent_blocks(BlockIndex(run.first), run.count as u32)
                .map_err(|source| failed(disk, run.first, run.count, source))
        },
        workers,
        sink: |run, blocks| order.take(run, blocks),
        purpose: Purpose::Store,
    };
    let latency = read(set, disk, Planner::new(plan, disk), options, job)?;
    let InOrder { sink, tally, .. } = order;
    let summary = sink.finish().map_err(|source| failed(disk, 0, disk.count(), source))?;
    Ok(BackupStats {
        summary,
        read_bytes: tally.read_bytes,
        zero_range_bytes: tally.zero_range_bytes,
        latency,
        took: started.elapsed(),
    })
}

fn failed(disk: Blocks, first: u64, count: u64, source: icecore_repository::Error) -> EngineError {
    EngineError::Repository { span: disk.span(first, count), source }
}

/// A worker: a piece's blocks encoded, each beside what the parent holds there.
fn encode_with(
    mut encoder: BlockEncoder,
) -> impl FnMut(Piece<'_, Vec<ParentBlock>>) -> Result<(Vec<Encoded>, u64), EngineError> {
    move |piece| {
        let mut held = 0;
        let mut blocks = Vec::with_capacity(piece.prepared.len());
        for (nth, parent) in (0..).zip(&piece.prepared) {
            let encoded = match piece.block(nth) {
                Some(block) => encoder.encode(block, *parent),
                None if *parent == ParentBlock::Zero => Encoded::Same,
                None => Encoded::Zero,
            };
            if let Encoded::New { frame, .. } = &encoded {
                held += frame.stored_bytes() as u64;
            }
            blocks.push(encoded);
        }
        Ok((blocks, held))
    }
}

/// Counts of a run.
#[derive(Default)]
struct Tally {
    read_bytes: u64,
    zero_range_bytes: u64,
}

/// Where blocks arrive in order.
struct InOrder<F> {
    disk: Blocks,
    sink: DiskSink,
    on_durable: F,
    durable: BlockIndex,
    tally: Tally,
}

impl<F: FnMut(BlockIndex)> InOrder<F> {
    fn take(&mut self, run: Run, blocks: Option<Vec<Encoded>>) -> Result<(), EngineError> {
        let disk = self.disk;
        let bytes = disk.span(run.first, run.count).len;
        let outcome = match blocks {
            None => {
                self.tally.zero_range_bytes += bytes;
                self.sink.push_zero_range(BlockIndex(run.first), run.count)
            }
            Some(blocks) => {
                self.tally.read_bytes += bytes;
                self.push(run, blocks)
            }
        };
        outcome.map_err(|source| failed(disk, run.first, run.count, source))?;
        let durable = self.sink.durable_below();
        if durable > self.durable {
            self.durable = durable;
            (self.on_durable)(durable);
        }
        Ok(())
    }

    fn push(&mut self, run: Run, blocks: Vec<Encoded>) -> icecore_repository::Result<()> {
        for (index, block) in (run.first..).map(BlockIndex).zip(blocks) {
            self.sink.push(index, block)?;
        }
        Ok(())
    }
}
