//! A laboratory for whole-system tests: real QEMU processes with a real guest in them, reference
//! reads of their disks, and the `icecore` binary run from outside, as its users run it.
//!
//! It knows nothing of Icecore's crates on purpose: what it compares with must not share their
//! mistakes. `cargo xtask test` installs and builds what it needs; `cargo xtask demo` is built on
//! it too.
//!
//! Everything here ends with its owner: dropping a [`TestVm`], an [`Icecore`] run or a mount kills
//! the process or takes the mount away, also when a test fails.

mod acceptance;
mod agent;
mod authority;
mod ceph;
mod daemon;
mod debian;
mod disk;
mod domain_proof;
mod failure;
mod fault_proxy;
mod guestless;
mod icecore;
mod image;
mod libvirt;
mod monitor;
mod mount;
mod object_store;
mod place;
mod process;
mod proof;
mod qemu;
mod reference;
mod remote;
mod repo_server;
mod shell;
mod spec;
mod ssh;
mod vm;

pub use acceptance::acceptance;
pub use agent::{AgentProxy, Answers, agent_answers};
pub use daemon::{Answer, Daemon};
pub use debian::Debian;
pub use disk::{Attach, Bus, Disk, Fs, Layout};
pub use domain_proof::{prove_backup, prove_point, reference_vdb, write_vdb};
pub use failure::{Failure, Result};
pub use fault_proxy::{FaultProxy, Mischief, Rule};
pub use icecore::{Icecore, Outcome, Run, Site, Started, icecore_binary};
pub use image::{
    compare, create_noise, create_overlay, create_qcow2, create_raw, filesystem_check,
    image_to_raw, sha256_of,
};
pub use libvirt::{AGENT_CHANNEL, Domain, Libvirt};
pub use monitor::Monitor;
pub use mount::{Mounted, check_writer, check_writer_in_images};
pub use object_store::{ACCESS_KEY, ObjectServer, ObjectStore, SECRET_KEY};
pub use place::{Scratch, guest_files, workspace_root};
pub use process::{Background, run, run_within, wait_until};
pub use proof::{count, of_disk, require_mode, require_rehash, text};
pub use qemu::Qemu;
pub use reference::{FreezeWatch, Reference};
pub use repo_server::RepoServer;
pub use shell::Shell;
pub use spec::VmSpec;
pub use ssh::SshServer;
pub use vm::TestVm;

/// Bytes in one KiB.
pub const KIB: u64 = 1 << 10;
/// Bytes in one MiB.
pub const MIB: u64 = 1 << 20;
