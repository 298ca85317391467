//! How writers, readers, deletions and gc of several hosts agree without locks and without clocks.
//!
//! Everything here is a create-only object below `coordination/`, a prefix that an object lock must
//! leave out. `docs/FORMAT.md`, section "Concurrency", has the argument; in short:
//! - A writer **announces** itself before it looks at anything, then reads the **generation**. Its
//!   life is a counter that it raises and that gc watches; nobody compares clocks.
//! - gc **revokes** a writer whose counter stands still: first a *fence*, then a *verdict* with the
//!   manifests of that writer found after the fence. A manifest not in the verdict does not exist.
//!   The writer looks for a fence after its manifest and before it reports success.
//! - A **deletion** is a tombstone, effective at once for readers; only gc removes bytes. Deletion
//!   and protection of one point contend for one name, so that never both succeed.
//!
//! [`Standing`] is what all of this says about a point. It must be loaded *after* the manifests were
//! listed: then a manifest that it shows was shown to gc too.

mod announce;
mod fate;
mod life;
mod quarantine;
mod reserve;
mod revoke;
mod services;
mod standing;
mod watch;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use announce::{Announcement, Generation, HEARTBEAT_PERIOD, WriterRecord};
pub(crate) use fate::Wish;
pub use life::Life;
pub(crate) use reserve::RESERVE_OBJECTS;
pub(crate) use services::is_beat;
pub use services::{ServiceRecord, ServiceState};
pub use standing::{PointStanding, Standing};
pub use watch::Watch;

use crate::envelope::Kind;
use crate::error::{Damage, DamageKind, Result};
use crate::ids::{PackId, PointId, WriterId};
use crate::sealing::Sealing;
use crate::store::{ObjectName, Store};

/// Everything of this module; not under an object lock.
pub(crate) const COORDINATION: &str = "coordination/";
pub(crate) const WRITERS: &str = "coordination/writers/";
pub(crate) const BEATS: &str = "coordination/beats/";
pub(crate) const GENERATIONS: &str = "coordination/generations/";
pub(crate) const REVOKED: &str = "coordination/revoked/";
pub(crate) const FATES: &str = "coordination/fates/";
pub(crate) const QUARANTINE: &str = "coordination/damaged/";
pub(crate) const RESERVE: &str = "coordination/reserve/";
pub(crate) const SERVICES: &str = "coordination/services/";

/// A record here is a few ids; more is damage.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// The coordination objects of one repository.
#[derive(Debug, Clone)]
pub(crate) struct Coordination {
    store: Arc<dyn Store>,
    sealing: Sealing,
}

impl Coordination {
    /// Of a repository in this store.
    pub(crate) fn new(store: Arc<dyn Store>, sealing: Sealing) -> Self {
        Self { store, sealing }
    }

    fn put<T: Serialize>(&self, name: &ObjectName, kind: Kind, record: &T) -> Result<()> {
        let payload = serde_json::to_vec(record)
            .map_err(|error| Damage::new(name, DamageKind::Inconsistent, error.to_string()))?;
        let bytes = self.sealing.close(kind, name.as_str(), &payload)?;
        Ok(self.store.put(name, &bytes)?)
    }

    /// As [`put`](Self::put); that somebody else was first is as good.
    fn put_once<T: Serialize>(&self, name: &ObjectName, kind: Kind, record: &T) -> Result<()> {
        accept_existing(self.put(name, kind, record))
    }

    fn get<T: DeserializeOwned>(&self, name: &ObjectName, kind: Kind) -> Result<T> {
        let bytes = self.store.read(name, RECORD_BYTES_MAX)?;
        let payload = self.sealing.open(kind, name.as_str(), &bytes)?;
        serde_json::from_slice(&payload)
            .map_err(|error| Damage::new(name, DamageKind::Inconsistent, error.to_string()).into())
    }

    fn last_parts(&self, prefix: &str) -> Result<Vec<String>> {
        let names = self.store.names(prefix)?;
        Ok(names.iter().map(|name| name.last_part().to_owned()).collect())
    }

    /// Verifies one object of [`COORDINATION`]; those without content are what their names say.
    pub(crate) fn verify(&self, name: &ObjectName) -> Result<()> {
        let is_in = |prefix| name.as_str().starts_with(prefix);
        if is_in(FATES) {
            self.get::<fate::Fate>(name, fate::KIND).map(drop)
        } else if is_in(WRITERS) {
            self.get::<WriterRecord>(name, announce::KIND).map(drop)
        } else if is_in(REVOKED) && name.as_str().ends_with(".verdict") {
            self.get::<BTreeSet<PointId>>(name, revoke::VERDICT).map(drop)
        } else if is_in(REVOKED) {
            self.get::<WriterId>(name, revoke::FENCE).map(drop)
        } else if is_in(QUARANTINE) {
            self.get::<PackId>(name, quarantine::KIND).map(drop)
        } else if is_in(RESERVE) {
            self.verify_reserve(name)
        } else if is_in(SERVICES) {
            self.get::<ServiceRecord>(name, services::KIND).map(drop)
        } else if is_in(BEATS) || is_in(GENERATIONS) {
            Ok(())
        } else {
            let detail = "no object of a repository has this name";
            Err(Damage::new(name, DamageKind::Foreign, detail).into())
        }
    }

    /// Whether an object of [`COORDINATION`] holds a record, as opposed to saying all by its name.
    pub(crate) fn is_record(&self, name: &ObjectName) -> bool {
        let in_any = |prefixes: &[&str]| prefixes.iter().any(|p| name.as_str().starts_with(p));
        in_any(&[WRITERS, REVOKED, FATES, QUARANTINE, SERVICES])
    }

    /// Makes durable what others may have left visible only: conclusions will be drawn from it.
    pub(crate) fn settle(&self) -> Result<()> {
        for prefix in [WRITERS, GENERATIONS, REVOKED, FATES] {
            self.store.settle(prefix)?;
        }
        Ok(())
    }
}

/// Takes "somebody else created it first" for success.
pub(crate) fn accept_existing(result: Result<()>) -> Result<()> {
    match result {
        Err(crate::error::Error::Store(error)) if error.already_exists() => Ok(()),
        other => other,
    }
}

fn writer_name(writer: &WriterId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{WRITERS}{writer}"))?)
}

fn fence_name(writer: &WriterId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{REVOKED}{writer}.fence"))?)
}

fn verdict_name(writer: &WriterId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{REVOKED}{writer}.verdict"))?)
}

#[cfg(test)]
mod tests;
