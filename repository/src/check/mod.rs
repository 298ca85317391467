//! check: is everything there, whole, and what it was? Names each damaged object.
//!
//! Three depths. Always: every object but the frames of packs is read and verified, and what refers
//! to what is followed. With `sample`: also some frames, chosen anew in each run. With `read_data`:
//! every frame is decoded and hashed, and every disk's content root is computed from its block ids.
//! It reads only, and it may run beside writers, deletions and gc.

mod coordination;
mod data;
mod points;

use std::collections::BTreeSet;

use serde::Serialize;

use crate::error::{DamageKind, Error, Result};
use crate::ids::PointId;
use crate::names;
use crate::repository::Repository;
use crate::store::StoreErrorKind;

/// Points come and go while we look; after so many looks what is still wrong is reported.
const LOOKS_MAX: u32 = 3;
/// A damaged repository may have millions of flaws; so many are enough to act.
const ERRORS_MAX: usize = 10_000;

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
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
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
            (Error::Unsupported { object, what }, _) => self.add(object, "unsupported", what),
            (Error::Store(failed), _) => {
                let short = failed.kind() == StoreErrorKind::Corrupt;
                let kind = if short { DamageKind::Length.as_str() } else { "unreadable" };
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
            let report = self.look(options, &mut progress)?;
            looks += 1;
            // What is missing may have been deleted while we looked.
            if report.ok || looks == LOOKS_MAX || self.world()? == before {
                return Ok(report);
            }
        }
    }

    /// What changes when points come or go.
    fn world(&self) -> Result<(Vec<String>, crate::writers::Standing)> {
        let listed = self.inner.store.list(names::POINTS)?;
        let names = listed.iter().map(|entry| entry.name.to_string()).collect();
        Ok((names, self.inner.coordination.standing()?))
    }

    fn look(
        &self,
        options: &CheckOptions,
        tell: &mut dyn FnMut(CheckProgress),
    ) -> Result<CheckReport> {
        let progress = CheckProgress::default();
        let mut findings = Findings { errors: BTreeSet::new(), progress, tell };
        let config = self.inner.verify_config();
        findings.note(names::CONFIG, config)?;
        if options.point.is_none() {
            coordination::check(&self.inner, &mut findings)?;
        }
        let points = points::check(&self.inner, options, &mut findings)?;
        let packs = data::check_maps(&self.inner, &points, options, &mut findings)?;
        data::check_packs(&self.inner, &packs, options, &mut findings)?;
        Ok(CheckReport {
            ok: findings.errors.is_empty(),
            points_checked: findings.progress.points_total,
            blocks_checked: findings.progress.blocks_checked,
            errors: findings.errors.into_iter().collect(),
        })
    }
}
