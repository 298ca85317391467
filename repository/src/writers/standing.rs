//! What deletions, protections and revocations say about a point.

use std::collections::{BTreeMap, BTreeSet};

use super::fate::Fate;
use super::{Coordination, REVOKED};
use crate::error::Result;
use crate::ids::{PointId, WriterId};

/// How a manifest counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PointStanding {
    /// It is a point.
    Valid,
    /// Deleted; gc has yet to remove it.
    Deleted,
    /// Its writer was revoked before the manifest was seen: it never became a point.
    Disowned,
    /// Its writer is being revoked and gc has not said yet which of its manifests count. Not shown;
    /// the next gc decides.
    Undecided,
}

/// What the coordination objects said at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    pub(super) deleted: BTreeSet<PointId>,
    pub(super) protected: BTreeSet<PointId>,
    pub(super) revoked: BTreeMap<WriterId, Option<BTreeSet<PointId>>>,
}

impl Standing {
    /// How the manifest of `point`, written by `writer`, counts.
    #[must_use]
    pub fn of(&self, point: &PointId, writer: &WriterId) -> PointStanding {
        if self.deleted.contains(point) {
            return PointStanding::Deleted;
        }
        match self.revoked.get(writer) {
            None => PointStanding::Valid,
            Some(None) => PointStanding::Undecided,
            Some(Some(kept)) if kept.contains(point) => PointStanding::Valid,
            Some(Some(_)) => PointStanding::Disowned,
        }
    }

    /// Whether readers and writers see it.
    #[must_use]
    pub fn sees(&self, point: &PointId, writer: &WriterId) -> bool {
        self.of(point, writer) == PointStanding::Valid
    }

    /// Whether the point has a deletion tombstone.
    #[must_use]
    pub fn is_deleted(&self, point: &PointId) -> bool {
        self.deleted.contains(point)
    }

    /// Points with a deletion tombstone.
    pub(crate) fn deleted(&self) -> &BTreeSet<PointId> {
        &self.deleted
    }

    /// All protected points.
    pub(crate) fn protected(&self) -> &BTreeSet<PointId> {
        &self.protected
    }

    /// Whether gc gave this writer up.
    #[must_use]
    pub fn is_revoked(&self, writer: &WriterId) -> bool {
        self.revoked.contains_key(writer)
    }

    /// Whether gc has given its verdict on this writer.
    pub(crate) fn is_judged(&self, writer: &WriterId) -> bool {
        self.revoked.get(writer).is_some_and(Option::is_some)
    }

    /// Writers given up, decided or not.
    pub(crate) fn revoked_writers(&self) -> impl Iterator<Item = &WriterId> {
        self.revoked.keys()
    }
}

impl Coordination {
    /// What counts now. Call it after the manifests were listed, never before.
    pub(crate) fn standing(&self) -> Result<Standing> {
        let mut standing = Standing::default();
        for (point, fate) in self.fates()? {
            match fate {
                Fate::Deleted => drop(standing.deleted.insert(point)),
                Fate::Protected => drop(standing.protected.insert(point)),
                Fate::Free => (),
            }
        }
        for name in self.last_parts(REVOKED)? {
            let writer = name.strip_suffix(".fence").and_then(|writer| writer.parse().ok());
            standing.revoked.extend(writer.map(|writer| (writer, None)));
        }
        for (writer, kept) in &mut standing.revoked {
            *kept = self.verdict(writer)?;
        }
        Ok(standing)
    }
}
