//! Restore: the blocks of a point onto a target, flushed, read back and proven.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use icecore_repository::{BlockHasher, ContentRoot, DiskReader};

use crate::backend::LaneSet;
use crate::error::{EngineError, Span};
use crate::pipeline::Options;
use crate::pipeline::write::{Fetchers, Holes, flush, write};
use crate::plan::Blocks;
use crate::prove::{prove_root, require_blocks};
use crate::source::{BlockRange, RangesOf, Steps};
use crate::stats::Latency;

/// What is known about a target's present content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetState {
    /// Proven to read as zeroes everywhere: zeroes need not be written.
    Blank,
    /// Anything may be there: zeroes are written.
    Unknown,
}

/// What is done to prove a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Nothing.
    None,
    /// What was written is read back: the whole target and its content root, or with `only` the
    /// id of each written block.
    ReadBack,
}

/// What a restore did.
#[derive(Debug, Clone)]
pub struct RestoreStats {
    /// Bytes of blocks written or zeroed.
    pub written_bytes: u64,
    /// Of these, bytes zeroed.
    pub zeroed_bytes: u64,
    /// Bytes read back and found right.
    pub verified_bytes: u64,
    /// The content root that the whole target was proven to have.
    pub root: Option<ContentRoot>,
    /// Latencies of writes.
    pub write_latency: Latency,
    /// Latencies of reading back.
    pub read_latency: Latency,
    /// How long writing took.
    pub write_took: Duration,
    /// How long flushing took.
    pub flush_took: Duration,
    /// How long verifying took.
    pub verify_took: Duration,
}

/// Gives the target behind `set` the content of `point`: all of it, or the blocks of `only`.
///
/// The target must be as long as the point's disk at least, and its lanes readable if it is to be
/// verified.
///
/// # Errors
/// The first failure of any part, or [`EngineError::RootDiffers`] or
/// [`EngineError::BlocksDiffer`]; the target must then not be used.
pub fn restore(
    point: &DiskReader,
    hasher: BlockHasher,
    set: &mut LaneSet,
    state: TargetState,
    only: Option<RangesOf<'_>>,
    verify: Verify,
    options: &Options,
) -> Result<RestoreStats, EngineError> {
    let disk = Blocks { size: point.size_bytes(), block: point.block_size().bytes() };
    let progress = &options.control.progress;
    let before = (progress.done_bytes.load(Relaxed), progress.zero_bytes.load(Relaxed));
    let started = Instant::now();
    let write_latency = write_steps(point, set, disk, state, only, options)?;
    let written = Instant::now();
    flush(set, options)?;
    let flushed = Instant::now();
    let mut stats = RestoreStats {
        written_bytes: progress.done_bytes.load(Relaxed) - before.0,
        zeroed_bytes: progress.zero_bytes.load(Relaxed) - before.1,
        verified_bytes: 0,
        root: None,
        write_latency,
        read_latency: Latency::default(),
        write_took: written - started,
        flush_took: flushed - written,
        verify_took: Duration::ZERO,
    };
    if verify == Verify::ReadBack {
        let read_before = progress.read_bytes.load(Relaxed);
        read_back(point, hasher, set, only, options, &mut stats)?;
        // A root proves all of the target, the holes that its file system knows of included.
        stats.verified_bytes = match only {
            None => point.size_bytes(),
            Some(_) => progress.read_bytes.load(Relaxed) - read_before,
        };
        stats.verify_took = flushed.elapsed();
    }
    Ok(stats)
}

fn write_steps(
    point: &DiskReader,
    set: &mut LaneSet,
    disk: Blocks,
    state: TargetState,
    only: Option<RangesOf<'_>>,
    options: &Options,
) -> Result<Latency, EngineError> {
    let all = BlockRange { first: 0, count: disk.count() };
    let ranges = match only {
        Some(ranges) => ranges(),
        None => Box::new(std::iter::once(Ok(all))),
    };
    let per_request = disk.per_request(set.request_bytes(disk.block)?);
    let blank = state == TargetState::Blank;
    let steps = Steps::new(point, disk, ranges, per_request, blank);
    let span = Span::new(0, disk.size);
    let fetcher = |_| point.fetcher().map_err(|source| EngineError::Repository { span, source });
    let (overlapping, batch_bytes) = point.fetchers();
    // Each fetcher of a server has a buffer for its answers, of which the store's memory has so many.
    let count = if batch_bytes > 0 { overlapping } else { options.workers.max(1) };
    let each = (0..count).map(fetcher).collect::<Result<Vec<_>, _>>()?;
    let holes = set.file().filter(|_| blank).map_or(Holes::Fill, Holes::Keep);
    write(set, disk, steps, Fetchers { each, batch_bytes }, holes, options)
}

fn read_back(
    point: &DiskReader,
    hasher: BlockHasher,
    set: &mut LaneSet,
    only: Option<RangesOf<'_>>,
    options: &Options,
    stats: &mut RestoreStats,
) -> Result<(), EngineError> {
    let Some(ranges) = only else {
        let found = prove_root(set, point, hasher, options)?;
        (stats.root, stats.read_latency) = (Some(found.root), found.latency);
        return Ok(());
    };
    stats.read_latency = require_blocks(set, point, hasher, ranges, options)?;
    Ok(())
}
