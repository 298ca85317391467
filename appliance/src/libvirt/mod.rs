//! libvirt: its domains, its checkpoints and its backup job, driven through `virsh`.
//!
//! [`Virsh`] runs the program; everything it prints is read by pure functions ([`xml`],
//! [`checkpoint`], [`job`]). The [`warden`] is a process that ends what a run has begun in libvirt
//! when the run itself cannot any more.

pub mod capsule;
pub mod checkpoint;
pub mod domain;
pub mod emulator;
pub mod job;
pub mod powered_off;
pub mod recover;
pub mod rewrite;
mod virsh;
pub mod warden;
pub mod xml;

pub use domain::{Domain, State};
pub use powered_off::PoweredOff;
pub use virsh::{Kind, Virsh, VirshError};
