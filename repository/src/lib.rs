//! Points of virtual disks at rest: blocks, packs, maps, points and chains.
//!
//! This crate does *not* know QEMU, NBD, bitmaps or any command line, spawns no runtime and decides
//! nothing about when or what to back up. It is synchronous; its handles may be used from several
//! threads at once. `docs/FORMAT.md` describes every byte it writes.

pub mod geometry;
pub mod ids;
pub mod point;
pub mod store;

pub use geometry::{BlockIndex, BlockSize, GeometryError};
pub use ids::{
    BlockId, ChainId, Checksum, ContentRoot, DiskId, IdError, PackId, PointId, RepositoryId, RunId,
    VmName, WriterId,
};
pub use point::{
    CapsulePart, Consistency, ConsistencyLevel, DiskMeta, DiskMode, DiskSummary, Encoded, Entry,
    Frame, Location, ParentBlock, PartInfo, Point, PointDisk, PointMeta, RunRef, WriterInfo,
};
