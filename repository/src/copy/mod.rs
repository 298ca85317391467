//! Copies points from one repository to another.
//!
//! A point keeps what it says of itself and gets a new id with the time of the old one: ids are never
//! used twice in a repository, and whether one was used there long ago nobody can know. Where it was
//! taken is recorded, and by that a copy is recognised. Blocks are read and verified in the source,
//! and hashed, compressed and stored as the destination does it; nothing is assumed of the ids and the
//! block sizes of the two.

mod plan;
mod spans;
mod transfer;

use std::ops::ControlFlow;

use jiff::Timestamp;

use crate::commit::{NewPoint, PointWriter};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::ids::{ChainId, DiskId, PointId};
use crate::names;
use crate::point::{CapsulePart, DiskMode, DiskSummary, Point, PointDisk, PointMeta};
use crate::repository::{Repository, random};
use crate::sink::DiskStart;
use plan::{Base, End, Plan};
use transfer::{Reach, Transfer};

/// After so many new packs what is known of them is saved, for the case that the copy dies: 128 MiB.
const REMEMBER_PACKS: u64 = 4;
/// Hashed by both sides to see whether they give equal blocks equal ids.
const PROBE: &[u8] = b"icecore: do two repositories give equal blocks equal ids";

/// How far the copy of a point is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// Bytes of the guest's that have to be looked at.
    pub total_bytes: u64,
    /// Those that were.
    pub done_bytes: u64,
}

/// What was compared between a point and its copy, beside the hash of each block that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The content roots of all disks: both repositories give equal blocks equal ids.
    Roots,
    /// Nothing more: the ids of the two have nothing in common. What was not read was inherited from
    /// copies whose origin has the content root of the source's point.
    Blocks,
}

/// A point that was copied.
#[derive(Clone, Debug)]
pub struct Copied {
    /// The copy.
    pub point: Point,
    /// What its disks cost, in their order.
    pub disks: Vec<CopiedDisk>,
    /// What was compared.
    pub compared: Compared,
}

/// A disk that was copied.
#[derive(Clone, Debug)]
pub struct CopiedDisk {
    /// The disk.
    pub disk: DiskId,
    /// Full: all data; incremental: the difference to a copy; rehash: all, compared with a copy.
    pub mode: DiskMode,
    /// Bytes of blocks read from the source.
    pub read_bytes: u64,
    /// What was written.
    pub summary: DiskSummary,
}

impl Repository {
    /// For each point of this repository its copy (or its original) in `to`, where there is one.
    ///
    /// # Errors
    /// The stores'.
    pub fn copies_in(&self, to: &Self, points: &[Point]) -> Result<Vec<Option<PointId>>> {
        let there = to.points()?;
        let known = End { repository: to.id(), points: &there }.identities();
        let here = End { repository: self.id(), points };
        let copy = |point| known.get(&here.identity(point)).map(|copy| copy.id.clone());
        Ok(points.iter().map(copy).collect())
    }

    /// Copies a point of this repository into `to`, whether or not it is there already; `watch` is
    /// told how far it is and may end it. Of its disks only the difference to copies that are there is
    /// read. Copy the oldest first, and one at a time.
    ///
    /// # Errors
    /// `Damaged` when a block cannot be read as what it was or the copy is not equal; `Cancelled`;
    /// `Refused` when both are one repository; else as [`begin_point`](Self::begin_point) and
    /// [`PointWriter::commit`].
    pub fn copy_point(
        &self,
        point: &Point,
        to: &Self,
        watch: &mut dyn FnMut(CopyProgress) -> ControlFlow<()>,
    ) -> Result<Copied> {
        if self.id() == to.id() {
            return Err(Error::Refused {
                what: format!("{} and {} are one repository", self.location(), to.location()),
                advice: "name another one to copy to",
            });
        }
        let mut plan = Plan { chain: None, bases: Vec::new() };
        let purpose = format!("a copy of a point of {}", point.vm);
        let writer = to.announced(point.vm.clone(), purpose, || {
            // Not before: what is grown from has to stay from now on.
            plan = self.plan_copy(point, to)?;
            self.name_copy(point, &plan)
        })?;
        let copy = Copy { from: self, to, point, writer, equal_ids: equal_ids(self, to) };
        copy.run(&plan, watch)
    }

    fn plan_copy(&self, point: &Point, to: &Self) -> Result<Plan> {
        let (here, there) = (self.points()?, to.points()?);
        let source = End { repository: self.id(), points: &here };
        Ok(plan::plan(point, source, End { repository: to.id(), points: &there }))
    }

    fn name_copy(&self, point: &Point, plan: &Plan) -> Result<NewPoint> {
        let time = i64::try_from(point.id.millis()).ok();
        let time = time.and_then(|time| Timestamp::from_millisecond(time).ok());
        let floor = plan::floor(&plan.bases);
        let random = u32::from_le_bytes(random()?);
        let id = PointId::next(time.unwrap_or(Timestamp::UNIX_EPOCH), floor, random);
        let chain = plan.chain.clone().unwrap_or_else(|| ChainId::from(&id));
        Ok(NewPoint { point: id, chain, origin: Some(plan::origin(point, self.id())) })
    }

    /// What a copy says of itself: all that its origin said, but for the bitmaps. They belong to the
    /// repository in which the point was taken.
    fn meta_of_copy(&self, point: &Point) -> Result<PointMeta> {
        let mut meta = point.meta.clone();
        for disk in &mut meta.disks {
            (disk.bitmap, disk.granularity) = (None, None);
        }
        let part = |name: &DiskId| {
            let bytes = self.capsule_part(point, name.as_str())?;
            Ok(CapsulePart { name: name.clone(), bytes })
        };
        meta.parts = point.parts.iter().map(|info| part(&info.name)).collect::<Result<_>>()?;
        Ok(meta)
    }
}

/// Whether both give equal blocks equal ids.
fn equal_ids(from: &Repository, to: &Repository) -> bool {
    let id = |repository: &Repository| repository.hasher().block_id(PROBE);
    from.block_size() == to.block_size() && id(from) == id(to)
}

/// The copy of one point under way.
struct Copy<'a> {
    from: &'a Repository,
    to: &'a Repository,
    point: &'a Point,
    writer: PointWriter,
    equal_ids: bool,
}

impl Copy<'_> {
    fn run(
        self,
        plan: &Plan,
        watch: &mut dyn FnMut(CopyProgress) -> ControlFlow<()>,
    ) -> Result<Copied> {
        let point = self.point;
        let disks = point.disks.iter().zip(&plan.bases);
        let routes: Vec<Route<'_>> =
            disks.map(|(disk, base)| self.route(disk, base)).collect::<Result<_>>()?;
        let lengths = routes.iter().map(|route| route.transfer.bytes());
        let mut progress =
            CopyProgress { total_bytes: lengths.sum::<Result<u64>>()?, done_bytes: 0 };
        let mut remembered = 0;
        let mut each = |bytes| {
            progress.done_bytes += bytes;
            if self.writer.durable_packs() >= remembered + REMEMBER_PACKS {
                remembered = self.writer.durable_packs();
                self.writer.remember();
            }
            match watch(progress) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => {
                    Err(Error::Cancelled { what: format!("the copy of point {}", self.point.id) })
                }
            }
        };
        let copied = each(0).and_then(|()| {
            routes.iter().map(|route| self.disk(route, &mut each)).collect::<Result<Vec<_>>>()
        });
        // Whatever ended it: the next try need not send again what is durable.
        let disks = copied.inspect_err(|_| self.writer.remember())?;
        let meta = self.from.meta_of_copy(self.point)?;
        let compared = if self.equal_ids { Compared::Roots } else { Compared::Blocks };
        Ok(Copied { point: self.writer.commit(meta)?, disks, compared })
    }

    /// How a disk is read, and what it is written as.
    fn route<'b>(&self, disk: &'b PointDisk, base: &Base) -> Result<Route<'b>> {
        let from = self.from.disk_reader(self.point, &disk.disk)?;
        let (reach, parent) = match base {
            Base::Nothing => (Reach::Data, None),
            Base::Older(copy) => (Reach::Whole, Some(copy)),
            Base::Same { source, copy } => match self.older(disk, source, copy) {
                Ok(Some(older)) => (Reach::DifferenceTo(Box::new(older)), Some(copy)),
                Ok(None) => (Reach::Whole, Some(copy)),
                Err(error) if error.damage().is_some() => (Reach::Whole, Some(copy)),
                Err(error) => return Err(error),
            },
        };
        // Growing from a map that cannot be read is worse than storing blocks twice.
        let (reach, parent) = match parent {
            Some(copy) if self.is_whole(copy, &disk.disk)? => (reach, Some(copy.clone())),
            _ => (Reach::Data, None),
        };
        let (to, equal_ids) = (self.to.block_size(), self.equal_ids);
        Ok(Route { disk, parent, transfer: Transfer { from, reach, to, equal_ids } })
    }

    /// The disk of the source to which the difference is taken; none where blocks of its copy are
    /// damaged, so that they have to come again.
    fn older(
        &self,
        disk: &PointDisk,
        source: &PointId,
        copy: &PointId,
    ) -> Result<Option<crate::DiskReader>> {
        if self.to.disk_is_damaged(&self.to.point(copy)?, &disk.disk)? {
            return Ok(None);
        }
        self.from.disk_reader(&self.from.point(source)?, &disk.disk).map(Some)
    }

    /// Whether the map of a copy can be opened.
    fn is_whole(&self, copy: &PointId, disk: &DiskId) -> Result<bool> {
        match self.to.point(copy).and_then(|copy| self.to.disk_reader(&copy, disk)) {
            Ok(_) => Ok(true),
            Err(error) if error.damage().is_some() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn disk(
        &self,
        route: &Route<'_>,
        each: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<CopiedDisk> {
        let PointDisk { disk, size_bytes, content_root, .. } = route.disk;
        let (disk, parent) = (disk.clone(), route.parent.clone());
        let start = DiskStart { disk: disk.clone(), size_bytes: *size_bytes, parent };
        let (summary, read_bytes) = route.transfer.run(self.writer.disk(start)?, each)?;
        if self.equal_ids && summary.content_root != *content_root {
            let detail = format!(
                "disk {disk} has content root {content_root}, and what was copied of it {}",
                summary.content_root
            );
            let object = names::manifest(&self.point.id)?;
            return Err(Damage::new(object, DamageKind::Content, detail).into());
        }
        Ok(CopiedDisk { disk, mode: route.mode(), read_bytes, summary })
    }
}

/// One disk's way.
struct Route<'a> {
    disk: &'a PointDisk,
    /// In the destination.
    parent: Option<PointId>,
    transfer: Transfer,
}

impl Route<'_> {
    fn mode(&self) -> DiskMode {
        match &self.transfer.reach {
            Reach::DifferenceTo(_) => DiskMode::Incremental,
            Reach::Whole => DiskMode::Rehash,
            Reach::Data => DiskMode::Full,
        }
    }
}
