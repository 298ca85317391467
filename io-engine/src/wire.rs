//! The face of a pipelined block protocol on one byte stream, without IO.
//!
//! The engine moves the bytes, the implementation knows what they mean; the appliance implements it
//! over its NBD client.

/// What one request does to its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the request's buffer from the range.
    Read,
    /// Write the request's buffer to the range.
    Write,
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Whether the space may be deallocated.
        may_trim: bool,
    },
    /// Say that the content of the range no longer matters.
    Trim,
    /// Make everything answered so far durable; the range is empty.
    Flush,
}

/// What a failure means for the request and its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WireErrorKind {
    /// The peer answered with an error; the connection stays usable.
    Refused,
    /// The peer does not know this operation: zeroes are then written as data, a trim or a flush
    /// is left out.
    Unsupported,
    /// The peer broke the protocol; the connection is dead.
    Protocol,
    /// The peer closed the connection.
    Closed,
}

/// A failure that a [`Wire`] reports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// What it means.
    pub kind: WireErrorKind,
    /// The peer's error as an errno, where there is one.
    pub errno: Option<i32>,
    /// One line for the operator.
    pub message: String,
}

impl WireError {
    /// An error without an errno.
    pub fn new(kind: WireErrorKind, message: impl Into<String>) -> Self {
        Self { kind, errno: None, message: message.into() }
    }
}

/// The next bytes that a [`Wire`] expects from its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Exactly so many bytes (1..=[`MAX_HEADER`](crate::limits::MAX_HEADER)) for
    /// [`Wire::header`].
    Header(usize),
    /// Bytes that belong straight into the buffer of a read in flight.
    Payload {
        /// The tag of the request.
        tag: u64,
        /// Offset in the request's buffer, in bytes.
        at: u32,
        /// Length in bytes.
        len: u32,
    },
    /// The connection is over.
    Closed,
}

/// A pipelined block protocol after its handshake. Does no IO.
///
/// The driver promises: tags in flight are distinct and small (a slot number); a write's payload
/// follows its header at once; [`header`](Wire::header) and [`payload_done`](Wire::payload_done)
/// are called exactly when what [`want`](Wire::want) named has arrived whole; after each of them
/// [`zero_fill`](Wire::zero_fill) and [`completed`](Wire::completed) are drained.
///
/// The implementation promises: a read completes with `Ok` only if payloads and zero fills have
/// covered its range exactly.
pub trait Wire: Send {
    /// Most requests that may be in flight.
    fn max_in_flight(&self) -> u32;

    /// Largest length of a read or write, in bytes.
    fn max_request(&self) -> u32;

    /// Encodes one request into the transmit buffer.
    ///
    /// # Errors
    /// [`WireErrorKind::Unsupported`] where the peer does not offer `op`; nothing is encoded then.
    fn submit(&mut self, tag: u64, op: Op, offset: u64, len: u32) -> Result<(), WireError>;

    /// Encoded headers not yet taken by [`transmitted`](Wire::transmitted), in submit order.
    fn transmit(&self) -> &[u8];

    /// Takes the first `n` bytes off the transmit buffer.
    fn transmitted(&mut self, n: usize);

    /// What must be received next.
    fn want(&self) -> Want;

    /// Delivers the bytes of [`Want::Header`].
    ///
    /// # Errors
    /// The peer broke the protocol: the connection is dead.
    fn header(&mut self, bytes: &[u8]) -> Result<(), WireError>;

    /// Says that the bytes of [`Want::Payload`] are in place.
    ///
    /// # Errors
    /// The peer broke the protocol: the connection is dead.
    fn payload_done(&mut self) -> Result<(), WireError>;

    /// A part of a read that the peer reported as zeroes without sending it: tag, offset in the
    /// buffer, length.
    fn zero_fill(&mut self) -> Option<(u64, u32, u32)>;

    /// A request that has ended, with its outcome.
    fn completed(&mut self) -> Option<(u64, Result<(), WireError>)>;
}
