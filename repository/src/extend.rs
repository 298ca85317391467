//! Locks what a new point reaches, before it is committed, where objects are locked.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::error::Result;
use crate::gc::DataObject;
use crate::ids::{PackId, RunId};
use crate::lock::{Extension, LockedUntil, PointLock, extension};
use crate::map::RunReader;
use crate::names;
use crate::point::{PointDisk, RunRef};
use crate::repository::{Inner, lock_of};
use crate::store::ObjectName;

/// What a disk takes over from its parent.
pub(crate) struct Inherited {
    pub(crate) runs: Vec<RunRef>,
    /// What the parent's manifest says of its objects' locks.
    pub(crate) lock: Option<PointLock>,
}

/// What this point has written itself, and since when.
pub(crate) struct Own {
    pub(crate) packs: BTreeSet<PackId>,
    pub(crate) begun: Timestamp,
}

/// Extends the locks of what the disks reach, as far as that is not locked for long enough; returns
/// what the manifest says of it. None where objects are not locked.
pub(crate) fn lock_reached(
    inner: &Inner,
    disks: &[PointDisk],
    inherited: &[Inherited],
    own: Own,
) -> Result<Option<PointLock>> {
    let Some(policy) = inner.config.lock() else { return Ok(None) };
    let lock = lock_of(&*inner.store)?;
    let mut maps = Maps { inner, packs: BTreeMap::new() };
    let reached = maps.reach(disks.iter().flat_map(|disk| &disk.runs))?;
    let mut known = Vec::new();
    for parent in inherited {
        if let Some(PointLock { objects_until: until, .. }) = parent.lock {
            known.push(LockedUntil { objects: maps.reach(parent.runs.iter())?, until });
        }
    }
    let parents: BTreeSet<RunId> =
        inherited.iter().flat_map(|parent| &parent.runs).map(|run| run.run).collect();
    let runs = disks.iter().flat_map(|disk| &disk.runs).map(|run| run.run);
    let mut objects: BTreeSet<DataObject> = own.packs.into_iter().map(DataObject::Pack).collect();
    objects.extend(runs.filter(|run| !parents.contains(run)).map(DataObject::Run));
    known.push(LockedUntil { objects, until: policy.horizon(own.begun).objects });
    let horizon = policy.horizon(lock.now());
    let Extension { objects, lock: of_point } = extension(horizon, reached, &known);
    let mut names = foundation(inner)?;
    for object in &objects {
        names.push(object.name()?);
    }
    tracing::debug!(objects = names.len(), until = %horizon.objects, "locks are extended");
    match lock.extend(&names, horizon.objects) {
        // The next run reads whole what needs a pack that is gone.
        Err(error) if error.is_not_found() => {
            quarantine_missing(inner, &objects)?;
            return Err(error.into());
        }
        other => other?,
    }
    Ok(Some(of_point))
}

/// Lets no new point use packs that are not there.
fn quarantine_missing(inner: &Inner, objects: &BTreeSet<DataObject>) -> Result<()> {
    let mut missing = BTreeSet::new();
    for object in objects {
        if let DataObject::Pack(pack) = object
            && !inner.store.exists(&object.name()?)?
        {
            missing.insert(*pack);
        }
    }
    inner.coordination.quarantine(&missing)
}

/// Without these no point can be read.
fn foundation(inner: &Inner) -> Result<Vec<ObjectName>> {
    let mut names = inner.store.names(names::KEYS)?;
    names.push(names::config()?);
    Ok(names)
}

/// Packs of runs, each run read once.
struct Maps<'a> {
    inner: &'a Inner,
    packs: BTreeMap<RunId, Vec<PackId>>,
}

impl Maps<'_> {
    fn reach<'r>(
        &mut self,
        runs: impl Iterator<Item = &'r RunRef>,
    ) -> Result<BTreeSet<DataObject>> {
        let mut reached = BTreeSet::new();
        for run in runs {
            if !self.packs.contains_key(&run.run) {
                let (store, sealing) = (&self.inner.store, &self.inner.sealing);
                self.packs.insert(run.run, RunReader::open(store, sealing, run)?.packs()?);
            }
            let packs = self.packs.get(&run.run).into_iter().flatten();
            reached.extend(packs.copied().map(DataObject::Pack));
            reached.insert(DataObject::Run(run.run));
        }
        Ok(reached)
    }
}
