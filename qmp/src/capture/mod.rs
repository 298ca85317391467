//! One instant across the disks of a running guest: names, commands, and what is seen in QEMU.
//!
//! This module decides nothing about *when*: [`crate::guardian`] runs the commands, and
//! [`crate::recover`] says how to undo them from what is observed.

mod agent_channel;
pub mod call;
pub mod guest_io;
pub mod link;
pub mod names;
pub mod observe;
pub mod plan;
pub mod scratch;

pub use call::Call;
pub use names::{DiskIndex, OurName, Role, RunId};
pub use observe::Observed;
