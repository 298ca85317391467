//! The thread backend: one thread per lane, `poll` and non-blocking calls on streams, blocking
//! calls on files.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::Done;
use super::file::{After, Begun, FileLane};
use super::queue::{Intake, Next, silence};
use super::stream::Stream;
use crate::control::Halt;
use crate::error::{Cause, EngineError};
use crate::lane::Lane;
use crate::limits::WAKE;
use crate::stats::Latency;
use crate::wire::Wire;

/// Receives before a thread looks at everything else: a reply is two, header and payload.
const RECEIVES_PER_TURN: usize = 8;

/// What one thread needs beside its lane.
struct Worker<'a, N> {
    lane: usize,
    lanes: usize,
    intake: Intake<N>,
    halt: &'a Halt,
    done: Done<'a, N>,
    /// Requests in flight on all lanes.
    total: &'a AtomicUsize,
}

pub(super) fn run<N: Send>(
    lanes: Vec<Lane>,
    intake: &Intake<N>,
    halt: &Halt,
    done: Done<'_, N>,
) -> Result<(Vec<Lane>, Latency), EngineError> {
    let (total, count) = (AtomicUsize::new(0), lanes.len());
    let ends = std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(count);
        for (lane, what) in lanes.into_iter().enumerate() {
            let intake = intake.clone();
            let worker = Worker { lane, lanes: count, intake, halt, done, total: &total };
            let name = std::thread::Builder::new().name(format!("icecore-io-{lane}"));
            let spawned = name.spawn_scoped(scope, move || halt.note(worker.drive(what)));
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(source) => halt.fail(EngineError::Setup { what: "start a thread", source }),
            }
        }
        threads.into_iter().map(|thread| thread.join().ok().flatten()).collect::<Vec<_>>()
    });
    let (mut back, mut latency) = (Vec::with_capacity(count), Latency::default());
    for end in ends {
        let (lane, part) = end.ok_or(EngineError::Cancelled)?;
        latency.merge(&part);
        back.push(lane);
    }
    Ok((back, latency))
}

impl<N: Send> Worker<'_, N> {
    fn drive(&self, lane: Lane) -> Result<(Lane, Latency), EngineError> {
        let depth = lane.depth();
        match lane {
            Lane::File(file) => self.drive_file(file),
            Lane::Stream { fd, wire } => self.drive_stream(fd, wire, depth),
        }
    }

    fn drive_file(&self, file: File) -> Result<(Lane, Latency), EngineError> {
        let mut lane = FileLane::new(file, 1);
        loop {
            self.check()?;
            match self.intake.wait() {
                Next::End => break,
                Next::Later => {}
                Next::Request(request) => {
                    let done = match lane.submit(request)? {
                        Begun::Complete(done) => Some(done),
                        Begun::Call(tag) => {
                            while lane.call_now(tag)? == After::Again {
                                self.check()?;
                            }
                            lane.slots.complete(tag)
                        }
                    };
                    done.into_iter().for_each(self.done);
                }
            }
        }
        let file = std::sync::Arc::try_unwrap(lane.file);
        let file = file.map_err(|_| EngineError::Lanes("a file is still in use".into()))?;
        Ok((Lane::File(file), lane.slots.latency))
    }

    fn drive_stream(
        &self,
        fd: OwnedFd,
        wire: Box<dyn Wire>,
        depth: u32,
    ) -> Result<(Lane, Latency), EngineError> {
        let mut stream = Stream::new(self.lane, wire, depth)?;
        let mut ended = false;
        loop {
            self.check()?;
            self.fill(&mut stream, &mut ended)?;
            self.send(&fd, &mut stream)?;
            let mut busy = self.receive(&fd, &mut stream)?;
            while let Some(done) = stream.take_done()? {
                self.total.fetch_sub(1, Relaxed);
                (self.done)(done);
                busy = true;
            }
            if ended && stream.idle() {
                break;
            }
            if !busy {
                let limit = self.halt.control.stall_after;
                stream.slots.stalled(self.lane, limit).map_or(Ok(()), Err)?;
                self.wait(&fd, &mut stream)?;
            }
        }
        let latency = std::mem::take(&mut stream.slots.latency);
        Ok((Lane::Stream { fd, wire: stream.into_wire() }, latency))
    }

    fn check(&self) -> Result<(), EngineError> {
        if self.halt.pulse() { Err(EngineError::Cancelled) } else { Ok(()) }
    }

    /// Takes requests while there is room, but no more than a fair share of all in flight: else
    /// one lane would get everything and the others nothing.
    fn fill(&self, stream: &mut Stream<N>, ended: &mut bool) -> Result<(), EngineError> {
        while !*ended && stream.slots.has_room() {
            let share = self.total.load(Relaxed) / self.lanes + 1;
            if stream.slots.in_flight() > share {
                break;
            }
            match self.intake.next() {
                Next::Request(request) => {
                    self.total.fetch_add(1, Relaxed);
                    stream.submit(request)?;
                }
                Next::Later => break,
                Next::End => *ended = true,
            }
        }
        Ok(())
    }

    /// Sends what the socket takes.
    fn send(&self, fd: &OwnedFd, stream: &mut Stream<N>) -> Result<(), EngineError> {
        while let Some((bytes, more)) = stream.sending() {
            let mut flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            flags.set(SendFlags::MORE, more);
            match self.transfer(send(fd, bytes, flags))? {
                Some(n) => stream.sent(n),
                None => break,
            }
        }
        Ok(())
    }

    /// Receives what is there; true if more may be there already.
    fn receive(&self, fd: &OwnedFd, stream: &mut Stream<N>) -> Result<bool, EngineError> {
        // A bounded turn, so that completions and new requests are not kept waiting.
        for _ in 0..RECEIVES_PER_TURN {
            let Some(place) = stream.receiving()? else { return Ok(false) };
            let asked = place.len();
            let received = recv(fd, place, RecvFlags::DONTWAIT).map(|(n, _)| n);
            let Some(n) = self.transfer(received)? else { return Ok(false) };
            stream.received(n)?;
            if n < asked {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn transfer(&self, outcome: rustix::io::Result<usize>) -> Result<Option<usize>, EngineError> {
        use rustix::io::Errno;
        match outcome {
            Ok(n) => Ok(Some(n)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => {
                Err(EngineError::Lane { lane: self.lane, cause: Cause::Os(errno.into()) })
            }
        }
    }

    /// Sleeps until the socket is ready for what is due, new requests are there, or 200 ms are over.
    fn wait(&self, fd: &OwnedFd, stream: &mut Stream<N>) -> Result<(), EngineError> {
        let mut events = PollFlags::empty();
        events.set(PollFlags::OUT, stream.sending().is_some());
        events.set(PollFlags::IN, stream.slots.in_flight() > 0);
        let bell = self.intake.kick.bell(self.lane);
        let timeout = Timespec::try_from(WAKE).ok();
        let mut fds = [PollFd::new(bell, PollFlags::IN), PollFd::new(fd, events)];
        // A socket that nothing is expected of is not looked at: one that hung up would not sleep.
        let used = if events.is_empty() { &mut fds[..1] } else { &mut fds[..] };
        match poll(used, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(EngineError::Setup { what: "poll", source: errno.into() });
            }
        }
        if fds[0].revents().contains(PollFlags::IN) {
            silence(bell);
        }
        Ok(())
    }
}
