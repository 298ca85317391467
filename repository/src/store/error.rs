//! What can go wrong at a store, by what a caller can do about it.

use std::io;

use rustix::io::Errno;

/// Kinds of store failure; each asks for another reaction of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// No object has that name (any more).
    NotFound,
    /// An object with that name exists; names are created once and never replaced.
    AlreadyExists,
    /// No room: space, quota, inodes or the largest allowed file size.
    NoSpace,
    /// The store, or our access to it, is read-only.
    ReadOnly,
    /// The operating system denied it.
    Permission,
    /// The object is there but is not what it must be (it ends early, or is absurdly large).
    Corrupt,
    /// A server refused who asked, or what is needed to ask it is missing.
    Credentials,
    /// A server cannot be reached.
    Unreachable,
    /// A server failed, or a connection to it did.
    Server,
    /// A lock keeps the object.
    Locked,
    /// This run has asked as often as it may.
    OverBudget,
    /// The store has not got what was asked of it.
    Unsupported,
    /// Anything else that the device answered.
    Io,
}

impl StoreErrorKind {
    /// What a person can do next.
    #[must_use]
    pub const fn guidance(self) -> &'static str {
        match self {
            Self::NotFound => "run `icecore check` to see which points need it",
            Self::AlreadyExists => "another writer was first; start the operation again",
            Self::NoSpace => {
                "free space with `icecore point delete` and `icecore gc`, or enlarge the disk"
            }
            Self::ReadOnly => "use a writable repository for this operation",
            Self::Permission => {
                "use a user or a token that may, or correct the modes of the repository"
            }
            Self::Corrupt => "run `icecore check --read-data` and keep the object for analysis",
            Self::Credentials => {
                "check the keys and certificates, what they may do at this place, and this host's clock"
            }
            Self::Unreachable => "check the server's address, its state and the network between",
            Self::Server => "try again later; if it stays, look at the server's log",
            Self::Locked => "wait until the lock has run out; nothing takes it away before",
            Self::OverBudget => "allow this run more requests, or unset the variable",
            Self::Unsupported => "choose another place, or do without",
            Self::Io => "look at the kernel log and the state of the disk, mount or server",
        }
    }

    fn of(error: &io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT) => Self::NotFound,
            Some(Errno::EXIST) => Self::AlreadyExists,
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::MLINK) => Self::NoSpace,
            Some(Errno::ROFS) => Self::ReadOnly,
            Some(Errno::ACCESS | Errno::PERM) => Self::Permission,
            Some(_) => Self::Io,
            None => {
                let told = error.get_ref().and_then(|source| source.downcast_ref::<Told>());
                told.map_or(Self::Io, |told| told.kind)
            }
        }
    }
}

/// What a file system that is not this host's says of an error, in words.
#[derive(Debug, thiserror::Error)]
#[error("{words}")]
struct Told {
    kind: StoreErrorKind,
    words: String,
}

/// An error of a file system for which the operating system has no code.
pub(super) fn told(kind: StoreErrorKind, words: impl Into<String>) -> io::Error {
    io::Error::other(Told { kind, words: words.into() })
}

/// One failed operation on one object of one store.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {object} in {store}: {source}; {}", kind.guidance())]
pub struct StoreError {
    kind: StoreErrorKind,
    action: &'static str,
    object: String,
    store: String,
    source: io::Error,
}

impl StoreError {
    /// An operating system's error, classified by its code.
    pub fn from_io(
        action: &'static str,
        object: impl Into<String>,
        store: &str,
        source: io::Error,
    ) -> Self {
        let kind = StoreErrorKind::of(&source);
        Self { kind, action, object: object.into(), store: store.to_owned(), source }
    }

    /// An error that the store itself found, with its reason in words.
    pub fn new(
        kind: StoreErrorKind,
        action: &'static str,
        object: impl Into<String>,
        store: &str,
        reason: impl Into<String>,
    ) -> Self {
        let source = io::Error::other(reason.into());
        Self { kind, action, object: object.into(), store: store.to_owned(), source }
    }

    /// What a caller can do about it.
    #[must_use]
    pub const fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Name of the object concerned (or of the prefix or directory).
    #[must_use]
    pub fn object(&self) -> &str {
        &self.object
    }

    /// Why, without what was tried on what.
    #[must_use]
    pub fn reason(&self) -> String {
        self.source.to_string()
    }

    /// What a person can do next.
    #[must_use]
    pub const fn guidance(&self) -> &'static str {
        self.kind.guidance()
    }

    /// True when the object simply is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.kind == StoreErrorKind::NotFound
    }

    /// True when the name was taken.
    #[must_use]
    pub fn already_exists(&self) -> bool {
        self.kind == StoreErrorKind::AlreadyExists
    }
}
