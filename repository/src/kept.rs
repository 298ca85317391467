//! What was read of maps and of packs' tables of contents on a server, kept on this host: opening them
//! again costs no journey.
//!
//! An object never changes and its name is never used again, so what is kept cannot grow old; it can
//! only be of an object that is gone, and that shows when its blocks are read. Kept are the bytes as
//! they are stored: of an encrypted repository the sealed ones. Whoever opens an object verifies it
//! as ever. Whatever is wrong with what is kept costs a journey, never a result. Nothing here says
//! that an object is there: `check`, and whoever is about to build upon a pack, ask the store.
//!
//! ```text
//! 0     8  "ICEKEPT1"
//! 8    32  BLAKE3 of repository id, object name and all that follows
//! 40    8  length of the object u64
//! 48    4  number of ranges u32
//! …        for each range: offset u64, bytes u32, the bytes
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::cache::replace_private;
use crate::error::{Error, Result};
use crate::ids::RepositoryId;
use crate::store::{ObjectEntry, ObjectName, ObjectWriter, Store, StoreError, Traffic};

/// All that is kept of one repository: the tables of some five thousand packs.
pub(crate) const KEPT_BYTES_MAX: u64 = 256 << 20;
/// What is kept of one object: the largest table of a pack fits.
const KEPT_OBJECT_BYTES_MAX: usize = 4 << 20;
/// An object no larger than this is read, and kept, as a whole: what comes after its tables is asked
/// for soon.
const WHOLE_BYTES_MAX: u64 = 128 << 10;
/// When there is too much, so much stays (of four parts): not every new entry looks for old ones.
const STAYS_OF_FOUR: u64 = 3;
/// The age of an entry's last use is known this exactly; more would be a write for each use.
const USE_KNOWN_TO: Duration = Duration::from_secs(3600);
const MAGIC: &[u8; 8] = b"ICEKEPT1";
const DIGEST_BYTES: usize = 32;

/// What is kept of one repository.
#[derive(Debug)]
pub(crate) struct Kept {
    folder: PathBuf,
    repository: RepositoryId,
    /// Bytes in the folder, as far as this process knows; none before it has looked.
    bytes: Mutex<Option<u64>>,
}

/// What is known of one object.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Known {
    length: Option<u64>,
    ranges: Vec<(u64, Vec<u8>)>,
    is_new: bool,
}

/// An object's store while the object is being opened: what is kept of it is answered from here, what
/// is not is noted.
#[derive(Debug)]
pub(crate) struct Opening {
    store: Arc<dyn Store>,
    name: ObjectName,
    known: Mutex<Known>,
}

impl Kept {
    pub(crate) fn new(cache_dir: &Path, repository: RepositoryId) -> Self {
        let folder = cache_dir.join(repository.as_str()).join("kept");
        Self { folder, repository, bytes: Mutex::default() }
    }

    /// Opens an object by `open`: with what is kept of it, and if that is no good, without. One that
    /// is new here and known whole is kept if `is_sound` says so: it answers from then on.
    pub(crate) fn open<T>(
        &self,
        store: &Arc<dyn Store>,
        name: &ObjectName,
        open: impl Fn(&Arc<dyn Store>) -> Result<T>,
        is_sound: impl Fn(&Arc<dyn Store>) -> bool,
    ) -> Result<T> {
        let known = self.read(name);
        let was_kept = known.length.is_some();
        let opening = |known| {
            let (store, name) = (Arc::clone(store), name.clone());
            Arc::new(Opening { store, name, known: Mutex::new(known) })
        };
        let mut tried = opening(known);
        let mut opened = open(&(Arc::clone(&tried) as Arc<dyn Store>));
        if was_kept && matches!(opened, Err(Error::Damaged(_))) {
            tracing::warn!(object = %name, "what this host kept of it is not what it is");
            tried = opening(Known::default());
            opened = open(&(Arc::clone(&tried) as Arc<dyn Store>));
        }
        if opened.is_ok() {
            let known = tried.opened();
            let needs_look = known.is_new && known.is_whole();
            if !needs_look || is_sound(&(tried as Arc<dyn Store>)) {
                self.write(name, &known);
            }
        }
        opened
    }

    fn path(&self, name: &ObjectName) -> PathBuf {
        self.folder.join(file_name(name))
    }

    fn read(&self, name: &ObjectName) -> Known {
        let path = self.path(name);
        let is_small = |path: &Path| {
            fs::metadata(path).is_ok_and(|meta| meta.len() <= KEPT_OBJECT_BYTES_MAX as u64)
        };
        let read = Some(&path).filter(|path| is_small(path)).and_then(|path| fs::read(path).ok());
        let Some(bytes) = read else { return Known::default() };
        let Some(known) = decode(&self.repository, name, &bytes) else {
            tracing::warn!(path = %path.display(), "cache file is ignored");
            return Known::default();
        };
        note_use(&path);
        known
    }

    fn write(&self, name: &ObjectName, known: &Known) {
        let Some(length) = known.length.filter(|_| known.is_new) else { return };
        let bytes = encode(&self.repository, name, length, &known.ranges);
        if bytes.len() > KEPT_OBJECT_BYTES_MAX {
            return;
        }
        match replace_private(&self.folder, &file_name(name), &bytes) {
            Ok(()) => self.bound(bytes.len() as u64),
            Err(error) => {
                let folder = self.folder.display();
                tracing::warn!(%error, %folder, "cache file not written");
            }
        }
    }

    /// Takes note of `more` bytes, and removes what was not used for longest when there is too much.
    fn bound(&self, more: u64) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let now = bytes.map_or(KEPT_BYTES_MAX + 1, |bytes| bytes.saturating_add(more));
        *bytes = Some(if now > KEPT_BYTES_MAX { self.shrink() } else { now });
    }

    fn shrink(&self) -> u64 {
        let Ok(folder) = fs::read_dir(&self.folder) else { return 0 };
        let entry = |entry: fs::DirEntry| {
            let meta = entry.metadata().ok()?;
            Some((meta.modified().ok()?, meta.len(), entry.path()))
        };
        let mut entries: Vec<_> = folder.flatten().filter_map(entry).collect();
        entries.sort_unstable_by_key(|(used, ..)| *used);
        let all: Vec<u64> = entries.iter().map(|(_, bytes, _)| *bytes).collect();
        let (gone, stays) = to_remove(&all, KEPT_BYTES_MAX);
        for (_, _, path) in &entries[..gone] {
            // Another process may have been faster.
            let _ = fs::remove_file(path);
        }
        stays
    }
}

/// How many of the first entries go, of which these are the bytes, and how many bytes stay.
fn to_remove(entries: &[u64], most: u64) -> (usize, u64) {
    let mut stays: u64 = entries.iter().sum();
    if stays <= most {
        return (0, stays);
    }
    let mut gone = 0;
    while stays > most / 4 * STAYS_OF_FOUR
        && let Some(bytes) = entries.get(gone)
    {
        stays -= bytes;
        gone += 1;
    }
    (gone, stays)
}

fn file_name(name: &ObjectName) -> String {
    name.as_str().replace('/', "-")
}

fn note_use(path: &Path) {
    let now = SystemTime::now();
    let used = fs::metadata(path).and_then(|meta| meta.modified());
    let is_old =
        used.is_ok_and(|used| now.duration_since(used).is_ok_and(|age| age > USE_KNOWN_TO));
    if is_old && let Ok(file) = fs::OpenOptions::new().write(true).open(path) {
        // It may be thought older than it is: then it is fetched again.
        let _ = file.set_modified(now);
    }
}

fn digest(repository: &RepositoryId, name: &ObjectName, rest: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for part in [repository.as_str().as_bytes(), b"\0", name.as_str().as_bytes(), b"\0", rest] {
        hasher.update(part);
    }
    hasher.finalize()
}

fn encode(
    repository: &RepositoryId,
    name: &ObjectName,
    length: u64,
    ranges: &[(u64, Vec<u8>)],
) -> Vec<u8> {
    let mut rest = length.to_le_bytes().to_vec();
    // A handful, each read at once: within 32 bits.
    rest.extend_from_slice(&(ranges.len() as u32).to_le_bytes());
    for (offset, bytes) in ranges {
        rest.extend_from_slice(&offset.to_le_bytes());
        rest.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        rest.extend_from_slice(bytes);
    }
    [&MAGIC[..], digest(repository, name, &rest).as_bytes(), &rest].concat()
}

fn decode(repository: &RepositoryId, name: &ObjectName, bytes: &[u8]) -> Option<Known> {
    let (sum, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<DIGEST_BYTES>()?;
    if digest(repository, name, rest) != *sum {
        return None;
    }
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let mut ranges = Vec::new();
    for _ in 0..u32::from_le_bytes(*count) {
        let (offset, after) = rest.split_first_chunk::<8>()?;
        let (bytes, after) = after.split_first_chunk::<4>()?;
        let (bytes, after) = after.split_at_checked(u32::from_le_bytes(*bytes) as usize)?;
        ranges.push((u64::from_le_bytes(*offset), bytes.to_vec()));
        rest = after;
    }
    Some(Known { length: Some(u64::from_le_bytes(*length)), ranges, is_new: false })
}

impl Known {
    fn is_whole(&self) -> bool {
        let is_all = |(offset, bytes): &(u64, Vec<u8>)| {
            *offset == 0 && Some(bytes.len() as u64) == self.length
        };
        self.ranges.iter().any(is_all)
    }

    fn copy_to(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let found = self.ranges.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(offset.checked_sub(*start)?).ok()?;
            bytes.get(from..)?.get(..buffer.len())
        });
        if let Some(found) = found {
            buffer.copy_from_slice(found);
        }
        found.is_some()
    }
}

impl Opening {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the object now that it is open. From here on only a whole one is answered
    /// from here, and nothing is noted.
    fn opened(&self) -> Known {
        let mut known = self.known();
        let all = known.clone();
        if !known.is_whole() {
            *known = Known::default();
        }
        all
    }

    /// Notes how long it is, and all of it if that is little.
    fn learn(&self, length: u64) -> Result<(), StoreError> {
        let mut ranges = Vec::new();
        if length <= WHOLE_BYTES_MAX {
            let mut whole = vec![0; length as usize];
            self.store.read_exact(&self.name, 0, &mut whole)?;
            ranges.push((0, whole));
        }
        *self.known() = Known { length: Some(length), ranges, is_new: true };
        Ok(())
    }
}

impl Store for Opening {
    fn location(&self) -> &str {
        self.store.location()
    }

    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        self.store.create(name)
    }

    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        if *name == self.name && self.known().copy_to(offset, buffer) {
            return Ok(());
        }
        self.store.read_exact(name, offset, buffer)?;
        let mut known = self.known();
        // Its length is asked for first, when it is opened; what comes later is not noted.
        if *name == self.name && known.length.is_some() && !known.is_whole() {
            known.ranges.push((offset, buffer.to_vec()));
            known.is_new = true;
        }
        Ok(())
    }

    fn read_planned(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        self.store.read_planned(name, offset, buffer)
    }

    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        if let Some(length) = self.known().length.filter(|_| *name == self.name) {
            return Ok(length);
        }
        let length = self.store.len(name)?;
        if *name == self.name {
            self.learn(length)?;
        }
        Ok(length)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.store.list(prefix)
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        self.store.delete(names)
    }

    fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.store.settle(prefix)
    }

    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        self.store.leftovers()
    }

    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        self.store.remove_leftovers(leftovers)
    }

    fn readers(&self) -> usize {
        self.store.readers()
    }

    fn traffic(&self) -> Option<Traffic> {
        self.store.traffic()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn repository(number: u128) -> RepositoryId {
        RepositoryId::from_random(number)
    }

    fn pack() -> ObjectName {
        ObjectName::new("packs/00/x").unwrap()
    }

    #[test]
    fn what_is_too_much_goes_from_the_front_and_leaves_room() {
        assert_eq!(to_remove(&[], 100), (0, 0));
        assert_eq!(to_remove(&[50, 50], 100), (0, 100));
        assert_eq!(to_remove(&[50, 20, 30, 1], 100), (1, 51));
        assert_eq!(to_remove(&[1, 1, 200], 100), (3, 0), "one that is too large, too");
    }

    proptest! {
        #[test]
        fn only_what_was_kept_of_this_object_is_read(
            length in any::<u64>(),
            ranges in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u8>(), 0..40)), 0..4),
            at in any::<prop::sample::Index>(),
            change in 1u8..,
        ) {
            let (name, other) = (pack(), ObjectName::new("runs/00/x").unwrap());
            let mut bytes = encode(&repository(1), &name, length, &ranges);
            let known = Known { length: Some(length), ranges, is_new: false };
            prop_assert_eq!(decode(&repository(1), &name, &bytes), Some(known));
            prop_assert_eq!(decode(&repository(2), &name, &bytes), None);
            prop_assert_eq!(decode(&repository(1), &other, &bytes), None);
            let at = at.index(bytes.len());
            prop_assert_eq!(decode(&repository(1), &name, &bytes[..at]), None);
            bytes[at] ^= change;
            prop_assert_eq!(decode(&repository(1), &name, &bytes), None);
        }
    }
}
