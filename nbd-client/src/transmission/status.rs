//! Replies to block status, taken in pieces so that no reply is ever held whole.

use super::chunks::{Chunk, Parse};
use super::{Progress, StatusRun, Transmission};
use crate::error::ProtocolError;
use crate::export_info::{ContextId, Dialect};
use crate::extents::Extent;
use crate::proto::{STATUS_EXTENTS_MAX, take_u32, take_u64};

/// Most bytes of extents that are asked for at once; a multiple of both forms of an extent.
const PIECE_BYTES: u64 = 64 << 10;

/// How far one context of one request has come.
#[derive(Debug)]
struct ContextProgress {
    id: ContextId,
    /// Whether the caller wants it; servers without payload support send all contexts.
    wanted: bool,
    /// Start of the next extent; `None` until the chunk of this context begins.
    at: Option<u64>,
}

/// How far one block status request has come.
#[derive(Debug)]
pub(super) struct StatusProgress {
    offset: u64,
    contexts: Vec<ContextProgress>,
}

impl StatusProgress {
    pub(super) fn new(offset: u64, sent: &[ContextId], wanted: &[ContextId]) -> StatusProgress {
        let progress =
            |id: &ContextId| ContextProgress { id: *id, wanted: wanted.contains(id), at: None };
        StatusProgress { offset, contexts: sent.iter().map(progress).collect() }
    }

    /// Whether each context was answered.
    pub(super) fn complete(&self) -> Result<(), ProtocolError> {
        match self.contexts.iter().all(|context| context.at.is_some()) {
            true => Ok(()),
            false => Err(ProtocolError::Status("a context is missing from a successful reply")),
        }
    }

    /// Begins the chunk of a context.
    fn begin(&mut self, id: ContextId) -> Result<(), ProtocolError> {
        let offset = self.offset;
        let context = self.contexts.iter_mut().find(|context| context.id == id);
        let context = context.ok_or(ProtocolError::Status("a context that was not asked for"))?;
        if context.at.replace(offset).is_some() {
            return Err(ProtocolError::Status("two chunks of one context"));
        }
        Ok(())
    }
}

/// The chunk of one context while its extents come in.
#[derive(Clone, Copy, Debug)]
pub(super) struct StatusBody {
    cookie: u64,
    last: bool,
    context: ContextId,
    left_bytes: u64,
}

impl StatusBody {
    pub(super) fn piece_bytes(&self) -> usize {
        self.left_bytes.min(PIECE_BYTES) as usize
    }
}

impl Transmission {
    /// Bytes in front of the extents: a context id, and a count in the 64-bit form.
    pub(super) fn status_head_bytes(dialect: Dialect) -> u64 {
        if dialect == Dialect::Extended { 8 } else { 4 }
    }

    fn extent_bytes(&self) -> u64 {
        if self.session.dialect == Dialect::Extended { 16 } else { 8 }
    }

    /// Checks the length of a block status chunk before anything of it is read.
    pub(super) fn status_chunk(&mut self, chunk: Chunk) -> Result<(), ProtocolError> {
        let (head, each) = (Self::status_head_bytes(self.session.dialect), self.extent_bytes());
        let bad = ProtocolError::ChunkLength { kind: chunk.kind, length: chunk.length };
        let extents = chunk.length.checked_sub(head).ok_or(bad.clone())?;
        if extents == 0 || !extents.is_multiple_of(each) || extents / each > STATUS_EXTENTS_MAX {
            return Err(bad);
        }
        self.parse = Parse::StatusHead(chunk);
        Ok(())
    }

    pub(super) fn status_head(
        &mut self,
        chunk: Chunk,
        mut bytes: &[u8],
    ) -> Result<(), ProtocolError> {
        let context = ContextId(take_u32(&mut bytes).unwrap_or_default());
        let each = self.extent_bytes();
        let left_bytes = chunk.length - Self::status_head_bytes(self.session.dialect);
        let count = take_u32(&mut bytes).map(u64::from);
        if count.is_some_and(|count| count * each != left_bytes) {
            return Err(ProtocolError::Status("the count of extents does not fit the length"));
        }
        let Progress::Status(progress) = &mut self.request(chunk.cookie)?.progress else {
            return Err(ProtocolError::ChunkType(chunk.kind));
        };
        progress.begin(context)?;
        let body = StatusBody { cookie: chunk.cookie, last: chunk.done, context, left_bytes };
        self.parse = Parse::StatusRuns(body);
        Ok(())
    }

    /// One piece of extents.
    pub(super) fn status_runs(
        &mut self,
        mut body: StatusBody,
        mut bytes: &[u8],
    ) -> Result<(), ProtocolError> {
        body.left_bytes -= bytes.len() as u64;
        let wide = self.session.dialect == Dialect::Extended;
        let take = |bytes: &mut &[u8]| match wide {
            true => take_u64(bytes),
            false => take_u32(bytes).map(u64::from),
        };
        while let (Some(length), Some(flags)) = (take(&mut bytes), take(&mut bytes)) {
            let final_one = bytes.is_empty() && body.left_bytes == 0;
            self.status_extent(&body, length, flags, final_one)?;
        }
        if body.left_bytes > 0 {
            self.parse = Parse::StatusRuns(body);
            return Ok(());
        }
        self.parse = Parse::Head;
        if body.last { self.finish(body.cookie) } else { Ok(()) }
    }

    fn status_extent(
        &mut self,
        body: &StatusBody,
        length: u64,
        flags: u64,
        final_one: bool,
    ) -> Result<(), ProtocolError> {
        let size = self.session.export.size_bytes;
        let pending = self.request(body.cookie)?;
        let (tag, request_end) = (pending.tag, pending.offset + pending.length);
        let Progress::Status(progress) = &mut pending.progress else {
            return Err(ProtocolError::Status("extents for a request that asked for none"));
        };
        let context = progress.contexts.iter_mut().find(|context| context.id == body.context);
        let context = context.ok_or(ProtocolError::Status("a context that was not asked for"))?;
        let offset = context.at.unwrap_or(progress.offset);
        if length == 0 {
            return Err(ProtocolError::Status("an extent of length 0"));
        }
        let end = offset.checked_add(length).filter(|end| *end <= size);
        let end = end.ok_or(ProtocolError::Status("an extent beyond the end of the export"))?;
        if end >= request_end && !final_one {
            return Err(ProtocolError::Status("extents beyond the request"));
        }
        context.at = Some(end);
        if context.wanted {
            let extent = Extent { offset, length: end.min(request_end) - offset, flags };
            self.runs.push_back(StatusRun { tag, context: body.context, extent });
        }
        Ok(())
    }
}
