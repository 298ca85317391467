//! Control plane to one QEMU: QMP session, guest agent, block inventory and bitmaps.
//!
//! This crate moves no block data, knows no repository and speaks no NBD; it asks QEMU to export.

pub mod agent;
pub mod bitmap;
pub mod capture;
pub mod errors;
pub mod features;
mod frame;
pub mod freeze;
pub mod guardian;
pub mod inventory;
pub mod monitor;
pub mod recover;
pub mod session;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use errors::QmpError;
pub use frame::{FrameError, MAX_DEPTH, MAX_MESSAGE_BYTES};
pub use monitor::Monitor;
