//! What can go wrong, sorted by what a caller can do about it.
//!
//! - [`ProtocolError`]: the peer broke the protocol. The connection is dead; do not retry on it.
//! - [`HandshakeError`]: the two sides cannot agree. Change the request or the server.
//! - [`SubmitError`]: we were asked for something that must not be sent. The connection lives.
//! - [`RequestError`]: the server failed one request. The connection lives.
//! - [`Error`]: any of those from a driver, with the peer and the action.

use std::time::Duration;

use crate::proto::reply;

/// An error number as the protocol defines it. Numbers unknown to the protocol become `EINVAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted (read-only export).
    EPERM = 1,
    /// Input/output error.
    EIO = 5,
    /// Out of memory.
    ENOMEM = 12,
    /// Invalid argument; QEMU's answer to every read of a broken snapshot.
    EINVAL = 22,
    /// No space left.
    ENOSPC = 28,
    /// Too large for one reply: ask for less.
    EOVERFLOW = 75,
    /// Not supported, or a fast zero that would be slow.
    ENOTSUP = 95,
    /// The server is shutting down.
    ESHUTDOWN = 108,
}

impl Errno {
    /// The protocol's number. Never 0.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// Reads a non-zero number of the wire; unknown ones are `EINVAL` (proto.md, "Error values").
    pub fn from_code(code: u32) -> Errno {
        use Errno::*;
        [EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN]
            .into_iter()
            .find(|errno| errno.code() == code)
            .unwrap_or(EINVAL)
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl From<&std::io::Error> for Errno {
    fn from(error: &std::io::Error) -> Errno {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Errno::EPERM,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Errno::ENOSPC,
            ErrorKind::OutOfMemory => Errno::ENOMEM,
            ErrorKind::InvalidInput => Errno::EINVAL,
            ErrorKind::Unsupported => Errno::ENOTSUP,
            _ => Errno::EIO,
        }
    }
}

/// The peer broke the protocol. Nothing that it says afterwards can be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A magic number is wrong: the stream is out of step, or this is no NBD peer.
    #[error("expected {expected}, found magic {found:#x}")]
    Magic {
        /// What should have come.
        expected: &'static str,
        /// What came.
        found: u64,
    },
    /// A reply of a form that was not negotiated, or that is not allowed for this command.
    #[error("a {form} reply is not allowed here ({why})")]
    ReplyForm {
        /// simple, structured or extended.
        form: &'static str,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A reply to nothing we asked, or a second reply.
    #[error("reply for cookie {0:#x}, which is not in flight")]
    UnknownCookie(u64),
    /// An extended reply echoes another offset than the request's.
    #[error("reply echoes offset {found}, the request had {expected}")]
    OffsetEcho {
        /// The request's offset, bytes.
        expected: u64,
        /// The reply's offset, bytes.
        found: u64,
    },
    /// A chunk type that is unknown and no error, or not allowed for the command.
    #[error("chunk type {0:#x} is unknown or not allowed for this command")]
    ChunkType(u16),
    /// A chunk whose length does not fit its type or our limit.
    #[error("chunk type {kind:#x} has a bad length of {length} bytes")]
    ChunkLength {
        /// Chunk type.
        kind: u16,
        /// Its announced length, bytes.
        length: u64,
    },
    /// Data, a hole or an error outside the range that was asked for.
    #[error(
        "chunk covers {offset}+{length}, outside the request {request_offset}+{request_length}"
    )]
    OutsideRequest {
        /// Start of the chunk, bytes.
        offset: u64,
        /// Length of the chunk, bytes.
        length: u64,
        /// Start of the request, bytes.
        request_offset: u64,
        /// Length of the request, bytes.
        request_length: u64,
    },
    /// A byte came twice.
    #[error("chunk covers {offset}+{length}, part of which came before")]
    Overlap {
        /// Start of the chunk, bytes.
        offset: u64,
        /// Length of the chunk, bytes.
        length: u64,
    },
    /// The reply ended with success, but bytes are missing.
    #[error("reply ended with success and {missing} of {length} bytes missing")]
    Incomplete {
        /// Bytes that never came.
        missing: u64,
        /// Bytes asked for.
        length: u64,
    },
    /// A NONE chunk that does not end the reply.
    #[error("an empty chunk that is not the last one")]
    EmptyChunk,
    /// More chunks than any honest reply has.
    #[error("more than {0} chunks in one reply")]
    TooManyChunks(u32),
    /// An error with number 0.
    #[error("an error reply with error number 0")]
    ErrorZero,
    /// A block status reply breaks a rule.
    #[error("block status: {0}")]
    Status(&'static str),
    /// An option reply breaks a rule.
    #[error("option {option}: {what}")]
    Option {
        /// The option's code.
        option: u32,
        /// The rule it breaks.
        what: &'static str,
    },
    /// Sizes of an export that cannot be.
    #[error("export: {0}")]
    Export(&'static str),
    /// A request that no client may send (server side).
    #[error("request: {0}")]
    Request(&'static str),
    /// The driver handed over something else than was wanted.
    #[error("driver out of step: {0}")]
    Driver(&'static str),
}

/// The two sides cannot agree on a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// An oldstyle server: it knows neither export names nor block status.
    #[error("the server speaks only the oldstyle handshake; use a newstyle NBD server")]
    OldStyle,
    /// The server wants TLS.
    #[error("the server requires TLS for {during}; offer the export on a unix socket instead")]
    TlsRequired {
        /// The option that it refused.
        during: &'static str,
    },
    /// No export of that name.
    #[error("the server has no export named {name:?} ({message})")]
    UnknownExport {
        /// The name asked for.
        name: String,
        /// The server's words.
        message: String,
    },
    /// The server refused an option that we cannot do without.
    #[error("the server refused {option} ({}): {message}", reply_name(*code))]
    Refused {
        /// The option.
        option: &'static str,
        /// The reply code.
        code: u32,
        /// The server's words.
        message: String,
    },
    /// A metadata context that is required is not there. Never read this as "nothing is dirty".
    #[error("the server does not offer metadata context {name:?} for export {export:?}: {why}")]
    ContextMissing {
        /// The context.
        name: String,
        /// The export.
        export: String,
        /// What is lacking.
        why: &'static str,
    },
    /// A name that the protocol cannot carry.
    #[error("{what} is longer than 4096 bytes")]
    NameTooLong {
        /// What is too long.
        what: &'static str,
    },
    /// The peer broke the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

/// A name for an option reply code.
fn reply_name(code: u32) -> &'static str {
    match code {
        reply::ERR_UNSUP => "not supported",
        reply::ERR_POLICY => "forbidden by policy",
        reply::ERR_INVALID => "invalid request",
        reply::ERR_PLATFORM => "not on this platform",
        reply::ERR_TLS_REQD => "TLS required",
        reply::ERR_UNKNOWN => "unknown export",
        reply::ERR_SHUTDOWN => "shutting down",
        reply::ERR_BLOCK_SIZE_REQD => "block sizes must be honoured",
        reply::ERR_TOO_BIG => "too big",
        reply::ERR_EXT_HEADER_REQD => "extended headers required",
        _ => "unknown error",
    }
}

/// A request that must not be sent. The connection is unharmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The export is read-only.
    #[error("the export is read-only")]
    ReadOnly,
    /// The server does not offer the command or flag.
    #[error("the server does not offer {0}")]
    NotOffered(&'static str),
    /// Beyond the end of the export.
    #[error("range {offset}+{length} ends beyond the export's {size} bytes")]
    OutOfBounds {
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        length: u64,
        /// Size of the export, bytes.
        size: u64,
    },
    /// Not a multiple of the server's minimum block size.
    #[error("range {offset}+{length} is not aligned to the server's minimum of {minimum} bytes")]
    Misaligned {
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        length: u64,
        /// The minimum block size, bytes.
        minimum: u32,
    },
    /// Nothing, or more than one request can carry.
    #[error("a length of {length} is not within 1..={max}")]
    Length {
        /// Length asked for, bytes.
        length: u64,
        /// Most that one request can carry, bytes.
        max: u64,
    },
    /// A metadata context that was not negotiated.
    #[error("a metadata context that was not negotiated on this connection")]
    UnknownContext,
    /// The server announced its shutdown, we disconnected, or the protocol broke.
    #[error("the connection is closed or closing")]
    Closed,
}

/// The server failed one request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("server answered {errno} at offset {offset}{}{message}", if message.is_empty() { "" } else { ": " })]
pub struct RequestError {
    /// The error number.
    pub errno: Errno,
    /// Where: the request's offset, or the one that the server names. Bytes.
    pub offset: u64,
    /// The server's words, control characters removed; often empty.
    pub message: String,
}

/// A failure of a driver: which peer, what was tried, why.
#[derive(Debug, thiserror::Error)]
#[error("NBD {peer}: {doing}: {cause}")]
pub struct Error {
    /// The peer's address.
    pub peer: String,
    /// What was tried.
    pub doing: &'static str,
    /// Why it failed.
    #[source]
    pub cause: Cause,
}

/// Why a driver failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The socket failed; `UnexpectedEof` when the peer closed it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// No progress in time.
    #[error("no answer for {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The peer broke the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// We asked for something that must not be sent.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The server failed a request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// An earlier failure or a cancelled call left the connection in the middle of a reply.
    #[error("the connection was left in mid-reply by an earlier failure; connect again")]
    Poisoned,
}

/// Removes what could play tricks on a terminal or a log from a peer's words.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}
