//! Where objects lie: named, immutable byte strings that are created once, read in ranges, listed and
//! deleted.
//!
//! A store does not know what an object means, keeps no index and never replaces bytes under a name.
//! What a network may have lost is tried again inside the store, see [`retry`]. Every implementation passes the one suite in `tests/store_conformance.rs`.
//!
//! The promises that the rest of the crate is built on:
//! 1. An object becomes visible only complete and durable, and only if its name was free
//!    ([`ObjectWriter::finish`]). Whoever gives up earlier leaves nothing visible.
//! 2. [`Store::delete`] is durable when it returns, so deletions have an order that survives a power
//!    cut.
//! 3. After an error of `write` or `finish` the writer is spent. A second fsync that succeeds says
//!    nothing about what the first one lost.

mod address;
mod ahead;
mod directory;
mod error;
mod fs;
mod http;
mod limit;
mod memory;
mod probe;
pub mod retry;
mod s3;
pub mod served;
pub mod sftp;
mod sim;
mod traffic;
mod transfer;

use std::fmt;

use jiff::Timestamp;

pub use address::{Address, BadAddress};
pub use ahead::ReadAhead;
pub use directory::{Access, DirectoryStore};
pub use error::{StoreError, StoreErrorKind};
pub use fs::{DirEntry, FileSystem, FsFile, OsFileSystem};
pub use limit::{Limited, Limits, Time};
pub use memory::MemoryStore;
pub use probe::{CreateOnly, Found, Unfit};
pub use s3::{Locking, S3Address, S3Settings, S3Store};
pub use sim::{CallFault, CrashMode, SimFileSystem, Torn};
pub use traffic::Traffic;
pub use transfer::TransferMemory;

use crate::lock::LockPolicy;

/// Longest name of an object in bytes; fits every file system and object store we know of.
pub const OBJECT_NAME_BYTES_MAX: usize = 200;

/// The checked name of an object: `/`-separated parts of `[A-Za-z0-9._-]`, none of which begins with
/// a dot. So a name is a safe relative path, whatever text it was built from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(String);

impl ObjectName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`BadObjectName`] with the name (escaped) when it breaks the rule above.
    pub fn new(name: impl Into<String>) -> Result<Self, BadObjectName> {
        let name = name.into();
        let fits = name.len() <= OBJECT_NAME_BYTES_MAX;
        if fits && name.split('/').all(part_is_safe) {
            Ok(Self(name))
        } else {
            Err(BadObjectName(name))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part behind the last `/`.
    #[must_use]
    pub fn last_part(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn part_is_safe(part: &str) -> bool {
    let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !part.is_empty() && !part.starts_with('.') && part.bytes().all(safe)
}

/// A name that no object can have.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no object name: parts of letters, digits, '.', '_', '-' joined by '/' are allowed"
)]
pub struct BadObjectName(String);

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectEntry {
    /// Name of the object.
    pub name: ObjectName,
    /// Its length in bytes.
    pub bytes: u64,
}

/// An object being written. Dropping it without [`finish`](Self::finish) leaves nothing visible.
pub trait ObjectWriter: Send {
    /// Appends bytes.
    ///
    /// # Errors
    /// After any error the writer is spent: every later call fails.
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError>;

    /// Makes the object durable, then visible, then its name durable; returns its length in bytes.
    ///
    /// # Errors
    /// `AlreadyExists` when the name was taken meanwhile. After any error the object must be taken
    /// for absent, but a reader may still meet it (a lost reply): names are therefore never reused.
    fn finish(self: Box<Self>) -> Result<u64, StoreError>;
}

/// What a store that locks objects does beside what every [`Store`] does: nobody takes a locked
/// object away before its time.
pub trait ObjectLock: Send + Sync {
    /// Makes sure that objects can be locked at this place, one by one.
    ///
    /// # Errors
    /// `Unsupported` with the reason when they cannot.
    fn require(&self) -> Result<(), StoreError>;

    /// From now on each new object is locked as the policy says, if it
    /// [`applies`](LockPolicy::applies_to) to its name.
    fn engage(&self, policy: LockPolicy);

    /// The time by which locks run out.
    fn now(&self) -> Timestamp;

    /// Until when an object is locked; none when it is not.
    ///
    /// # Errors
    /// `NotFound`, or the device's error.
    fn locked_until(&self, name: &ObjectName) -> Result<Option<Timestamp>, StoreError>;

    /// Locks objects until then, at least; none is locked for less than before.
    ///
    /// # Errors
    /// `NotFound`, or the device's first error; some of them may be extended then.
    fn extend(&self, names: &[ObjectName], until: Timestamp) -> Result<(), StoreError>;

    /// As [`Store::delete`], but leaves what is locked, and returns it.
    ///
    /// # Errors
    /// As [`Store::delete`].
    fn delete_unlocked(&self, names: &[ObjectName]) -> Result<Vec<ObjectName>, StoreError>;
}

/// A place for objects; safe to share between threads, processes and hosts.
pub trait Store: Send + Sync + fmt::Debug {
    /// Where this is, for messages.
    fn location(&self) -> &str;

    /// Begins an object whose name must be free.
    ///
    /// # Errors
    /// `AlreadyExists` at once when the name is seen to be taken; else what the device says.
    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError>;

    /// Creates a small object in one call.
    ///
    /// # Errors
    /// As [`create`](Self::create), [`ObjectWriter::write`] and [`ObjectWriter::finish`].
    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<(), StoreError> {
        let mut writer = self.create(name)?;
        writer.write(bytes)?;
        writer.finish().map(|_| ())
    }

    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// `Corrupt` when the object ends before the buffer is full, `NotFound`, or the device's error.
    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError>;

    /// As [`read_exact`](Self::read_exact) for those who ask for all that they need in time, so that
    /// reading ahead of them would be in vain.
    ///
    /// # Errors
    /// As [`read_exact`](Self::read_exact).
    fn read_planned(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        self.read_exact(name, offset, buffer)
    }

    /// The object's length in bytes.
    ///
    /// # Errors
    /// `NotFound`, or the device's error.
    fn len(&self, name: &ObjectName) -> Result<u64, StoreError>;

    /// Whether the object is there.
    ///
    /// # Errors
    /// Anything but `NotFound` that [`len`](Self::len) answers.
    fn exists(&self, name: &ObjectName) -> Result<bool, StoreError> {
        match self.len(name) {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads a whole object of at most `bytes_max`; the length is checked before memory is taken.
    ///
    /// # Errors
    /// `Corrupt` when it is larger, else as [`read_exact`](Self::read_exact).
    fn read(&self, name: &ObjectName, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        let bytes = self.len(name)?;
        let fitting = usize::try_from(bytes).ok().filter(|_| bytes <= bytes_max);
        let Some(length) = fitting else {
            let reason = format!("it has {bytes} bytes where at most {bytes_max} are possible");
            let kind = StoreErrorKind::Corrupt;
            return Err(StoreError::new(kind, "read", name.as_str(), self.location(), reason));
        };
        let mut content = vec![0; length];
        self.read_exact(name, 0, &mut content)?;
        Ok(content)
    }

    /// All objects whose names begin with `prefix` (empty, or ending in `/`), sorted by name.
    /// Objects that come or go meanwhile may or may not be listed; all others are. No match: empty.
    ///
    /// # Errors
    /// The device's error; a listing is never silently partial.
    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError>;

    /// As [`list`](Self::list), the names alone: a store that has to ask for each length is spared
    /// that.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    fn names(&self, prefix: &str) -> Result<Vec<ObjectName>, StoreError> {
        Ok(self.list(prefix)?.into_iter().map(|entry| entry.name).collect())
    }

    /// Deletes objects, durably when it returns. A name that is already gone is no error. A few of
    /// them go in their order.
    ///
    /// # Errors
    /// The device's first error; some of the objects may be gone then.
    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError>;

    /// Makes durable what is already visible under a prefix ending in `/`. A process that died
    /// between showing an object and making its name durable leaves one that a power cut may still
    /// take back; whoever draws a conclusion from an object that he did not write settles it first.
    ///
    /// # Errors
    /// The device's error.
    fn settle(&self, prefix: &str) -> Result<(), StoreError>;

    /// Names of unfinished objects that running or dead writers left, opaque to the caller.
    ///
    /// # Errors
    /// The device's error.
    fn leftovers(&self) -> Result<Vec<String>, StoreError>;

    /// Removes unfinished objects; a writer still at work on one gets an error from `finish`.
    ///
    /// # Errors
    /// The device's error.
    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError>;

    /// The locks of this store; none where it has no such thing.
    fn lock(&self) -> Option<&dyn ObjectLock> {
        None
    }

    /// How many planned reads are worth having under way at once, because each waits for a journey; 0
    /// where there is no server to travel to.
    fn readers(&self) -> usize {
        0
    }

    /// What was sent and received so far; none where nothing is counted, as on a local disk.
    fn traffic(&self) -> Option<Traffic> {
        None
    }
}
