//! Replies: which bytes come next and what they mean.

use super::status::StatusBody;
use super::{Op, Progress, Transmission, head_bytes};
use crate::error::{Errno, ProtocolError, RequestError, printable};
use crate::export_info::Dialect;
use crate::proto::{
    EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRING_BYTES_MAX, STRUCTURED_REPLY_MAGIC, chunk,
    take_u16, take_u32, take_u64,
};

/// A chunk whose header was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) cookie: u64,
    pub(super) done: bool,
    pub(super) kind: u16,
    /// Bytes behind the header.
    pub(super) length: u64,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Parse {
    /// The start of a reply.
    Head,
    /// The rest of a structured header: its length, and for data the offset too, which saves a
    /// read on every data chunk.
    Rest(Chunk),
    /// The offset in front of data.
    DataOffset(Chunk),
    /// A hole's offset and length.
    Hole(Chunk),
    /// An error's body.
    Error(Chunk),
    /// What stands before the extents of a context.
    StatusHead(Chunk),
    /// Extents.
    StatusRuns(StatusBody),
    /// Data for the caller's buffer.
    Payload { cookie: u64, at: u32, len: u32, last: bool },
    /// The peer broke the protocol.
    Dead,
}

impl Parse {
    pub(super) fn header_bytes(&self, dialect: Dialect) -> usize {
        match self {
            Parse::Head => head_bytes(dialect),
            Parse::Rest(chunk) if chunk.kind == chunk::OFFSET_DATA => 12,
            Parse::Rest(_) => 4,
            Parse::DataOffset(_) => 8,
            Parse::Hole(_) => 12,
            Parse::Error(chunk) => chunk.length as usize,
            Parse::StatusHead(_) => Transmission::status_head_bytes(dialect) as usize,
            Parse::StatusRuns(body) => body.piece_bytes(),
            Parse::Payload { .. } | Parse::Dead => 0,
        }
    }
}

impl Transmission {
    pub(super) fn parse_header(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        match self.parse {
            Parse::Head => self.head(bytes),
            Parse::Rest(chunk) => self.rest(chunk, bytes),
            Parse::DataOffset(chunk) => self.data(chunk, bytes),
            Parse::Hole(chunk) => self.hole(chunk, bytes),
            Parse::Error(chunk) => self.error_chunk(chunk, bytes),
            Parse::StatusHead(chunk) => self.status_head(chunk, bytes),
            Parse::StatusRuns(body) => self.status_runs(body, bytes),
            Parse::Payload { .. } | Parse::Dead => {
                Err(ProtocolError::Driver("header bytes where none were wanted"))
            }
        }
    }

    /// The first bytes of a reply decide its form.
    fn head(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let magic = take_u32(&mut bytes).unwrap_or_default();
        match (magic, self.session.dialect) {
            (SIMPLE_REPLY_MAGIC, Dialect::Simple | Dialect::Structured) => self.simple(bytes),
            (STRUCTURED_REPLY_MAGIC, Dialect::Structured) => self.structured(bytes),
            (EXTENDED_REPLY_MAGIC, Dialect::Extended) => self.extended(bytes),
            (SIMPLE_REPLY_MAGIC, _) => Err(not_negotiated("simple")),
            (STRUCTURED_REPLY_MAGIC, _) => Err(not_negotiated("structured")),
            (EXTENDED_REPLY_MAGIC, _) => Err(not_negotiated("extended")),
            _ => Err(ProtocolError::Magic { expected: "a reply", found: u64::from(magic) }),
        }
    }

    fn simple(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let code = take_u32(&mut bytes).unwrap_or_default();
        let cookie = take_u64(&mut bytes).unwrap_or_default();
        let structured = self.session.dialect == Dialect::Structured;
        let pending = self.request(cookie)?;
        if structured && pending.op == Op::Read {
            return Err(ProtocolError::ReplyForm { form: "simple", why: "to a structured READ" });
        }
        if pending.chunks > 0 {
            return Err(ProtocolError::ReplyForm { form: "simple", why: "after chunks" });
        }
        if code != 0 {
            let (errno, offset) = (Errno::from_code(code), pending.offset);
            pending.error = Some(RequestError { errno, offset, message: String::new() });
        } else if let Progress::Read(coverage) = &mut pending.progress {
            let len = pending.length as u32;
            coverage.add(0, len);
            self.parse = Parse::Payload { cookie, at: 0, len, last: true };
            return Ok(());
        }
        self.finish(cookie)
    }

    fn structured(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let flags = take_u16(&mut bytes).unwrap_or_default();
        let kind = take_u16(&mut bytes).unwrap_or_default();
        let cookie = take_u64(&mut bytes).unwrap_or_default();
        let chunk = Chunk { cookie, done: flags & chunk::FLAG_DONE != 0, kind, length: 0 };
        self.count(&chunk)?;
        self.parse = Parse::Rest(chunk);
        Ok(())
    }

    /// The length of a structured chunk. Data's offset came along, if the length allows for it.
    fn rest(&mut self, mut chunk: Chunk, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        chunk.length = u64::from(take_u32(&mut bytes).unwrap_or_default());
        self.body(chunk)?;
        if bytes.is_empty() { Ok(()) } else { self.data(chunk, bytes) }
    }

    fn extended(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let flags = take_u16(&mut bytes).unwrap_or_default();
        let kind = take_u16(&mut bytes).unwrap_or_default();
        let cookie = take_u64(&mut bytes).unwrap_or_default();
        let found = take_u64(&mut bytes).unwrap_or_default();
        let length = take_u64(&mut bytes).unwrap_or_default();
        let chunk = Chunk { cookie, done: flags & chunk::FLAG_DONE != 0, kind, length };
        self.count(&chunk)?;
        let expected = self.request(cookie)?.offset;
        if expected != found {
            return Err(ProtocolError::OffsetEcho { expected, found });
        }
        self.body(chunk)
    }

    /// A chunk's header is complete: check type and length, and say what comes next.
    fn body(&mut self, chunk: Chunk) -> Result<(), ProtocolError> {
        let (op, length) = {
            let pending = self.request(chunk.cookie)?;
            (pending.op, pending.length)
        };
        let extended = self.session.dialect == Dialect::Extended;
        let status = if extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let bad_length = ProtocolError::ChunkLength { kind: chunk.kind, length: chunk.length };
        match chunk.kind {
            chunk::NONE if chunk.length > 0 => return Err(bad_length),
            chunk::NONE if !chunk.done => return Err(ProtocolError::EmptyChunk),
            chunk::NONE => {
                self.parse = Parse::Head;
                return self.finish(chunk.cookie);
            }
            chunk::OFFSET_DATA if op == Op::Read => {
                if chunk.length < 9 || chunk.length - 8 > length {
                    return Err(bad_length);
                }
                self.parse = Parse::DataOffset(chunk);
            }
            chunk::OFFSET_HOLE if op == Op::Read => {
                if chunk.length != 12 {
                    return Err(bad_length);
                }
                self.parse = Parse::Hole(chunk);
            }
            kind if kind == status && op == Op::BlockStatus => return self.status_chunk(chunk),
            kind if kind & chunk::ERROR_BIT != 0 => {
                if chunk.length < 6 || chunk.length > 6 + 8 + STRING_BYTES_MAX as u64 {
                    return Err(bad_length);
                }
                self.parse = Parse::Error(chunk);
            }
            kind => return Err(ProtocolError::ChunkType(kind)),
        }
        Ok(())
    }

    /// Data begins: note what it covers and let the caller read it in place.
    fn data(&mut self, chunk: Chunk, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let offset = take_u64(&mut bytes).unwrap_or_default();
        let (at, len) = self.cover(chunk.cookie, offset, chunk.length - 8)?;
        self.parse = Parse::Payload { cookie: chunk.cookie, at, len, last: chunk.done };
        Ok(())
    }

    fn hole(&mut self, chunk: Chunk, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let offset = take_u64(&mut bytes).unwrap_or_default();
        let length = u64::from(take_u32(&mut bytes).unwrap_or_default());
        if length == 0 {
            return Err(ProtocolError::ChunkLength { kind: chunk.kind, length });
        }
        let (at, len) = self.cover(chunk.cookie, offset, length)?;
        let tag = self.request(chunk.cookie)?.tag;
        self.zeroes.push_back((tag, at, len));
        self.parse = Parse::Head;
        if chunk.done { self.finish(chunk.cookie) } else { Ok(()) }
    }

    /// Notes that a part of a read has come; returns its place in the request's buffer.
    fn cover(
        &mut self,
        cookie: u64,
        offset: u64,
        length: u64,
    ) -> Result<(u32, u32), ProtocolError> {
        let pending = self.request(cookie)?;
        let (start, size) = (pending.offset, pending.length);
        let at = offset.checked_sub(start).filter(|at| *at <= size && size - at >= length);
        let outside = ProtocolError::OutsideRequest {
            offset,
            length,
            request_offset: start,
            request_length: size,
        };
        let (at, len) = (at.ok_or(outside)? as u32, length as u32);
        let Progress::Read(coverage) = &mut pending.progress else {
            return Err(ProtocolError::Driver("data for a request that reads nothing"));
        };
        match coverage.add(at, len) {
            true => Ok((at, len)),
            false => Err(ProtocolError::Overlap { offset, length }),
        }
    }

    /// An error chunk fails the request; the first one is kept. Unknown ones count as well.
    fn error_chunk(&mut self, chunk: Chunk, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let code = take_u32(&mut bytes).unwrap_or_default();
        let message_bytes = usize::from(take_u16(&mut bytes).unwrap_or_default());
        let bad_length = ProtocolError::ChunkLength { kind: chunk.kind, length: chunk.length };
        if code == 0 {
            return Err(ProtocolError::ErrorZero);
        }
        let (message, mut rest) =
            bytes.split_at_checked(message_bytes).ok_or(bad_length.clone())?;
        let fits = match chunk.kind {
            chunk::ERROR => rest.is_empty(),
            chunk::ERROR_OFFSET => rest.len() == 8,
            _ => true,
        };
        if !fits || message.len() > STRING_BYTES_MAX {
            return Err(bad_length);
        }
        let named = take_u64(&mut rest).filter(|_| chunk.kind == chunk::ERROR_OFFSET);
        self.fail(&chunk, code, named, message)?;
        self.parse = Parse::Head;
        if chunk.done { self.finish(chunk.cookie) } else { Ok(()) }
    }

    fn fail(
        &mut self,
        chunk: &Chunk,
        code: u32,
        named: Option<u64>,
        message: &[u8],
    ) -> Result<(), ProtocolError> {
        let pending = self.request(chunk.cookie)?;
        let (request_offset, request_length) = (pending.offset, pending.length);
        let offset = named.unwrap_or(request_offset);
        let inside = offset.checked_sub(request_offset).is_some_and(|at| at < request_length);
        if named.is_some() && !inside {
            let length = 1;
            let outside =
                ProtocolError::OutsideRequest { offset, length, request_offset, request_length };
            return Err(outside);
        }
        let error =
            RequestError { errno: Errno::from_code(code), offset, message: printable(message) };
        pending.error.get_or_insert(error);
        Ok(())
    }
}

fn not_negotiated(form: &'static str) -> ProtocolError {
    ProtocolError::ReplyForm { form, why: "not negotiated" }
}
