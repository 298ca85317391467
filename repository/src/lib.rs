//! Points of virtual disks at rest: blocks, packs, maps, points and chains.
//!
//! This crate does *not* know QEMU, NBD, bitmaps or any command line, spawns no runtime and decides
//! nothing about when or what to back up. It is synchronous; its handles may be used from several
//! threads at once. `docs/FORMAT.md` describes every byte it writes.

mod block;
mod cache;
mod catalog;
mod check;
mod commit;
mod config;
mod content;
mod copy;
mod crypto;
mod decoder;
mod dedup;
mod delete;
mod encoder;
mod envelope;
mod error;
mod extend;
mod gc;
pub mod geometry;
#[cfg(test)]
mod hostile;
pub mod ids;
mod kept;
mod keys;
mod lock;
mod manifest;
mod map;
mod names;
mod open;
mod pack;
mod packs;
pub mod point;
mod reader;
mod record;
mod repository;
mod resolve;
pub mod rights;
mod sealing;
mod session;
mod sink;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
mod writers;

pub use block::{BlockHasher, Compression, is_zero};
pub use check::{CheckError, CheckOptions, CheckProgress, CheckReport, scrub};
pub use commit::{BeginPoint, ChainChoice, PointWriter};
pub use config::FORMAT_VERSION;
pub use content::ContentHasher;
pub use copy::{Compared, Copied, CopiedDisk, CopyProgress};
pub use crypto::{BadKey, KeyInfo, KeyMaterial, KeyMethod, RecoveryKit};
pub use decoder::{BlockDecoder, Part};
pub use encoder::{BlockEncoder, Encoders};
pub use error::{Damage, DamageKind, Error, Result};
pub use gc::{GcOptions, GcReport, Pace, RealPace};
pub use geometry::{BlockIndex, BlockSize, GeometryError};
pub use ids::{
    BlockId, ChainId, Checksum, ContentRoot, DiskId, IdError, KeyId, PackId, PointId, RepositoryId,
    RunId, ServiceId, VmName, WriterId,
};
pub use lock::{BadLock, Horizon, LockMode, LockPolicy, PointLock};
pub use open::{InitOptions, OpenOptions};
pub use point::{
    CapsulePart, Consistency, ConsistencyLevel, DiskMeta, DiskMode, DiskSummary, Encoded, Entry,
    Frame, Location, Origin, ParentBlock, PartInfo, Point, PointDisk, PointMeta, RunRef,
    WriterInfo,
};
pub use reader::{Diff, DiskReader, Entries};
pub use record::RecordState;
pub use repository::{Repository, RepositoryInfo};
pub use sink::{DiskSink, DiskStart, DiskWriter, ParentCursor};
pub use writers::{ServiceRecord, ServiceState};
