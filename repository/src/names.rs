//! Where each kind of object lies in a store. Every name is built from a checked id.

use crate::error::Result;
use crate::ids::{KeyId, PackId, PointId, RunId};
use crate::store::ObjectName;

/// The repository's own description; its presence makes a directory a repository.
pub(crate) const CONFIG: &str = "config";
/// The master key, sealed under each of the keys that open an encrypted repository.
pub(crate) const KEYS: &str = "keys/";
/// Packs, in 256 folders by the first byte of their id.
pub(crate) const PACKS: &str = "packs/";
/// Map runs, in 256 folders by the first byte of their id.
pub(crate) const RUNS: &str = "runs/";
/// Manifests, one per point.
pub(crate) const POINTS: &str = "points/";
/// Receipts, one per point.
pub(crate) const RECEIPTS: &str = "receipts/";

pub(crate) fn config() -> Result<ObjectName> {
    Ok(ObjectName::new(CONFIG)?)
}

pub(crate) fn key(id: &KeyId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{KEYS}{id}"))?)
}

pub(crate) fn pack(id: PackId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{PACKS}{:02x}/{id}", id.0[0]))?)
}

pub(crate) fn run(id: RunId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{RUNS}{:02x}/{id}", id.0[0]))?)
}

pub(crate) fn manifest(id: &PointId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{POINTS}{id}"))?)
}

pub(crate) fn receipt(id: &PointId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{RECEIPTS}{id}"))?)
}
