//! Control plane to one QEMU: QMP session, guest agent, block inventory, bitmaps and the capture.
//!
//! This crate moves no block data, knows no repository and speaks no NBD; it asks QEMU to export.
//!
//! - [`session`] is the protocol without IO; [`Monitor`] runs it on a socket. [`agent`] is the
//!   guest agent's channel. Every call has a deadline, and a call that ran out of it may still be
//!   carried out ([`QmpError::outcome_unknown`]).
//! - [`features`] tells what the QEMU can do, [`inventory`] which disks there are and what stands
//!   against backing them up, [`bitmap`] whether a bitmap may be trusted.
//!
//! Answers of QEMU are read field by field: what a newer version adds is passed over, what a
//! decision needs and is not there is an error.

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
mod place;
pub mod recover;
pub mod session;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use errors::QmpError;
pub use frame::{FrameError, MAX_DEPTH, MAX_MESSAGE_BYTES};
pub use monitor::Monitor;
pub use place::{NOBODY_THERE, Place};
