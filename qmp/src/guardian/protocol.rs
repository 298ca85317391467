//! What the worker and its guardian say to each other: one JSON document per line.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::capture::names::{DiskIndex, RunId};
use crate::capture::plan::{Base, DiskPlan};
use crate::features::{Features, QemuVersion};
use crate::inventory::{Disk, Inventory};
use crate::place::Place;
use crate::recover::Intents;

/// Longest line; a request with [`SAMPLES_MAX`] samples for one disk stays well below.
pub const LINE_BYTES_MAX: usize = 4 << 20;

/// Most samples of one disk. Each is one command to QEMU.
pub const SAMPLES_MAX: usize = 4096;

/// A line to the guardian.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToGuardian {
    /// Something to do, and the id under which its answer comes.
    Request(u64, Request),
    /// A counter that moves as long as the worker does.
    Pulse(u64),
}

/// A line from the guardian.
#[derive(Debug, Serialize, Deserialize)]
pub struct ToWorker {
    /// The request's id.
    pub id: u64,
    /// What came of it.
    pub answer: Result<Value, GuardianError>,
}

/// What can be asked. The methods of [`super::GuardianClient`] say what each does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // Each is documented where it is called.
pub enum Request {
    Connect(Connect),
    Features,
    Know(Features),
    Inspect,
    Prepare(Prepare),
    Instant(InstantPlan),
    Expose(Expose),
    Push(Push),
    PushStatus(DiskIndex),
    Sizes,
    GuestIo,
    Release,
    Retire(Vec<String>),
    DropNew,
    SwapAway(SwapAway),
    ExposeWritable(Vec<Option<Base>>),
    BeginWriting,
    SwapBack,
    Restart(Restart),
    Abort,
    Recover(Box<Intents>, Option<PathBuf>),
    Forget(Vec<String>),
}

impl Request {
    /// Whether it shows that the worker goes on. The guest's counters are asked for by a clock,
    /// also when nobody reads replies any more.
    pub fn shows_life(&self) -> bool {
        *self != Self::GuestIo
    }
}

/// Where the QEMU is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// Its monitor.
    pub monitor: Place,
    /// Its guest agent.
    pub agent: Option<Place>,
}

/// Who answered on the monitor's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeted {
    /// The version in QEMU's greeting.
    pub version: QemuVersion,
    /// The process that listened on the monitor's socket, where the kernel tells.
    pub peer: Option<i32>,
}

/// A capture to prepare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The run.
    pub run: RunId,
    /// Its disks; their positions are their indexes in every later request.
    pub disks: Vec<DiskPlan>,
    /// Where QEMU's NBD server shall listen: a path in a private directory that does not exist.
    pub server_socket: PathBuf,
    /// The directory of the scratch files.
    pub scratch_dir: PathBuf,
}

/// What came of preparing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// For each disk with a new bitmap, whether it survives a clean end of QEMU.
    pub bitmap_persistent: Vec<Option<bool>>,
}

/// How to take the instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstantPlan {
    /// Freeze the guest's filesystems.
    pub freeze: Freeze,
    /// What follows the instant.
    pub then: Then,
}

/// Whether to freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freeze {
    /// Do not.
    No,
    /// Freeze if that works within so many milliseconds; else go on without.
    Try(u64),
    /// Freeze within so many milliseconds, or fail and undo.
    Require(u64),
}

/// What follows the instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// A guest that ran runs on.
    Continue,
    /// The guest is stopped and stays so, for a rollback.
    Hold,
}

/// How the instant went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstantReport {
    /// Filesystems that were frozen, when any was.
    pub frozen_filesystems: Option<u64>,
    /// Why none was.
    pub why_not_frozen: Option<String>,
    /// From the call to freeze until the thaw was confirmed or given up.
    pub freeze_ms: f64,
    /// From the call to stop until the guest ran again; 0 when it was not stopped by us.
    pub pause_ms: f64,
    /// The guest ran before.
    pub was_running: bool,
    /// A thaw is still owed and goes on being tried.
    pub thaw_owed: bool,
    /// The instant, in milliseconds since 1970, by the guardian's clock.
    pub captured_unix_ms: u64,
}

/// How a disk's data reach the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// QEMU serves them over NBD.
    Pull,
    /// QEMU writes them to an NBD server of ours: for disks whose export would crash QEMU.
    Push,
}

impl Form {
    /// The form that keeps QEMU alive.
    pub fn safe_for(disk: &Disk, features: &Features) -> Self {
        match disk.iothread {
            Some(_) if !features.iothread_exports_are_safe() => Self::Push,
            _ => Self::Pull,
        }
    }
}

/// What to expose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expose {
    /// One per disk, in the order of the run.
    pub disks: Vec<ExposeDisk>,
    /// Exports take TRIM, which frees scratch of what was read.
    pub trim: bool,
}

/// How to expose one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExposeDisk {
    /// Its form.
    pub form: Form,
    /// Its recorded changes, for an incremental point.
    pub base: Option<Base>,
}

/// What is exposed, in the order of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exposed {
    /// One per disk.
    pub disks: Vec<ExposedDisk>,
}

/// One exposed disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExposedDisk {
    /// Its form. With [`Form::Push`] the export holds no data: only `dirty_context` is of use.
    pub form: Form,
    /// Name of its export on the run's socket; none for a push of everything.
    pub export: Option<String>,
    /// The NBD metadata context with its changes.
    pub dirty_context: Option<String>,
    /// Its size at the instant.
    pub size_bytes: u64,
}

/// A push to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Push {
    /// The disk.
    pub disk: DiskIndex,
    /// The unix socket of our NBD server.
    pub socket: PathBuf,
    /// The export there, as large as the disk.
    pub export: String,
    /// With a base only what changed since and `samples` are pushed, else everything.
    pub base: Option<Base>,
    /// Byte ranges to be pushed although they did not change.
    pub samples: Vec<Range<u64>>,
}

/// How a push stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PushState {
    /// It goes on.
    Running {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// All was written and acknowledged.
    Done,
    /// It ended with QEMU's word for it.
    Failed(String),
}

/// A rollback that begins to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapAway {
    /// The run.
    pub run: RunId,
    /// Its disks; their positions are their indexes.
    pub disks: Vec<SwapDisk>,
    /// Where QEMU's NBD server shall listen.
    pub server_socket: PathBuf,
}

/// A disk to be written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapDisk {
    /// QOM path of the object whose `drive` property names the node.
    pub qom_path: String,
    /// The node that the device uses.
    pub node: String,
    /// The node that holds the disk's bitmaps.
    pub bitmap_node: String,
    /// The disk's size.
    pub size_bytes: u64,
    /// The device's iothread, if it has one.
    pub iothread: Option<String>,
}

impl SwapDisk {
    /// A disk of the inventory.
    pub fn new(disk: &Disk) -> Self {
        Self {
            qom_path: disk.drive_path.clone(),
            node: disk.node.clone(),
            bitmap_node: disk.bitmap_node.clone(),
            size_bytes: disk.size_bytes,
            iothread: disk.iothread.clone(),
        }
    }
}

/// An export to write to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritableDisk {
    /// Name of the writable export of the disk.
    pub export: String,
    /// Name of an export without data whose `dirty_context` shows the disk's changes.
    pub map_export: Option<String>,
    /// The NBD metadata context with its changes.
    pub dirty_context: Option<String>,
}

/// How a rollback ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// Reset the machine and let it run.
    Reset,
    /// Leave it stopped: another command restarts it.
    Leave,
}

/// What a connected QEMU is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// What it can do.
    pub features: Features,
    /// Its disks.
    pub inventory: Inventory,
    /// The guest runs.
    pub running: bool,
    /// Runs that have left something.
    pub leftovers: Vec<RunId>,
    /// The process that listens on the monitor's socket, where the kernel tells.
    pub peer: Option<i32>,
}

/// What is left after undoing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// What is still there, and why; empty when all is as before.
    pub left: Vec<String>,
}

/// Why a request failed. Unless the kind says otherwise, all that the run had done was undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct GuardianError {
    /// What a caller can do about it.
    pub kind: ErrorKind,
    /// What was tried, on what, why it failed.
    pub message: String,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// QEMU or its guest cannot be used for this now; nothing was changed.
    Refused,
    /// There is no process behind the monitor's socket: its QEMU has ended, and all that was ours
    /// in it.
    Unreachable,
    /// The monitor's socket cannot be connected to or speaks no QMP; its QEMU may well live.
    NotConnected,
    /// A filesystem-consistent instant was required and not reached.
    NotFrozen,
    /// QEMU answered with an error.
    Qemu,
    /// QEMU did not answer in time.
    Timeout,
    /// QEMU is gone.
    QemuGone,
    /// A disk changed its size.
    SizeChanged,
    /// The worker was taken for dead.
    WorkerStalled,
    /// The request is not legal now.
    OutOfOrder,
    /// The guardian is gone: see [`crate::recover`].
    GuardianGone,
}
