//! What may be deleted. Pure: sets in, sets out.
//!
//! Two looks at the repository with a wait in between. The first condemns what nothing reaches; the
//! wait is for every writer that was announced after that; the second look acquits what a manifest
//! that came meanwhile reaches. Manifests of the first look need no second reading: what they reach
//! was not condemned, and they are immutable.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Result;
use crate::ids::{PackId, PointId, RunId};
use crate::names;
use crate::store::ObjectName;
use crate::writers::PointStanding;

/// An object that manifests reach. Small, because gc holds one for each object of the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum DataObject {
    Run(RunId),
    Pack(PackId),
}

impl DataObject {
    /// Its name in the store.
    pub(crate) fn name(self) -> Result<ObjectName> {
        match self {
            Self::Run(id) => names::run(id),
            Self::Pack(id) => names::pack(id),
        }
    }

    /// The object with this name, if it is one of these.
    pub(crate) fn from_name(name: &ObjectName) -> Option<Self> {
        let last = name.last_part();
        if name.as_str().starts_with(names::PACKS) {
            last.parse().ok().map(Self::Pack)
        } else if name.as_str().starts_with(names::RUNS) {
            last.parse().ok().map(Self::Run)
        } else {
            None
        }
    }
}

/// The first look. The fields were read in the order in which they stand here.
#[derive(Debug, Clone, Default)]
pub(crate) struct FirstLook {
    /// Points with a deletion tombstone, before anything else was listed.
    pub(crate) buried_before: BTreeSet<PointId>,
    /// Packs and runs, with their lengths in bytes.
    pub(crate) objects: BTreeMap<DataObject, u64>,
    /// Receipts.
    pub(crate) receipts: BTreeSet<PointId>,
    /// Manifests that are there, and how each counts.
    pub(crate) manifests: BTreeMap<PointId, PointStanding>,
    /// Of the deleted and disowned ones those whose locks have not run out: they stay whole. Whoever
    /// says that they are deleted may be he whom the lock is there for.
    pub(crate) locked: BTreeSet<PointId>,
    /// Points with a deletion tombstone, after the manifests were listed.
    pub(crate) deleted: BTreeSet<PointId>,
}

impl FirstLook {
    /// The manifests to follow: the valid ones, those on which nobody has decided yet, the locked.
    pub(crate) fn roots(&self) -> impl Iterator<Item = &PointId> {
        self.manifests.keys().filter(|point| !self.is_doomed(point))
    }

    fn is_doomed(&self, point: &PointId) -> bool {
        self.manifests.get(point).copied().is_some_and(is_doomed) && !self.locked.contains(point)
    }

    /// What goes unless the second look acquits it; `reachable` is what the roots reach.
    pub(crate) fn condemn(&self, reachable: &BTreeSet<DataObject>) -> Condemned {
        let objects = self.objects.keys().filter(|object| !reachable.contains(object));
        let doomed = self.manifests.keys().filter(|point| self.is_doomed(point));
        let manifests: BTreeSet<_> = doomed.cloned().collect();
        let with_rest = |point: &&PointId| {
            self.manifests.contains_key(*point) || self.receipts.contains(*point)
        };
        let rests = self.deleted.iter().filter(with_rest);
        let rests = rests.filter(|point| !self.locked.contains(*point));
        // A point that was committed and deleted since the manifests were listed looks like one of
        // which nothing is left; forgetting its tombstone would bring it back.
        let husks = self.buried_before.iter().filter(|point| !with_rest(point));
        Condemned {
            objects: objects.copied().collect(),
            receipts: rests.chain(&manifests).cloned().collect(),
            husks: husks.cloned().collect(),
            manifests,
        }
    }
}

/// Whether a point goes unless it is locked.
pub(crate) fn is_doomed(standing: PointStanding) -> bool {
    matches!(standing, PointStanding::Deleted | PointStanding::Disowned)
}

/// What the first look found to be unreachable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Condemned {
    /// Manifests of deleted and disowned points.
    pub(crate) manifests: BTreeSet<PointId>,
    /// Points whose receipts go after their manifests.
    pub(crate) receipts: BTreeSet<PointId>,
    /// Packs and runs.
    pub(crate) objects: BTreeSet<DataObject>,
    /// Deleted points of which nothing but the tombstone was left. Tombstones outlive their points
    /// by one gc, for readers that had listed manifests before these went.
    pub(crate) husks: BTreeSet<PointId>,
}

impl Condemned {
    /// True when there is nothing to delete.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The manifests that the second look must follow: those that were not there at the first, and
    /// that count.
    pub(crate) fn newcomers<'a>(
        first: &'a FirstLook,
        now: &'a BTreeMap<PointId, PointStanding>,
    ) -> impl Iterator<Item = &'a PointId> {
        // Deleted ones too: another writer may have built on them before they were.
        now.iter()
            .filter(|(_, standing)| **standing != PointStanding::Disowned)
            .map(|(point, _)| point)
            .filter(|point| !first.manifests.contains_key(*point))
    }

    /// Takes out what the store did not delete; returns how much it is.
    pub(crate) fn spare(&mut self, kept: &BTreeSet<ObjectName>) -> Result<u64> {
        let mut spared = 0;
        for object in std::mem::take(&mut self.objects) {
            match kept.contains(&object.name()?) {
                true => spared += 1,
                false => drop(self.objects.insert(object)),
            }
        }
        for point in std::mem::take(&mut self.receipts) {
            match kept.contains(&names::receipt(&point)?)
                || kept.contains(&names::manifest(&point)?)
            {
                true => spared += 1,
                false => drop(self.receipts.insert(point)),
            }
        }
        Ok(spared)
    }

    /// Takes out what newcomers reach.
    pub(crate) fn acquit(&mut self, reachable: &BTreeSet<DataObject>) {
        self.objects.retain(|object| !reachable.contains(object));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn point(number: u32) -> PointId {
        PointId::next(jiff::Timestamp::UNIX_EPOCH, None, number)
    }

    fn pack(number: u8) -> DataObject {
        DataObject::Pack(PackId([number; 16]))
    }

    fn standing() -> impl Strategy<Value = PointStanding> {
        prop_oneof![
            Just(PointStanding::Valid),
            Just(PointStanding::Deleted),
            Just(PointStanding::Disowned),
            Just(PointStanding::Undecided),
        ]
    }

    /// Manifests: how each counts and what it reaches.
    type World = BTreeMap<u32, (PointStanding, BTreeSet<u8>)>;

    fn world() -> impl Strategy<Value = World> {
        let reaches = prop::collection::btree_set(0..20_u8, 0..6);
        prop::collection::btree_map(0..12_u32, (standing(), reaches), 0..8)
    }

    fn standings(world: &World) -> BTreeMap<PointId, PointStanding> {
        world.iter().map(|(number, (standing, _))| (point(*number), *standing)).collect()
    }

    fn reached<'a>(
        world: &World,
        points: impl Iterator<Item = &'a PointId>,
    ) -> BTreeSet<DataObject> {
        let wanted: BTreeSet<_> = points.collect();
        world
            .iter()
            .filter(|(number, _)| wanted.contains(&point(**number)))
            .flat_map(|(_, (_, reaches))| reaches.iter().copied().map(pack))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Whatever comes between the looks, nothing that a visible point reaches is deleted, and
        /// everything that no manifest reached at the first look and none reaches now is.
        #[test]
        fn only_the_unreachable_goes(
            first in world(),
            later in world(),
            listed in prop::collection::btree_set(0..20_u8, 0..20),
            tombs in prop::collection::btree_set(0..12_u32, 0..4),
            locks in prop::collection::btree_set(0..12_u32, 0..4),
        ) {
            let look = FirstLook {
                objects: listed.iter().map(|number| (pack(*number), 1)).collect(),
                receipts: first.keys().map(|number| point(*number)).collect(),
                manifests: standings(&first),
                locked: locks.iter().map(|number| point(*number)).collect(),
                buried_before: tombs.iter().map(|number| point(*number)).collect(),
                deleted: tombs.iter().map(|number| point(*number)).collect(),
            };
            let mut condemned = look.condemn(&reached(&first, look.roots()));
            // Points of the first look are still as they were; later ones came in addition.
            let mut now = later;
            now.extend(first.clone());
            let standings_now = standings(&now);
            let newcomers: Vec<_> = Condemned::newcomers(&look, &standings_now).collect();
            condemned.acquit(&reached(&now, newcomers.into_iter()));
            let visible = now.iter().filter(|(number, (standing, _))| {
                matches!(standing, PointStanding::Valid | PointStanding::Undecided)
                    || (locks.contains(number) && first.contains_key(number))
            });
            for (number, (_, reaches)) in visible {
                prop_assert!(!condemned.manifests.contains(&point(*number)));
                let is_locked = locks.contains(number) && first.contains_key(number);
                prop_assert!(!is_locked || !condemned.receipts.contains(&point(*number)));
                prop_assert!(reaches.iter().all(|n| !condemned.objects.contains(&pack(*n))));
            }
            let all: BTreeSet<_> = now.values().flat_map(|(_, reaches)| reaches).collect();
            for number in listed.iter().filter(|number| !all.contains(number)) {
                prop_assert!(condemned.objects.contains(&pack(*number)));
            }
            for husk in &condemned.husks {
                prop_assert!(!look.manifests.contains_key(husk));
                prop_assert!(!look.receipts.contains(husk));
            }
        }
    }

    #[test]
    fn names_go_there_and_back() {
        for object in [pack(7), DataObject::Run(RunId([9; 16]))] {
            assert_eq!(DataObject::from_name(&object.name().unwrap()), Some(object));
        }
        let other = ObjectName::new("points/00000000000001").unwrap();
        assert_eq!(DataObject::from_name(&other), None);
    }
}
