//! The keys of an encrypted repository: opening it with one, adding, listing and removing them.
//!
//! All keys seal the same master key, each in an object of its own, so adding or removing one rewrites
//! nothing else. What somebody has once opened stays open to him: against a key that was stolen together
//! with its object, only a new repository helps.

use jiff::Timestamp;

use crate::config::Config;
use crate::crypto::{
    Drawn, KEY_BYTES_MAX, KeyInfo, KeyMaterial, KeyMethod, Keys, MasterKey, RecoveryKit, WrappedKey,
};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::ids::{KeyId, RepositoryId};
use crate::names;
use crate::repository::{Repository, random};
use crate::sealing::Sealing;
use crate::store::{ObjectName, Store};

/// Keys that may be added; and so many are tried with a passphrase, because each may cost whoever opens
/// the repository seconds of work and others may write to the store. A key file costs nothing to try, so
/// nobody who has one is kept out by what others have put there.
const KEYS_MAX: usize = 64;

/// What the objects of a repository are read and written with, opened by one of `given`.
pub(crate) fn sealing(
    store: &dyn Store,
    config: &Config,
    given: &[KeyMaterial],
) -> Result<Sealing> {
    if !config.is_encrypted() {
        return Ok(Sealing::plain(config.id.clone()));
    }
    let master = unlock(store, &config.id, given)?;
    let keys = Keys::derive(&config.id, &master)?;
    if !config.is_proven(&keys) {
        let detail = "what it says is not what was said when the repository was made";
        return Err(Damage::new(names::CONFIG, DamageKind::Checksum, detail).into());
    }
    Ok(Sealing::encrypted(config.id.clone(), keys))
}

/// The master key.
fn unlock(
    store: &dyn Store,
    repository: &RepositoryId,
    given: &[KeyMaterial],
) -> Result<MasterKey> {
    let location = || store.location().to_owned();
    if given.is_empty() {
        return Err(Error::KeyMissing { location: location() });
    }
    if let Some(kit) = given.iter().find_map(|key| key.kit_of(repository)) {
        return Ok(kit.master());
    }
    let mut tried = 0;
    let mut unusable = None;
    let mut stretched = 0;
    for id in ids(store)? {
        let opened =
            read(store, &id).and_then(|bytes| open(repository, &id, &bytes, given, &mut stretched));
        match opened {
            Ok(Some(master)) => return Ok(master),
            Ok(None) => tried += 1,
            Err(error) => unusable = Some(error),
        }
    }
    match unusable {
        // It may be the one that is meant.
        Some(error) => Err(error),
        None => {
            let why = format!("what was given is none of its {tried} keys");
            Err(Error::KeyRefused { location: location(), why })
        }
    }
}

fn open(
    repository: &RepositoryId,
    id: &KeyId,
    bytes: &[u8],
    given: &[KeyMaterial],
    stretched: &mut usize,
) -> Result<Option<MasterKey>> {
    let key = WrappedKey::parse(repository, id, bytes)?;
    for material in given {
        if material.is_passphrase() && key.info().method == KeyMethod::Passphrase {
            *stretched += 1;
            if *stretched > KEYS_MAX {
                let detail = format!("{KEYS_MAX} keys were tried before this one");
                return Err(Damage::new(names::KEYS, DamageKind::Limit, detail).into());
            }
        }
        if let Some(master) = key.unwrap(repository, material)? {
            return Ok(Some(master));
        }
    }
    Ok(None)
}

fn ids(store: &dyn Store) -> Result<Vec<KeyId>> {
    let names = store.names(names::KEYS)?;
    Ok(names.iter().filter_map(|name| name.last_part().parse().ok()).collect())
}

fn read(store: &dyn Store, id: &KeyId) -> Result<Vec<u8>> {
    Ok(store.read(&names::key(id)?, KEY_BYTES_MAX)?)
}

/// Stores the master key for whoever gives `material`.
pub(crate) fn store(
    store: &dyn Store,
    repository: &RepositoryId,
    master: &MasterKey,
    material: &KeyMaterial,
    label: Option<String>,
    now: Timestamp,
) -> Result<KeyInfo> {
    let drawn = Drawn { id: u128::from_le_bytes(random()?), salt: random()? };
    let (info, bytes) = WrappedKey::wrap(repository, master, material, label, now, &drawn)?;
    store.put(&names::key(&info.id)?, &bytes)?;
    Ok(info)
}

/// The keys that an `init` has left which has crashed, or is not done yet; none when there is anything
/// else in the store.
pub(crate) fn unfinished(store: &dyn Store) -> Result<Option<Vec<ObjectName>>> {
    let found = store.names("")?;
    for name in &found {
        let id = name.as_str().strip_prefix(names::KEYS).and_then(|id| id.parse::<KeyId>().ok());
        let Some(id) = id else { return Ok(None) };
        if WrappedKey::is_one(&id, &read(store, &id)?).is_err() {
            return Ok(None);
        }
    }
    Ok(Some(found))
}

/// Verifies that a key of this repository is there at all; what is wrong with one of them is told of
/// that object.
pub(crate) fn verify_any(store: &dyn Store, repository: &RepositoryId) -> Result<()> {
    if all(store, repository)?.iter().any(|(_, key)| key.is_ok()) {
        return Ok(());
    }
    let detail = "no key is left; only its recovery kit opens it, so add a key with that";
    Err(Damage::new(names::KEYS, DamageKind::Missing, detail).into())
}

/// All that has a key's name, with the key or what is wrong with it.
fn all(
    store: &dyn Store,
    repository: &RepositoryId,
) -> Result<Vec<(KeyId, Result<KeyInfo, Damage>)>> {
    let mut found = Vec::new();
    for id in ids(store)? {
        let parsed = read(store, &id)
            .and_then(|bytes| Ok(WrappedKey::parse(repository, &id, &bytes)?.info()));
        match parsed {
            Ok(key) => found.push((id, Ok(key))),
            Err(Error::Damaged(damage)) => found.push((id, Err(damage))),
            // Removed since it was listed.
            Err(Error::Store(error)) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Verifies an object below `keys/`.
pub(crate) fn verify(
    store: &dyn Store,
    repository: &RepositoryId,
    name: &ObjectName,
) -> Result<()> {
    let Ok(id) = name.last_part().parse::<KeyId>() else {
        let detail = "no object of a repository has this name";
        return Err(Damage::new(name, DamageKind::Foreign, detail).into());
    };
    WrappedKey::parse(repository, &id, &read(store, &id)?).map(drop)
}

impl Repository {
    /// The keys that open it, the oldest first. None where it is not encrypted.
    ///
    /// # Errors
    /// The store's.
    pub fn keys(&self) -> Result<Vec<KeyInfo>> {
        let all = all(&*self.inner.store, self.id())?;
        let mut keys: Vec<_> = all.into_iter().filter_map(|(_, key)| key.ok()).collect();
        keys.sort_by(|one, two| (one.created_at, &one.id).cmp(&(two.created_at, &two.id)));
        Ok(keys)
    }

    /// What has a key's name and is none of this repository, with what is wrong. It opens nothing and
    /// may be removed like a key.
    ///
    /// # Errors
    /// The store's.
    pub fn damaged_keys(&self) -> Result<Vec<(KeyId, Damage)>> {
        let all = all(&*self.inner.store, self.id())?;
        Ok(all.into_iter().filter_map(|(id, key)| key.err().map(|damage| (id, damage))).collect())
    }

    /// Lets `new` open it, too. `current` opens it now.
    ///
    /// # Errors
    /// `Refused` when it is not encrypted or `new` opens it already; `KeyRefused` when `current` does
    /// not open it; `ReadOnly`; the store's.
    pub fn add_key(
        &self,
        current: &[KeyMaterial],
        new: &KeyMaterial,
        label: Option<String>,
        now: Timestamp,
    ) -> Result<KeyInfo> {
        self.inner.refuse_read_only("add a key")?;
        self.must_be_encrypted()?;
        let master = self.master(current)?;
        let known = ids(&*self.inner.store)?.len();
        if known >= KEYS_MAX {
            return Err(Error::Refused {
                what: format!("it has {known} keys, and no more than {KEYS_MAX} can be"),
                advice: "remove one that nobody uses with `icecore repo key remove` first",
            });
        }
        match unlock(&*self.inner.store, self.id(), std::slice::from_ref(new)) {
            Ok(_) => {
                return Err(Error::Refused {
                    what: "the new key opens the repository already".to_owned(),
                    advice: "give another key file or passphrase",
                });
            }
            // What is damaged opens nothing.
            Err(Error::KeyRefused { .. } | Error::Damaged(_)) => {}
            Err(error) => return Err(error),
        }
        store(&*self.inner.store, self.id(), &master, new, label, now)
    }

    /// Takes a key away, or what is left of one. The last that opens the repository stays.
    ///
    /// # Errors
    /// `NotFound`; `Refused` when it is the last one; `ReadOnly`; the store's.
    pub fn remove_key(&self, id: &KeyId) -> Result<()> {
        self.inner.refuse_read_only("remove a key")?;
        self.must_be_encrypted()?;
        let known = all(&*self.inner.store, self.id())?;
        if !known.iter().any(|(known, _)| known == id) {
            return Err(Error::NotFound { what: format!("key {id}") });
        }
        if !known.iter().any(|(other, key)| other != id && key.is_ok()) {
            return Err(Error::Refused {
                what: format!(
                    "key {id} is the only one that opens it; nobody could read its points"
                ),
                advice: "add another one with `icecore repo key add` first",
            });
        }
        Ok(self.inner.store.delete(&[names::key(id)?])?)
    }

    /// The master key as text, to be kept where no computer reaches it.
    ///
    /// # Errors
    /// `Refused` when it is not encrypted; `KeyRefused` when `current` does not open it.
    pub fn recovery_kit(&self, current: &[KeyMaterial]) -> Result<RecoveryKit> {
        self.must_be_encrypted()?;
        Ok(RecoveryKit::new(self.id(), &self.master(current)?))
    }

    /// The master key, which is not kept in memory.
    fn master(&self, current: &[KeyMaterial]) -> Result<MasterKey> {
        let master = unlock(&*self.inner.store, self.id(), current)?;
        let keys = Keys::derive(self.id(), &master)?;
        if self.inner.config.is_proven(&keys) {
            return Ok(master);
        }
        let location = self.location().to_owned();
        Err(Error::KeyRefused { location, why: "what was given opens another one".to_owned() })
    }

    fn must_be_encrypted(&self) -> Result<()> {
        if self.is_encrypted() {
            return Ok(());
        }
        Err(Error::Refused {
            what: format!("{} is not encrypted and has no keys", self.location()),
            advice: "make an encrypted repository with `icecore repo init --encrypt`",
        })
    }
}

impl KeyMaterial {
    /// The kit, if it is one of this repository.
    fn kit_of(&self, repository: &RepositoryId) -> Option<&RecoveryKit> {
        self.kit().filter(|kit| kit.is_of(repository))
    }
}
