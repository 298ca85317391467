//! Daemons that share a repository tell that they are there, for whoever asks. Nothing is decided by
//! it: what is lost or forgotten here is told again at a daemon's next beat.
//!
//! A beat creates an object of the next number and removes the one before; its name also holds gc's
//! generation, so that gc forgets daemons that are gone for good by names alone, without a clock.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Coordination, SERVICES, accept_existing};
use crate::envelope::Kind;
use crate::error::{Error, Result};
use crate::ids::ServiceId;
use crate::repository::Repository;
use crate::store::ObjectName;

pub(super) const KIND: Kind = Kind::new(b"SRVC");

/// A daemon is forgotten when gc has begun so many generations since its last beat: with a gc each
/// night, after a month.
const GENERATIONS_KEPT: u64 = 30;
/// A daemon beats while its objects are listed and read; who loses that race this often is left out.
const READ_TRIES: usize = 3;

/// Whether a daemon meant to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceState {
    /// It is at work, and will beat again.
    Up,
    /// It was told to end.
    Stopped,
}

/// What a daemon tells of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// Drawn once for a host's state directory.
    pub service: ServiceId,
    /// Its host's name.
    pub host: String,
    /// Its version.
    pub version: String,
    /// Whether it meant to stay.
    pub state: ServiceState,
    /// When it told this, by its own clock.
    pub at: Timestamp,
    /// Seconds from one beat to the next.
    pub period_seconds: u64,
}

/// A beat by its name: generation, then number.
type Beat = (u64, u64);

impl Coordination {
    fn tell_of_service(&self, record: &ServiceRecord) -> Result<()> {
        let mut before = self.service_beats()?.remove(&record.service).unwrap_or_default();
        let number = before.last().map_or(0, |(_, number)| number.saturating_add(1));
        let name = beat_name(&record.service, (self.generation()?.0, number))?;
        // Two daemons of one copied state directory are one to others.
        accept_existing(self.put(&name, KIND, record))?;
        before.retain(|beat| beat.1 < number);
        let old: Result<Vec<_>> =
            before.into_iter().map(|beat| beat_name(&record.service, beat)).collect();
        Ok(self.store.delete(&old?)?)
    }

    fn services(&self) -> Result<Vec<ServiceRecord>> {
        let mut found = BTreeMap::new();
        for _ in 0..READ_TRIES {
            let mut missed = false;
            for (service, beats) in self.service_beats()? {
                let Some(beat) = beats.last().filter(|_| !found.contains_key(&service)) else {
                    continue;
                };
                match self.get::<ServiceRecord>(&beat_name(&service, *beat)?, KIND) {
                    Ok(record) => drop(found.insert(service, record)),
                    Err(Error::Store(error)) if error.is_not_found() => missed = true,
                    Err(Error::Store(error)) => return Err(error.into()),
                    // `check` names a damaged one; the next beat replaces it.
                    Err(error) => tracing::warn!(%error, "a service cannot be read"),
                }
            }
            if !missed {
                break;
            }
        }
        Ok(found.into_values().collect())
    }

    /// Forgets daemons that have not beaten for many generations.
    pub(crate) fn forget_services(&self) -> Result<()> {
        let now = self.generation()?.0;
        let all = self.service_beats()?.into_iter();
        let beats = all.flat_map(|(id, beats)| beats.into_iter().map(move |b| (id.clone(), b)));
        let old = beats.filter(|(_, (generation, _))| {
            // One that lies ahead was made by nobody who has read the generation.
            *generation > now || now - generation > GENERATIONS_KEPT
        });
        let names: Result<Vec<_>> = old.map(|(id, beat)| beat_name(&id, beat)).collect();
        Ok(self.store.delete(&names?)?)
    }

    /// The beats of each daemon in the order of their numbers.
    fn service_beats(&self) -> Result<BTreeMap<ServiceId, Vec<Beat>>> {
        let mut all: BTreeMap<_, Vec<Beat>> = BTreeMap::new();
        for name in self.last_parts(SERVICES)? {
            if let Some((service, beat)) = parse(&name) {
                all.entry(service).or_default().push(beat);
            }
        }
        all.values_mut().for_each(|beats| beats.sort_by_key(|beat| beat.1));
        Ok(all)
    }
}

fn parse(name: &str) -> Option<(ServiceId, Beat)> {
    let mut parts = name.split('.');
    let service = parts.next()?.parse().ok()?;
    let beat = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some((service, beat))
}

/// Whether this is what follows [`SERVICES`] in the name of a beat.
pub(crate) fn is_beat(name: &str) -> bool {
    let canonical = |(service, beat)| beat_name(&service, beat).ok();
    let canonical = parse(name).and_then(canonical);
    canonical.is_some_and(|canonical| canonical.last_part() == name)
}

fn beat_name(service: &ServiceId, (generation, number): Beat) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{SERVICES}{service}.{generation:020}.{number:020}"))?)
}

impl Repository {
    /// Tells that a daemon is there, or that it ends, in place of what it told before.
    ///
    /// # Errors
    /// `ReadOnly`; the store's.
    pub fn tell_of_service(&self, record: &ServiceRecord) -> Result<()> {
        self.inner.refuse_read_only("tell of a service")?;
        self.inner.coordination.tell_of_service(record)
    }

    /// What daemons last told of themselves. Whether one still runs is for the reader to judge by
    /// its time, its period and how far the two clocks can be trusted.
    ///
    /// # Errors
    /// The store's.
    pub fn services(&self) -> Result<Vec<ServiceRecord>> {
        self.inner.coordination.services()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gc::GcOptions;
    use crate::open::{InitOptions, OpenOptions};

    fn record(random: u128, second: i64) -> ServiceRecord {
        ServiceRecord {
            service: ServiceId::from_random(random),
            host: format!("host{random}"),
            version: "1".into(),
            state: ServiceState::Up,
            at: Timestamp::from_second(second).unwrap(),
            period_seconds: 300,
        }
    }

    #[test]
    fn each_daemon_has_one_object_with_what_it_told_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        let repository = Repository::init(&path, InitOptions::default()).unwrap();
        for second in 0..4 {
            repository.tell_of_service(&record(1, second)).unwrap();
        }
        let stopped = ServiceRecord { state: ServiceState::Stopped, ..record(2, 9) };
        repository.tell_of_service(&stopped).unwrap();
        assert_eq!(repository.services().unwrap(), [record(1, 3), stopped]);
        let objects = std::fs::read_dir(path.join("coordination/services")).unwrap().count();
        assert_eq!(objects, 2);
        assert!(repository.check(&Default::default(), |_| ()).unwrap().ok);
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let reader = Repository::open(&path, options).unwrap();
        assert_eq!(reader.services().unwrap().len(), 2);
        assert!(matches!(reader.tell_of_service(&record(1, 5)), Err(Error::ReadOnly { .. })));
    }

    #[test]
    fn gc_forgets_only_those_that_were_silent_for_many_generations() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::init(dir.path().join("r"), InitOptions::default()).unwrap();
        let coordination = &repository.inner.coordination;
        repository.tell_of_service(&record(1, 0)).unwrap();
        for _ in 0..GENERATIONS_KEPT {
            coordination.next_generation().unwrap();
        }
        repository.tell_of_service(&record(2, 0)).unwrap();
        repository.gc(&GcOptions::default()).unwrap();
        assert_eq!(repository.services().unwrap().len(), 2, "not yet");
        coordination.next_generation().unwrap();
        repository.gc(&GcOptions::default()).unwrap();
        assert_eq!(repository.services().unwrap(), [record(2, 0)]);
        // One that was only slow is back with its next beat.
        repository.tell_of_service(&record(1, 1)).unwrap();
        assert_eq!(repository.services().unwrap().len(), 2);
    }

    #[test]
    fn a_damaged_or_foreign_name_hides_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        let repository = Repository::init(&path, InitOptions::default()).unwrap();
        repository.tell_of_service(&record(1, 0)).unwrap();
        repository.tell_of_service(&record(2, 0)).unwrap();
        let folder = path.join("coordination/services");
        let name = beat_name(&record(1, 0).service, (0, 0)).unwrap();
        std::fs::write(path.join(name.as_str()), b"no record").unwrap();
        std::fs::write(folder.join("what"), b"").unwrap();
        assert_eq!(repository.services().unwrap(), [record(2, 0)]);
        assert!(!repository.check(&Default::default(), |_| ()).unwrap().ok);
        repository.tell_of_service(&record(1, 1)).unwrap();
        assert_eq!(repository.services().unwrap().len(), 2);
    }
}
