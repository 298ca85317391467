//! Requests in flight on one lane, by small numbers that serve as tags.

use std::time::{Duration, Instant};

use super::{Completion, Request};
use crate::error::{Cause, EngineError};
use crate::limits::{FLUSH_PATIENCE, ZERO_STEP};
use crate::stats::Latency;
use crate::wire::Op;

/// One request in flight.
pub(super) struct Slot<N> {
    pub(super) request: Request<N>,
    started: Instant,
    /// Bytes of the present step that are done.
    pub(super) at: u32,
    /// Set once zeroes have to be written as data: how far that is.
    zeroed: Option<u32>,
    pub(super) hole: bool,
}

impl<N> Slot<N> {
    /// The operation to be carried out now: operation, offset, length.
    pub(super) fn step(&self) -> (Op, u64, u32) {
        let Request { op, offset, len, .. } = self.request;
        match self.zeroed {
            Some(at) => (Op::Write, offset + u64::from(at), (len - at).min(ZERO_STEP)),
            None => (op, offset, len),
        }
    }

    /// Ends the present step; true if the request is complete.
    pub(super) fn step_done(&mut self) -> bool {
        self.at = 0;
        let (.., len) = self.step();
        match &mut self.zeroed {
            Some(at) => {
                *at += len;
                *at >= self.request.len
            }
            None => true,
        }
    }

    /// What to do about an operation that the target does not know.
    pub(super) fn unsupported(&mut self) -> Fallback {
        match (self.request.op, self.zeroed) {
            (Op::WriteZeroes { .. }, None) => {
                self.zeroed = Some(0);
                self.at = 0;
                Fallback::WriteData
            }
            (Op::Trim | Op::Flush, _) => Fallback::LeaveOut,
            _ => Fallback::Fail,
        }
    }

    /// The bytes that the present step, a write, sends.
    pub(super) fn payload<'a>(&'a self, zeroes: &'a [u8]) -> &'a [u8] {
        let (_, _, len) = self.step();
        let all = match (&self.request.buf, self.zeroed) {
            (Some(buf), None) => &buf[..],
            _ => zeroes,
        };
        all.get(..len as usize).unwrap_or(&[])
    }

    /// The error that ends the run because this request failed.
    pub(super) fn error(&self, cause: impl Into<Cause>) -> EngineError {
        let (op, span) = (self.request.op, self.request.span());
        EngineError::Io { op, span, cause: cause.into() }
    }
}

/// See [`Slot::unsupported`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fallback {
    WriteData,
    LeaveOut,
    Fail,
}

/// The slots of one lane.
pub(super) struct Slots<N> {
    slots: Vec<Option<Slot<N>>>,
    free: Vec<usize>,
    /// When the lane last completed something, or began to have something outstanding.
    moved: Instant,
    pub(super) latency: Latency,
}

impl<N> Slots<N> {
    pub(super) fn new(depth: u32) -> Self {
        let depth = depth as usize;
        Self {
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            moved: Instant::now(),
            latency: Latency::default(),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether one more may be submitted.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes `request` in; there must be room.
    pub(super) fn insert(&mut self, request: Request<N>) -> Option<usize> {
        let now = Instant::now();
        if self.in_flight() == 0 {
            self.moved = now;
        }
        let tag = self.free.pop()?;
        let slot = Slot { request, started: now, at: 0, zeroed: None, hole: false };
        self.slots[tag] = Some(slot);
        Some(tag)
    }

    pub(super) fn get(&mut self, tag: usize) -> Option<&mut Slot<N>> {
        self.slots.get_mut(tag)?.as_mut()
    }

    pub(super) fn peek(&self, tag: usize) -> Option<&Slot<N>> {
        self.slots.get(tag)?.as_ref()
    }

    /// Takes the request of `tag` out as complete.
    pub(super) fn complete(&mut self, tag: usize) -> Option<Completion<N>> {
        let slot = self.slots.get_mut(tag)?.take()?;
        self.free.push(tag);
        self.moved = Instant::now();
        self.latency.record(self.moved - slot.started);
        Some(Completion { request: slot.request, hole: slot.hole })
    }

    /// The error of a lane that has completed nothing for `limit`.
    pub(super) fn stalled(&self, lane: usize, limit: Duration) -> Option<EngineError> {
        let still = self.moved.elapsed();
        if self.in_flight() == 0 || still < limit {
            return None;
        }
        let oldest = self.slots.iter().flatten().min_by_key(|slot| slot.started)?;
        let (op, span) = (oldest.request.op, oldest.request.span());
        if op == Op::Flush && still < limit * FLUSH_PATIENCE {
            return None;
        }
        Some(EngineError::Stalled { lane, seconds: still.as_secs(), op, span })
    }
}
