//! A small process that keeps a guest safe from the worker that backs it up.
//!
//! From before the freeze until the graph is out, the guardian owns the connections to QEMU and
//! to the guest agent; the worker asks it. It does no file IO, ignores the signals that end the
//! worker, and when the worker ends, stalls or misses its time, it undoes everything by itself.

mod client;
mod flow;
mod keeper;
pub mod leash;
pub mod probe;
pub mod protocol;
mod rollback;
mod serve;
mod spawn;
mod watch;

pub use client::{GuardianClient, Pulse};
pub use protocol::GuardianError;
pub use serve::{main, serve};
