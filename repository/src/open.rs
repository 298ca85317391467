//! Making repositories, and opening them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::Compression;
use crate::cache::Cache;
use crate::catalog::Catalog;
use crate::config::{CONFIG_BYTES_MAX, Config};
use crate::crypto::{KeyMaterial, Keys, MasterKey};
use crate::decoder::TocCache;
use crate::error::{Error, Result};
use crate::geometry::BlockSize;
use crate::ids::RepositoryId;
use crate::kept::Kept;
use crate::keys;
use crate::lock::LockPolicy;
use crate::names;
use crate::repository::{Inner, Repository, delete_unlocked, lock_of, random};
use crate::sealing::Sealing;
use crate::store::{Access, Address, Locking, Store, StoreErrorKind, TransferMemory};
use crate::writers::Coordination;

/// Parameters that are fixed when a repository is made.
#[derive(Clone, Debug, Default)]
pub struct InitOptions {
    /// Size of a block; 64 KiB unless told otherwise.
    pub block_size: BlockSize,
    /// Compression of blocks; zstd level 1 unless told otherwise.
    pub compression: Compression,
    /// What opens it; without any key it is not encrypted.
    pub keys: Vec<KeyMaterial>,
    /// How its objects are locked; not at all unless told otherwise.
    pub lock: Option<LockPolicy>,
}

/// How to open a repository.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Where caches may be kept; without it nothing is remembered between processes.
    pub cache_dir: Option<PathBuf>,
    /// Refuse everything that writes.
    pub read_only: bool,
    /// Keys to try, where it is encrypted; where it is not, they are of no use.
    pub keys: Vec<KeyMaterial>,
    /// Memory for what is under way, where a server keeps the repository.
    pub transfer: TransferMemory,
}

impl Repository {
    /// Makes a repository in a directory that is empty or does not exist yet.
    ///
    /// # Errors
    /// `InitRefused` when something is there already, or the place cannot keep what a repository
    /// promises; else the store's.
    pub fn init(path: impl AsRef<Path>, options: InitOptions) -> Result<Self> {
        Self::init_at(&Address::Directory(path.as_ref().to_owned()), options)
    }

    /// Makes a repository at an address where there is nothing yet.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    pub fn init_at(address: &Address, options: InitOptions) -> Result<Self> {
        if let Address::Directory(path) = address {
            refuse_occupied(path)?;
        }
        let locking = options.lock.map_or(Locking::NotWanted, |_| Locking::Wanted);
        let store = address.create(locking)?;
        address.probe().map_err(|unfit| Error::InitRefused {
            location: address.to_string(),
            why: unfit.to_string(),
        })?;
        Self::init_on(store, options, jiff::Timestamp::now())
    }

    /// Makes a repository in any empty store.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    pub fn init_on(
        store: Arc<dyn Store>,
        options: InitOptions,
        now: jiff::Timestamp,
    ) -> Result<Self> {
        if let Some(policy) = options.lock {
            engage_new(&*store, policy)?;
        }
        let occupied = || Error::InitRefused {
            location: store.location().to_owned(),
            why: "there are objects in it already".to_owned(),
        };
        let unfinished = keys::unfinished(&*store)?.ok_or_else(occupied)?;
        let id = RepositoryId::from_random(u128::from_le_bytes(random()?));
        let mut config = Config::new(id.clone(), now, options.block_size, options.compression);
        if let Some(policy) = options.lock {
            config = config.locked(policy);
        }
        let mut sealing = Sealing::plain(id.clone());
        let mut own = Vec::new();
        if !options.keys.is_empty() {
            let master = MasterKey::new(random()?);
            let derived = Keys::derive(&id, &master)?;
            config = config.encrypted(&derived);
            sealing = Sealing::encrypted(id.clone(), derived);
            // Before the config, so that no repository is ever without a key.
            for key in &options.keys {
                own.push(names::key(&keys::store(&*store, &id, &master, key, None, now)?.id)?);
            }
        }
        match store.put(&names::config()?, &config.encode()?) {
            // Somebody else has made one meanwhile; his keys are none of ours.
            Err(error) if error.already_exists() => {
                delete_unlocked(&*store, &own)?;
                return Err(occupied());
            }
            other => other?,
        }
        // Only whoever made the repository removes what others have left, lest two remove each other's.
        delete_unlocked(&*store, &unfinished)?;
        if options.lock.is_some() {
            must_be_locked(&*store)?;
        }
        let repository = Self::with_config(store, config, sealing, &OpenOptions::default());
        repository.inner.coordination.refill_reserve()?;
        Ok(repository)
    }

    /// Opens the repository in a directory.
    ///
    /// # Errors
    /// `NotARepository` when there is none, `Unsupported` when a newer program made it.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Self::open_at(&Address::Directory(path.as_ref().to_owned()), options)
    }

    /// Opens the repository at an address.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_at(address: &Address, options: OpenOptions) -> Result<Self> {
        let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let none = |why: &str| Error::NotARepository {
            location: address.to_string(),
            why: why.to_owned(),
        };
        if let Address::Directory(path) = address
            && path.exists()
            && !path.is_dir()
        {
            return Err(none("it is no directory"));
        }
        match address.open(access, options.transfer) {
            Ok(store) => Self::open_on(store, options),
            Err(error) if error.is_not_found() => Err(none("there is nothing at this place")),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the repository in any store.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(store: Arc<dyn Store>, options: OpenOptions) -> Result<Self> {
        let bytes = match store.read(&names::config()?, CONFIG_BYTES_MAX) {
            Err(error) if error.is_not_found() => {
                return Err(Error::NotARepository {
                    location: store.location().to_owned(),
                    why: "it has no object called config".to_owned(),
                });
            }
            other => other?,
        };
        let config = Config::decode(&bytes)?;
        // A copy of it elsewhere may be read, and points deleted; none is added without a lock.
        if let (Some(policy), Some(lock)) = (config.lock(), store.lock()) {
            lock.engage(policy);
        }
        // Before anything else is read or written.
        let sealing = keys::sealing(&*store, &config, &options.keys)?;
        Ok(Self::with_config(store, config, sealing, &options))
    }

    fn with_config(
        store: Arc<dyn Store>,
        config: Config,
        sealing: Sealing,
        options: &OpenOptions,
    ) -> Self {
        let coordination = Coordination::new(Arc::clone(&store), sealing.clone());
        let cache = options.cache_dir.clone().map(|root| Cache::new(root, sealing.clone()));
        let is_far = store.readers() > 0;
        let kept_in = options.cache_dir.as_deref().filter(|_| is_far);
        let kept = kept_in.map(|root| Kept::new(root, config.id.clone()));
        let inner = Inner {
            store,
            config,
            sealing,
            coordination,
            cache,
            kept,
            read_only: options.read_only,
            transfer: options.transfer,
            catalog: Catalog::default(),
            tocs: TocCache::default(),
        };
        Self { inner: Arc::new(inner) }
    }
}

/// Locks all that is put into a store from now on.
fn engage_new(store: &dyn Store, policy: LockPolicy) -> Result<()> {
    let lock = lock_of(store)?;
    lock.require().map_err(|error| match error.kind() {
        StoreErrorKind::Unsupported => Error::InitRefused {
            location: store.location().to_owned(),
            why: error.reason().to_owned(),
        },
        _ => error.into(),
    })?;
    lock.engage(policy);
    Ok(())
}

/// Some servers take the words and lock nothing.
fn must_be_locked(store: &dyn Store) -> Result<()> {
    let lock = lock_of(store)?;
    match lock.locked_until(&names::config()?)? {
        Some(until) if until > lock.now() => Ok(()),
        _ => Err(Error::InitRefused {
            location: store.location().to_owned(),
            why: "the server took an object and did not lock it".to_owned(),
        }),
    }
}

/// A directory may be used when it is missing or empty (a fresh file system has its lost+found).
fn refuse_occupied(path: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(path) else {
        // Missing, or no directory: the store says which.
        return Ok(());
    };
    // What an init that crashed has left behind is no stranger either.
    let own = ["lost+found", ".incomplete", "keys"];
    let stranger =
        entries.flatten().find(|entry| own.iter().all(|name| entry.file_name() != *name));
    match stranger {
        None => Ok(()),
        Some(entry) => Err(Error::InitRefused {
            location: path.display().to_string(),
            why: format!("it holds {:?}", entry.file_name()),
        }),
    }
}
