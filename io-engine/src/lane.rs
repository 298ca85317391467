//! Lanes: the file or the connections through which one disk is read or written.

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::error::EngineError;
use crate::limits::LANE_DEPTH;
use crate::wire::Wire;

/// One way to a disk. Several lanes of one disk work in parallel and must show the same content.
pub enum Lane {
    /// A regular file or block device, opened for what will be asked of it.
    File(File),
    /// A connected stream socket, and the protocol on it after its handshake.
    Stream {
        /// The socket; used without `O_NONBLOCK`.
        fd: OwnedFd,
        /// The protocol.
        wire: Box<dyn Wire>,
    },
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(file) => write!(f, "Lane::File({file:?})"),
            Self::Stream { fd, .. } => write!(f, "Lane::Stream({fd:?})"),
        }
    }
}

impl Lane {
    /// `count` lanes on one file, so that the thread backend can use it in parallel.
    ///
    /// # Errors
    /// The descriptor could not be duplicated.
    pub fn files(file: File, count: usize) -> Result<Vec<Self>, EngineError> {
        let failed = |source| EngineError::Setup { what: "duplicate a file descriptor", source };
        let mut lanes = Vec::with_capacity(count.max(1));
        for _ in 1..count {
            lanes.push(Self::File(file.try_clone().map_err(failed)?));
        }
        lanes.push(Self::File(file));
        Ok(lanes)
    }

    /// Most requests in flight that the lane takes.
    pub(crate) fn depth(&self) -> u32 {
        match self {
            Self::File(_) => LANE_DEPTH,
            Self::Stream { wire, .. } => wire.max_in_flight().clamp(1, LANE_DEPTH),
        }
    }

    /// Largest read or write that the lane takes, in bytes.
    pub(crate) fn max_request(&self) -> u32 {
        match self {
            Self::File(_) => u32::MAX,
            Self::Stream { wire, .. } => wire.max_request(),
        }
    }
}
