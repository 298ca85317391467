//! The io_uring backend: one ring, driven by one thread, for all lanes of a disk.
//!
//! The rule on which its safety rests: memory that a submitted entry names stays where it is until
//! that entry has completed. Buffers are mappings whose address does not change; a lane gives a
//! buffer away only when its request is complete, which takes the completion of every entry that
//! names it; and [`Guard`] lets go of lanes only when no entry is left, or never.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::Done;
use super::file::{After, Begun, FileLane, Memory, allocate_flags};
use super::queue::{Intake, Next, silence, strike};
use super::stream::Stream;
use crate::control::Halt;
use crate::error::{Cause, EngineError};
use crate::lane::Lane;
use crate::limits::{DRAIN_AFTER_FAILURE, WAKE};
use crate::stats::Latency;
use crate::wire::Op;

/// Most entries of a ring; what does not fit waits for the next turn.
const MAX_ENTRIES: u32 = 1024;

/// What a completion belongs to, packed into its user data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Bell,
    Send(u32),
    Receive(u32),
    File(u32, u16),
}

impl Mark {
    fn pack(self) -> u64 {
        match self {
            Self::Bell => 0,
            Self::Send(lane) => 1 << 60 | u64::from(lane),
            Self::Receive(lane) => 2 << 60 | u64::from(lane),
            Self::File(lane, tag) => 3 << 60 | u64::from(tag) << 32 | u64::from(lane),
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "fields of a packed word")]
    fn unpack(word: u64) -> Self {
        match word >> 60 {
            1 => Self::Send(word as u32),
            2 => Self::Receive(word as u32),
            3 => Self::File(word as u32, (word >> 32) as u16),
            _ => Self::Bell,
        }
    }
}

enum State<N> {
    Stream { fd: OwnedFd, stream: Stream<N>, sending: bool, receiving: bool },
    File(FileLane<N>),
}

impl<N> State<N> {
    fn new(number: usize, lane: Lane) -> Result<Self, EngineError> {
        let depth = lane.depth();
        match lane {
            Lane::File(file) => Ok(Self::File(FileLane::new(file, depth))),
            Lane::Stream { fd, wire } => {
                // On a non-blocking socket the ring would report "try again" instead of waiting.
                rustix::io::ioctl_fionbio(&fd, false).map_err(|errno| EngineError::Setup {
                    what: "make a socket blocking",
                    source: errno.into(),
                })?;
                let stream = Stream::new(number, wire, depth)?;
                Ok(Self::Stream { fd, stream, sending: false, receiving: false })
            }
        }
    }

    fn slots(&mut self) -> &mut super::slots::Slots<N> {
        match self {
            Self::Stream { stream, .. } => &mut stream.slots,
            Self::File(lane) => &mut lane.slots,
        }
    }

    fn idle(&mut self) -> bool {
        match self {
            Self::Stream { stream, sending, .. } => stream.idle() && !*sending,
            Self::File(lane) => lane.slots.in_flight() == 0,
        }
    }
}

struct Driver<N> {
    ring: IoUring,
    lanes: Vec<State<N>>,
    /// File requests that need a system call: lane, tag.
    ready: Vec<(u32, u16)>,
    /// Entries submitted and not completed.
    named: usize,
    bell_armed: bool,
    ended: bool,
}

/// Owns a driver; on any way out, also by panic, no entry outlives the memory it names.
struct Guard<'a, N> {
    driver: Option<Box<Driver<N>>>,
    bell: &'a OwnedFd,
}

pub(super) fn run<N: Send>(
    lanes: Vec<Lane>,
    intake: &Intake<N>,
    halt: &Halt,
    done: Done<'_, N>,
) -> Result<(Vec<Lane>, Latency), EngineError> {
    let bell = intake.kick.bell(0);
    let mut guard = Guard { driver: Some(Box::new(Driver::new(lanes)?)), bell };
    if let Some(driver) = &mut guard.driver {
        driver.drive(intake, halt, done)?;
    }
    guard.finish()
}

impl<N> Guard<'_, N> {
    /// Takes the lanes back after a run without failure.
    fn finish(mut self) -> Result<(Vec<Lane>, Latency), EngineError> {
        self.drain();
        let (mut lanes, mut latency) = (Vec::new(), Latency::default());
        let Some(driver) = self.driver.take() else { return Ok((lanes, latency)) };
        for state in driver.lanes {
            lanes.push(match state {
                State::Stream { fd, mut stream, .. } => {
                    latency.merge(&std::mem::take(&mut stream.slots.latency));
                    Lane::Stream { fd, wire: stream.into_wire() }
                }
                State::File(lane) => {
                    latency.merge(&lane.slots.latency);
                    let file = std::sync::Arc::try_unwrap(lane.file);
                    Lane::File(file.map_err(|_| EngineError::Lanes("a file is in use".into()))?)
                }
            });
        }
        Ok((lanes, latency))
    }

    /// Waits for what the kernel still holds; gives the memory away for good if it does not let go.
    fn drain(&mut self) {
        let Some(driver) = &mut self.driver else { return };
        strike(self.bell);
        let until = Instant::now() + DRAIN_AFTER_FAILURE;
        while driver.named > 0 && Instant::now() < until {
            if driver.enter().is_err() {
                break;
            }
            driver.named -= driver.ring.completion().count();
        }
        if driver.named > 0
            && let Some(driver) = self.driver.take()
        {
            tracing::warn!(entries = driver.named, "the kernel does not let go of buffers");
            Box::leak(driver);
        }
    }
}

impl<N> Drop for Guard<'_, N> {
    fn drop(&mut self) {
        if let Some(driver) = &self.driver {
            driver.shut_down();
        }
        self.drain();
    }
}

/// A ring with what this kernel has: the flags spare interrupts and locks, but need 6.1.
fn make_ring(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries)
        .or_else(|_| IoUring::new(entries))
}

impl<N> Driver<N> {
    fn new(lanes: Vec<Lane>) -> Result<Self, EngineError> {
        let entries = 1 + lanes.iter().map(|lane| lane.depth() + 2).sum::<u32>();
        let entries = entries.next_power_of_two().min(MAX_ENTRIES);
        let ring = make_ring(entries).map_err(|source| EngineError::NoUring { source })?;
        let lanes = lanes.into_iter().enumerate().map(|(n, lane)| State::new(n, lane));
        Ok(Self {
            ring,
            lanes: lanes.collect::<Result<_, _>>()?,
            ready: Vec::new(),
            named: 0,
            bell_armed: false,
            ended: false,
        })
    }

    fn drive(
        &mut self,
        intake: &Intake<N>,
        halt: &Halt,
        done: Done<'_, N>,
    ) -> Result<(), EngineError> {
        let bell = intake.kick.bell(0);
        loop {
            if halt.pulse() {
                return Err(EngineError::Cancelled);
            }
            let sleepy = self.fill(intake, done)?;
            self.submit_lanes()?;
            if self.ended && self.lanes.iter_mut().all(State::idle) {
                return Ok(());
            }
            if sleepy && !self.bell_armed {
                let poll = opcode::PollAdd::new(Fd(bell.as_raw_fd()), libc::POLLIN as u32);
                // SAFETY: the entry names no memory.
                self.bell_armed = unsafe { self.push(poll.build(), Mark::Bell) };
            }
            self.enter()?;
            self.reap(bell, done)?;
            for (number, lane) in self.lanes.iter_mut().enumerate() {
                let limit = halt.control.stall_after;
                lane.slots().stalled(number, limit).map_or(Ok(()), Err)?;
            }
        }
    }

    /// Takes requests while there is room, for the least loaded lane first; true if the queue was
    /// found empty.
    fn fill(&mut self, intake: &Intake<N>, done: Done<'_, N>) -> Result<bool, EngineError> {
        while !self.ended {
            let free = self.lanes.iter_mut().enumerate().filter_map(|(number, lane)| {
                let slots = lane.slots();
                slots.has_room().then(|| (slots.in_flight(), number))
            });
            let Some((_, number)) = free.min() else { return Ok(false) };
            match intake.next() {
                Next::End => self.ended = true,
                Next::Later => return Ok(true),
                Next::Request(request) => match &mut self.lanes[number] {
                    State::Stream { stream, .. } => stream.submit(request)?,
                    State::File(lane) => match lane.submit(request)? {
                        Begun::Call(tag) => self.ready.push(file_mark(number, tag)),
                        Begun::Complete(complete) => done(complete),
                    },
                },
            }
        }
        Ok(false)
    }

    /// Puts an entry into the ring for everything that is due and has none.
    fn submit_lanes(&mut self) -> Result<(), EngineError> {
        for (number, tag) in std::mem::take(&mut self.ready) {
            self.submit_file(number, tag)?;
        }
        for number in 0..self.lanes.len() {
            self.submit_stream(number)?;
        }
        Ok(())
    }

    #[allow(clippy::cast_possible_truncation, reason = "lengths of requests fit 32 bits")]
    fn submit_stream(&mut self, number: usize) -> Result<(), EngineError> {
        let State::Stream { fd, stream, sending, receiving } = &mut self.lanes[number] else {
            return Ok(());
        };
        let (raw, mark) = (Fd(fd.as_raw_fd()), number as u32);
        let mut entries = [None, None];
        if !*sending && let Some((bytes, more)) = stream.sending() {
            let more = if more { libc::MSG_MORE } else { 0 };
            let send = opcode::Send::new(raw, bytes.as_ptr(), bytes.len() as u32);
            entries[0] = Some(send.flags(libc::MSG_NOSIGNAL | more).build());
        }
        if !*receiving && let Some(place) = stream.receiving()? {
            let recv = opcode::Recv::new(raw, place.as_mut_ptr(), place.len() as u32);
            entries[1] = Some(recv.flags(libc::MSG_WAITALL).build());
        }
        let [send, receive] = entries;
        // SAFETY: the stream promises that both places stay valid until it is told of the
        // completion or dropped; `sending` and `receiving` keep it from being asked for a second
        // place, and the guard keeps the lane until no entry is left.
        unsafe {
            let sent = send.is_some_and(|entry| self.push(entry, Mark::Send(mark)));
            let asked = receive.is_some_and(|entry| self.push(entry, Mark::Receive(mark)));
            if let State::Stream { sending, receiving, .. } = &mut self.lanes[number] {
                *sending |= sent;
                *receiving |= asked;
            }
        }
        Ok(())
    }

    fn submit_file(&mut self, number: u32, tag: u16) -> Result<(), EngineError> {
        let State::File(lane) = &mut self.lanes[number as usize] else { return Ok(()) };
        let fd = Fd(lane.file.as_raw_fd());
        let (op, offset, len, memory) = lane.call(usize::from(tag))?;
        let entry = match memory {
            Memory::Fill(buffer) => {
                opcode::Read::new(fd, buffer.as_mut_ptr(), len).offset(offset).build()
            }
            Memory::Send(bytes) => {
                opcode::Write::new(fd, bytes.as_ptr(), len).offset(offset).build()
            }
            Memory::None if op == Op::Flush => {
                opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build()
            }
            Memory::None => {
                let mode = allocate_flags(op).bits().cast_signed();
                opcode::Fallocate::new(fd, u64::from(len)).offset(offset).mode(mode).build()
            }
        };
        // SAFETY: the lane promises that the memory stays valid until the request is complete or
        // the lane is dropped; the guard keeps the lane until no entry is left.
        if !unsafe { self.push(entry, Mark::File(number, tag)) } {
            self.ready.push((number, tag));
        }
        Ok(())
    }

    /// Puts `entry` into the ring; false if there is no place now.
    ///
    /// # Safety
    /// The memory that the entry names must stay valid and untouched until its completion.
    unsafe fn push(&mut self, entry: squeue::Entry, mark: Mark) -> bool {
        let entry = entry.user_data(mark.pack());
        // SAFETY: the caller's promise is exactly what `push` asks for.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.named += usize::from(pushed);
        pushed
    }

    /// Submits what is in the ring and sleeps until something completes or 200 ms are over.
    fn enter(&self) -> Result<(), EngineError> {
        let timeout = Timespec::from(WAKE);
        let args = SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(EngineError::Setup { what: "enter the ring", source: error }),
            },
        }
    }

    fn reap(&mut self, bell: &OwnedFd, done: Done<'_, N>) -> Result<(), EngineError> {
        loop {
            let next = self.ring.completion().next();
            let Some(event) = next else { return Ok(()) };
            self.named -= 1;
            let outcome = match event.result() {
                n if n >= 0 => Ok(usize::try_from(n).unwrap_or(0)),
                code => Err(io::Error::from_raw_os_error(-code)),
            };
            match Mark::unpack(event.user_data()) {
                Mark::Bell => {
                    self.bell_armed = false;
                    silence(bell);
                }
                Mark::File(lane, tag) => self.file_event(lane, tag, outcome, done)?,
                Mark::Send(lane) => self.stream_event(lane, true, outcome, done)?,
                Mark::Receive(lane) => self.stream_event(lane, false, outcome, done)?,
            }
        }
    }

    fn file_event(
        &mut self,
        number: u32,
        tag: u16,
        outcome: io::Result<usize>,
        done: Done<'_, N>,
    ) -> Result<(), EngineError> {
        let State::File(lane) = &mut self.lanes[number as usize] else { return Ok(()) };
        match lane.after(usize::from(tag), outcome)? {
            After::Again => self.ready.push((number, tag)),
            After::Complete => lane.slots.complete(usize::from(tag)).into_iter().for_each(done),
        }
        Ok(())
    }

    fn stream_event(
        &mut self,
        number: u32,
        send: bool,
        outcome: io::Result<usize>,
        done: Done<'_, N>,
    ) -> Result<(), EngineError> {
        let State::Stream { stream, sending, receiving, .. } = &mut self.lanes[number as usize]
        else {
            return Ok(());
        };
        *(if send { sending } else { receiving }) = false;
        let moved = match outcome {
            Ok(n) => n,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                return Ok(());
            }
            Err(error) => {
                let lane = number as usize;
                return Err(EngineError::Lane { lane, cause: Cause::Os(error) });
            }
        };
        if send {
            stream.sent(moved);
        } else {
            stream.received(moved)?;
        }
        while let Some(complete) = stream.take_done()? {
            done(complete);
        }
        Ok(())
    }

    /// Ends all connections, so that what is outstanding on them completes.
    fn shut_down(&self) {
        for state in &self.lanes {
            if let State::Stream { fd, .. } = state
                && let Err(error) = rustix::net::shutdown(fd, rustix::net::Shutdown::Both)
            {
                tracing::debug!(%error, "a connection was closed already");
            }
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "lanes and slots are few")]
fn file_mark(number: usize, tag: usize) -> (u32, u16) {
    (number as u32, tag as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_survive_packing() {
        for mark in [Mark::Bell, Mark::Send(7), Mark::Receive(u32::MAX), Mark::File(3, 15)] {
            assert_eq!(Mark::unpack(mark.pack()), mark);
        }
    }

    #[test]
    fn a_ring_can_be_made_with_the_flags_of_old_kernels() {
        if IoUring::new(8).is_ok() {
            assert!(make_ring(8).is_ok());
        }
    }
}
