//! What can go wrong, by what a caller can do about it.
//!
//! Rules: a message says what was tried, on what, why it failed and what to do next; damage always
//! names the object; nothing read from a repository appears in a message unescaped.

use std::fmt;

use crate::crypto::BadKey;
use crate::geometry::{BlockIndex, GeometryError};
use crate::ids::{DiskId, IdError, PointId, WriterId};
use crate::store::{BadObjectName, StoreError};

/// How an object differs from what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DamageKind {
    /// It is not there.
    Missing,
    /// It ends early or is longer than it can be.
    Length,
    /// It does not begin as an object of its kind does.
    Header,
    /// Its bytes do not match their checksum.
    Checksum,
    /// It belongs to another repository, or under another name.
    Foreign,
    /// It is whole but contradicts itself or what refers to it.
    Inconsistent,
    /// A block's bytes do not have the block's id.
    Content,
    /// It asks for more than any valid object can need.
    Limit,
}

impl DamageKind {
    /// One word for reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Length => "length",
            Self::Header => "header",
            Self::Checksum => "checksum",
            Self::Foreign => "foreign",
            Self::Inconsistent => "inconsistent",
            Self::Content => "content",
            Self::Limit => "limit",
        }
    }
}

impl fmt::Display for DamageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A damaged object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{object} is damaged ({kind}): {detail}; run `icecore check --read-data` to see what needs it"
)]
pub struct Damage {
    /// Name of the object in the store.
    pub object: String,
    /// In which way.
    pub kind: DamageKind,
    /// What was found, in words.
    pub detail: String,
}

impl Damage {
    pub(crate) fn new(
        object: impl fmt::Display,
        kind: DamageKind,
        detail: impl Into<String>,
    ) -> Self {
        Self { object: object.to_string(), kind, detail: detail.into() }
    }
}

/// A failed operation on a repository.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object is damaged.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// There is no repository at that place.
    #[error("{location} is no Icecore repository: {why}; make one with `icecore repo init`")]
    NotARepository {
        /// Where.
        location: String,
        /// What was found instead.
        why: String,
    },
    /// There is something already where a repository was to be made.
    #[error("cannot make a repository in {location}: {why}; choose an empty or new directory")]
    InitRefused {
        /// Where.
        location: String,
        /// What stands in the way.
        why: String,
    },
    /// It is encrypted, and no key was given.
    #[error(
        "{location} is encrypted and no key was given; name its key file with --key-file or \
         ICECORE_KEY_FILE, or in the configuration"
    )]
    KeyMissing {
        /// Where.
        location: String,
    },
    /// Nothing that was given opens it.
    #[error("{location} is encrypted and {why}; give a key file or passphrase of this repository")]
    KeyRefused {
        /// Where.
        location: String,
        /// What was tried.
        why: String,
    },
    /// What was given as a key cannot be one.
    #[error(transparent)]
    BadKey(#[from] BadKey),
    /// A newer program wrote it.
    #[error("{object} needs a newer icecore: {what}; upgrade this one")]
    Unsupported {
        /// Name of the object.
        object: String,
        /// What is not understood.
        what: String,
    },
    /// The repository was opened read-only.
    #[error("cannot {action} in {location}: it was opened read-only; open it writable")]
    ReadOnly {
        /// What was tried.
        action: &'static str,
        /// Where.
        location: String,
    },
    /// No such point, chain, disk or part.
    #[error("there is no {what}; `icecore point list` shows what there is")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// A prefix that fits several points.
    #[error("{spec:?} fits {matches} points; write more of the id")]
    Ambiguous {
        /// The prefix.
        spec: String,
        /// How many it fits.
        matches: usize,
    },
    /// A text that is no id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A size that no disk or repository has.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// Blocks were handed over in a way that cannot make a right point.
    #[error("disk {disk}, {index}: {why}; the point is not written")]
    Push {
        /// The disk.
        disk: DiskId,
        /// The block.
        index: BlockIndex,
        /// What is wrong.
        why: &'static str,
    },
    /// A request that contradicts itself or what the repository holds.
    #[error("{what}; {advice}")]
    Refused {
        /// What was asked and why it cannot be.
        what: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// The point would store more than it was allowed.
    #[error("point {point} would store more than the {bytes} bytes that it may; it is not written")]
    OverLimit {
        /// The point.
        point: PointId,
        /// What it was allowed.
        bytes: u64,
    },
    /// An earlier failure of the same point writer; what it wrote cannot be trusted.
    #[error("point {point} failed earlier ({why}); begin a new point")]
    Poisoned {
        /// The point.
        point: PointId,
        /// The first failure.
        why: String,
    },
    /// The caller wanted it to end.
    #[error("{what} was ended before it was done")]
    Cancelled {
        /// What was under way.
        what: String,
    },
    /// gc took this writer for dead; its point does not exist for any reader.
    #[error("writer {writer} of point {point} was revoked by a gc; begin a new point")]
    Revoked {
        /// The writer.
        writer: WriterId,
        /// Its point.
        point: PointId,
    },
    /// The commit failed after the manifest was on its way: the point may exist or not.
    #[error(
        "whether point {point} was committed is unknown: {source}; \
         keep both bitmaps and ask again with `icecore point show {point}`"
    )]
    CommitUnknown {
        /// The point.
        point: PointId,
        /// What failed.
        source: Box<Error>,
    },
}

impl Error {
    /// The damage, when that is what it is (also a missing object).
    #[must_use]
    pub fn damage(&self) -> Option<Damage> {
        match self {
            Self::Damaged(damage) => Some(damage.clone()),
            Self::Store(error) if error.is_not_found() => {
                Some(Damage::new(error.object(), DamageKind::Missing, error.to_string()))
            }
            _ => None,
        }
    }
}

/// Names are built from checked ids, so this cannot happen; it is no reason to panic either.
impl From<BadObjectName> for Error {
    fn from(error: BadObjectName) -> Self {
        Self::Refused { what: error.to_string(), advice: "report this as a defect" }
    }
}

/// Result of an operation on a repository.
pub type Result<T, E = Error> = std::result::Result<T, E>;
