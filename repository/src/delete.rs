//! Deleting points and protecting them from it.
//!
//! Every point is logically full, so any one may go without the others noticing. A deletion is a
//! tombstone: readers on all hosts stop seeing the point at once, and the next gc frees the space.

use std::collections::BTreeSet;

use jiff::Timestamp;

use crate::error::{Error, Result};
use crate::ids::{ChainId, PointId};
use crate::names;
use crate::point::Point;
use crate::repository::Repository;
use crate::writers::Wish;

impl Repository {
    /// Deletes one point. A point whose manifest is damaged can be deleted too.
    ///
    /// # Errors
    /// `NotFound`; `Refused` when it is protected or locked; `ReadOnly`; the store's.
    pub fn delete_point(&self, id: &PointId) -> Result<()> {
        self.inner.refuse_read_only("delete a point")?;
        self.must_be_there(id)?;
        self.must_not_be_locked(id)?;
        self.inner.coordination.wish(id, Wish::Delete)
    }

    /// Deletes a point and all that were grown from it; returns them, the oldest first. If one of
    /// them is protected, none is deleted.
    ///
    /// # Errors
    /// As [`delete_point`](Self::delete_point).
    pub fn delete_with_descendants(&self, id: &PointId) -> Result<Vec<PointId>> {
        self.must_be_there(id)?;
        let mut doomed = self.descendants(id)?;
        doomed.insert(0, id.clone());
        self.delete_all(doomed)
    }

    /// Deletes all points of a chain; returns them, the oldest first. If one of them is protected,
    /// none is deleted.
    ///
    /// # Errors
    /// As [`delete_point`](Self::delete_point).
    pub fn delete_chain(&self, chain: &ChainId) -> Result<Vec<PointId>> {
        let points = self.points()?.into_iter().filter(|point| &point.chain == chain);
        let doomed: Vec<PointId> = points.map(|point| point.id).collect();
        if doomed.is_empty() {
            return Err(Error::NotFound { what: format!("chain {chain}") });
        }
        self.delete_all(doomed)
    }

    /// The points that were grown from this one, directly or not, the oldest first.
    ///
    /// # Errors
    /// The store's.
    pub fn descendants(&self, id: &PointId) -> Result<Vec<PointId>> {
        Ok(descendants(&self.points()?, id))
    }

    /// Protects a point: it is not deleted, by nobody, until it is unprotected.
    ///
    /// # Errors
    /// `NotFound` when it is not there or was just deleted; `ReadOnly`; the store's.
    pub fn protect(&self, id: &PointId) -> Result<()> {
        self.inner.refuse_read_only("protect a point")?;
        self.must_be_there(id)?;
        self.inner.coordination.wish(id, Wish::Protect)
    }

    /// Takes the protection away; that there is none is no error.
    ///
    /// # Errors
    /// As [`protect`](Self::protect).
    pub fn unprotect(&self, id: &PointId) -> Result<()> {
        self.inner.refuse_read_only("take away a protection")?;
        self.must_be_there(id)?;
        self.inner.coordination.wish(id, Wish::Unprotect)
    }

    /// The protected points.
    ///
    /// # Errors
    /// The store's.
    pub fn protected(&self) -> Result<BTreeSet<PointId>> {
        Ok(self.inner.coordination.standing()?.protected().clone())
    }

    /// Until when a point is locked, if it still is.
    ///
    /// # Errors
    /// The store's.
    pub fn locked_until(&self, id: &PointId) -> Result<Option<Timestamp>> {
        self.inner.locked_until(id)
    }

    fn must_not_be_locked(&self, id: &PointId) -> Result<()> {
        match self.locked_until(id)? {
            None => Ok(()),
            Some(until) => Err(Error::Refused {
                what: format!("point {id} is locked until {until}, and nothing was deleted"),
                advice: "delete it then: before that nobody can",
            }),
        }
    }

    fn must_be_there(&self, id: &PointId) -> Result<()> {
        // A receipt alone is what is left of a point whose manifest has vanished.
        let there = self.inner.store.exists(&names::manifest(id)?)?
            || self.inner.store.exists(&names::receipt(id)?)?;
        if there && !self.inner.coordination.standing()?.is_deleted(id) {
            return Ok(());
        }
        Err(Error::NotFound { what: format!("point {id}") })
    }

    fn delete_all(&self, doomed: Vec<PointId>) -> Result<Vec<PointId>> {
        self.inner.refuse_read_only("delete points")?;
        let protected = self.protected()?;
        if let Some(id) = doomed.iter().find(|id| protected.contains(*id)) {
            return Err(Error::Refused {
                what: format!("point {id} is protected; none was deleted"),
                advice: "take the protection away with `icecore point unprotect` first",
            });
        }
        doomed.iter().try_for_each(|id| self.must_not_be_locked(id))?;
        // The newest first: what is left if this is interrupted is what can be grown from.
        for id in doomed.iter().rev() {
            self.inner.coordination.wish(id, Wish::Delete)?;
        }
        Ok(doomed)
    }
}

fn descendants(points: &[Point], id: &PointId) -> Vec<PointId> {
    let mut family = BTreeSet::from([id]);
    let mut found = Vec::new();
    // Ascending by id, and a parent's id is always smaller: one pass sees parents first.
    for point in points {
        let mut parents = point.disks.iter().filter_map(|disk| disk.parent.as_ref());
        if parents.any(|parent| family.contains(parent)) {
            family.insert(&point.id);
            found.push(point.id.clone());
        }
    }
    found
}
