//! What a point is wherever it lies, and what its copy is grown from. Pure.

use std::collections::BTreeMap;

use crate::ids::{ChainId, ContentRoot, PointId, RepositoryId};
use crate::point::{Origin, Point, PointDisk};

/// Where a point was taken, and what it was called there: the same in every repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    repository: RepositoryId,
    point: PointId,
}

/// One end of a copy: a repository and its points, ascending.
#[derive(Clone, Copy)]
pub(super) struct End<'a> {
    pub(super) repository: &'a RepositoryId,
    pub(super) points: &'a [Point],
}

/// What a disk of a copy is grown from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Base {
    /// `copy` holds what `source` holds: only their difference to the new point is copied.
    Same {
        /// In the source.
        source: PointId,
        /// In the destination.
        copy: PointId,
    },
    /// An older point of the chain of which nothing is known: the disk is read whole and compared.
    Older(PointId),
    /// Nothing: all data of the disk is copied.
    Nothing,
}

impl Base {
    /// The point of the destination that it names.
    pub(super) fn parent(&self) -> Option<&PointId> {
        match self {
            Self::Same { copy, .. } | Self::Older(copy) => Some(copy),
            Self::Nothing => None,
        }
    }
}

/// How a point is copied.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    /// The chain that it goes on with; none: it begins one.
    pub(super) chain: Option<ChainId>,
    /// In the order of its disks.
    pub(super) bases: Vec<Base>,
}

/// The origin of a point of `repository`, itself if it was taken there.
pub(super) fn origin(point: &Point, repository: &RepositoryId) -> Origin {
    let itself = || Origin {
        repository: repository.clone(),
        point: point.id.clone(),
        chain: point.chain.clone(),
        roots: point.disks.iter().map(|disk| (disk.disk.clone(), disk.content_root)).collect(),
    };
    point.origin.clone().unwrap_or_else(itself)
}

impl<'a> End<'a> {
    /// Its points by what they are. Of two copies of one point the later one counts.
    pub(super) fn identities(self) -> BTreeMap<Identity, &'a Point> {
        self.points.iter().map(|point| (self.identity(point), point)).collect()
    }

    pub(super) fn identity(self, point: &Point) -> Identity {
        let (repository, point) = match &point.origin {
            Some(origin) => (&origin.repository, &origin.point),
            None => (self.repository, &point.id),
        };
        Identity { repository: repository.clone(), point: point.clone() }
    }

    fn find(self, id: &PointId) -> Option<&'a Point> {
        let at = self.points.binary_search_by(|point| point.id.cmp(id)).ok()?;
        self.points.get(at)
    }

    /// The roots by which the content of a disk is known, each with the repository that computed it.
    fn roots(
        self,
        point: &'a Point,
        disk: &'a PointDisk,
    ) -> [Option<(&'a RepositoryId, ContentRoot)>; 2] {
        let own = (self.repository, disk.content_root);
        let of_origin = point.origin.as_ref().and_then(|origin| {
            origin.roots.get(&disk.disk).map(|root| (&origin.repository, *root))
        });
        [Some(own), of_origin]
    }
}

/// Plans the copy of `point`, which is one of the source's.
pub(super) fn plan(point: &Point, source: End<'_>, destination: End<'_>) -> Plan {
    let copies = destination.identities();
    let chain = chain(point, source, destination, &copies);
    let base = |disk: &PointDisk| match &chain {
        Some(chain) => base(point, disk, chain, source, destination, &copies),
        None => Base::Nothing,
    };
    let bases = point.disks.iter().map(base).collect();
    Plan { chain, bases }
}

/// The chain of the destination in which the copies of the source's chain lie.
fn chain(
    point: &Point,
    source: End<'_>,
    destination: End<'_>,
    copies: &BTreeMap<Identity, &Point>,
) -> Option<ChainId> {
    let siblings = source.points.iter().filter(|other| other.chain == point.chain);
    let of_sibling =
        siblings.rev().find_map(|sibling| copies.get(&source.identity(sibling)).copied());
    // Those that it came with may all be gone from the source.
    let wanted = origin(point, source.repository);
    let of_origin = || {
        destination.points.iter().rfind(|other| {
            let found = origin(other, destination.repository);
            (found.repository, found.chain) == (wanted.repository.clone(), wanted.chain.clone())
        })
    };
    let found = of_sibling.or_else(of_origin).filter(|found| found.vm == point.vm)?;
    Some(found.chain.clone())
}

fn base(
    point: &Point,
    disk: &PointDisk,
    chain: &ChainId,
    source: End<'_>,
    destination: End<'_>,
    copies: &BTreeMap<Identity, &Point>,
) -> Base {
    let mut ancestor = disk.parent.as_ref().and_then(|id| source.find(id));
    while let Some(parent) = ancestor {
        let Some(held) = parent.disk(&disk.disk) else { break };
        let copy = copies.get(&source.identity(parent)).filter(|copy| &copy.chain == chain);
        let equal = copy.filter(|copy| is_same(source, parent, held, destination, copy));
        if let Some(copy) = equal {
            return Base::Same { source: parent.id.clone(), copy: copy.id.clone() };
        }
        ancestor = held.parent.as_ref().and_then(|id| source.find(id));
    }
    let older = |copy: &&Point| {
        let holds = &copy.chain == chain && copy.disk(&disk.disk).is_some();
        holds && copy.id.millis() <= point.id.millis()
    };
    let older = destination.points.iter().rfind(older);
    older.map_or(Base::Nothing, |copy| Base::Older(copy.id.clone()))
}

/// Whether two disks are known to hold the same: some repository computed the same root of both.
fn is_same(
    source: End<'_>,
    parent: &Point,
    held: &PointDisk,
    destination: End<'_>,
    copy: &Point,
) -> bool {
    let Some(copied) = copy.disk(&held.disk).filter(|disk| disk.size_bytes == held.size_bytes)
    else {
        return false;
    };
    let known = source.roots(parent, held);
    destination.roots(copy, copied).iter().flatten().any(|root| known.contains(&Some(*root)))
}

/// The greatest of the points that a copy is grown from: its id has to be greater.
pub(super) fn floor(bases: &[Base]) -> Option<&PointId> {
    bases.iter().filter_map(Base::parent).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DiskId, VmName, WriterId};
    use crate::point::DiskSummary;
    use proptest::prelude::*;

    fn repository(n: u128) -> RepositoryId {
        RepositoryId::from_random(n)
    }

    fn id(n: u64) -> PointId {
        let at = jiff::Timestamp::from_millisecond(i64::try_from(n).unwrap()).unwrap();
        PointId::next(at, None, u32::try_from(n).unwrap())
    }

    fn disk(name: &str, parent: Option<u64>, root: u8) -> PointDisk {
        PointDisk {
            disk: DiskId::new(name).unwrap(),
            size_bytes: 1 << 20,
            parent: parent.map(id),
            content_root: ContentRoot([root; 32]),
            runs: Vec::new(),
            summary: DiskSummary::default(),
        }
    }

    fn point(n: u64, chain: u64, disks: Vec<PointDisk>) -> Point {
        let meta = serde_json::json!({
            "created_at": "2027-01-15T08:00:00Z", "captured_at": "2027-01-15T08:00:00Z",
            "consistency": {"level": "crash", "frozen_filesystems": 0, "freeze_ms": 0.0,
                "pause_ms": 0.0},
            "capsule": {}, "disks": [], "writer": {"host": "h", "version": "0"},
        });
        Point {
            id: id(n),
            vm: VmName::new("vm").unwrap(),
            chain: ChainId::from(&id(chain)),
            parent: None,
            writer_id: WriterId::from_random(1),
            origin: None,
            meta: serde_json::from_value(meta).unwrap(),
            disks,
            parts: Vec::new(),
            new_bytes: 0,
            lock: None,
            stored_bytes: 0,
            object_count: 0,
        }
    }

    /// What a copy of `point` out of repository `from` is in another one, whose roots differ.
    fn copied(point: &Point, from: u128, n: u64, chain: u64) -> Point {
        let mut copy = point.clone();
        copy.origin = Some(origin(point, &repository(from)));
        copy.id = id(n);
        copy.chain = ChainId::from(&id(chain));
        for disk in &mut copy.disks {
            disk.content_root.0[31] ^= 0xff;
        }
        copy
    }

    fn chain_of_three() -> Vec<Point> {
        vec![
            point(10, 10, vec![disk("a", None, 1), disk("b", None, 2)]),
            point(20, 10, vec![disk("a", Some(10), 3)]),
            point(30, 10, vec![disk("a", Some(20), 4), disk("b", Some(10), 5)]),
        ]
    }

    fn planned(point: &Point, source: &[Point], destination: &[Point]) -> Plan {
        let (one, two) = (repository(1), repository(2));
        let source = End { repository: &one, points: source };
        plan(point, source, End { repository: &two, points: destination })
    }

    #[test]
    fn a_first_point_begins_a_chain_and_a_later_one_grows_from_its_parents_copies() {
        let source = chain_of_three();
        let first = planned(&source[0], &source, &[]);
        assert_eq!(first, Plan { chain: None, bases: vec![Base::Nothing, Base::Nothing] });
        let copies = [copied(&source[0], 1, 10, 10), copied(&source[1], 1, 21, 10)];
        let third = planned(&source[2], &source, &copies);
        assert_eq!(third.chain, Some(ChainId::from(&id(10))));
        let same = |source, copy| Base::Same { source: id(source), copy: id(copy) };
        assert_eq!(third.bases, [same(20, 21), same(10, 10)]);
        // Without the second one the difference to the first is what has to be copied.
        let third = planned(&source[2], &source, &copies[..1]);
        assert_eq!(third.bases, [same(10, 10), same(10, 10)]);
        assert_eq!(floor(&third.bases), Some(&id(10)));
    }

    #[test]
    fn what_is_not_known_to_be_equal_is_read_whole() {
        let source = chain_of_three();
        let mut other = copied(&source[1], 1, 21, 10);
        other
            .origin
            .as_mut()
            .unwrap()
            .roots
            .insert(DiskId::new("a").unwrap(), ContentRoot([9; 32]));
        let wrong = planned(&source[2], &source, std::slice::from_ref(&other));
        assert_eq!(wrong.bases, [Base::Older(id(21)), Base::Nothing]);
        // The parents are gone from the source.
        let copies = [copied(&source[0], 1, 10, 10)];
        let alone = planned(&source[2], &source[2..], &copies);
        assert_eq!(alone.chain, Some(ChainId::from(&id(10))));
        assert_eq!(alone.bases, [Base::Older(id(10)), Base::Older(id(10))]);
    }

    #[test]
    fn on_the_way_back_originals_are_what_their_copies_are() {
        let originals = chain_of_three();
        let mut there: Vec<Point> =
            originals.iter().map(|point| copied(point, 1, point.id.millis() + 1, 10)).collect();
        there.push(point(40, 10, vec![disk("a", Some(31), 7)]));
        let (one, two) = (repository(1), repository(2));
        let source = End { repository: &two, points: &there };
        let destination = End { repository: &one, points: &originals };
        let known = destination.identities();
        assert!(there[..3].iter().all(|copy| known.contains_key(&source.identity(copy))));
        assert!(!known.contains_key(&source.identity(&there[3])));
        let plan = plan(&there[3], source, destination);
        assert_eq!(plan.bases, [Base::Same { source: id(31), copy: id(30) }]);
    }

    proptest! {
        /// Whatever is there: a parent is of the plan's chain, holds the disk, and is older; and a
        /// difference is only taken to what is known to be equal.
        #[test]
        fn bases_are_sound(there in proptest::collection::vec(any::<bool>(), 3), last in 0usize..3) {
            let source = chain_of_three();
            let copies: Vec<Point> = source.iter().zip(&there).take(last)
                .filter(|(_, there)| **there)
                .map(|(point, _)| copied(point, 1, point.id.millis(), 10))
                .collect();
            let plan = planned(&source[last], &source, &copies);
            for (disk, base) in source[last].disks.iter().zip(&plan.bases) {
                if let Some(parent) = base.parent() {
                    let found = copies.iter().find(|copy| &copy.id == parent).unwrap();
                    prop_assert!(Some(&found.chain) == plan.chain.as_ref());
                    prop_assert!(found.disk(&disk.disk).is_some() && found.id < source[last].id);
                }
                if let Base::Same { source: from, copy } = base {
                    prop_assert!(from == copy, "the model's copies keep their times");
                }
            }
        }
    }
}
