//! Manifests and receipts: each is what it says, and neither is there without the other.

use std::collections::BTreeSet;

use super::{CheckOptions, Findings};
use crate::error::{DamageKind, Error, Result};
use crate::ids::{PointId, WriterId};
use crate::manifest::{self, RECEIPT_BYTES_MAX, Receipt};
use crate::names;
use crate::point::Point;
use crate::repository::Inner;
use crate::writers::Standing;

/// Verifies manifests and receipts and returns the points that readers see.
///
/// The order of the listings keeps writers at work from looking like damage: a receipt seen first
/// has a manifest; a manifest whose writer is announced no more afterwards has a receipt.
pub(super) fn check(
    inner: &Inner,
    options: &CheckOptions,
    findings: &mut Findings<'_>,
) -> Result<Vec<Point>> {
    let wanted = |id: &PointId| options.point.as_ref().is_none_or(|point| point == id);
    let receipts_before = list(inner, names::RECEIPTS, findings)?;
    let manifests = list(inner, names::POINTS, findings)?;
    let announced: BTreeSet<WriterId> = inner.coordination.writers()?.into_iter().collect();
    let receipts = list(inner, names::RECEIPTS, findings)?;
    let standing = inner.coordination.standing()?;
    refuse_absent(options, &manifests, &receipts, &standing)?;
    let mut points = Vec::new();
    let valid = manifests.iter().filter(|id| wanted(id) && !standing.is_deleted(id));
    for id in valid {
        let object = names::manifest(id)?;
        let read = findings.note(object.as_str(), read_manifest(inner, id))?;
        let Some((point, bytes)) = read else {
            findings.progress.points_total += 1;
            continue;
        };
        if !standing.sees(id, &point.writer_id) {
            continue;
        }
        findings.progress.points_total += 1;
        match (receipts.contains(id), announced.contains(&point.writer_id)) {
            (true, _) => check_receipt(inner, &point, &bytes, findings)?,
            (false, true) => (),
            (false, false) => findings.add(
                names::receipt(id)?,
                DamageKind::Missing.as_str(),
                format!("point {id} is committed and nobody is at work on it"),
            ),
        }
        points.push(point);
    }
    let vanished = receipts_before.difference(&manifests).filter(|id| wanted(id));
    for id in vanished.filter(|id| !standing.is_deleted(id)) {
        check_vanished(inner, id, &standing, findings)?;
    }
    Ok(points)
}

fn refuse_absent(
    options: &CheckOptions,
    manifests: &BTreeSet<PointId>,
    receipts: &BTreeSet<PointId>,
    standing: &Standing,
) -> Result<()> {
    let known = |id: &PointId| manifests.contains(id) || receipts.contains(id);
    match &options.point {
        Some(id) if !known(id) || standing.is_deleted(id) => {
            Err(Error::NotFound { what: format!("point {id}") })
        }
        _ => Ok(()),
    }
}

fn list(inner: &Inner, prefix: &str, findings: &mut Findings<'_>) -> Result<BTreeSet<PointId>> {
    let mut ids = BTreeSet::new();
    for entry in inner.store.list(prefix)? {
        match entry.name.last_part().parse() {
            Ok(id) if entry.name.as_str() == format!("{prefix}{id}") => drop(ids.insert(id)),
            _ => findings.add(
                entry.name,
                DamageKind::Foreign.as_str(),
                "no object of a repository has this name",
            ),
        }
    }
    Ok(ids)
}

fn read_manifest(inner: &Inner, id: &PointId) -> Result<(Point, Vec<u8>)> {
    let bytes = inner.manifest_bytes(id)?;
    let (point, parts) = inner.decode_manifest(id, &bytes)?;
    for part in &point.parts {
        manifest::part(&point, &parts, part.name.as_str())?;
    }
    Ok((point, bytes))
}

fn read_receipt(inner: &Inner, id: &PointId) -> Result<Receipt> {
    let bytes = inner.store.read(&names::receipt(id)?, RECEIPT_BYTES_MAX)?;
    Receipt::decode(&inner.sealing, id, &bytes)
}

fn check_receipt(
    inner: &Inner,
    point: &Point,
    manifest: &[u8],
    findings: &mut Findings<'_>,
) -> Result<()> {
    let name = names::receipt(&point.id)?;
    let Some(receipt) = findings.note(name.as_str(), read_receipt(inner, &point.id))? else {
        return Ok(());
    };
    if receipt != Receipt::of(point, manifest) {
        // Each is whole: one of the two was put in the place of another.
        findings.add(
            names::manifest(&point.id)?,
            DamageKind::Foreign.as_str(),
            "it is not the manifest of which the receipt speaks",
        );
    }
    Ok(())
}

/// A receipt without a manifest and without a tombstone.
fn check_vanished(
    inner: &Inner,
    id: &PointId,
    standing: &Standing,
    findings: &mut Findings<'_>,
) -> Result<()> {
    let name = names::receipt(id)?;
    let Some(receipt) = findings.note(name.as_str(), read_receipt(inner, id))? else {
        return Ok(());
    };
    // A writer that was suspended past its point's whole life may leave a receipt behind.
    if !standing.is_revoked(&receipt.writer) {
        findings.add(
            names::manifest(id)?,
            "vanished",
            format!("point {id} was committed and never deleted, but its manifest is gone"),
        );
    }
    Ok(())
}
