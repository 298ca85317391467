//! Maps: which block of a disk holds what, as a short list of immutable sorted runs.
//!
//! The newest run that mentions a block decides; a block that no run mentions is zero. `layout`
//! has the bytes, `writer` and `reader` one run, `view` several runs laid over each other, `delta`
//! builds the run of a new point together with its content root, `merge` folds runs together.

mod delta;
#[cfg(feature = "testing")]
pub(crate) mod fuzzed;
mod layout;
mod merge;
mod reader;
mod scrub;
mod view;
mod writer;

use crate::content::FANOUT;
use crate::ids::BlockId;
use crate::point::Location;

pub(crate) use delta::DeltaWriter;
pub(crate) use merge::{Below, fold, merge_count};
pub(crate) use reader::RunReader;
pub(crate) use scrub::{scrub_run, scrub_stored};
pub(crate) use view::{MapView, PageCursor};
pub(crate) use writer::{RunDraft, RunWriter};

/// Most runs of one map. The tiers keep them below the logarithm of their sizes' ratio, which is
/// below 40; a manifest with more is refused.
pub(crate) const MAP_RUNS_MAX: usize = 64;
/// Blocks of a page (a span).
pub(crate) const PAGE_BLOCKS: u64 = FANOUT as u64;
/// Pages of a region, which has one index.
pub(crate) const REGION_PAGES: u64 = FANOUT as u64;
/// Blocks of a region: 4 GiB of disk at 64 KiB.
pub(crate) const REGION_BLOCKS: u64 = PAGE_BLOCKS * REGION_PAGES;

/// What a run says about a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// It is zero.
    Zero,
    /// It holds data.
    Data(BlockId, Location),
}

/// The blocks of one page; none where nothing is said.
pub(crate) type PageSlots = [Option<Slot>; FANOUT];

pub(crate) fn empty_page() -> Box<PageSlots> {
    Box::new([None; FANOUT])
}
