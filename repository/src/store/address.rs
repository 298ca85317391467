//! What a user writes to name a store, and the store that it names.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::probe::probe_directory;
use super::{Access, DirectoryStore, Found, Store, StoreError, Unfit};

/// The address of a store: the path of a directory, or an URL.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// A directory of this host; NFS and other mounts are directories, too.
    Directory(PathBuf),
}

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadAddress {
    /// Nothing was given.
    #[error("the name of the repository is empty")]
    Empty,
    /// An URL of a kind that Icecore does not know.
    #[error("{0}:// is no kind of repository that this program knows")]
    Scheme(String),
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        match text.split_once("://") {
            _ if text.is_empty() => Err(BadAddress::Empty),
            None => Ok(Self::Directory(PathBuf::from(text))),
            Some((scheme, _)) => Err(BadAddress::Scheme(scheme.to_owned())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
        }
    }
}

impl Address {
    /// The same store, named so that another working directory does not matter.
    ///
    /// # Errors
    /// When there is no working directory (any more).
    pub fn absolute(self) -> io::Result<Self> {
        Ok(match self {
            Self::Directory(path) => Self::Directory(std::path::absolute(path)?),
        })
    }

    /// The store at this address; it must be there.
    ///
    /// # Errors
    /// `NotFound` when there is nothing, else what the device says.
    pub fn open(&self, access: Access) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Directory(path) => Arc::new(DirectoryStore::open(path, access)?),
        })
    }

    /// Tries what a repository needs of the place, which must be there and writable.
    ///
    /// # Errors
    /// [`Unfit`] when a repository there could lose what it reported as stored.
    pub fn probe(&self) -> Result<Found, Unfit> {
        match self {
            Self::Directory(path) => probe_directory(path),
        }
    }

    /// The store at this address, made if it is not there.
    ///
    /// # Errors
    /// What the device says.
    pub fn create(&self) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Directory(path) => Arc::new(DirectoryStore::create(path)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_was_written() {
        assert_eq!("/a/b".parse::<Address>().unwrap().to_string(), "/a/b");
        assert_eq!("".parse::<Address>(), Err(BadAddress::Empty));
        assert_eq!("gopher://x".parse::<Address>(), Err(BadAddress::Scheme("gopher".into())));
    }
}
