//! The store in a directory: local disks, NFS and other mounts.
//!
//! An object is written to `.incomplete/`, fsynced, linked to its name (the link fails if the name is
//! taken, on every host alike), and the directory is fsynced. Directories are fsynced into their
//! parents before the first object in them.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::{
    FileSystem, FsFile, ObjectEntry, ObjectName, ObjectWriter, OsFileSystem, Store, StoreError,
    StoreErrorKind,
};

/// Where unfinished objects lie. No object name begins with a dot, so listings never meet it.
const INCOMPLETE: &str = ".incomplete";

/// What a store may be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing is created, changed or removed.
    ReadOnly,
    /// Everything.
    ReadWrite,
}

/// Objects as files below a root directory.
#[derive(Debug)]
pub struct DirectoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    fs: Arc<dyn FileSystem>,
    location: String,
    access: Access,
    // Directories known to be durable; each process fsyncs a directory's parent itself once, since
    // another one may have made the directory and not come to its fsync.
    durable: Mutex<HashSet<String>>,
}

impl DirectoryStore {
    /// Opens a directory that must exist.
    ///
    /// # Errors
    /// When it cannot be opened as a directory.
    pub fn open(root: &Path, access: Access) -> Result<Self, StoreError> {
        let location = root.display().to_string();
        let fs = OsFileSystem::open(root)
            .map_err(|error| StoreError::from_io("open", "the directory", &location, error))?;
        Ok(Self::on(Arc::new(fs), location, access))
    }

    /// Creates the directory (mode 0700) unless it exists; its parent must exist.
    ///
    /// # Errors
    /// When it can be neither created nor opened.
    pub fn create(root: &Path) -> Result<Self, StoreError> {
        let location = root.display().to_string();
        let fs = OsFileSystem::create(root)
            .map_err(|error| StoreError::from_io("create", "the directory", &location, error))?;
        Ok(Self::on(Arc::new(fs), location, Access::ReadWrite))
    }

    /// A store on any file system, the simulated one for instance.
    #[must_use]
    pub fn on(fs: Arc<dyn FileSystem>, location: impl Into<String>, access: Access) -> Self {
        let durable = Mutex::new(HashSet::new());
        Self { shared: Arc::new(Shared { fs, location: location.into(), access, durable }) }
    }
}

impl Shared {
    fn failed(&self, action: &'static str, object: &str, error: io::Error) -> StoreError {
        StoreError::from_io(action, object, &self.location, error)
    }

    fn must_be_writable(&self, action: &'static str, object: &str) -> Result<(), StoreError> {
        if self.access == Access::ReadWrite {
            return Ok(());
        }
        let reason = "the repository is open for reading only";
        let kind = StoreErrorKind::ReadOnly;
        Err(StoreError::new(kind, action, object, &self.location, reason))
    }

    fn make_durable_directory(&self, path: &str) -> io::Result<()> {
        for end in path.match_indices('/').map(|(at, _)| at).chain([path.len()]) {
            let directory = &path[..end];
            if directory.is_empty() || self.durable_directories().contains(directory) {
                continue;
            }
            match self.fs.make_directory(directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => self.fs.sync_directory(parent(directory))?,
            }
            self.durable_directories().insert(directory.to_owned());
        }
        Ok(())
    }

    fn durable_directories(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create_incomplete(&self) -> io::Result<(String, Box<dyn FsFile>)> {
        self.make_durable_directory(INCOMPLETE)?;
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let path = format!("{INCOMPLETE}/{:032x}", u128::from_le_bytes(random));
        let file = self.fs.create_new(&path)?;
        Ok((path, file))
    }

    fn publish(&self, incomplete: &str, name: &ObjectName) -> io::Result<()> {
        let directory = parent(name.as_str());
        self.make_durable_directory(directory)?;
        self.fs.publish(incomplete, name.as_str())?;
        self.fs.sync_directory(directory).inspect_err(|_| {
            // What may not survive a power cut must not be seen; if this fails too, the caller
            // still learns that the object is not to be trusted.
            let _ = self.fs.remove(name.as_str());
        })
    }

    /// All objects below a directory, level by level, with their lengths as far as listings tell.
    fn walk(&self, directory: &str, prefix: &str) -> io::Result<Vec<(ObjectName, Option<u64>)>> {
        let mut found = Vec::new();
        let mut level = vec![directory.to_owned()];
        while !level.is_empty() {
            let listed = self.fs.entries_of(&level)?;
            let mut below = Vec::new();
            for (directory, entries) in level.iter().zip(listed) {
                for entry in entries.into_iter().flatten() {
                    let path = if directory.is_empty() {
                        entry.name
                    } else {
                        format!("{directory}/{}", entry.name)
                    };
                    let Ok(name) = ObjectName::new(path) else { continue };
                    if entry.is_directory {
                        below.push(name.as_str().to_owned());
                    } else if name.as_str().starts_with(prefix) {
                        found.push((name, entry.bytes));
                    }
                }
            }
            level = below;
        }
        found.sort_unstable();
        Ok(found)
    }

    fn entry(&self, name: ObjectName, bytes: Option<u64>) -> Option<io::Result<ObjectEntry>> {
        if let Some(bytes) = bytes {
            return Some(Ok(ObjectEntry { name, bytes }));
        }
        match self.fs.file_bytes(name.as_str()) {
            Ok(bytes) => Some(Ok(ObjectEntry { name, bytes })),
            // Deleted since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(Err(error)),
        }
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl Store for DirectoryStore {
    fn location(&self) -> &str {
        &self.shared.location
    }

    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        let shared = &self.shared;
        shared.must_be_writable("create", name.as_str())?;
        if self.exists(name)? {
            let taken = io::Error::from_raw_os_error(rustix::io::Errno::EXIST.raw_os_error());
            return Err(shared.failed("create", name.as_str(), taken));
        }
        let (incomplete, file) = shared
            .create_incomplete()
            .map_err(|error| shared.failed("create", name.as_str(), error))?;
        Ok(Box::new(DirectoryWriter {
            shared: Arc::clone(shared),
            name: name.clone(),
            incomplete,
            file: Some(file),
            bytes: 0,
        }))
    }

    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        let shared = &self.shared;
        let count = shared
            .fs
            .read_at(name.as_str(), offset, buffer)
            .map_err(|error| shared.failed("read", name.as_str(), error))?;
        if count == buffer.len() {
            return Ok(());
        }
        let reason = format!("it ends at byte {} inside a read at {offset}", offset + count as u64);
        let kind = StoreErrorKind::Corrupt;
        Err(StoreError::new(kind, "read", name.as_str(), &shared.location, reason))
    }

    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        let shared = &self.shared;
        shared
            .fs
            .file_bytes(name.as_str())
            .map_err(|error| shared.failed("look at", name.as_str(), error))
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        let shared = &self.shared;
        let list = || -> io::Result<Vec<ObjectEntry>> {
            let found = shared.walk(parent(prefix), prefix)?.into_iter();
            found.filter_map(|(name, bytes)| shared.entry(name, bytes)).collect()
        };
        list().map_err(|error| shared.failed("list", prefix, error))
    }

    fn names(&self, prefix: &str) -> Result<Vec<ObjectName>, StoreError> {
        let found = self.shared.walk(parent(prefix), prefix);
        let found = found.map_err(|error| self.shared.failed("list", prefix, error))?;
        Ok(found.into_iter().map(|(name, _)| name).collect())
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        let shared = &self.shared;
        let mut directories: Vec<&str> = Vec::new();
        for name in names {
            shared.must_be_writable("delete", name.as_str())?;
            ignore_missing(shared.fs.remove(name.as_str()))
                .map_err(|error| shared.failed("delete", name.as_str(), error))?;
            directories.push(parent(name.as_str()));
        }
        directories.sort_unstable();
        directories.dedup();
        for directory in directories {
            ignore_missing(shared.fs.sync_directory(directory))
                .map_err(|error| shared.failed("make deletions durable in", directory, error))?;
        }
        Ok(())
    }

    fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        ignore_missing(self.shared.fs.sync_directory(parent(prefix)))
            .map_err(|error| self.shared.failed("make durable", prefix, error))
    }

    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        match self.shared.fs.entries(INCOMPLETE) {
            Ok(entries) => Ok(entries.into_iter().map(|entry| entry.name).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(self.shared.failed("list", INCOMPLETE, error)),
        }
    }

    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        let shared = &self.shared;
        for leftover in leftovers.iter().filter(|name| !name.contains('/')) {
            shared.must_be_writable("remove", leftover)?;
            ignore_missing(shared.fs.remove(&format!("{INCOMPLETE}/{leftover}")))
                .map_err(|error| shared.failed("remove", leftover, error))?;
        }
        Ok(())
    }
}

struct DirectoryWriter {
    shared: Arc<Shared>,
    name: ObjectName,
    incomplete: String,
    // None once a call failed: no later fsync could be trusted.
    file: Option<Box<dyn FsFile>>,
    bytes: u64,
}

impl DirectoryWriter {
    fn with_file<T>(
        &mut self,
        action: &'static str,
        operation: impl FnOnce(&mut dyn FsFile) -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let Some(file) = self.file.as_mut() else {
            let reason = "an earlier write of this object failed";
            let (kind, location) = (StoreErrorKind::Io, &self.shared.location);
            return Err(StoreError::new(kind, action, self.name.as_str(), location, reason));
        };
        operation(file.as_mut()).map_err(|error| {
            self.file = None;
            self.shared.failed(action, self.name.as_str(), error)
        })
    }
}

impl ObjectWriter for DirectoryWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.with_file("write", |file| file.append(bytes))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<u64, StoreError> {
        self.with_file("make durable", |file| file.sync())?;
        self.shared.publish(&self.incomplete, &self.name).map_err(|error| {
            let (object, location) = (self.name.as_str(), &self.shared.location);
            if error.kind() == io::ErrorKind::NotFound {
                let reason = "its unfinished bytes were removed meanwhile, as gc does with those \
                              of a writer that it takes for dead";
                return StoreError::new(StoreErrorKind::Io, "publish", object, location, reason);
            }
            self.shared.failed("publish", object, error)
        })?;
        Ok(self.bytes)
    }
}

impl Drop for DirectoryWriter {
    fn drop(&mut self) {
        // Also after success: the object has its own name by then. What cannot be removed now is
        // found by gc.
        let _ = self.shared.fs.remove(&self.incomplete);
    }
}
