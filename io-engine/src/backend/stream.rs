//! A stream lane as a state machine: which bytes to send, where to receive, what is complete. It
//! does no IO, so both backends share every decision.

use std::collections::VecDeque;

use super::slots::{Fallback, Slots};
use super::{Completion, Request};
use crate::buffer::Buffer;
use crate::error::{Cause, EngineError};
use crate::limits::{MAX_HEADER, PAGE, ZERO_STEP};
use crate::wire::{Op, Want, Wire, WireError, WireErrorKind};

/// What lies in line to be sent.
enum Segment {
    /// So many bytes of encoded headers.
    Headers(usize),
    /// The payload of the request with this tag.
    Payload(usize),
}

/// A request whose reply has arrived but which may still be named by an unfinished send.
struct Settled {
    tag: usize,
    outcome: Result<(), WireError>,
}

pub(super) struct Stream<N> {
    lane: usize,
    wire: Box<dyn Wire>,
    pub(super) slots: Slots<N>,
    line: VecDeque<Segment>,
    /// Headers on their way out, copied so that the wire may grow its own buffer meanwhile.
    staged: Buffer,
    staged_len: usize,
    /// Bytes of the first segment (of `staged`, for headers) that are sent.
    sent: usize,
    header: Buffer,
    /// Bytes of the present `Want` that have arrived.
    received: usize,
    settled: VecDeque<Settled>,
    zeroes: Option<Buffer>,
}

impl<N> Stream<N> {
    pub(super) fn new(lane: usize, wire: Box<dyn Wire>, depth: u32) -> Result<Self, EngineError> {
        Ok(Self {
            lane,
            wire,
            slots: Slots::new(depth),
            line: VecDeque::new(),
            staged: Buffer::fixed(PAGE)?,
            staged_len: 0,
            sent: 0,
            header: Buffer::fixed(MAX_HEADER)?,
            received: 0,
            settled: VecDeque::new(),
            zeroes: None,
        })
    }

    pub(super) fn into_wire(self) -> Box<dyn Wire> {
        self.wire
    }

    pub(super) fn idle(&self) -> bool {
        self.slots.in_flight() == 0 && self.line.is_empty()
    }

    /// Takes a request in. There must be room.
    pub(super) fn submit(&mut self, request: Request<N>) -> Result<(), EngineError> {
        match self.slots.insert(request) {
            Some(tag) => self.issue(tag),
            None => Err(self.broken("no slot is free")),
        }
    }

    /// Encodes the present step of `tag`.
    fn issue(&mut self, tag: usize) -> Result<(), EngineError> {
        let Some(slot) = self.slots.get(tag) else { return Err(self.broken("unknown tag")) };
        let (op, offset, len) = slot.step();
        let before = self.wire.transmit().len();
        match self.wire.submit(tag as u64, op, offset, len) {
            Ok(()) => {}
            Err(error) if error.kind == WireErrorKind::Unsupported => {
                return self.fall_back(tag, error);
            }
            Err(error) => return Err(slot.error(error)),
        }
        self.queue_headers(self.wire.transmit().len().saturating_sub(before));
        if op == Op::Write {
            if slot_needs_zeroes(&self.slots, tag) && self.zeroes.is_none() {
                self.zeroes = Some(Buffer::fixed(ZERO_STEP as usize)?);
            }
            self.line.push_back(Segment::Payload(tag));
        }
        Ok(())
    }

    fn queue_headers(&mut self, bytes: usize) {
        match self.line.back_mut() {
            Some(Segment::Headers(last)) => *last += bytes,
            _ => self.line.push_back(Segment::Headers(bytes)),
        }
    }

    fn fall_back(&mut self, tag: usize, error: WireError) -> Result<(), EngineError> {
        let Some(slot) = self.slots.get(tag) else { return Err(self.broken("unknown tag")) };
        match slot.unsupported() {
            Fallback::WriteData => self.issue(tag),
            Fallback::Fail => Err(slot.error(error)),
            Fallback::LeaveOut => {
                tracing::warn!(%error, op = ?slot.request.op, "left out: the server does not offer it");
                self.settled.push_back(Settled { tag, outcome: Ok(()) });
                Ok(())
            }
        }
    }

    /// The bytes to send now, and whether more follow at once. They stay valid, at the same
    /// address, until [`sent`](Self::sent) is called or the lane is dropped.
    pub(super) fn sending(&mut self) -> Option<(&[u8], bool)> {
        let more = self.line.len() > 1;
        match self.line.front()? {
            Segment::Headers(bytes) => {
                if self.staged_len == 0 {
                    let ready = self.wire.transmit();
                    let take = (*bytes).min(ready.len()).min(self.staged.len());
                    self.staged[..take].copy_from_slice(&ready[..take]);
                    self.wire.transmitted(take);
                    self.staged_len = take;
                }
                Some((&self.staged[self.sent..self.staged_len], more))
            }
            Segment::Payload(tag) => {
                let zeroes = self.zeroes.as_deref().unwrap_or(&[]);
                let payload = self.slots.peek(*tag)?.payload(zeroes);
                Some((payload.get(self.sent..).unwrap_or(&[]), more))
            }
        }
    }

    /// Says that `n` of the bytes of [`sending`](Self::sending) are sent.
    pub(super) fn sent(&mut self, n: usize) {
        self.sent += n;
        let whole = match self.line.front_mut() {
            None => return,
            Some(Segment::Headers(_)) if self.sent < self.staged_len => return,
            Some(Segment::Headers(left)) => {
                *left -= self.staged_len.min(*left);
                self.staged_len = 0;
                self.sent = 0;
                *left == 0
            }
            Some(Segment::Payload(tag)) => {
                let len = self.slots.peek(*tag).map_or(0, |slot| slot.step().2 as usize);
                self.sent >= len
            }
        };
        if whole {
            self.line.pop_front();
            self.sent = 0;
        }
    }

    /// Where the next bytes belong, or `None` when no reply is due. The place stays valid, at the
    /// same address, until [`received`](Self::received) is called or the lane is dropped.
    pub(super) fn receiving(&mut self) -> Result<Option<&mut [u8]>, EngineError> {
        if self.slots.in_flight() == 0 {
            return Ok(None);
        }
        let (lane, from) = (self.lane, self.received);
        let place = match self.wire.want() {
            Want::Header(bytes) => self.header.get_mut(from..bytes),
            Want::Payload { tag, at, len } => reply_buffer(&mut self.slots, tag, at, len)
                .and_then(|buffer| buffer.get_mut(from..)),
            Want::Closed => return Err(closed(lane)),
        };
        match place {
            Some(place) if !place.is_empty() => Ok(Some(place)),
            _ => Err(broken(lane, "it wants bytes outside any request")),
        }
    }

    /// Says that `n` bytes have arrived where [`receiving`](Self::receiving) said; 0 is the end of
    /// the stream.
    pub(super) fn received(&mut self, n: usize) -> Result<(), EngineError> {
        if n == 0 {
            return Err(closed(self.lane));
        }
        self.received += n;
        let lane = self.lane;
        let failed = |error: WireError| EngineError::Lane { lane, cause: error.into() };
        match self.wire.want() {
            Want::Header(bytes) if self.received >= bytes => {
                self.received = 0;
                self.wire.header(self.header.get(..bytes).unwrap_or(&[])).map_err(failed)?;
                self.settle()
            }
            Want::Payload { len, .. } if self.received >= len as usize => {
                self.received = 0;
                self.wire.payload_done().map_err(failed)?;
                self.settle()
            }
            _ => Ok(()),
        }
    }

    /// Takes over what the wire has concluded from the bytes so far.
    fn settle(&mut self) -> Result<(), EngineError> {
        while let Some((tag, at, len)) = self.wire.zero_fill() {
            self.zero_fill(tag, at, len)?;
        }
        while let Some((tag, outcome)) = self.wire.completed() {
            let tag = usize::try_from(tag).unwrap_or(usize::MAX);
            if self.slots.peek(tag).is_none() || self.settled.iter().any(|done| done.tag == tag) {
                return Err(self.broken("it completed a request that is not in flight"));
            }
            self.settled.push_back(Settled { tag, outcome });
        }
        Ok(())
    }

    fn zero_fill(&mut self, tag: u64, at: u32, len: u32) -> Result<(), EngineError> {
        let index = usize::try_from(tag).unwrap_or(usize::MAX);
        if let Some(slot) = self.slots.get(index)
            && (at, len) == (0, slot.request.len)
        {
            slot.hole = slot.request.op == Op::Read;
            return Ok(());
        }
        match reply_buffer(&mut self.slots, tag, at, len) {
            Some(buffer) => {
                buffer.fill(0);
                Ok(())
            }
            None => Err(self.broken("it reports zeroes outside any request")),
        }
    }

    /// A request that is complete and that nothing names any more.
    pub(super) fn take_done(&mut self) -> Result<Option<Completion<N>>, EngineError> {
        let mut waiting = 0;
        while waiting < self.settled.len() {
            let Some(Settled { tag, outcome }) = self.settled.pop_front() else { break };
            if self.still_sending(tag) {
                self.settled.push_back(Settled { tag, outcome });
                waiting += 1;
            } else if let Some(done) = self.conclude(tag, outcome)? {
                return Ok(Some(done));
            }
        }
        Ok(None)
    }

    /// A server may refuse a write before it has taken the payload, which must be sent all the
    /// same; until then the buffer is in use.
    fn still_sending(&self, tag: usize) -> bool {
        self.line.iter().any(|segment| matches!(segment, Segment::Payload(t) if *t == tag))
    }

    fn conclude(
        &mut self,
        tag: usize,
        outcome: Result<(), WireError>,
    ) -> Result<Option<Completion<N>>, EngineError> {
        let Some(slot) = self.slots.get(tag) else { return Err(self.broken("unknown tag")) };
        match outcome {
            Ok(()) if slot.step_done() => Ok(self.slots.complete(tag)),
            Ok(()) => self.issue(tag).map(|()| None),
            Err(error) if is_unsupported(&error) => self.fall_back(tag, error).map(|()| None),
            Err(error) => Err(slot.error(error)),
        }
    }

    fn broken(&self, what: &str) -> EngineError {
        broken(self.lane, what)
    }
}

/// Servers say that they cannot do something when it was offered, too.
fn is_unsupported(error: &WireError) -> bool {
    error.kind == WireErrorKind::Unsupported || error.errno == Some(libc::EOPNOTSUPP)
}

fn slot_needs_zeroes<N>(slots: &Slots<N>, tag: usize) -> bool {
    slots.peek(tag).is_some_and(|slot| slot.request.buf.is_none())
}

/// The part of a read's buffer that a reply may fill.
fn reply_buffer<N>(slots: &mut Slots<N>, tag: u64, at: u32, len: u32) -> Option<&mut [u8]> {
    let slot = slots.get(usize::try_from(tag).ok()?)?;
    let end = at.checked_add(len).filter(|end| *end <= slot.request.len)?;
    if slot.request.op != Op::Read {
        return None;
    }
    slot.request.buf.as_mut()?.get_mut(at as usize..end as usize)
}

fn broken(lane: usize, what: &str) -> EngineError {
    let error = WireError::new(WireErrorKind::Protocol, format!("protocol error: {what}"));
    EngineError::Lane { lane, cause: Cause::Wire(error) }
}

fn closed(lane: usize) -> EngineError {
    let what = "the server closed the connection with requests outstanding";
    let error = WireError::new(WireErrorKind::Closed, what);
    EngineError::Lane { lane, cause: Cause::Wire(error) }
}
