//! One connection to an SFTP server: what it can do, its open files, and what its answers mean.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustix::io::Errno;

use super::session::{Pending, Session};
use super::ssh::{SftpAddress, Ssh, Tunnel};
use super::wire::{self, Attributes, Code, Handle, Named, OpenFor, Reply, Request};

/// Bytes of one read or one file's writes that are asked for before the first answer is waited for:
/// enough for a fast line across a continent, little beside the budget of a backup.
const BYTES_IN_FLIGHT: u32 = 4 << 20;

/// Open files and directories that are kept for the next read or fsync. Packs are read again and
/// again; servers allow some hundred handles.
const HANDLES_KEPT: usize = 32;

/// Answers of one directory that are asked for at once; a server sends a hundred names in each.
const LISTING_AHEAD: usize = 4;

/// Less free space than this and a write that failed without a reason failed for want of it.
const FULL_BYTES: u64 = 4 << 20;

/// Extensions that it takes to create objects, and what would be without them.
const NEEDED: [(&str, &str); 2] = [
    (wire::HARD_LINK, "objects could not be created without the risk of replacing others"),
    (wire::SYNC, "nothing could be made durable"),
];

/// A server, its process of ssh, and the files that are open on it.
#[derive(Debug)]
pub(super) struct Connection {
    session: Arc<Session>,
    tunnel: Tunnel,
    /// The extension that it takes to create objects and that the server has not, if any.
    missing: Option<(&'static str, &'static str)>,
    tells_space: bool,
    read_bytes: u32,
    write_bytes: u32,
    kept: Mutex<VecDeque<(String, Arc<OpenFile>)>>,
}

/// A file or directory that is open on the server until nobody has it any more.
#[derive(Debug)]
struct OpenFile {
    session: Arc<Session>,
    handle: Handle,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // On a dead connection there is nothing to close, and a close has no news.
        let _ = self.session.submit(&Request::Close { handle: &self.handle });
    }
}

impl Connection {
    /// Connects. A server on which objects could not be created safely is good for reading.
    pub(super) fn open(ssh: &Ssh, address: &SftpAddress) -> io::Result<Self> {
        let (tunnel, session, hello) = ssh.connect(address)?;
        let missing = NEEDED.into_iter().find(|(extension, _)| !hello.has(extension, "1"));
        let (mut read_bytes, mut write_bytes) = (wire::DATA_BYTES, wire::DATA_BYTES);
        if hello.has(wire::LIMITS, "1")
            && let Reply::Extended(answer) = session.ask(&Request::Limits)?
        {
            (read_bytes, write_bytes) = wire::limits(answer).map_err(io::Error::other)?;
        }
        let tells_space = hello.has(wire::STAT_FS, "2");
        let (session, kept) = (Arc::new(session), Mutex::default());
        Ok(Self { session, tunnel, missing, tells_space, read_bytes, write_bytes, kept })
    }

    /// Refuses a server on which objects could not be created safely.
    pub(super) fn must_take_objects(&self) -> io::Result<()> {
        let Some((extension, consequence)) = self.missing else { return Ok(()) };
        let why = format!("the server has no {extension}, so {consequence}; OpenSSH has it");
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    pub(super) fn has_ended(&self) -> bool {
        self.session.has_ended()
    }

    /// The same error, with what ssh says of it if the connection is gone.
    pub(super) fn explain(&self, error: io::Error) -> io::Error {
        if self.has_ended() { self.tunnel.why(&error) } else { error }
    }

    /// Asks, and takes nothing but success. `path` is where space is looked for if there may be none.
    fn demand(&self, path: &str, request: &Request<'_>) -> io::Result<()> {
        self.succeeded(path, self.session.ask(request)?)
    }

    fn succeeded(&self, path: &str, reply: Reply) -> io::Result<()> {
        match reply {
            Reply::Status { code: Code::Done, .. } => Ok(()),
            other => Err(self.refused(path, other)),
        }
    }

    /// What an answer other than the wanted one means.
    fn refused(&self, path: &str, reply: Reply) -> io::Error {
        let Reply::Status { code, text } = reply else {
            return io::Error::other("the server's answer does not fit the request");
        };
        match code {
            Code::NoSuchFile => Errno::NOENT.into(),
            Code::PermissionDenied => Errno::ACCESS.into(),
            Code::Unsupported => io::Error::new(io::ErrorKind::Unsupported, text),
            Code::Failure => self.space_error(path).unwrap_or_else(|| {
                io::Error::other(format!("the server says {text:?} and no more; its log may"))
            }),
            Code::Done | Code::End => io::Error::other("the server's answer comes too early"),
        }
    }

    /// SFTP has one code for all other failures: space and mode of the file system tell more.
    fn space_error(&self, path: &str) -> Option<io::Error> {
        if !self.tells_space {
            return None;
        }
        let path = super::parent_of(path);
        let Ok(Reply::Extended(answer)) = self.session.ask(&Request::StatFs { path }) else {
            return None;
        };
        let space = wire::space(answer).ok()?;
        if space.read_only {
            return Some(Errno::ROFS.into());
        }
        (space.free_bytes < FULL_BYTES).then(|| Errno::NOSPC.into())
    }

    fn open_file(&self, path: &str, purpose: OpenFor) -> io::Result<OpenFile> {
        match self.session.ask(&Request::Open { path, purpose })? {
            Reply::Handle(handle) => Ok(OpenFile { session: Arc::clone(&self.session), handle }),
            other => Err(self.refused(path, other)),
        }
    }

    /// A file or directory to read or to sync, open already if it was used lately. Objects never
    /// change, so an open one is as good as one that is opened anew.
    fn kept_open(&self, path: &str) -> io::Result<Arc<OpenFile>> {
        if let Some(file) = self.take_kept(path) {
            self.keep(path, Arc::clone(&file));
            return Ok(file);
        }
        let file = Arc::new(self.open_file(path, OpenFor::Reading)?);
        self.keep(path, Arc::clone(&file));
        Ok(file)
    }

    fn take_kept(&self, path: &str) -> Option<Arc<OpenFile>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(name, _)| name == path)?;
        kept.remove(at).map(|(_, file)| file)
    }

    fn keep(&self, path: &str, file: Arc<OpenFile>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back((path.to_owned(), file));
        // Closing sends something: not under the lock.
        let oldest = if kept.len() > HANDLES_KEPT { kept.pop_front() } else { None };
        drop(kept);
        drop(oldest);
    }

    /// Fills a buffer; fewer bytes only at the end of the file.
    pub(super) fn read_at(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let file = self.kept_open(path)?;
        let ask = |start: usize, bytes: u32| {
            let offset = offset + start as u64;
            self.session.submit(&Request::Read { handle: &file.handle, offset, bytes })
        };
        let window = (BYTES_IN_FLIGHT / self.read_bytes).max(1) as usize;
        let mut pieces: VecDeque<(usize, u32, Pending)> = VecDeque::new();
        let mut asked = 0;
        loop {
            while asked < buffer.len() && pieces.len() < window {
                let rest = u32::try_from(buffer.len() - asked).unwrap_or(u32::MAX);
                let bytes = rest.min(self.read_bytes);
                pieces.push_back((asked, bytes, ask(asked, bytes)?));
                asked += bytes as usize;
            }
            let Some((start, bytes, pending)) = pieces.pop_front() else {
                return Ok(buffer.len());
            };
            match pending.wait()? {
                Reply::Data(data) if !data.is_empty() && data.len() <= bytes as usize => {
                    buffer[start..start + data.len()].copy_from_slice(&data);
                    // Less than was asked for is allowed: the rest is asked for again, in its turn.
                    let (next, rest) = (start + data.len(), bytes - data.len() as u32);
                    if rest > 0 {
                        pieces.push_front((next, rest, ask(next, rest)?));
                    }
                }
                Reply::Status { code: Code::End, .. } => return Ok(start),
                other => return Err(self.refused(path, other)),
            }
        }
    }

    pub(super) fn look(&self, path: &str) -> io::Result<Attributes> {
        match self.session.ask(&Request::Look { path })? {
            Reply::Attributes(attributes) => Ok(attributes),
            other => Err(self.refused(path, other)),
        }
    }

    /// Makes a directory durable with its entries. `Unsupported` where the server does not let us.
    pub(super) fn sync_directory(&self, path: &str) -> io::Result<()> {
        let directory = match self.kept_open(path) {
            Err(error) if may_mean_unsupported(&error) => return Err(unsupported(error)),
            other => other?,
        };
        match self.demand(path, &Request::Sync { handle: &directory.handle }) {
            Err(error) if may_mean_unsupported(&error) => Err(unsupported(error)),
            other => other,
        }
    }

    /// Gives a file a second name, which must be free.
    pub(super) fn link(&self, from: &str, to: &str) -> io::Result<()> {
        match self.session.ask(&Request::HardLink { from, to })? {
            // The one code that may also mean that the name is taken.
            Reply::Status { code: Code::Failure, .. } if self.look(to).is_ok() => {
                Err(Errno::EXIST.into())
            }
            other => self.succeeded(to, other),
        }
    }

    pub(super) fn remove(&self, path: &str) -> io::Result<()> {
        drop(self.take_kept(path));
        self.demand(path, &Request::Remove { path })
    }

    pub(super) fn make_directory(&self, path: &str, mode: u32) -> io::Result<()> {
        match self.session.ask(&Request::MakeDirectory { path, mode })? {
            Reply::Status { code: Code::Failure, .. } if self.look(path).is_ok() => {
                Err(Errno::EXIST.into())
            }
            other => self.succeeded(path, other),
        }
    }

    /// The lines of many directories, each in no order; `None` for one that is not there.
    pub(super) fn list(&self, paths: &[String]) -> io::Result<Vec<Option<Vec<Named>>>> {
        let mut listed = Vec::with_capacity(paths.len());
        for some in paths.chunks(HANDLES_KEPT) {
            let opening = |path: &String| self.session.submit(&Request::OpenDirectory { path });
            let opening: Vec<Pending> = some.iter().map(opening).collect::<io::Result<_>>()?;
            let mut open = Vec::with_capacity(some.len());
            for (path, pending) in some.iter().zip(opening) {
                open.push(self.begin_listing(path, pending.wait()?)?);
            }
            for (path, listing) in some.iter().zip(open) {
                listed.push(listing.map(|listing| self.end_listing(path, listing)).transpose()?);
            }
        }
        Ok(listed)
    }

    fn begin_listing(&self, path: &str, opened: Reply) -> io::Result<Option<Listing>> {
        let handle = match opened {
            Reply::Handle(handle) => handle,
            Reply::Status { code: Code::NoSuchFile, .. } => return Ok(None),
            other => return Err(self.refused(path, other)),
        };
        let directory = OpenFile { session: Arc::clone(&self.session), handle };
        let mut listing = Listing { directory, pending: VecDeque::new() };
        listing.ask_ahead()?;
        Ok(Some(listing))
    }

    fn end_listing(&self, path: &str, mut listing: Listing) -> io::Result<Vec<Named>> {
        let mut names = Vec::new();
        while let Some(pending) = listing.pending.pop_front() {
            match pending.wait()? {
                Reply::Names(more) => names.extend(more),
                Reply::Status { code: Code::End, .. } => break,
                other => return Err(self.refused(path, other)),
            }
            listing.ask_ahead()?;
        }
        Ok(names)
    }
}

/// A directory that is being read.
struct Listing {
    directory: OpenFile,
    pending: VecDeque<Pending>,
}

impl Listing {
    fn ask_ahead(&mut self) -> io::Result<()> {
        while self.pending.len() < LISTING_AHEAD {
            let handle = &self.directory.handle;
            let request = Request::ReadDirectory { handle };
            self.pending.push_back(self.directory.session.submit(&request)?);
        }
        Ok(())
    }
}

/// A server that cannot sync a directory has no code of its own for that.
fn may_mean_unsupported(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Other | io::ErrorKind::Unsupported)
}

fn unsupported(error: io::Error) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, error.to_string())
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct NewFile {
    connection: Arc<Connection>,
    path: String,
    file: OpenFile,
    sent: u64,
    unsent: Vec<u8>,
    pending: VecDeque<Pending>,
}

impl NewFile {
    /// Creates a file that must not be there.
    pub(super) fn create(connection: Arc<Connection>, path: String, mode: u32) -> io::Result<Self> {
        connection.must_take_objects()?;
        let file = connection.open_file(&path, OpenFor::Creating { mode })?;
        let (unsent, pending) = Default::default();
        Ok(Self { connection, path, file, sent: 0, unsent, pending })
    }

    /// Takes bytes; those that fill a message are sent, and answers are not waited for while few
    /// are out.
    pub(super) fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let full = self.connection.write_bytes as usize;
        while !bytes.is_empty() {
            let take = bytes.len().min(full - self.unsent.len());
            self.unsent.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.unsent.len() == full {
                self.send()?;
            }
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let window = (BYTES_IN_FLIGHT / self.connection.write_bytes).max(1) as usize;
        if self.pending.len() >= window
            && let Some(oldest) = self.pending.pop_front()
        {
            self.connection.succeeded(&self.path, oldest.wait()?)?;
        }
        let (handle, offset) = (&self.file.handle, self.sent);
        let request = Request::Write { handle, offset, data: &self.unsent };
        self.pending.push_back(self.connection.session.submit(&request)?);
        self.sent += self.unsent.len() as u64;
        self.unsent.clear();
        Ok(())
    }

    /// Waits for every write, then has the file made durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if !self.unsent.is_empty() {
            self.send()?;
        }
        for pending in self.pending.drain(..) {
            self.connection.succeeded(&self.path, pending.wait()?)?;
        }
        self.connection.demand(&self.path, &Request::Sync { handle: &self.file.handle })
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// A name as text; names of other encodings are none of ours.
pub(super) fn text(name: &Bytes) -> Option<&str> {
    std::str::from_utf8(name).ok()
}
