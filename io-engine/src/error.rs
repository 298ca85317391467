//! What can go wrong in the data plane: what was tried, on which range, why, what to do.

use std::fmt;
use std::io;

use crate::budget::BudgetError;
use crate::plan::PlanError;
use crate::wire::{Op, WireError};

/// A range of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Span {
    /// The range of `len` bytes at `offset`.
    pub fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}..{}", self.offset, self.offset.saturating_add(self.len))
    }
}

/// Why one request failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The operating system said so.
    #[error("{0}")]
    Os(#[from] io::Error),
    /// The peer or its protocol said so.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// A file ended inside the range.
    #[error("the file ends there; was it truncated meanwhile?")]
    EndOfFile,
}

/// Why a run of the data plane ended without success. Nothing that it read may be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A request failed.
    #[error("{} of {span} failed: {cause}", op_name(*op))]
    Io {
        /// What was tried.
        op: Op,
        /// On what.
        span: Span,
        /// Why it failed.
        #[source]
        cause: Cause,
    },
    /// A connection failed outside any one request.
    #[error("connection {lane} failed: {cause}")]
    Lane {
        /// Number of the connection, from 0.
        lane: usize,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// A lane completed nothing for too long.
    #[error(
        "connection {lane} completed nothing for {seconds} s; its oldest request is {} of {span}; \
         is the server or its storage hung?",
        op_name(*op)
    )]
    Stalled {
        /// Number of the lane, from 0.
        lane: usize,
        /// How long it was waited for.
        seconds: u64,
        /// The oldest request outstanding.
        op: Op,
        /// Its range.
        span: Span,
    },
    /// The caller's flag was set.
    #[error("cancelled")]
    Cancelled,
    /// The memory limit leaves no room.
    #[error(transparent)]
    Budget(BudgetError),
    /// The operating system gave no memory.
    #[error("could not map {size} bytes for a buffer: {source}")]
    Memory {
        /// Bytes asked for.
        size: usize,
        /// Why not.
        source: io::Error,
    },
    /// The plan cannot be carried out.
    #[error("the list of ranges to read is unusable: {0}")]
    Plan(#[from] PlanError),
    /// The repository failed.
    #[error("repository: {source} (while at {span})")]
    Repository {
        /// What was at work.
        span: Span,
        /// Why it failed.
        source: icecore_repository::Error,
    },
    /// The asked-for engine is not available here.
    #[error("io_uring is not available here ({source}); use --io-engine threads or auto")]
    NoUring {
        /// What set-up said.
        source: io::Error,
    },
    /// A helper of the engine could not be made.
    #[error("could not {what}: {source}")]
    Setup {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The lanes do not fit the job.
    #[error("the connections cannot serve this job: {0}")]
    Lanes(String),
    /// The target, read back, is not what was restored.
    #[error(
        "the target was read back and differs from the point: content root {found} instead of \
         {expected}; do not use it, restore again to other storage"
    )]
    RootDiffers {
        /// The point's.
        expected: icecore_repository::ContentRoot,
        /// The target's.
        found: icecore_repository::ContentRoot,
    },
    /// Written blocks, read back, are not what was written.
    #[error(
        "{count} written blocks were read back and differ from the point, the first at block \
         {first}; do not use the target"
    )]
    BlocksDiffer {
        /// How many.
        count: u64,
        /// Number of the first.
        first: u64,
    },
}

impl From<BudgetError> for EngineError {
    fn from(error: BudgetError) -> Self {
        match error {
            BudgetError::Cancelled => Self::Cancelled,
            error => Self::Budget(error),
        }
    }
}

/// A word for `op` in a message.
fn op_name(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write => "write",
        Op::WriteZeroes { .. } => "writing zeroes",
        Op::Trim => "trim",
        Op::Flush => "flush",
    }
}
