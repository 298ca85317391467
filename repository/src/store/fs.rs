//! The few file system calls that a directory store makes, as a trait: the real ones, and in
//! [`super::SimFileSystem`] simulated ones that can crash.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, AtFlags, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// Directories of a repository are their owner's only: they hold whole disks of guests.
const DIRECTORY_MODE: Mode = Mode::RWXU;
/// Objects likewise; read and write for the owner.
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// After so many bytes the device is given work, so that the fsync at the end finds little left.
const EARLY_WRITING_BYTES: u64 = 8 << 20;

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name inside the directory.
    pub name: String,
    /// True for a directory; everything that is neither file nor directory is left out.
    pub is_directory: bool,
    /// A file's length, where the listing tells it and it need not be asked for.
    pub bytes: Option<u64>,
}

/// A file open for appending.
pub trait FsFile: Send {
    /// Appends all bytes.
    ///
    /// # Errors
    /// The operating system's.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// fsync: content and length are durable afterwards.
    ///
    /// # Errors
    /// The operating system's; what was not durable then must be taken for lost.
    fn sync(&mut self) -> io::Result<()>;
}

/// File system calls, each on a path relative to the store's root.
pub trait FileSystem: Send + Sync + fmt::Debug {
    /// Creates a file (mode 0600) that must not exist.
    ///
    /// # Errors
    /// The operating system's, as for every call below.
    fn create_new(&self, path: &str) -> io::Result<Box<dyn FsFile>>;
    /// Reads up to `buffer.len()` bytes at `offset`; fewer only at the end of the file.
    fn read_at(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Length of a file in bytes.
    fn file_bytes(&self, path: &str) -> io::Result<u64>;
    /// Gives a file a second name, which must be free. The first may be gone afterwards or not.
    fn publish(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &str) -> io::Result<()>;
    /// Creates a directory (mode 0700).
    fn make_directory(&self, path: &str) -> io::Result<()>;
    /// fsync of a directory: its entries are durable afterwards.
    fn sync_directory(&self, path: &str) -> io::Result<()>;
    /// Entries of a directory, in no order.
    fn entries(&self, path: &str) -> io::Result<Vec<DirEntry>>;
    /// As [`entries`](Self::entries) of many directories; `None` for one that is not there. Where
    /// each question takes a journey, they are asked together.
    fn entries_of(&self, paths: &[String]) -> io::Result<Vec<Option<Vec<DirEntry>>>> {
        let entries = |path: &String| match self.entries(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            entries => entries.map(Some),
        };
        paths.iter().map(entries).collect()
    }
}

/// The operating system's file system below a root directory.
#[derive(Debug)]
pub struct OsFileSystem {
    root: PathBuf,
    // Paths are resolved from this descriptor, so a root that is renamed or replaced while we run
    // cannot make one object land in another repository.
    directory: OwnedFd,
}

impl OsFileSystem {
    /// Opens a root directory that must exist.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let directory = rustix::fs::open(root, flags, Mode::empty())?;
        Ok(Self { root: root.to_owned(), directory })
    }

    /// Creates the root directory (mode 0700) unless it exists, durably, and opens it.
    ///
    /// # Errors
    /// The operating system's; the parent directory must exist.
    pub fn create(root: &Path) -> io::Result<Self> {
        match rustix::fs::mkdir(root, DIRECTORY_MODE) {
            Ok(()) => File::open(parent_of(root))?.sync_all()?,
            Err(Errno::EXIST) => (),
            Err(errno) => return Err(errno.into()),
        }
        Self::open(root)
    }

    /// The root's path, for messages.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The number of the kind of file system, and its free bytes for this user.
    pub(super) fn magic_and_room(&self) -> io::Result<(u64, u64)> {
        let facts = rustix::fs::fstatfs(&self.directory)?;
        // 32 bits, widened with their sign on some machines.
        let magic = facts.f_type as u64 & 0xffff_ffff;
        let block = u64::try_from(facts.f_bsize).unwrap_or(0);
        Ok((magic, facts.f_bavail.saturating_mul(block)))
    }

    fn open_for_reading(&self, path: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(File::from(rustix::fs::openat(&self.directory, path, flags, Mode::empty())?))
    }

    fn open_directory(&self, path: &str) -> io::Result<OwnedFd> {
        // "." stands for the root itself.
        let path = if path.is_empty() { "." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(&self.directory, path, flags, Mode::empty())?)
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| *parent != OsStr::new("")).unwrap_or(Path::new("."))
}

struct OsFile {
    file: File,
    bytes: u64,
    /// Bytes whose writing has been asked for.
    asked: u64,
}

impl FsFile for OsFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut self.file, bytes)?;
        self.bytes += bytes.len() as u64;
        if let Some(new) = NonZeroU64::new(self.bytes - self.asked)
            && new.get() >= EARLY_WRITING_BYTES
        {
            // Starts to write what is dirty. Only an advice: the fsync at the end is what counts.
            let _ = rustix::fs::fadvise(&self.file, self.asked, Some(new), Advice::DontNeed);
            self.asked = self.bytes;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl FileSystem for OsFileSystem {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn FsFile>> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, path, flags, FILE_MODE)?;
        Ok(Box::new(OsFile { file: File::from(file), bytes: 0, asked: 0 }))
    }

    fn read_at(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let file = self.open_for_reading(path)?;
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn file_bytes(&self, path: &str) -> io::Result<u64> {
        let stat = rustix::fs::statat(&self.directory, path, AtFlags::SYMLINK_NOFOLLOW)?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    fn publish(&self, from: &str, to: &str) -> io::Result<()> {
        let root = &self.directory;
        match rustix::fs::linkat(root, from, root, to, AtFlags::empty()) {
            Ok(()) => Ok(()),
            // File systems without hard links (exfat, some FUSE ones) have the other create-only call.
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {
                Ok(rustix::fs::renameat_with(root, from, root, to, RenameFlags::NOREPLACE)?)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.directory, path, AtFlags::empty())?)
    }

    fn make_directory(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.directory, path, DIRECTORY_MODE)?)
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        Ok(rustix::fs::fsync(self.open_directory(path)?)?)
    }

    fn entries(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let directory = self.open_directory(path)?;
        let mut found = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name == "." || name == ".." {
                continue;
            }
            let file_type = match entry.file_type() {
                // Some file systems do not say it in the listing.
                FileType::Unknown => {
                    match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                        Err(Errno::NOENT) => continue,
                        Err(errno) => return Err(errno.into()),
                    }
                }
                known => known,
            };
            if file_type.is_file() || file_type.is_dir() {
                let (name, is_directory) = (name.to_owned(), file_type.is_dir());
                found.push(DirEntry { name, is_directory, bytes: None });
            }
        }
        Ok(found)
    }
}
