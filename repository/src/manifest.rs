//! Manifests (the commit of a point) and receipts (the memory that there was one). Pure.
//!
//! ```text
//! envelope MANI, payload: length of the JSON u64, JSON of the point, binary parts in its order
//! envelope RCPT, payload: JSON {point, writer, manifest: BLAKE3 of the manifest object}
//! ```

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::envelope::Kind;
use crate::error::{Damage, DamageKind, Error, Result};
use crate::geometry::BlockSize;
use crate::ids::{Checksum, PointId, WriterId};
use crate::map::MAP_RUNS_MAX;
use crate::names;
use crate::point::{CapsulePart, PartInfo, Point};
use crate::sealing::Sealing;

/// The largest manifest: JSON, NVRAM and vTPM state are a few MiB at most.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// The largest JSON of a point.
const JSON_BYTES_MAX: usize = 8 << 20;
/// Disks of one point; a QEMU machine has far fewer slots.
pub const POINT_DISKS_MAX: usize = 1024;
/// A receipt holds three ids.
pub(crate) const RECEIPT_BYTES_MAX: u64 = 4 << 10;
const LENGTH_BYTES: usize = 8;

/// What stays known of a point when its manifest is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Receipt {
    pub(crate) point: PointId,
    pub(crate) writer: WriterId,
    /// BLAKE3 of the manifest object.
    pub(crate) manifest: Checksum,
}

impl Receipt {
    pub(crate) fn of(point: &Point, manifest: &[u8]) -> Self {
        Self {
            point: point.id.clone(),
            writer: point.writer_id.clone(),
            manifest: Checksum(*blake3::hash(manifest).as_bytes()),
        }
    }

    pub(crate) fn encode(&self, sealing: &Sealing) -> Result<Vec<u8>> {
        let object = names::receipt(&self.point)?;
        let payload = serde_json::to_vec(self).map_err(|error| malformed(&object, &error))?;
        sealing.close(Kind::RECEIPT, object.as_str(), &payload)
    }

    pub(crate) fn decode(sealing: &Sealing, id: &PointId, bytes: &[u8]) -> Result<Self> {
        let object = names::receipt(id)?;
        let payload = sealing.open(Kind::RECEIPT, object.as_str(), bytes)?;
        let receipt: Self =
            serde_json::from_slice(&payload).map_err(|error| malformed(&object, &error))?;
        if &receipt.point != id {
            let detail = format!("it is the receipt of point {}", receipt.point);
            return Err(Damage::new(object, DamageKind::Foreign, detail).into());
        }
        Ok(receipt)
    }
}

/// Describes the parts of a capsule for the manifest.
pub(crate) fn describe_parts(parts: &[CapsulePart]) -> Vec<PartInfo> {
    let describe = |part: &CapsulePart| PartInfo {
        name: part.name.clone(),
        bytes: part.bytes.len() as u64,
        checksum: Checksum(*blake3::hash(&part.bytes).as_bytes()),
    };
    parts.iter().map(describe).collect()
}

/// The manifest of a point, with the parts that `point.parts` describes.
pub(crate) fn encode(
    sealing: &Sealing,
    block_size: BlockSize,
    point: &Point,
    parts: &[CapsulePart],
) -> Result<Vec<u8>> {
    let object = names::manifest(&point.id)?;
    let json = serde_json::to_vec(point).map_err(|error| malformed(&object, &error))?;
    let mut payload = Vec::with_capacity(json.len() + LENGTH_BYTES);
    payload.extend_from_slice(&(json.len() as u64).to_le_bytes());
    payload.extend_from_slice(&json);
    for part in parts {
        payload.extend_from_slice(&part.bytes);
    }
    let bytes = sealing.close(Kind::MANIFEST, object.as_str(), &payload)?;
    // What cannot be read back must not be written: the same checks, before the commit.
    decode(sealing, block_size, &point.id, &bytes).map_err(|error| Error::Refused {
        what: format!("the point cannot be written: {error}"),
        advice: "give fewer disks or a smaller capsule",
    })?;
    Ok(bytes)
}

/// The point, and its parts one after the other.
pub(crate) fn decode(
    sealing: &Sealing,
    block_size: BlockSize,
    id: &PointId,
    bytes: &[u8],
) -> Result<(Point, Vec<u8>)> {
    let object = names::manifest(id)?;
    let damaged = |kind, detail: &str| Error::from(Damage::new(&object, kind, detail));
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(damaged(DamageKind::Limit, "it is larger than any manifest"));
    }
    let payload = sealing.open(Kind::MANIFEST, object.as_str(), bytes)?;
    let cut = || damaged(DamageKind::Length, "its JSON is cut off");
    let (length, rest) = payload.split_first_chunk::<LENGTH_BYTES>().ok_or_else(cut)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > JSON_BYTES_MAX {
        return Err(damaged(DamageKind::Limit, "its JSON is larger than any point's"));
    }
    let (json, parts) = rest.split_at_checked(length).ok_or_else(cut)?;
    let point: Point = serde_json::from_slice(json).map_err(|error| malformed(&object, &error))?;
    if &point.id != id {
        let detail = format!("it is the manifest of point {}", point.id);
        return Err(Damage::new(&object, DamageKind::Foreign, detail).into());
    }
    validate(&point, block_size, parts.len() as u64)
        .map_err(|detail| damaged(DamageKind::Inconsistent, detail))?;
    Ok((point, parts.to_vec()))
}

/// One part of a capsule, verified.
pub(crate) fn part(point: &Point, parts: &[u8], name: &str) -> Result<Vec<u8>> {
    let mut offset = 0;
    for info in &point.parts {
        // `validate` has compared the sum of the lengths with what is there.
        let stop = offset + info.bytes as usize;
        if info.name.as_str() == name {
            let bytes = parts.get(offset..stop).unwrap_or_default();
            if blake3::hash(bytes) != info.checksum.0 {
                let object = names::manifest(&point.id)?;
                let detail = format!("part {name} of its capsule does not match");
                return Err(Damage::new(object, DamageKind::Checksum, detail).into());
            }
            return Ok(bytes.to_vec());
        }
        offset = stop;
    }
    Err(Error::NotFound { what: format!("part {name:?} in the capsule of point {}", point.id) })
}

fn validate(point: &Point, block_size: BlockSize, parts_bytes: u64) -> Result<(), &'static str> {
    if point.disks.len() > POINT_DISKS_MAX {
        return Err("it has more disks than any machine");
    }
    let mut seen = BTreeSet::new();
    for disk in &point.disks {
        if !seen.insert(&disk.disk) {
            return Err("a disk appears twice");
        }
        if block_size.blocks(disk.size_bytes).is_err() {
            return Err("a disk is larger than any disk");
        }
        if disk.runs.len() > MAP_RUNS_MAX {
            return Err("a disk has more map runs than a map");
        }
        let runs: BTreeSet<_> = disk.runs.iter().map(|run| run.run).collect();
        if runs.len() != disk.runs.len() {
            return Err("a map run appears twice");
        }
    }
    let older = |parent: &Option<PointId>| parent.as_ref().is_none_or(|id| id < &point.id);
    if !older(&point.parent) || !point.disks.iter().all(|disk| older(&disk.parent)) {
        return Err("a parent is not older than it");
    }
    let described = point.parts.iter().map(|part| part.bytes).fold(0, u64::saturating_add);
    if described != parts_bytes {
        return Err("its binary parts are not as described");
    }
    Ok(())
}

fn malformed(object: &crate::store::ObjectName, error: &serde_json::Error) -> Error {
    Damage::new(object, DamageKind::Inconsistent, error.to_string()).into()
}
