//! A file lane: what the next system call of a request is, and what its result means. Both
//! backends share it; they differ only in how the call is made.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use super::slots::{Fallback, Slots};
use super::{Completion, Request};
use crate::buffer::Buffer;
use crate::error::{Cause, EngineError};
use crate::limits::ZERO_STEP;
use crate::wire::{Op, WireError, WireErrorKind};

/// What follows a system call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Another one for the same request.
    Again,
    /// The request is complete.
    Complete,
}

/// The memory of a system call.
pub(super) enum Memory<'a> {
    Fill(&'a mut [u8]),
    Send(&'a [u8]),
    None,
}

pub(super) struct FileLane<N> {
    pub(super) file: Arc<File>,
    pub(super) slots: Slots<N>,
    /// Size of a regular file that has holes: those need not be read.
    sparse_size: Option<u64>,
    zeroes: Option<Buffer>,
}

impl<N> FileLane<N> {
    pub(super) fn new(file: File, depth: u32) -> Self {
        let sparse_size = file
            .metadata()
            .ok()
            .filter(|meta| meta.is_file() && meta.blocks().saturating_mul(512) < meta.len())
            .map(|meta| meta.len());
        Self { file: Arc::new(file), slots: Slots::new(depth), sparse_size, zeroes: None }
    }

    /// Takes `request` in; its tag if a system call is needed, or its completion at once.
    pub(super) fn submit(&mut self, request: Request<N>) -> Result<Begun<N>, EngineError> {
        let hole = request.op == Op::Read && self.is_hole(request.offset, request.len);
        let Some(tag) = self.slots.insert(request) else {
            return Err(EngineError::Lanes("no slot is free".into()));
        };
        match self.slots.get(tag) {
            Some(slot) if hole => slot.hole = true,
            _ => return Ok(Begun::Call(tag)),
        }
        Ok(self.slots.complete(tag).map_or(Begun::Call(tag), Begun::Complete))
    }

    /// Whether the file has no data in the whole range. Doubt means data.
    fn is_hole(&self, offset: u64, len: u32) -> bool {
        let end = offset + u64::from(len);
        if self.sparse_size.is_none_or(|size| end > size) {
            return false;
        }
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data >= end,
            Err(errno) => errno == rustix::io::Errno::NXIO,
        }
    }

    /// The next system call of `tag`: operation, offset, length, memory. The memory stays valid,
    /// at the same address, until the request is complete or the lane is dropped.
    pub(super) fn call(&mut self, tag: usize) -> Result<(Op, u64, u32, Memory<'_>), EngineError> {
        let Some(slot) = self.slots.get(tag) else {
            return Err(EngineError::Lanes("unknown tag".into()));
        };
        let (op, offset, len) = slot.step();
        let at = slot.at;
        let (from, to) = (at as usize, len as usize);
        if op == Op::Write && slot.request.buf.is_none() && self.zeroes.is_none() {
            self.zeroes = Some(Buffer::fixed(ZERO_STEP as usize)?);
        }
        let memory = match op {
            Op::Read => slot.request.buf.as_mut().and_then(|buf| buf.get_mut(from..to)),
            Op::Write => {
                let all = slot.payload(self.zeroes.as_deref().unwrap_or(&[]));
                let rest = all.get(from..).unwrap_or(&[]);
                return Ok((op, offset + u64::from(at), len - at, Memory::Send(rest)));
            }
            _ => return Ok((op, offset, len, Memory::None)),
        };
        match memory {
            Some(memory) => Ok((op, offset + u64::from(at), len - at, Memory::Fill(memory))),
            None => Err(EngineError::Lanes("a read came without a buffer".into())),
        }
    }

    /// What the `outcome` of that system call means.
    pub(super) fn after(
        &mut self,
        tag: usize,
        outcome: io::Result<usize>,
    ) -> Result<After, EngineError> {
        let Some(slot) = self.slots.get(tag) else {
            return Err(EngineError::Lanes("unknown tag".into()));
        };
        let (op, _, len) = slot.step();
        let moves = matches!(op, Op::Read | Op::Write);
        match outcome {
            Err(error) if is_transient(&error) => Ok(After::Again),
            Err(error) if !moves && is_unsupported(&error) => match slot.unsupported() {
                Fallback::WriteData => Ok(After::Again),
                Fallback::LeaveOut if op == Op::Trim => Ok(After::Complete),
                _ => Err(slot.error(error)),
            },
            Err(error) => Err(slot.error(error)),
            Ok(0) if moves => Err(slot.error(end_of(op))),
            Ok(n) if moves => {
                slot.at += u32::try_from(n).unwrap_or(len);
                let complete = slot.at >= len && slot.step_done();
                Ok(if complete { After::Complete } else { After::Again })
            }
            Ok(_) => Ok(After::Complete),
        }
    }

    /// Makes the next system call of `tag`, blocking, and says what its outcome means.
    pub(super) fn call_now(&mut self, tag: usize) -> Result<After, EngineError> {
        let file = Arc::clone(&self.file);
        let (op, offset, len, memory) = self.call(tag)?;
        let outcome = match memory {
            Memory::Fill(buffer) => file.read_at(buffer, offset),
            Memory::Send(bytes) => file.write_at(bytes, offset),
            Memory::None if op == Op::Flush => file.sync_data().map(|()| 0),
            Memory::None => {
                let outcome = fallocate(&*file, allocate_flags(op), offset, u64::from(len));
                outcome.map(|()| 0).map_err(io::Error::from)
            }
        };
        self.after(tag, outcome)
    }
}

/// See [`FileLane::submit`].
pub(super) enum Begun<N> {
    Call(usize),
    Complete(Completion<N>),
}

/// How zeroes are made without being written.
pub(super) fn allocate_flags(op: Op) -> FallocateFlags {
    match op {
        Op::WriteZeroes { may_trim: false } => {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        }
        _ => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Errors by which file systems and devices say that they cannot punch this range.
fn is_unsupported(error: &io::Error) -> bool {
    let codes = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENODEV, libc::EINVAL];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

fn end_of(op: Op) -> Cause {
    match op {
        Op::Read => Cause::EndOfFile,
        _ => Cause::Wire(WireError::new(WireErrorKind::Refused, "the file takes no more bytes")),
    }
}
