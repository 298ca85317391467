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
pub mod budget;
mod buffer;
pub mod control;
pub mod error;
pub mod lane;
pub mod limits;
pub mod plan;
mod priority;
mod stats;
pub mod wire;

pub use backend::{Engine, EngineChoice, LaneSet};
pub use budget::{Budget, BudgetError, Reservation};
pub use control::{Control, Progress};
pub use error::{Cause, EngineError, Span};
pub use lane::Lane;
pub use plan::{PlanError, PlanItem, ReadItem};
pub use priority::Priority;
pub use stats::Latency;
pub use wire::{Op, Want, Wire, WireError, WireErrorKind};
