//! check: is everything there, whole, and what it was? Names each damaged object.
//!
//! Three depths. Always: every object but the frames of packs is read and verified, and what refers
//! to what is followed. With `sample`: also some frames, chosen anew in each run. With `read_data`:
//! every frame is decoded and hashed, and every disk's content root is computed from its block ids.
//! It may run beside writers, deletions and gc. In a repository opened writable it marks damaged
//! packs, so that new points build on nothing in them and a disk read whole heals.

mod coordination;
mod data;
mod points;
mod scrub;

pub use scrub::scrub;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{DamageKind, Error, Result};
use crate::geometry::BlockIndex;
use crate::ids::{DiskId, PackId, PointId};
use crate::keys;
use crate::names;
use crate::point::Point;
use crate::repository::Repository;
use crate::store::StoreErrorKind;

/// Points come and go while we look; after so many looks what is still wrong is reported.
const LOOKS_MAX: u32 = 3;
/// A damaged repository may have millions of flaws; so many are enough to act.
const ERRORS_MAX: usize = 10_000;
const UNREADABLE: &str = "unreadable";
const UNSUPPORTED: &str = "unsupported";

/// How deep to look, and at what.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CheckOptions {
    /// Decode and hash every block.
    pub read_data: bool,
    /// Decode and hash about this percentage of the blocks.
    pub sample: Option<f64>,
    /// Only this point and what it needs.
    pub point: Option<PointId>,
}

/// How far a check is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckProgress {
    /// Points whose metadata is done.
    pub points_done: u64,
    /// Points to be looked at.
    pub points_total: u64,
    /// Packs that are done.
    pub packs_done: u64,
    /// Packs found so far.
    pub packs_total: u64,
    /// Blocks decoded and hashed.
    pub blocks_checked: u64,
    /// Bytes of frames read for that.
    pub bytes_read: u64,
}

/// One thing that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CheckError {
    /// Name of the object in the repository.
    pub object: String,
    /// One word: a [`DamageKind`], or `vanished` (a point of which only the receipt is left),
    /// `unsupported` (of a newer version), `unreadable` (the device failed).
    pub kind: String,
    /// What was found, in words.
    pub detail: String,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// True when there are no errors.
    pub ok: bool,
    /// Points looked at.
    pub points_checked: u64,
    /// Blocks decoded and hashed.
    pub blocks_checked: u64,
    /// All that is wrong, by object.
    pub errors: Vec<CheckError>,
}

/// Errors found so far and the progress to tell about.
struct Findings<'a> {
    errors: BTreeSet<CheckError>,
    progress: CheckProgress,
    tell: &'a mut dyn FnMut(CheckProgress),
}

impl Findings<'_> {
    fn tell(&mut self) {
        (self.tell)(self.progress);
    }

    fn add(&mut self, object: impl ToString, kind: &str, detail: impl Into<String>) {
        if self.errors.len() < ERRORS_MAX {
            let (object, kind) = (object.to_string(), kind.to_owned());
            self.errors.insert(CheckError { object, kind, detail: detail.into() });
        }
    }

    /// Notes a failure that concerns `object` unless it names another; what is no finding about the
    /// repository (no memory, say) ends the check.
    fn note<T>(&mut self, object: &str, result: Result<T>) -> Result<Option<T>> {
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        match (&error, error.damage()) {
            (_, Some(damage)) => self.add(damage.object, damage.kind.as_str(), damage.detail),
            (Error::Unsupported { object, what }, _) => self.add(object, UNSUPPORTED, what),
            (Error::Store(failed), _) => {
                let short = failed.kind() == StoreErrorKind::Corrupt;
                let kind = if short { DamageKind::Length.as_str() } else { UNREADABLE };
                self.add(failed.object(), kind, failed.to_string());
            }
            (Error::NotFound { .. } | Error::Id(_) | Error::Geometry(_), _) => {
                self.add(object, DamageKind::Inconsistent.as_str(), error.to_string());
            }
            _ => return Err(error),
        }
        Ok(None)
    }
}

impl Repository {
    /// Looks for damage. Finding some is no error of the check itself.
    ///
    /// # Errors
    /// `NotFound` when the wanted point is not there; the store's, when it cannot even list.
    pub fn check(
        &self,
        options: &CheckOptions,
        mut progress: impl FnMut(CheckProgress),
    ) -> Result<CheckReport> {
        let mut looks = 0;
        loop {
            let before = self.world()?;
            let (report, packs) = self.look(options, &mut progress)?;
            looks += 1;
            // What is missing may have been deleted while we looked.
            if report.ok || looks == LOOKS_MAX || self.world()? == before {
                self.mark_damage(options, &report, &packs);
                return Ok(report);
            }
        }
    }

    /// Whether a disk of a point has blocks in packs that a check found damaged. The next point
    /// should read such a disk whole (reason: the parent is corrupt); then it is sound again.
    ///
    /// # Errors
    /// `NotFound` when the point lacks the disk; `Damaged` when its map is, which asks for the same.
    pub fn disk_is_damaged(&self, point: &Point, disk: &DiskId) -> Result<bool> {
        let marked = self.inner.coordination.quarantined()?;
        if marked.is_empty() {
            return Ok(false);
        }
        let mut entries = self.disk_reader(point, disk)?.entries(BlockIndex(0));
        entries
            .try_fold(false, |damaged, entry| Ok(damaged || marked.contains(&entry?.location.pack)))
    }

    /// Notes which packs are damaged, and which marked ones were found whole (replaced by a copy).
    fn mark_damage(&self, options: &CheckOptions, report: &CheckReport, packs: &BTreeSet<PackId>) {
        if self.inner.read_only {
            return;
        }
        let of_pack = |error: &CheckError| {
            let damaged = !matches!(error.kind.as_str(), UNREADABLE | UNSUPPORTED);
            let id = error.object.strip_prefix(names::PACKS).filter(|_| damaged)?;
            id.rsplit('/').next()?.parse().ok()
        };
        let damaged: BTreeSet<PackId> = report.errors.iter().filter_map(of_pack).collect();
        let coordination = &self.inner.coordination;
        let marked = coordination.quarantine(&damaged).and_then(|()| {
            if !options.read_data || report.errors.len() >= ERRORS_MAX {
                return Ok(());
            }
            let marked = coordination.quarantined()?.into_iter();
            let whole = |pack: &PackId| packs.contains(pack) && !damaged.contains(pack);
            coordination.release(marked.filter(whole))
        });
        if let Err(error) = marked {
            // The report is what was asked for.
            tracing::warn!(%error, "damaged packs could not be marked");
        }
    }

    /// What changes when points come or go.
    fn world(&self) -> Result<(Vec<String>, crate::writers::Standing)> {
        let listed = self.inner.store.list(names::POINTS)?;
        let names = listed.iter().map(|entry| entry.name.to_string()).collect();
        Ok((names, self.inner.coordination.standing()?))
    }

    /// Whether each key is whole, and there is one; whether somebody still has it, nobody can tell.
    fn check_keys(&self, findings: &mut Findings<'_>) -> Result<()> {
        let store = &*self.inner.store;
        for name in store.names(names::KEYS)? {
            let verified = keys::verify(store, self.id(), &name);
            if verified.is_ok() || store.exists(&name)? {
                findings.note(name.as_str(), verified)?;
            }
        }
        if self.is_encrypted() {
            findings.note(names::KEYS, keys::verify_any(store, self.id()))?;
        }
        Ok(())
    }

    fn look(
        &self,
        options: &CheckOptions,
        tell: &mut dyn FnMut(CheckProgress),
    ) -> Result<(CheckReport, BTreeSet<PackId>)> {
        let progress = CheckProgress::default();
        let mut findings = Findings { errors: BTreeSet::new(), progress, tell };
        let config = self.inner.verify_config();
        findings.note(names::CONFIG, config)?;
        if options.point.is_none() {
            coordination::check(&self.inner, &mut findings)?;
            self.check_keys(&mut findings)?;
        }
        let points = points::check(&self.inner, options, &mut findings)?;
        let packs = data::check_maps(&self.inner, &points, options, &mut findings)?;
        data::check_packs(&self.inner, &packs, options, &mut findings)?;
        let report = CheckReport {
            ok: findings.errors.is_empty(),
            points_checked: findings.progress.points_total,
            blocks_checked: findings.progress.blocks_checked,
            errors: findings.errors.into_iter().collect(),
        };
        Ok((report, packs))
    }
}
