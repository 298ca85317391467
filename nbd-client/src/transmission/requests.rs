//! Requests: what may be sent, and how it is written.

use super::status::StatusProgress;
use super::{Coverage, Op, Parse, Pending, Progress, Transmission};
use crate::error::SubmitError;
use crate::export_info::{ContextId, Dialect};
use crate::proto::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, command, command_flag, export_flag};

impl Op {
    fn command(self) -> u16 {
        match self {
            Op::Read => command::READ,
            Op::Write => command::WRITE,
            Op::WriteZeroes { .. } => command::WRITE_ZEROES,
            Op::Trim => command::TRIM,
            Op::Flush => command::FLUSH,
            Op::BlockStatus => command::BLOCK_STATUS,
        }
    }

    fn modifies(self) -> bool {
        matches!(self, Op::Write | Op::WriteZeroes { .. } | Op::Trim)
    }

    /// The transmission flag without which the command is not to be sent.
    fn gate(self) -> Option<(u16, &'static str)> {
        match self {
            Op::Read | Op::Write | Op::BlockStatus => None,
            Op::WriteZeroes { .. } => Some((export_flag::SEND_WRITE_ZEROES, "WRITE_ZEROES")),
            Op::Trim => Some((export_flag::SEND_TRIM, "TRIM")),
            Op::Flush => Some((export_flag::SEND_FLUSH, "FLUSH")),
        }
    }
}

/// Command flags, and the transmission flag that each of them needs.
const FLAG_GATES: [(u16, u16, &str); 4] = [
    (command_flag::FUA, export_flag::SEND_FUA, "FUA"),
    (command_flag::DF, export_flag::SEND_DF, "DF"),
    (command_flag::FAST_ZERO, export_flag::SEND_FAST_ZERO, "FAST_ZERO"),
    (command_flag::NO_HOLE, export_flag::SEND_WRITE_ZEROES, "NO_HOLE"),
];

impl Transmission {
    /// Whether the command may be sent on this connection.
    pub fn supports(&self, op: Op) -> Result<(), SubmitError> {
        let export = &self.session.export;
        if op.modifies() && export.read_only() {
            return Err(SubmitError::ReadOnly);
        }
        match op.gate() {
            Some((flag, name)) if !export.has(flag) => Err(SubmitError::NotOffered(name)),
            None if op == Op::BlockStatus && self.session.contexts.is_empty() => {
                Err(SubmitError::UnknownContext)
            }
            _ => Ok(()),
        }
    }

    /// Most bytes that one request of this kind may name.
    pub fn max_length(&self, op: Op) -> u64 {
        let minimum = u64::from(self.session.export.block.minimum);
        match (op, self.session.dialect) {
            (Op::Read | Op::Write, _) => u64::from(self.max_request()),
            (_, Dialect::Extended) => i64::MAX as u64 - (i64::MAX as u64 % minimum),
            _ => u64::from(u32::MAX) - u64::from(u32::MAX) % minimum,
        }
    }

    /// Queues a request. `tag` comes back with its result and need not be unique.
    pub fn submit(&mut self, tag: u64, op: Op, offset: u64, len: u32) -> Result<(), SubmitError> {
        let flags = match op {
            Op::WriteZeroes { may_trim: false } => command_flag::NO_HOLE,
            _ => 0,
        };
        self.submit_with(tag, op, flags, offset, u64::from(len))
    }

    /// Queues a request with command flags (see [`command_flag`]) and a 64-bit length.
    pub fn submit_with(
        &mut self,
        tag: u64,
        op: Op,
        flags: u16,
        offset: u64,
        length: u64,
    ) -> Result<(), SubmitError> {
        if op == Op::BlockStatus {
            return self.submit_status(tag, offset, length, &[]);
        }
        self.check(op, flags, offset, length)?;
        let progress = match op {
            Op::Read => Progress::Read(Coverage::default()),
            _ => Progress::Plain,
        };
        let payload = op == Op::Write && self.session.dialect == Dialect::Extended;
        let flags = if payload { flags | command_flag::PAYLOAD_LEN } else { flags };
        self.enqueue(tag, op, flags, offset, length, length, progress);
        Ok(())
    }

    /// Asks for extents of `contexts` (none: all that were negotiated). The server may answer for
    /// less than `length`; more is cut off. Where the server cannot pick contexts all of them are
    /// sent, and only the wanted ones reported.
    pub fn submit_status(
        &mut self,
        tag: u64,
        offset: u64,
        length: u64,
        contexts: &[ContextId],
    ) -> Result<(), SubmitError> {
        self.check(Op::BlockStatus, 0, offset, length)?;
        let all: Vec<ContextId> = self.session.contexts.iter().map(|context| context.id).collect();
        if contexts.iter().any(|id| !all.contains(id)) {
            return Err(SubmitError::UnknownContext);
        }
        let wanted = if contexts.is_empty() { &all[..] } else { contexts };
        let can_pick = self.session.dialect == Dialect::Extended
            && self.session.export.has(export_flag::BLOCK_STATUS_PAYLOAD);
        let pick = can_pick && wanted.len() < all.len();
        let sent = if pick { wanted } else { &all[..] };
        let progress = Progress::Status(StatusProgress::new(offset, sent, wanted));
        if !pick {
            self.enqueue(tag, Op::BlockStatus, 0, offset, length, length, progress);
            return Ok(());
        }
        let payload_bytes = 8 + 4 * wanted.len() as u64;
        let flags = command_flag::PAYLOAD_LEN;
        self.enqueue(tag, Op::BlockStatus, flags, offset, length, payload_bytes, progress);
        self.tx.extend_from_slice(&length.to_be_bytes());
        wanted.iter().for_each(|id| self.tx.extend_from_slice(&id.0.to_be_bytes()));
        Ok(())
    }

    /// Queues the disconnect. Only with nothing in flight: it has no reply.
    pub fn disconnect(&mut self) -> Result<(), SubmitError> {
        if self.closing || !self.pending.is_empty() {
            return Err(SubmitError::Closed);
        }
        self.write_request(command::DISC, 0, 0, 0, 0);
        self.closing = true;
        Ok(())
    }

    fn check(&self, op: Op, flags: u16, offset: u64, length: u64) -> Result<(), SubmitError> {
        if self.closing || matches!(self.parse, Parse::Dead) {
            return Err(SubmitError::Closed);
        }
        self.supports(op)?;
        let export = &self.session.export;
        for (flag, needs, name) in FLAG_GATES {
            if flags & flag != 0 && !export.has(needs) {
                return Err(SubmitError::NotOffered(name));
            }
        }
        if op == Op::Flush {
            return if length == 0 { Ok(()) } else { Err(SubmitError::Length { length, max: 0 }) };
        }
        let max = self.max_length(op);
        if length == 0 || length > max {
            return Err(SubmitError::Length { length, max });
        }
        let size = export.size_bytes;
        let end = offset.checked_add(length).filter(|end| *end <= size);
        let end = end.ok_or(SubmitError::OutOfBounds { offset, length, size })?;
        let minimum = export.block.minimum;
        let tail = !export.block.announced && end == size;
        let aligned = |value: u64| value.is_multiple_of(u64::from(minimum));
        match aligned(offset) && (aligned(length) || tail) {
            true => Ok(()),
            false => Err(SubmitError::Misaligned { offset, length, minimum }),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one field of the request each")]
    fn enqueue(
        &mut self,
        tag: u64,
        op: Op,
        flags: u16,
        offset: u64,
        length: u64,
        length_field: u64,
        progress: Progress,
    ) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.write_request(op.command(), flags, cookie, offset, length_field);
        let pending = Pending { tag, op, offset, length, progress, chunks: 0, error: None };
        self.pending.insert(cookie, pending);
    }

    fn write_request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) {
        let extended = self.session.dialect == Dialect::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        self.tx.extend_from_slice(&magic.to_be_bytes());
        self.tx.extend_from_slice(&flags.to_be_bytes());
        self.tx.extend_from_slice(&command.to_be_bytes());
        self.tx.extend_from_slice(&cookie.to_be_bytes());
        self.tx.extend_from_slice(&offset.to_be_bytes());
        match extended {
            true => self.tx.extend_from_slice(&length.to_be_bytes()),
            false => self.tx.extend_from_slice(&(length as u32).to_be_bytes()),
        }
    }
}
