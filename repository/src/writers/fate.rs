//! Deletion and protection: one create-only log per point, whose last entry counts.
//!
//! An entry's name holds the point and the entry's number, its content what was decided. Whoever
//! wants to change a point's fate creates the entry after the last one he saw; of two at once, one
//! finds the name taken, looks again and decides anew. Entries are never removed one by one.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Coordination, FATES};
use crate::envelope::Kind;
use crate::error::{Error, Result};
use crate::ids::PointId;
use crate::store::ObjectName;

pub(super) const KIND: Kind = Kind::new(b"FATE");

/// What was last decided about a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fate {
    /// Nothing: it may be deleted and protected.
    Free,
    /// It must not be deleted.
    Protected,
    /// It is gone for every reader; final.
    Deleted,
}

/// What somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Protect,
    Unprotect,
    Delete,
}

/// The entry to add, or none when the wish is already true.
fn decide(fate: Fate, wish: Wish, point: &PointId) -> Result<Option<Fate>> {
    match (fate, wish) {
        (Fate::Free, Wish::Protect) => Ok(Some(Fate::Protected)),
        (Fate::Free, Wish::Delete) => Ok(Some(Fate::Deleted)),
        (Fate::Protected, Wish::Unprotect) => Ok(Some(Fate::Free)),
        (Fate::Free, Wish::Unprotect)
        | (Fate::Protected, Wish::Protect)
        | (Fate::Deleted, Wish::Delete) => Ok(None),
        (Fate::Protected, Wish::Delete) => Err(Error::Refused {
            what: format!("point {point} is protected and was not deleted"),
            advice: "take the protection away with `icecore point unprotect` first",
        }),
        (Fate::Deleted, Wish::Protect | Wish::Unprotect) => {
            Err(Error::NotFound { what: format!("point {point} any more: it was deleted") })
        }
    }
}

impl Coordination {
    /// Makes a wish come true, durably, or says why not.
    pub(crate) fn wish(&self, point: &PointId, wish: Wish) -> Result<()> {
        loop {
            let last = self.last_entries()?.remove(point);
            let fate = match &last {
                Some((_, name)) => self.fate(name)?,
                None => Fate::Free,
            };
            let Some(next) = decide(fate, wish, point)? else { return Ok(()) };
            let number = last.map_or(0, |(number, _)| number + 1);
            let name = ObjectName::new(format!("{FATES}{point}.{number:08}"))?;
            match self.with_room(|| self.put(&name, KIND, &next)) {
                // Somebody else decided meanwhile; each round of this loop is one of theirs.
                Err(Error::Store(error)) if error.already_exists() => (),
                result => return result,
            }
        }
    }

    /// The fates of all points about which something was decided.
    pub(super) fn fates(&self) -> Result<BTreeMap<PointId, Fate>> {
        let entries = self.last_entries()?.into_iter();
        entries.map(|(point, (_, name))| Ok((point, self.fate(&name)?))).collect()
    }

    fn fate(&self, name: &ObjectName) -> Result<Fate> {
        match self.get(name, KIND) {
            Err(Error::Store(error)) if !error.is_not_found() => Err(error.into()),
            // A damaged entry, one of a newer version, or one that gc took away with all that was
            // left of its point must not delete anything. `check` names the damage.
            Err(_) => Ok(Fate::Protected),
            fate => fate,
        }
    }

    fn last_entries(&self) -> Result<BTreeMap<PointId, (u32, ObjectName)>> {
        let mut last = BTreeMap::new();
        // Listings are sorted and numbers have a fixed width: the last one of a point wins.
        for entry in self.store.list(FATES)? {
            let parsed = entry.name.last_part().rsplit_once('.').and_then(|(point, number)| {
                Some((point.parse::<PointId>().ok()?, number.parse::<u32>().ok()?))
            });
            if let Some((point, number)) = parsed {
                last.insert(point, (number, entry.name));
            }
        }
        Ok(last)
    }

    /// Forgets the fates of points of which nothing is left.
    pub(crate) fn forget_points(&self, points: &BTreeSet<PointId>) -> Result<()> {
        let of_these = |name: &ObjectName| {
            let point = name.last_part().split('.').next().and_then(|id| id.parse().ok());
            point.is_some_and(|point: PointId| points.contains(&point))
        };
        let names = self.store.list(FATES)?.into_iter().map(|entry| entry.name);
        Ok(self.store.delete(&names.filter(of_these).collect::<Vec<_>>())?)
    }
}
