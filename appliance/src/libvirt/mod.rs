//! libvirt: its domains, its checkpoints and its backup job, driven through `virsh`.
//!
//! [`Virsh`] runs the program; everything it prints is read by pure functions ([`xml`],
//! [`checkpoint`], [`job`]). The [`warden`] is a process that ends what a run has begun in libvirt
//! when the run itself cannot any more. A domain may also be captured as a bare QEMU is, through
//! libvirt's monitor: then a [`relay`] stands in for its sockets.

pub mod capsule;
pub mod checkpoint;
mod console;
pub mod domain;
pub mod emulator;
mod form;
pub mod half_written;
pub mod job;
pub mod powered_off;
pub mod recover;
pub mod relay;
pub mod rewrite;
pub mod tpm;
mod virsh;
pub mod warden;
pub mod xml;

pub use domain::{Domain, State};
pub use form::CaptureForm;
pub use powered_off::PoweredOff;
pub use virsh::{Kind, Virsh, VirshError};
