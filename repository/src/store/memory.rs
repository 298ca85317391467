//! A store in memory: for tests, and for whoever wants a repository that is gone with its process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Access, ObjectEntry, ObjectName, ObjectWriter, Store, StoreError, StoreErrorKind};

const LOCATION: &str = "memory";

/// Objects in memory; clones and what [`reopened`](Self::reopened) gives share them.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    shared: Arc<Mutex<Shared>>,
    access: Access,
}

#[derive(Debug, Default)]
struct Shared {
    objects: BTreeMap<ObjectName, Arc<[u8]>>,
    /// Numbers of the writers that are at work.
    unfinished: BTreeSet<u64>,
    writers: u64,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self { shared: Arc::default(), access: Access::ReadWrite }
    }
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same objects, opened otherwise.
    #[must_use]
    pub fn reopened(&self, access: Access) -> Self {
        Self { shared: Arc::clone(&self.shared), access }
    }

    /// Replaces an object's bytes, for tests that damage one.
    pub fn overwrite(&self, name: &ObjectName, bytes: &[u8]) {
        self.lock().objects.insert(name.clone(), bytes.into());
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, action: &'static str, name: &ObjectName) -> Result<Arc<[u8]>, StoreError> {
        let found = self.lock().objects.get(name).cloned();
        found.ok_or_else(|| failed(StoreErrorKind::NotFound, action, name.as_str(), "it is absent"))
    }

    fn must_be_writable(&self, action: &'static str, object: &str) -> Result<(), StoreError> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => {
                let why = "the repository is open for reading only";
                Err(failed(StoreErrorKind::ReadOnly, action, object, why))
            }
        }
    }
}

fn failed(
    kind: StoreErrorKind,
    action: &'static str,
    object: &str,
    why: impl Into<String>,
) -> StoreError {
    StoreError::new(kind, action, object, LOCATION, why.into())
}

fn taken(name: &ObjectName) -> StoreError {
    failed(StoreErrorKind::AlreadyExists, "create", name.as_str(), "its name is taken")
}

impl Store for MemoryStore {
    fn location(&self) -> &str {
        LOCATION
    }

    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        self.must_be_writable("create", name.as_str())?;
        let mut shared = self.lock();
        if shared.objects.contains_key(name) {
            return Err(taken(name));
        }
        shared.writers += 1;
        let number = shared.writers;
        shared.unfinished.insert(number);
        let (store, name) = (self.clone(), name.clone());
        Ok(Box::new(MemoryWriter { store, name, number, bytes: Vec::new() }))
    }

    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        let bytes = self.find("read", name)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(part) = bytes.get(start..).and_then(|rest| rest.get(..buffer.len())) else {
            let why = format!("it ends at byte {} inside a read at {offset}", bytes.len());
            return Err(failed(StoreErrorKind::Corrupt, "read", name.as_str(), why));
        };
        buffer.copy_from_slice(part);
        Ok(())
    }

    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        Ok(self.find("look at", name)?.len() as u64)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        let shared = self.lock();
        let fitting = shared.objects.iter().filter(|(name, _)| name.as_str().starts_with(prefix));
        let entry = |(name, bytes): (&ObjectName, &Arc<[u8]>)| ObjectEntry {
            name: name.clone(),
            bytes: bytes.len() as u64,
        };
        Ok(fitting.map(entry).collect())
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        for name in names {
            self.must_be_writable("delete", name.as_str())?;
            self.lock().objects.remove(name);
        }
        Ok(())
    }

    fn settle(&self, _prefix: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.lock().unfinished.iter().map(ToString::to_string).collect())
    }

    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        for leftover in leftovers {
            self.must_be_writable("remove", leftover)?;
            if let Ok(number) = leftover.parse() {
                self.lock().unfinished.remove(&number);
            }
        }
        Ok(())
    }
}

struct MemoryWriter {
    store: MemoryStore,
    name: ObjectName,
    number: u64,
    bytes: Vec<u8>,
}

impl ObjectWriter for MemoryWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<u64, StoreError> {
        let mut shared = self.store.lock();
        if !shared.unfinished.contains(&self.number) {
            let why = "its unfinished bytes were removed meanwhile";
            return Err(failed(StoreErrorKind::Io, "publish", self.name.as_str(), why));
        }
        if shared.objects.contains_key(&self.name) {
            return Err(taken(&self.name));
        }
        let bytes = std::mem::take(&mut self.bytes);
        let length = bytes.len() as u64;
        shared.objects.insert(self.name.clone(), bytes.into());
        Ok(length)
    }
}

impl Drop for MemoryWriter {
    fn drop(&mut self) {
        self.store.lock().unfinished.remove(&self.number);
    }
}
