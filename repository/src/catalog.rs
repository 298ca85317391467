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

/// Manifests that are read one by one before the cache of all is worth its reading.
const MANIFESTS_READ_MAX: u32 = 64;

#[derive(Default)]
pub(crate) struct Catalog(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    loaded: bool,
    /// The cache does not hold just these.
    unsaved: bool,
    points: BTreeMap<PointId, Point>,
}

impl Entries {
    /// Adds what the cache holds.
    fn load(&mut self, inner: &Inner) {
        if !std::mem::replace(&mut self.loaded, true) {
            let mut cached = load(inner);
            self.unsaved |= self.points.keys().any(|id| !cached.contains_key(id));
            cached.append(&mut self.points);
            self.points = cached;
        }
    }

    /// Reads a manifest unless it is known already.
    fn learn(&mut self, inner: &Inner, id: &PointId) -> Result<()> {
        if !self.points.contains_key(id)
            && let Some(point) = read(inner, id)?
        {
            self.points.insert(id.clone(), point);
            self.unsaved |= self.loaded;
        }
        Ok(())
    }
}

impl Catalog {
    /// The points called `ids`, in that order, less those whose manifests are damaged or went away.
    pub(crate) fn points(&self, inner: &Inner, ids: &BTreeSet<PointId>) -> Result<Vec<Point>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.load(inner);
        let known = entries.points.len();
        entries.points.retain(|id, _| ids.contains(id));
        entries.unsaved |= entries.points.len() != known;
        for id in ids {
            entries.learn(inner, id)?;
        }
        if std::mem::take(&mut entries.unsaved) {
            save(inner, &entries.points);
        }
        Ok(entries.points.values().cloned().collect())
    }

    /// The points called `ids`, without a look at the cache of all.
    pub(crate) fn some(&self, inner: &Inner, ids: &BTreeSet<PointId>) -> Result<Vec<Point>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ids.iter().try_for_each(|id| entries.learn(inner, id))?;
        Ok(ids.iter().filter_map(|id| entries.points.get(id).cloned()).collect())
    }

    /// For each of `wanted` the newest of the points called `ids` that counts and that it says yes
    /// to.
    pub(crate) fn newest<F: Fn(&Point) -> bool>(
        &self,
        inner: &Inner,
        ids: &BTreeSet<PointId>,
        counts: impl Fn(&Point) -> bool,
        wanted: &[F],
    ) -> Result<Vec<Option<Point>>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = vec![None; wanted.len()];
        let mut read_here = 0;
        for id in ids.iter().rev() {
            if found.iter().all(Option::is_some) {
                break;
            }
            if !entries.points.contains_key(id) {
                if read_here == MANIFESTS_READ_MAX {
                    entries.load(inner);
                }
                read_here += 1;
                entries.learn(inner, id)?;
            }
            let Some(point) = entries.points.get(id).filter(|point| counts(point)) else {
                continue;
            };
            for (found, wants) in found.iter_mut().zip(wanted) {
                if found.is_none() && wants(point) {
                    *found = Some(point.clone());
                }
            }
        }
        Ok(found)
    }

    /// Reads all manifests again at the next use.
    pub(crate) fn forget(&self, inner: &Inner) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *entries = Entries { loaded: true, ..Entries::default() };
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
