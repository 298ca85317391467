//! The data plane: moves blocks between disks and a repository.
//!
//! It drives *lanes* (a file, or connections that speak a [`wire::Wire`] protocol) with io_uring or
//! with threads, behind one face, and runs the pipelines above them: read, encode and store in
//! order; fetch, verify, write and prove. It knows neither QMP nor NBD.
//!
//! Three rules shape it. A request is sent only after the memory for its whole reply is reserved,
//! and replies are always read: rates and back-pressure act on sending, so no guest ever waits for
//! us. Memory is bounded by a [`budget::Budget`] from end to end. The first error ends a run, and
//! what a failed run has read is never used.

mod backend;
mod backup;
pub mod budget;
mod buffer;
pub mod control;
pub mod error;
pub mod lane;
pub mod limits;
pub mod pacing;
mod pipeline;
pub mod plan;
mod priority;
mod prove;
mod restore;
mod source;
mod stats;
pub mod wire;

pub use backend::{DataMap, Engine, EngineChoice, LaneSet};
pub use backup::{BackupStats, backup};
pub use budget::{Budget, BudgetError, Reservation};
pub use control::{Control, Progress};
pub use error::{Cause, EngineError, Span};
pub use lane::Lane;
pub use pacing::{Pace, Pacing};
pub use pipeline::Options;
pub use plan::{PlanError, PlanItem, ReadItem};
pub use priority::Priority;
pub use prove::{HashStats, compare_blocks, dry_run, require_blocks, whole_disk};
pub use restore::{RestoreStats, TargetState, Verify, restore};
pub use source::{BlockRange, BlockRanges, RangesOf};
pub use stats::Latency;
pub use wire::{Op, Want, Wire, WireError, WireErrorKind};

#[cfg(test)]
mod end_to_end;
