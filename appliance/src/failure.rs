//! What a person is told when something fails, and the exit status that goes with it.
//!
//! Libraries have typed errors; here they become one sentence: what was tried, on what, why it
//! failed, what to do next.

use std::fmt;

use icecore_repository::Error as RepositoryError;
use icecore_repository::store::StoreErrorKind;

/// Exit statuses of the command, a contract with scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Failed; nothing half-done is left.
    Failed = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// Refused: busy, protected, in use, over quota.
    Refused = 3,
    /// Verification found damage.
    Damaged = 4,
    /// Interrupted by the user, cleaned up.
    Interrupted = 130,
}

/// What a program may want to know of a failure beside its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nature {
    Plain,
    /// The same may go well a little later: something was busy or did not answer.
    Transient,
    /// What was named does not exist.
    Missing,
    /// Not for this caller.
    Forbidden,
}

/// A failure on its way to the user.
#[derive(Debug)]
pub struct Failure {
    /// Exit status of the process.
    pub status: Status,
    /// What was tried and on what, as in "back up vm1 to /backup".
    pub tried: String,
    /// Why it failed.
    pub why: String,
    /// What to do next, where there is something to say.
    pub next: Option<String>,
    /// Something of the run may still be there: its journal is kept for the next start.
    pub unclean: bool,
    /// What kind of failure it is beside its status.
    pub nature: Nature,
}

/// Result of everything in this package.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// A failure with status 1.
    pub fn failed(tried: impl Into<String>, why: impl fmt::Display) -> Self {
        let (tried, why) = (tried.into(), why.to_string());
        Self {
            status: Status::Failed,
            tried,
            why,
            next: None,
            unclean: false,
            nature: Nature::Plain,
        }
    }

    /// Wrong usage or configuration, status 2.
    pub fn usage(tried: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { status: Status::Usage, ..Self::failed(tried, why) }
    }

    /// What was named does not exist, status 2.
    pub fn missing(tried: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { nature: Nature::Missing, ..Self::usage(tried, why) }
    }

    /// Not for this caller, status 3.
    pub fn forbidden(tried: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { nature: Nature::Forbidden, ..Self::refused(tried, why) }
    }

    /// Refused before anything was changed, status 3.
    pub fn refused(tried: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { status: Status::Refused, ..Self::failed(tried, why) }
    }

    /// Damage was found, status 4.
    pub fn damaged(tried: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { status: Status::Damaged, ..Self::failed(tried, why) }
    }

    /// The user interrupted; everything was cleaned up.
    pub fn interrupted(tried: impl Into<String>) -> Self {
        let why = "interrupted; what was begun has been undone";
        Self { status: Status::Interrupted, ..Self::failed(tried, why) }
    }

    /// A repository's error; damage is told apart, and what is wrong with the request itself.
    pub fn from_repository(tried: impl Into<String>, error: RepositoryError) -> Self {
        let status = match &error {
            _ if error.damage().is_some() => Status::Damaged,
            RepositoryError::Refused { .. }
            | RepositoryError::InitRefused { .. }
            | RepositoryError::OverLimit { .. } => Status::Refused,
            RepositoryError::Store(error) if error.kind() == StoreErrorKind::Locked => {
                Status::Refused
            }
            RepositoryError::Store(error) if error.kind() == StoreErrorKind::Unsupported => {
                Status::Usage
            }
            RepositoryError::NotARepository { .. }
            | RepositoryError::NotFound { .. }
            | RepositoryError::Ambiguous { .. }
            | RepositoryError::KeyMissing { .. }
            | RepositoryError::KeyRefused { .. }
            | RepositoryError::BadKey(_)
            | RepositoryError::Id(_)
            | RepositoryError::Geometry(_) => Status::Usage,
            _ => Status::Failed,
        };
        let nature = match &error {
            RepositoryError::NotFound { .. } => Nature::Missing,
            _ => Nature::Plain,
        };
        Self { status, nature, ..Self::failed(tried, error) }
    }

    /// Says that something of the run may still be there.
    pub fn unclean(mut self) -> Self {
        self.unclean = true;
        self
    }

    /// Says that the same may go well a little later.
    pub fn transient(mut self) -> Self {
        self.nature = Nature::Transient;
        self
    }

    /// Adds what to do next.
    pub fn next(mut self, advice: impl Into<String>) -> Self {
        self.next = Some(advice.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.tried, self.why)?;
        match &self.next {
            Some(next) => write!(f, "\n  next: {next}"),
            None => Ok(()),
        }
    }
}
