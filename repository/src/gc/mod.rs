//! gc: deletes what no point reaches, beside writers at work on any host.
//!
//! It never reads a clock that others must agree with, and never deletes a pack of which one block
//! is alive. `plan` decides, `driver` does; `docs/FORMAT.md`, section "Concurrency", has the argument.

mod driver;
mod plan;
#[cfg(test)]
mod simulator;

use std::time::Duration;

use jiff::Timestamp;

pub use driver::{Pace, RealPace};
pub(crate) use plan::DataObject;

use driver::{Collector, Contents, ManifestFacts};

use crate::error::Result;
use crate::ids::{PackId, PointId};
use crate::manifest::Receipt;
use crate::map::RunReader;
use crate::names;
use crate::point::RunRef;
use crate::repository::{Inner, Repository};
use crate::writers::HEARTBEAT_PERIOD;

/// A heartbeat comes every ten seconds; six missed ones are no hiccup of the store.
pub const PATIENCE_DEFAULT: Duration = Duration::from_secs(60);
const _: () = assert!(PATIENCE_DEFAULT.as_secs() >= 6 * HEARTBEAT_PERIOD.as_secs());
/// Long enough for an ordinary incremental to end, short enough for a command that someone watches.
pub const WAIT_MAX_DEFAULT: Duration = Duration::from_secs(600);

/// How a gc is to be run.
#[derive(Debug, Clone)]
pub struct GcOptions {
    /// Only tell what is unreachable now.
    pub dry_run: bool,
    /// A writer whose counter stands still for so long is given up.
    pub patience: Duration,
    /// How long to wait for living writers before giving up (nothing is deleted then).
    pub wait_max: Duration,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self { dry_run: false, patience: PATIENCE_DEFAULT, wait_max: WAIT_MAX_DEFAULT }
    }
}

/// What a gc did, or with `dry_run` would do if nobody wrote meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GcReport {
    /// Deleted or disowned points of which the last rest was removed.
    pub points_removed: u64,
    /// Packs deleted.
    pub packs_deleted: u64,
    /// Map runs deleted.
    pub runs_deleted: u64,
    /// Bytes of these packs and runs.
    pub bytes_freed: u64,
    /// Dead writers given up.
    pub writers_revoked: u64,
    /// Receipts written for committed points whose writers died before they wrote them.
    pub receipts_completed: u64,
    /// Unfinished objects removed.
    pub leftovers_removed: u64,
    /// Deleted or disowned points that stay with all that they reach, since they are locked.
    pub points_locked: u64,
    /// Objects that nothing reaches and that stay, since they are locked.
    pub objects_locked: u64,
}

impl Repository {
    /// Deletes what no point reaches, beside writers at work.
    ///
    /// # Errors
    /// `Damaged` when a manifest or map of a point cannot be read: then nothing is deleted, since
    /// nobody can tell what it reaches. `Refused` when writers are still at work after the longest
    /// wait; `ReadOnly`; the store's.
    pub fn gc(&self, options: &GcOptions) -> Result<GcReport> {
        self.gc_at_pace(options, &mut RealPace::start())
    }

    /// As [`gc`](Self::gc), with time handed in.
    ///
    /// # Errors
    /// As [`gc`](Self::gc).
    pub fn gc_at_pace(&self, options: &GcOptions, pace: &mut dyn Pace) -> Result<GcReport> {
        if !options.dry_run {
            self.inner.refuse_read_only("collect garbage")?;
        }
        let inner = &*self.inner;
        let (store, coordination) = (&*inner.store, &inner.coordination);
        Collector { store, coordination, contents: inner, pace, options }.run()
    }
}

impl Contents for Inner {
    fn manifest(&self, point: &PointId) -> Result<ManifestFacts> {
        let bytes = self.manifest_bytes(point)?;
        let (point, _) = self.decode_manifest(point, &bytes)?;
        let runs = point.disks.into_iter().flat_map(|disk| disk.runs).collect();
        Ok(ManifestFacts { writer: point.writer_id, runs })
    }

    fn locked_until(&self, point: &PointId) -> Result<Option<Timestamp>> {
        Self::locked_until(self, point)
    }

    fn packs(&self, run: &RunRef) -> Result<Vec<PackId>> {
        RunReader::open(&self.store, &self.sealing, run)?.packs()
    }

    fn complete_receipt(&self, point: &PointId) -> Result<()> {
        let bytes = self.manifest_bytes(point)?;
        let (decoded, _) = self.decode_manifest(point, &bytes)?;
        let receipt = Receipt::of(&decoded, &bytes).encode(&self.sealing)?;
        Ok(self.store.put(&names::receipt(point)?, &receipt)?)
    }
}
