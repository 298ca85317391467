//! Which disks the machine has, which node each uses, and what stands against backing it up.
//!
//! [`observe`] asks QEMU and decides nothing; [`assemble`] decides and asks nothing.

mod assemble;
mod graph;
mod observe;
mod order;
mod wire;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use assemble::assemble;
pub use graph::{OUR_PREFIX, is_ours};
pub use observe::{Observed, observe};
pub(crate) use wire::WireBitmap;
pub use wire::{Export, Job};

use crate::bitmap::{Bitmap, BitmapName};
use crate::{Monitor, QmpError};

/// The machine's disks as Icecore sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Writable and read-only disks on block nodes, in device order, refused ones included.
    pub disks: Vec<Disk>,
    /// Devices that may hold data and have no block node: no backup sees them.
    pub unprotected: Vec<Unprotected>,
    /// Backends that are no disks of the guest.
    pub excluded: Vec<Excluded>,
    /// Bitmaps of Icecore on nodes where no disk's bitmap belongs, as an external snapshot leaves
    /// them behind: they record nothing any more.
    pub stray_bitmaps: Vec<StrayBitmap>,
}

/// A bitmap of Icecore on another node than that of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrayBitmap {
    /// Where it is.
    pub node: String,
    /// Whose it is.
    pub name: BitmapName,
}

/// One disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Stable id, `[A-Za-z0-9._-]+`, unique in the machine: the device's id, else the `-drive`'s
    /// name, else the node's given name, else made from the QOM path.
    pub id: String,
    /// The device, as `query-block` names it: its id or its QOM path.
    pub device: String,
    /// QOM type of the object at `drive_path`, such as `virtio-blk-device` or `scsi-hd`.
    pub device_type: String,
    /// QOM path of the object whose `drive` property swaps the disk.
    pub drive_path: String,
    /// The node at the device now; ours while a graph of ours is in.
    pub root: String,
    /// The topmost node that is not ours: what the device uses, and where the filter goes over.
    pub node: String,
    /// Where bitmaps belong: `node`, or the image below a throttle or another lasting filter.
    pub bitmap_node: String,
    /// From `node` down to the file or volume.
    pub layers: Vec<Layer>,
    /// Virtual size.
    pub size_bytes: u64,
    /// Whether the guest may write to it.
    pub writable: bool,
    /// Whether a bitmap on `bitmap_node` can be stored in the image and so outlive QEMU.
    pub persistent_bitmaps: bool,
    /// Whether QEMU decrypts it, so that a backup holds what the image keeps secret.
    pub decrypted: bool,
    /// Serial number the guest sees, where set.
    pub serial: Option<String>,
    /// World-wide name the guest sees, where set.
    pub wwn: Option<u64>,
    /// The iothread that serves it (the first of several), by object id.
    pub iothread: Option<String>,
    /// Tells this disk from another one under the same id.
    pub identity: Identity,
    /// The bitmaps on `bitmap_node`, foreign ones included.
    pub bitmaps: Vec<Bitmap>,
    /// Why it cannot be backed up.
    pub refusal: Option<Refusal>,
}

/// One block node in a disk's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Node name; automatic ones begin with `#`.
    pub node: String,
    /// Its driver, such as `qcow2`, `raw`, `throttle`, `file`, `host_device`, `nbd`.
    pub driver: String,
    /// File name, URI or `json:` description.
    pub file: String,
}

/// What makes a disk the same disk: its id, serial, WWN and file or volume. Compared as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(pub String);

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a disk cannot be backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case", tag = "kind")]
#[non_exhaustive]
pub enum Refusal {
    /// The guest sends its SCSI commands past the block layer.
    #[error(
        "{device_type} passes SCSI commands through to the host device, unseen by QEMU: use scsi-hd"
    )]
    Passthrough {
        /// QOM type of the device.
        device_type: String,
    },
    /// Others write to the image, unseen by this QEMU's bitmaps.
    #[error("share-rw=on: others may write to it, unseen by any bitmap")]
    ShareRw,
    /// Another user of the node may write to it.
    #[error("{user} may write to its node {node} too")]
    SecondWriter {
        /// The node.
        node: String,
        /// The other user.
        user: String,
    },
    /// A job (mirror, commit, backup) has its filter on the disk.
    #[error("a block job is at work on it ({driver} at node {node}): wait for its end")]
    BlockJob {
        /// Driver of the filter.
        driver: String,
        /// Node of the filter.
        node: String,
    },
    /// The guest cannot write to it and neither can a bitmap record on it.
    #[error("it is read-only: its content cannot change, copy its image once")]
    ReadOnly,
    /// A device whose disk cannot be swapped in a way known to be safe.
    #[error("devices of type {device_type} are not supported")]
    UnknownDevice {
        /// QOM type of the device.
        device_type: String,
    },
    /// An interrupted rollback has left the device on a placeholder.
    #[error(
        "its device is on the placeholder {root} of an unfinished rollback: let Icecore recover"
    )]
    SwappedAway {
        /// The placeholder.
        root: String,
    },
}

/// A device that may hold data and has no block node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unprotected {
    /// The device's id, else made from its QOM path.
    pub id: String,
    /// Its QOM path.
    pub path: String,
    /// Its QOM type.
    pub device_type: String,
    /// Why nothing of it is seen.
    pub why: String,
}

/// A block backend that is no disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excluded {
    /// Device id, path, or `-drive` name.
    pub device: String,
    /// Why it is left out.
    pub why: Exclusion,
}

/// Why a backend is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exclusion {
    /// A CD-ROM drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// Firmware flash; NVRAM belongs to the capsule.
    Flash,
    /// Nothing is inserted.
    Empty,
    /// No device of the guest uses it.
    NoDevice,
}

/// Asks QEMU and assembles: [`observe`] and [`assemble`]. `deadline` is for each question.
pub async fn inventory(monitor: &Monitor, deadline: Duration) -> Result<Inventory, QmpError> {
    Ok(assemble(&observe(monitor, deadline).await?))
}

/// The block exports of this QEMU, all protocols. Whether an NBD server runs, and at which
/// address, cannot be asked: a `nbd-server-start` that is refused tells the first.
pub async fn exports(monitor: &Monitor, deadline: Duration) -> Result<Vec<Export>, QmpError> {
    observe::query(monitor, "query-block-exports", serde_json::Value::Null, deadline).await
}

/// The jobs of this QEMU.
pub async fn jobs(monitor: &Monitor, deadline: Duration) -> Result<Vec<Job>, QmpError> {
    observe::query(monitor, "query-jobs", serde_json::Value::Null, deadline).await
}
