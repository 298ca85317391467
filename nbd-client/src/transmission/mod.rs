//! The client's side of the transmission phase, without IO and without owning any payload.
//!
//! A driver submits requests, sends [`Transmission::transmit`], and feeds what comes back:
//! [`Transmission::want`] says how many header bytes to read for [`Transmission::header`], or where
//! in the caller's own buffer the next payload bytes belong; [`Transmission::payload_done`] confirms
//! them. Results are taken from [`Transmission::zero_fill`], [`Transmission::status_run`] and
//! [`Transmission::completed`], in this order, after each step.
//!
//! After submitting [`Op::Write`] the driver sends all of `transmit()` and then the payload, before
//! it sends anything of a later request.

mod chunks;
mod coverage;
mod requests;
mod status;

use std::collections::{HashMap, VecDeque};

use crate::error::{Errno, ProtocolError, RequestError};
use crate::export_info::{ContextId, Dialect, ExportInfo, Session};
use crate::extents::Extent;
use crate::proto::{CHUNKS_PER_REPLY_MAX, PAYLOAD_BYTES_MAX};
use chunks::{Chunk, Parse};
use coverage::Coverage;
use status::StatusProgress;

/// Requests in flight that one connection is good for. QEMU and nbdkit work on 16 at a time.
pub const IN_FLIGHT_MAX: u32 = 16;

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Read into the caller's buffer.
    Read,
    /// Write from the caller's buffer.
    Write,
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Whether the server may punch a hole.
        may_trim: bool,
    },
    /// Tell that a range is not needed any more.
    Trim,
    /// Make all writes whose replies came durable. Wait for them first.
    Flush,
    /// Ask for extents; see [`Transmission::submit_status`].
    BlockStatus,
}

/// What the driver reads next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Exactly this many bytes, for [`Transmission::header`].
    Header(usize),
    /// `len` bytes into the buffer of request `tag`, from byte `at` of it; then
    /// [`Transmission::payload_done`].
    Payload {
        /// The tag given to `submit`.
        tag: u64,
        /// Offset in the request's buffer, bytes.
        at: u32,
        /// Bytes to read.
        len: u32,
    },
    /// Nothing: the connection is over.
    Closed,
}

/// Part of an answer to block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// The tag given to `submit_status`.
    pub tag: u64,
    /// The metadata context.
    pub context: ContextId,
    /// The extent, cut at the end of the request.
    pub extent: Extent,
}

#[derive(Debug)]
enum Progress {
    Plain,
    Read(Coverage),
    Status(StatusProgress),
}

/// A request whose reply has not ended.
#[derive(Debug)]
struct Pending {
    tag: u64,
    op: Op,
    offset: u64,
    length: u64,
    progress: Progress,
    chunks: u32,
    error: Option<RequestError>,
}

/// The transmission machine of one connection.
#[derive(Debug)]
pub struct Transmission {
    session: Session,
    next_cookie: u64,
    pending: HashMap<u64, Pending>,
    tx: Vec<u8>,
    parse: Parse,
    closing: bool,
    zeroes: VecDeque<(u64, u32, u32)>,
    runs: VecDeque<StatusRun>,
    done: VecDeque<(u64, Result<(), RequestError>)>,
}

impl Transmission {
    /// A machine for a connection whose handshake ended with this session.
    pub fn new(session: Session) -> Transmission {
        Transmission {
            session,
            next_cookie: 1,
            pending: HashMap::new(),
            tx: Vec::new(),
            parse: Parse::Head,
            closing: false,
            zeroes: VecDeque::new(),
            runs: VecDeque::new(),
            done: VecDeque::new(),
        }
    }

    /// What was negotiated.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The export.
    pub fn export(&self) -> &ExportInfo {
        &self.session.export
    }

    /// Most requests worth having in flight.
    pub fn max_in_flight(&self) -> u32 {
        IN_FLIGHT_MAX
    }

    /// Most payload bytes of one request; a multiple of the minimum block size.
    pub fn max_request(&self) -> u32 {
        let block = &self.session.export.block;
        let cap = block.maximum.min(PAYLOAD_BYTES_MAX);
        cap - cap % block.minimum
    }

    /// Requests submitted whose results were not all produced yet.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Bytes to send now: request headers.
    pub fn transmit(&self) -> &[u8] {
        &self.tx
    }

    /// The first `n` bytes of [`Transmission::transmit`] were sent.
    pub fn transmitted(&mut self, n: usize) {
        self.tx.drain(..n.min(self.tx.len()));
    }

    /// What to read next.
    pub fn want(&self) -> Want {
        match &self.parse {
            Parse::Payload { cookie, at, len, .. } => match self.pending.get(cookie) {
                Some(pending) => Want::Payload { tag: pending.tag, at: *at, len: *len },
                None => Want::Closed,
            },
            Parse::Dead => Want::Closed,
            Parse::Head if self.closing && self.pending.is_empty() => Want::Closed,
            parse => Want::Header(parse.header_bytes(self.session.dialect)),
        }
    }

    /// Takes exactly the bytes of [`Want::Header`]. After an error the connection is dead.
    pub fn header(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        let Want::Header(expected) = self.want() else {
            return Err(ProtocolError::Driver("header bytes where none were wanted"));
        };
        if bytes.len() != expected {
            return Err(ProtocolError::Driver("header bytes of another length than wanted"));
        }
        let result = self.parse_header(bytes);
        self.die_on_error(result)
    }

    /// The bytes of [`Want::Payload`] are in the caller's buffer.
    pub fn payload_done(&mut self) -> Result<(), ProtocolError> {
        let Parse::Payload { cookie, last, .. } = self.parse else {
            return Err(ProtocolError::Driver("payload where none was wanted"));
        };
        self.parse = Parse::Head;
        let result = if last { self.finish(cookie) } else { Ok(()) };
        self.die_on_error(result)
    }

    /// Part of a read that the server reported as a hole: `(tag, at, len)` of the request's buffer
    /// that the caller fills with zeroes.
    pub fn zero_fill(&mut self) -> Option<(u64, u32, u32)> {
        self.zeroes.pop_front()
    }

    /// The next extent of a block status reply. Ascending per tag and context.
    pub fn status_run(&mut self) -> Option<StatusRun> {
        self.runs.pop_front()
    }

    /// The next finished request: its tag and result.
    pub fn completed(&mut self) -> Option<(u64, Result<(), RequestError>)> {
        self.done.pop_front()
    }

    fn die_on_error(&mut self, result: Result<(), ProtocolError>) -> Result<(), ProtocolError> {
        if result.is_err() {
            self.parse = Parse::Dead;
            self.closing = true;
            self.tx.clear();
        }
        result
    }

    fn request(&mut self, cookie: u64) -> Result<&mut Pending, ProtocolError> {
        self.pending.get_mut(&cookie).ok_or(ProtocolError::UnknownCookie(cookie))
    }

    /// Counts a chunk: a reply that never ends must not keep a connection busy for ever.
    fn count(&mut self, chunk: &Chunk) -> Result<(), ProtocolError> {
        let pending = self.request(chunk.cookie)?;
        pending.chunks += 1;
        match pending.chunks > CHUNKS_PER_REPLY_MAX {
            true => Err(ProtocolError::TooManyChunks(CHUNKS_PER_REPLY_MAX)),
            false => Ok(()),
        }
    }

    /// Ends a reply: success only if all that was asked for came.
    fn finish(&mut self, cookie: u64) -> Result<(), ProtocolError> {
        let pending = self.pending.remove(&cookie).ok_or(ProtocolError::UnknownCookie(cookie))?;
        if pending.error.is_none() {
            pending.progress.complete(pending.length)?;
        }
        if pending.error.as_ref().is_some_and(|error| error.errno == Errno::ESHUTDOWN) {
            self.closing = true;
        }
        self.done.push_back((pending.tag, pending.error.map_or(Ok(()), Err)));
        Ok(())
    }
}

impl Progress {
    /// Whether a reply that ends with success brought everything.
    fn complete(&self, length: u64) -> Result<(), ProtocolError> {
        match self {
            Progress::Plain => Ok(()),
            Progress::Read(coverage) if coverage.bytes() == length => Ok(()),
            Progress::Read(coverage) => {
                Err(ProtocolError::Incomplete { missing: length - coverage.bytes(), length })
            }
            Progress::Status(progress) => progress.complete(),
        }
    }
}

/// Header bytes of a reply: 16 are common to simple and structured ones.
fn head_bytes(dialect: Dialect) -> usize {
    if dialect == Dialect::Extended { 32 } else { 16 }
}
