//! A file system in memory that can crash and fail at any call, for tests of everything above it.
//!
//! It keeps two images. The *live* one is what a running process sees. The *durable* one is what a
//! power cut leaves: a file's bytes as of its last fsync, and a directory's entries as of the
//! directory's last fsync. Nothing else survives unless a crash mode says so.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::{DirEntry, FileSystem, FsFile};

/// What one chosen call does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFault {
    /// It fails with this errno and changes nothing; later calls work.
    Fail(Errno),
    /// The process dies before the call: it and all later calls fail.
    CrashBefore,
    /// The process dies after the call took effect.
    CrashAfter,
    /// The process dies in the middle: part of the bytes, part of the entries.
    CrashTorn,
}

/// What is found after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashMode {
    /// The process died, the machine did not: everything that was done is there.
    Process,
    /// A power cut: only what was made durable.
    PowerCut,
    /// A power cut of a disk that had got round to some of the rest, chosen by the seed.
    TornPowerCut(Torn),
}

/// Seed that chooses what of the not durable part survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torn(pub u64);

type Inode = usize;
type Names = BTreeMap<String, Inode>;

#[derive(Debug, Clone, Default)]
struct FileState {
    live: Vec<u8>,
    durable: Vec<u8>,
}

#[derive(Debug, Clone, Default)]
struct State {
    files: Vec<FileState>,
    names: Names,
    durable_names: Names,
    directories: BTreeSet<String>,
    durable_directories: BTreeSet<String>,
    calls: u64,
    fault: Option<(u64, CallFault)>,
    crashed: bool,
    read_only: bool,
    capacity_bytes: Option<u64>,
    bad_sector: Option<u64>,
}

/// The simulated file system; clones share it.
#[derive(Debug, Clone, Default)]
pub struct SimFileSystem {
    state: Arc<Mutex<State>>,
}

enum Step {
    Whole,
    Torn,
}

impl SimFileSystem {
    /// An empty file system.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of changing calls (create, append, fsync, link, remove, mkdir) made so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Lets changing call number `call` (counted from 0 as [`calls`](Self::calls) does) go wrong.
    pub fn inject(&self, call: u64, fault: CallFault) {
        self.lock().fault = Some((call, fault));
    }

    /// Whether an injected crash has happened.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        self.lock().crashed
    }

    /// Makes every changing call fail with EROFS, or stops doing so.
    pub fn set_read_only(&self, read_only: bool) {
        self.lock().read_only = read_only;
    }

    /// Limits the sum of all files' bytes; beyond it appending and creating fail with ENOSPC.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().capacity_bytes = bytes;
    }

    /// Makes every read of any file fail with EIO that has this byte among those it asks for.
    pub fn set_bad_sector(&self, offset: Option<u64>) {
        self.lock().bad_sector = offset;
    }

    /// Bytes of all files that have a name.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.lock().used_bytes()
    }

    /// What the next process finds: a new, healthy file system, faults cleared.
    #[must_use]
    pub fn after_crash(&self, mode: CrashMode) -> Self {
        let state = self.lock();
        let survivor = match mode {
            CrashMode::Process => state.as_lived(),
            CrashMode::PowerCut => state.as_durable(&mut || Survival::Lost),
            CrashMode::TornPowerCut(Torn(seed)) => {
                let mut random = SplitMix(seed);
                state.as_durable(&mut || random.survival())
            }
        };
        Self { state: Arc::new(Mutex::new(survivor)) }
    }

    /// A file's bytes as a process sees them, for tests that damage one.
    #[must_use]
    pub fn content(&self, path: &str) -> Option<Vec<u8>> {
        let state = self.lock();
        state.names.get(path).map(|&inode| state.files[inode].live.clone())
    }

    /// Replaces a file's bytes in both images behind the back of whoever owns it.
    pub fn overwrite(&self, path: &str, bytes: Vec<u8>) {
        let mut state = self.lock();
        if let Some(&inode) = state.names.get(path) {
            state.files[inode] = FileState { live: bytes.clone(), durable: bytes };
        }
    }

    /// Removes a file from both images; true when it was there.
    pub fn vanish(&self, path: &str) -> bool {
        let mut state = self.lock();
        state.durable_names.remove(path);
        state.names.remove(path).is_some()
    }

    /// Paths of all files.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        self.lock().names.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one changing call, or what the injected fault makes of it.
    fn change<T>(
        &self,
        operation: impl FnOnce(&mut State, &Step) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.lock();
        state.must_be_alive()?;
        let call = state.calls;
        state.calls += 1;
        if state.read_only {
            return Err(Errno::ROFS.into());
        }
        let fault = state.fault.filter(|(at, _)| *at == call).map(|(_, fault)| fault);
        match fault {
            None => operation(&mut state, &Step::Whole),
            Some(CallFault::Fail(errno)) => Err(errno.into()),
            Some(crash) => {
                match crash {
                    CallFault::CrashAfter => drop(operation(&mut state, &Step::Whole)),
                    CallFault::CrashTorn => drop(operation(&mut state, &Step::Torn)),
                    _ => (),
                }
                state.crashed = true;
                Err(Errno::IO.into())
            }
        }
    }

    fn look<T>(&self, operation: impl FnOnce(&State) -> io::Result<T>) -> io::Result<T> {
        let state = self.lock();
        state.must_be_alive()?;
        operation(&state)
    }
}

/// How much of one thing that was not durable survives.
#[derive(Clone, Copy)]
enum Survival {
    Lost,
    Half,
    Whole,
}

/// A small generator (Steele, Lea, Flood: SplitMix64), enough to choose among survivals.
struct SplitMix(u64);

impl SplitMix {
    fn survival(&mut self) -> Survival {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        match (mixed ^ (mixed >> 31)) % 3 {
            0 => Survival::Lost,
            1 => Survival::Half,
            _ => Survival::Whole,
        }
    }
}

impl State {
    fn must_be_alive(&self) -> io::Result<()> {
        if self.crashed { Err(Errno::IO.into()) } else { Ok(()) }
    }

    fn used_bytes(&self) -> u64 {
        let named: BTreeSet<_> = self.names.values().collect();
        named.into_iter().map(|&inode| self.files[inode].live.len() as u64).sum()
    }

    fn must_have_room(&self, bytes: u64) -> io::Result<()> {
        match self.capacity_bytes {
            Some(capacity) if self.used_bytes() + bytes > capacity => Err(Errno::NOSPC.into()),
            _ => Ok(()),
        }
    }

    fn must_have_parent(&self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) if !self.directories.contains(parent) => Err(Errno::NOENT.into()),
            _ => Ok(()),
        }
    }

    fn must_be_free(&self, path: &str) -> io::Result<()> {
        let taken = self.names.contains_key(path) || self.directories.contains(path);
        if taken { Err(Errno::EXIST.into()) } else { Ok(()) }
    }

    fn inode(&self, path: &str) -> io::Result<Inode> {
        self.names.get(path).copied().ok_or_else(|| Errno::NOENT.into())
    }

    fn as_lived(&self) -> Self {
        let files = self.files.iter().map(|file| FileState {
            live: file.live.clone(),
            // Still not durable: the next power cut may take it.
            durable: file.durable.clone(),
        });
        Self {
            files: files.collect(),
            names: self.names.clone(),
            durable_names: self.durable_names.clone(),
            directories: self.directories.clone(),
            durable_directories: self.durable_directories.clone(),
            ..Self::default()
        }
    }

    fn as_durable(&self, survival: &mut dyn FnMut() -> Survival) -> Self {
        let files = self.files.iter().map(|file| {
            let bytes = surviving_bytes(file, survival());
            FileState { live: bytes.clone(), durable: bytes }
        });
        let files = files.collect();
        let mut directories = self.durable_directories.clone();
        for directory in self.directories.difference(&self.durable_directories) {
            if matches!(survival(), Survival::Whole) {
                directories.insert(directory.clone());
            }
        }
        let mut names = self.durable_names.clone();
        let touched = self.names.keys().chain(self.durable_names.keys());
        for path in touched.collect::<BTreeSet<_>>() {
            let (live, durable) = (self.names.get(path), self.durable_names.get(path));
            if live != durable && matches!(survival(), Survival::Whole) {
                match live {
                    Some(&inode) => drop(names.insert(path.clone(), inode)),
                    None => drop(names.remove(path)),
                }
            }
        }
        let reachable = |path: &String| ancestors(path).all(|up| directories.contains(up));
        names.retain(|path, _| reachable(path));
        let directories: BTreeSet<_> =
            directories.iter().filter(|path| reachable(path)).cloned().collect();
        Self {
            files,
            durable_names: names.clone(),
            names,
            durable_directories: directories.clone(),
            directories,
            ..Self::default()
        }
    }

    fn sync_directory(&mut self, directory: &str, step: &Step) {
        let in_it =
            |path: &str| path.rsplit_once('/').map_or("", |(parent, _)| parent) == directory;
        let touched: BTreeSet<String> = self
            .names
            .keys()
            .chain(self.durable_names.keys())
            .filter(|path| in_it(path))
            .cloned()
            .collect();
        let count = match step {
            Step::Whole => touched.len(),
            Step::Torn => touched.len() / 2,
        };
        for path in touched.into_iter().take(count) {
            match self.names.get(&path) {
                Some(&inode) => drop(self.durable_names.insert(path, inode)),
                None => drop(self.durable_names.remove(&path)),
            }
        }
        if matches!(step, Step::Whole) {
            let made = self.directories.iter().filter(|path| in_it(path)).cloned();
            let made: Vec<_> = made.collect();
            self.durable_directories.extend(made);
        }
    }
}

fn surviving_bytes(file: &FileState, survival: Survival) -> Vec<u8> {
    match survival {
        Survival::Lost => file.durable.clone(),
        Survival::Whole => file.live.clone(),
        Survival::Half => {
            let middle = file.durable.len().midpoint(file.live.len());
            let mut bytes = file.live[..middle.min(file.live.len())].to_vec();
            // Length without data: many file systems show zeroes there.
            bytes.resize(file.live.len(), 0);
            bytes
        }
    }
}

fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

struct SimFile {
    fs: SimFileSystem,
    inode: Inode,
}

impl FsFile for SimFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let inode = self.inode;
        self.fs.change(|state, step| {
            state.must_have_room(bytes.len() as u64)?;
            let count = match step {
                Step::Whole => bytes.len(),
                Step::Torn => bytes.len() / 2,
            };
            state.files[inode].live.extend_from_slice(&bytes[..count]);
            Ok(())
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        let inode = self.inode;
        self.fs.change(|state, step| {
            let file = &mut state.files[inode];
            let survival = match step {
                Step::Whole => Survival::Whole,
                Step::Torn => Survival::Half,
            };
            file.durable = surviving_bytes(file, survival);
            Ok(())
        })
    }
}

impl FileSystem for SimFileSystem {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn FsFile>> {
        let inode = self.change(|state, _| {
            state.must_have_parent(path)?;
            state.must_be_free(path)?;
            state.must_have_room(1)?;
            state.files.push(FileState::default());
            let inode = state.files.len() - 1;
            state.names.insert(path.to_owned(), inode);
            Ok(inode)
        })?;
        Ok(Box::new(SimFile { fs: self.clone(), inode }))
    }

    fn read_at(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.look(|state| {
            let bytes = &state.files[state.inode(path)?].live;
            let asked = offset..offset.saturating_add(buffer.len() as u64);
            if state.bad_sector.is_some_and(|bad| asked.contains(&bad)) {
                return Err(Errno::IO.into());
            }
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            let count = buffer.len().min(bytes.len() - start);
            buffer[..count].copy_from_slice(&bytes[start..start + count]);
            Ok(count)
        })
    }

    fn file_bytes(&self, path: &str) -> io::Result<u64> {
        self.look(|state| Ok(state.files[state.inode(path)?].live.len() as u64))
    }

    fn publish(&self, from: &str, to: &str) -> io::Result<()> {
        self.change(|state, _| {
            state.must_have_parent(to)?;
            state.must_be_free(to)?;
            let inode = state.inode(from)?;
            state.names.insert(to.to_owned(), inode);
            Ok(())
        })
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.change(|state, _| {
            state.names.remove(path).map(|_| ()).ok_or_else(|| Errno::NOENT.into())
        })
    }

    fn make_directory(&self, path: &str) -> io::Result<()> {
        self.change(|state, _| {
            state.must_have_parent(path)?;
            state.must_be_free(path)?;
            state.directories.insert(path.to_owned());
            Ok(())
        })
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        self.change(|state, step| {
            if !path.is_empty() && !state.directories.contains(path) {
                return Err(Errno::NOENT.into());
            }
            state.sync_directory(path, step);
            Ok(())
        })
    }

    fn entries(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        self.look(|state| {
            if !path.is_empty() && !state.directories.contains(path) {
                return Err(Errno::NOENT.into());
            }
            let name_in = |full: &String| {
                let rest = match path {
                    "" => full.as_str(),
                    _ => full.strip_prefix(path)?.strip_prefix('/')?,
                };
                (!rest.contains('/')).then(|| rest.to_owned())
            };
            let files = state.names.keys().filter_map(name_in);
            let directories = state.directories.iter().filter_map(name_in);
            Ok(files
                .map(|name| DirEntry { name, is_directory: false, bytes: None })
                .chain(directories.map(|name| DirEntry { name, is_directory: true, bytes: None }))
                .collect())
        })
    }
}
