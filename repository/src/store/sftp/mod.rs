//! The store on an SFTP server, over the system's `ssh`.
//!
//! It is the directory store on another file system: the same names, the same temporary files, the
//! same order of write, fsync, link and fsync of the directory. A connection that is gone is made
//! anew for the next operation. An operation that it took down is an error, but for one that only
//! looks: that is asked again, once.
//!
//! OpenSSH's server syncs a directory that is opened like a file. One that refuses that leaves the
//! moment at which a name is durable to its file system; it is said once in the log.

mod connection;
mod session;
mod ssh;
mod wire;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use connection::{Connection, NewFile};
pub use ssh::{BadSftpAddress, SftpAddress, Ssh};

use super::{Access, DirEntry, DirectoryStore, FileSystem, FsFile, StoreError};

/// Directories of a repository are their owner's only: they hold whole disks of guests.
const DIRECTORY_MODE: u32 = 0o700;
/// Objects likewise.
const FILE_MODE: u32 = 0o600;

/// Opens the store in a directory of a server; it must be there.
///
/// # Errors
/// `NotFound` when there is nothing, `Permission` when the server lets us not in or is not the one
/// that ssh knows, else what ssh or the server says.
pub fn open(ssh: Ssh, address: &SftpAddress, access: Access) -> Result<DirectoryStore, StoreError> {
    let fs = SftpFileSystem::new(ssh, address.clone());
    fs.must_be_directory().map_err(|error| failed("open", address, error))?;
    Ok(DirectoryStore::on(Arc::new(fs), address.to_string(), access))
}

/// Opens the store in a directory of a server, and makes that directory (mode 0700) if it is not
/// there; its parent must be.
///
/// # Errors
/// As [`open`].
pub fn create(ssh: Ssh, address: &SftpAddress) -> Result<DirectoryStore, StoreError> {
    let fs = SftpFileSystem::new(ssh, address.clone());
    // Before anything is made on it.
    fs.once(Connection::must_take_objects).map_err(|error| failed("create", address, error))?;
    let made = match fs.make_directory("") {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs.must_be_directory(),
        Err(error) => Err(error),
        Ok(()) => fs.sync_path(parent_of(address.path())),
    };
    made.map_err(|error| failed("create", address, error))?;
    Ok(DirectoryStore::on(Arc::new(fs), address.to_string(), Access::ReadWrite))
}

fn failed(action: &'static str, address: &SftpAddress, error: io::Error) -> StoreError {
    StoreError::from_io(action, "the directory", &address.to_string(), error)
}

fn parent_of(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) => "/",
        Some((parent, _)) => parent,
        None => ".",
    }
}

/// File system calls on a server.
#[derive(Debug)]
struct SftpFileSystem {
    ssh: Ssh,
    address: SftpAddress,
    connection: Mutex<Option<Arc<Connection>>>,
    /// Whether a directory of this server was ever synced; what fails afterwards is an error.
    synced: AtomicBool,
    /// Whether it was said that directories are not.
    unsynced: AtomicBool,
}

impl SftpFileSystem {
    fn new(ssh: Ssh, address: SftpAddress) -> Self {
        let (connection, synced, unsynced) = Default::default();
        Self { ssh, address, connection, synced, unsynced }
    }

    fn path(&self, path: &str) -> String {
        match (self.address.path(), path) {
            (root, "") => root.to_owned(),
            (root, path) => format!("{root}/{path}"),
        }
    }

    /// The connection, made anew if the last one is gone.
    fn connection(&self) -> io::Result<Arc<Connection>> {
        let mut current = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = current.as_ref().filter(|connection| !connection.has_ended()) {
            return Ok(Arc::clone(connection));
        }
        *current = None;
        let connection = Arc::new(Connection::open(&self.ssh, &self.address)?);
        Ok(Arc::clone(current.insert(connection)))
    }

    /// One operation that may change something: its failure is not mended.
    fn once<T>(&self, operation: impl FnOnce(&Connection) -> io::Result<T>) -> io::Result<T> {
        let connection = self.connection()?;
        operation(&connection).map_err(|error| connection.explain(error))
    }

    /// One operation that only looks: if it took the connection down, or found it dead, it is tried
    /// once more on another.
    fn looking<T>(&self, mut operation: impl FnMut(&Connection) -> io::Result<T>) -> io::Result<T> {
        let connection = self.connection()?;
        match operation(&connection) {
            Err(_) if connection.has_ended() => self.once(operation),
            other => other,
        }
    }

    fn must_be_directory(&self) -> io::Result<()> {
        // So written, a link to a directory is followed, as a local path of a repository is.
        let itself = format!("{}/.", self.address.path());
        if self.looking(|server| server.look(&itself))?.is_directory() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::NotADirectory, "it is no directory"))
    }

    fn sync_path(&self, path: &str) -> io::Result<()> {
        match self.once(|server| server.sync_directory(path)) {
            Ok(()) => self.synced.store(true, Ordering::Relaxed),
            Err(error)
                if error.kind() == io::ErrorKind::Unsupported
                    && !self.synced.load(Ordering::Relaxed) =>
            {
                if !self.unsynced.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        %error, server = %self.address,
                        "this server does not sync directories: after a power cut of its host the \
                         last objects may be missing, as its file system has it"
                    );
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl FileSystem for SftpFileSystem {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn FsFile>> {
        let connection = self.connection()?;
        let file = NewFile::create(Arc::clone(&connection), self.path(path), FILE_MODE);
        Ok(Box::new(file.map_err(|error| connection.explain(error))?))
    }

    fn read_at(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let path = self.path(path);
        self.looking(|server| server.read_at(&path, offset, buffer))
    }

    fn file_bytes(&self, path: &str) -> io::Result<u64> {
        let attributes = self.looking(|server| server.look(&self.path(path)))?;
        if !attributes.is_regular() {
            return Err(io::Error::other("it is not a regular file"));
        }
        attributes.bytes.ok_or_else(|| io::Error::other("the server tells no length of files"))
    }

    fn publish(&self, from: &str, to: &str) -> io::Result<()> {
        self.once(|server| server.link(&self.path(from), &self.path(to)))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.once(|server| server.remove(&self.path(path)))
    }

    fn make_directory(&self, path: &str) -> io::Result<()> {
        self.once(|server| server.make_directory(&self.path(path), DIRECTORY_MODE))
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        self.sync_path(&self.path(path))
    }

    fn entries(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        let found = self.entries_of(&[path.to_owned()])?.pop().flatten();
        found.ok_or_else(|| rustix::io::Errno::NOENT.into())
    }

    fn entries_of(&self, paths: &[String]) -> io::Result<Vec<Option<Vec<DirEntry>>>> {
        let paths: Vec<String> = paths.iter().map(|path| self.path(path)).collect();
        let listed = self.looking(|server| server.list(&paths))?;
        let entries = |names: Vec<wire::Named>| names.iter().filter_map(entry).collect();
        Ok(listed.into_iter().map(|names| names.map(entries)).collect())
    }
}

fn entry(named: &wire::Named) -> Option<DirEntry> {
    let name = connection::text(&named.name)?;
    let attributes = named.attributes;
    let is_directory = attributes.is_directory();
    if name == "." || name == ".." || !(is_directory || attributes.is_regular()) {
        return None;
    }
    Some(DirEntry { name: name.to_owned(), is_directory, bytes: attributes.bytes })
}

impl FsFile for NewFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        NewFile::append(self, bytes).map_err(|error| self.connection().explain(error))
    }

    fn sync(&mut self) -> io::Result<()> {
        NewFile::sync(self).map_err(|error| self.connection().explain(error))
    }
}
