//! Manifests that were read before, so that listing points does not read them all again.
//!
//! Only a cache: which points exist is always asked of the store, and a point that is about to be
//! restored or checked is read from its manifest. Manifests are immutable and ids are never used
//! twice, so an entry cannot grow old; it can only be of a point that is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use crate::envelope::Kind;
use crate::error::{Error, Result};
use crate::ids::PointId;
use crate::point::Point;
use crate::repository::Inner;

const FILE: &str = "catalog";

#[derive(Default)]
pub(crate) struct Catalog(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    loaded: bool,
    points: BTreeMap<PointId, Point>,
}

impl Catalog {
    /// The points called `ids`, in that order, less those whose manifests are damaged or went away.
    pub(crate) fn points(&self, inner: &Inner, ids: &BTreeSet<PointId>) -> Result<Vec<Point>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !entries.loaded {
            entries.points = load(inner);
            entries.loaded = true;
        }
        let known = entries.points.len();
        entries.points.retain(|id, _| ids.contains(id));
        let mut changed = entries.points.len() != known;
        for id in ids {
            if entries.points.contains_key(id) {
                continue;
            }
            if let Some(point) = read(inner, id)? {
                entries.points.insert(id.clone(), point);
                changed = true;
            }
        }
        if changed {
            save(inner, &entries.points);
        }
        Ok(entries.points.values().cloned().collect())
    }

    /// Reads all manifests again at the next use.
    pub(crate) fn forget(&self, inner: &Inner) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *entries = Entries { loaded: true, points: BTreeMap::new() };
        save(inner, &entries.points);
    }
}

fn read(inner: &Inner, id: &PointId) -> Result<Option<Point>> {
    let read = inner.manifest_bytes(id).and_then(|bytes| {
        let (point, _) = inner.decode_manifest(id, &bytes)?;
        Ok(point)
    });
    match read {
        Ok(point) => Ok(Some(point)),
        // A gc beside us took it.
        Err(Error::Store(error)) if error.is_not_found() => Ok(None),
        Err(error @ (Error::Damaged(_) | Error::Unsupported { .. })) => {
            tracing::warn!(%error, point = %id, "a point is left out of the list");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn load(inner: &Inner) -> BTreeMap<PointId, Point> {
    let bytes = inner.cache.as_ref().and_then(|cache| cache.read(Kind::CATALOG, FILE));
    let points: Option<Vec<Point>> = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    points.unwrap_or_default().into_iter().map(|point| (point.id.clone(), point)).collect()
}

fn save(inner: &Inner, points: &BTreeMap<PointId, Point>) {
    let Some(cache) = &inner.cache else { return };
    let points: Vec<&Point> = points.values().collect();
    if let Ok(json) = serde_json::to_vec(&points) {
        cache.write(Kind::CATALOG, FILE, &json);
    }
}

impl crate::Repository {
    /// Throws the catalog cache away and builds it again from the manifests; returns their number.
    ///
    /// # Errors
    /// The store's.
    pub fn rebuild_catalog(&self) -> Result<usize> {
        self.inner.catalog.forget(&self.inner);
        self.points().map(|points| points.len())
    }
}
