//! Captures: ways to hold one instant of a VM's disks still while they are read.
//!
//! There is one for a running QEMU ([`qmp`]), one for a domain of libvirt ([`libvirt`]) and one for
//! powered-off images ([`image`]); the same reader stands behind all. What is read of each disk is decided in [`decide`].

pub mod changes;
pub mod decide;
pub mod image;
pub mod libvirt;
pub mod qmp;
pub mod scratch;
pub mod spool;
pub mod trim;
pub mod trust;

use std::ops::Range;
use std::sync::Arc;

use icecore_qmp::bitmap::{Bitmap, BitmapName, Granularity};
use icecore_qmp::inventory::Identity;
use icecore_repository::{CapsulePart, Consistency, DiskId};
use jiff::Timestamp;

use crate::failure::Outcome;
use crate::governor::Guest;
use crate::nbd::Peer;
use crate::report::Unprotected;
use spool::Spool;

/// A disk of the VM, as it is before anything is done.
#[derive(Debug, Clone)]
pub struct SeenDisk {
    pub id: DiskId,
    pub size_bytes: u64,
    /// What it is recognised by next time.
    pub identity: Identity,
    /// The identity holds only what an image tells: the parent's may say more.
    pub partial_identity: bool,
    /// All bitmaps on it, those of others included.
    pub bitmaps: Vec<Bitmap>,
    /// Whether a bitmap of ours can record on it.
    pub records: bool,
    /// Who makes its bitmaps.
    pub recorder: Recorder,
    /// Why it cannot be backed up.
    pub refusal: Option<String>,
    /// The guest cannot write to it: a point without it lacks nothing that changes.
    pub read_only: bool,
}

impl SeenDisk {
    /// The identity to compare with a parent's: a partial one is the parent's where all of it is
    /// in there.
    pub fn identity_beside<'a>(&'a self, parent: &'a Identity) -> &'a Identity {
        let of_parent: Vec<&str> = parent.0.split(';').collect();
        let within = self.identity.0.split(';').all(|part| of_parent.contains(&part));
        if self.partial_identity && within { parent } else { &self.identity }
    }
}

/// Who makes the bitmaps of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorder {
    /// We do: in the granularity of the repository, with sentinels.
    Icecore,
    /// libvirt does, with its checkpoints: in QEMU's own granularity, without sentinels.
    Libvirt,
}

impl Recorder {
    /// The granularity of new bitmaps; `of_repository` is the one that we choose.
    pub fn granularity(self, of_repository: Granularity) -> Granularity {
        match self {
            Self::Icecore => of_repository,
            Self::Libvirt => Granularity::DEFAULT,
        }
    }
}

/// Recorded changes since the parent's instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    pub bitmap: BitmapName,
    pub granularity: Granularity,
    /// Size of the disk when the bitmap was made.
    pub size_bytes: u64,
    /// Who made it: it has sentinels, or not.
    pub recorder: Recorder,
}

/// What is wanted of one disk.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its place in [`Capture::disks`].
    pub index: usize,
    /// The changes to read, where they may be trusted.
    pub base: Option<Base>,
    /// The bitmap that records from the instant on.
    pub bitmap: Option<BitmapName>,
}

/// How the instant went.
#[derive(Debug, Clone)]
pub struct Taken {
    pub captured_at: Timestamp,
    pub consistency: Consistency,
}

/// A disk at the instant, ready to be read.
#[derive(Debug, Clone)]
pub struct Readable {
    pub data: Data,
    /// The changes, where a base was given.
    pub dirty: Option<DirtyMap>,
    /// Size at the instant.
    pub size_bytes: u64,
}

/// Where the data of a disk are.
#[derive(Debug, Clone)]
pub enum Data {
    /// In an export.
    Export(Peer),
    /// Here: they were pushed.
    Spool(Arc<Spool>),
}

/// A readable copy of a dirty bitmap.
#[derive(Debug, Clone)]
pub enum DirtyMap {
    /// Beside the data, in their export.
    Export {
        /// Its name, without the `qemu:dirty-bitmap:` of its metadata context.
        bitmap: String,
    },
    /// Read already: dirty byte ranges, ascending and disjoint.
    Listed(Arc<Vec<Range<u64>>>),
}

/// What is known of the point at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Committed and read back: older bitmaps of ours may go.
    Committed,
    /// Known not to be committed: the new bitmaps go.
    NotCommitted,
    /// Nobody knows: all bitmaps stay until the repository has been asked.
    Unknown,
}

/// A way to hold an instant.
#[allow(async_fn_in_trait)] // Used within this package, on one thread.
pub trait Capture {
    /// The VM's disks, in device order.
    fn disks(&self) -> &[SeenDisk];

    /// Devices that may hold data and cannot be seen.
    fn unprotected(&self) -> Vec<Unprotected>;

    /// What recreates the machine.
    fn capsule(&self) -> serde_json::Value;

    /// Binary parts of it, such as the firmware's variables.
    fn parts(&self) -> Vec<CapsulePart> {
        Vec::new()
    }

    /// Fixes one instant of the disks in `tasks`; the guest runs again when this returns.
    async fn take(&mut self, tasks: &[Task]) -> Outcome<Taken>;

    /// Makes the `at`-th of the tasks readable: what changed since `base` and the `samples`, or
    /// all of it without a base.
    async fn open(
        &mut self,
        at: usize,
        base: Option<&Base>,
        samples: &[Range<u64>],
    ) -> Outcome<Readable>;

    /// The running guest that a backup must not slow down; none where nobody runs, or nobody can
    /// be seen.
    fn guest(&self) -> Option<Guest> {
        None
    }

    /// The `at`-th of the tasks is read: what was there for this alone may go.
    fn close(&mut self, _at: usize) {}

    /// Why the instant was lost, where the capture knows better than whoever read from it.
    async fn lost(&self) -> Option<String>;

    /// Lets go of the instant; with an error where it turned out not to have held.
    async fn release(&mut self) -> Outcome<()>;

    /// Puts the bitmaps in order. Called once, after [`release`](Self::release) or in its stead.
    async fn settle(&mut self, fate: Fate) -> Outcome<()>;
}
