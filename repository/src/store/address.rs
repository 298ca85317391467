//! What a user writes to name a store, and the store that it names.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::ahead::ReadAhead;
use super::probe::probe_directory;
use super::served::{BadServerAddress, ServedStore, ServerAddress};
use super::sftp::{self, BadSftpAddress, SftpAddress, Ssh};
use super::transfer::TransferMemory;
use super::{
    Access, DirectoryStore, Found, Locking, S3Address, S3Store, Store, StoreError, Unfit, limit, s3,
};

/// The address of a store: the path of a directory, or an URL.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// A directory of this host; NFS and other mounts are directories, too.
    Directory(PathBuf),
    /// A place in a bucket of an object store. Server and keys are told by the environment.
    S3(S3Address),
    /// A directory of an SFTP server, over the system's ssh.
    Sftp(SftpAddress),
    /// A repository of an Icecore repository server.
    Server(ServerAddress),
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
    /// An URL of a known kind with something wrong behind it.
    #[error("{0}")]
    Place(String),
    /// An SFTP server's address that cannot be used.
    #[error(transparent)]
    Sftp(#[from] BadSftpAddress),
    /// A repository server's address that cannot be used.
    #[error(transparent)]
    Server(#[from] BadServerAddress),
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        match text.split_once("://") {
            _ if text.is_empty() => Err(BadAddress::Empty),
            None => Ok(Self::Directory(PathBuf::from(text))),
            Some(("s3", place)) => S3Address::parse(place).map(Self::S3).map_err(BadAddress::Place),
            Some(("sftp", rest)) => Ok(Self::Sftp(rest.parse()?)),
            Some(("https" | "http", _)) => Ok(Self::Server(text.parse()?)),
            Some((scheme, _)) => Err(BadAddress::Scheme(scheme.to_owned())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::S3(place) => place.fmt(f),
            Self::Sftp(address) => address.fmt(f),
            Self::Server(address) => address.fmt(f),
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
            Self::S3(_) | Self::Sftp(_) | Self::Server(_) => self,
        })
    }

    /// The same place, with the files that a repository server takes where they are named.
    #[must_use]
    pub fn with_files(self, token_file: Option<PathBuf>, ca_file: Option<PathBuf>) -> Self {
        match self {
            Self::Server(mut address) => {
                address.token_file = token_file.or(address.token_file);
                address.ca_file = ca_file.or(address.ca_file);
                Self::Server(address)
            }
            other => other,
        }
    }

    /// The store at this address; it must be there.
    ///
    /// # Errors
    /// `NotFound` when there is nothing, else what the device says.
    pub fn open(
        &self,
        access: Access,
        memory: TransferMemory,
    ) -> Result<Arc<dyn Store>, StoreError> {
        let ahead =
            |store| -> Arc<dyn Store> { Arc::new(ReadAhead::new(store, memory.reading(access))) };
        Ok(match self {
            Self::Directory(path) => {
                limit::from_environment(Arc::new(DirectoryStore::open(path, access)?))?
            }
            Self::S3(place) => {
                let settings = s3::from_environment(&place.to_string())?;
                let store = S3Store::open(place, settings, access)?;
                ahead(limit::from_environment(Arc::new(store.with_memory(memory.writing())))?)
            }
            Self::Sftp(address) => {
                let store = sftp::open(Ssh::from_environment(), address, access)?;
                ahead(limit::from_environment(Arc::new(store))?)
            }
            Self::Server(address) => {
                let store = Arc::new(ServedStore::open(address, access)?);
                ahead(limit::from_environment(store)?)
            }
        })
    }

    /// Tries what a repository needs of the place, which must be there and writable.
    ///
    /// # Errors
    /// [`Unfit`] when a repository there could lose what it reported as stored.
    pub fn probe(&self) -> Result<Option<Found>, Unfit> {
        match self {
            Self::Directory(path) => probe_directory(path).map(Some),
            // What it knows of conditions is tried when the first object is created.
            Self::S3(_) | Self::Sftp(_) | Self::Server(_) => Ok(None),
        }
    }

    /// The store at this address, made if it is not there. Whoever wants locks asks it for them.
    ///
    /// # Errors
    /// What the device says.
    pub fn create(&self, locking: Locking) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Directory(path) => Arc::new(DirectoryStore::create(path)?),
            Self::S3(place) => {
                let settings = s3::from_environment(&place.to_string())?;
                Arc::new(S3Store::create(place, settings, locking)?)
            }
            Self::Sftp(address) => Arc::new(sftp::create(Ssh::from_environment(), address)?),
            Self::Server(address) => Arc::new(ServedStore::create(address)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_was_written() {
        assert_eq!("/a/b".parse::<Address>().unwrap().to_string(), "/a/b");
        assert_eq!("s3://bkt/a/b/".parse::<Address>().unwrap().to_string(), "s3://bkt/a/b");
        assert!(matches!("s3://bkt/../b".parse::<Address>(), Err(BadAddress::Place(_))));
        for text in ["sftp://me@host:22/a", "https://host:8443/main"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("".parse::<Address>(), Err(BadAddress::Empty));
        assert_eq!("gopher://x".parse::<Address>(), Err(BadAddress::Scheme("gopher".into())));
    }
}
