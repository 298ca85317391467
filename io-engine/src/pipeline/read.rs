//! Reader -> parallel workers -> ordered sink.
//!
//! Five kinds of threads: the planner (cuts the plan into requests, reserves the memory of each,
//! asks the repository what it must), the IO threads (which do nothing that could keep a reply
//! waiting), the workers, and the sink. Memory and places are reserved by the planner in ascending
//! order, so whatever the sink waits for already has all that it needs: no deadlock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::ordered::Reorder;
use super::{Options, spawn};
use crate::backend::{Completion, Feed, LaneSet, Request, queue};
use crate::budget::{Budget, Reservation};
use crate::buffer::Pool;
use crate::control::Halt;
use crate::error::EngineError;
use crate::limits::{ITEM_COST, WAKE};
use crate::pacing::Ticket;
use crate::plan::{Blocks, Kind, PlanError, Run};
use crate::stats::Latency;
use crate::wire::Op;

/// What a job adds to the reading.
///
/// `prepare` and `sink` see the runs in ascending order, each in a thread of its own.
pub(crate) struct Job<Prepare, Worker, Sink> {
    /// Asked for each run before it is read.
    pub(crate) prepare: Prepare,
    /// One for each worker thread: from what was read to what the sink takes, with the bytes of
    /// memory that the latter holds.
    pub(crate) workers: Vec<Worker>,
    /// Takes the results; `None` for a run of zeroes, which is not read.
    pub(crate) sink: Sink,
    /// What it is for.
    pub(crate) purpose: Purpose,
}

/// What a job is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Storing: results hold up to as much memory as what was read, and count as done.
    Store,
    /// Hashing: results are small, and nothing is done with them that would count.
    Hash,
}

/// A run of blocks that has been read.
pub(crate) struct Piece<'a, P> {
    pub(crate) run: Run,
    pub(crate) disk: Blocks,
    pub(crate) prepared: P,
    /// `None` where the source says that all of it is a hole.
    bytes: Option<&'a [u8]>,
}

impl<P> Piece<'_, P> {
    /// The content of the `nth` block of the run; `None` if it is zero.
    pub(crate) fn block(&self, nth: u64) -> Option<&[u8]> {
        let whole = self.disk.span(self.run.first, self.run.count);
        let block = self.disk.span(self.run.first + nth, 1);
        // Both lie within one request, so within 32 bits.
        let from = (block.offset - whole.offset) as usize;
        self.bytes?.get(from..from + block.len as usize)
    }
}

/// What travels with a request.
struct Note<P> {
    seq: u64,
    run: Run,
    prepared: P,
    hold: Reservation,
    /// Given back as soon as the reply is there.
    ticket: Option<Ticket>,
}

/// What arrives at the sink.
struct Outcome<T> {
    run: Run,
    out: Option<T>,
    /// Given back when the sink is done with it.
    _hold: Reservation,
}

/// The parts that all threads of one run share.
struct Shared<'a> {
    halt: &'a Halt,
    disk: Blocks,
    pool: Pool,
    /// Places between planner and sink: results and their order.
    places: Arc<Budget>,
    per_request: u64,
    purpose: Purpose,
}

/// Reads the runs of `plan` from `set` and carries out `job` with them.
///
/// # Errors
/// The first error of any thread; nothing of what the job has produced may then be used.
pub(crate) fn read<P, T, Prepare, Worker, Sink>(
    set: &mut LaneSet,
    disk: Blocks,
    plan: impl Iterator<Item = Result<Run, PlanError>> + Send,
    options: &Options,
    mut job: Job<Prepare, Worker, Sink>,
) -> Result<Latency, EngineError>
where
    P: Send,
    T: Send,
    Prepare: FnMut(Run) -> Result<P, EngineError> + Send,
    Worker: FnMut(Piece<'_, P>) -> Result<(T, u64), EngineError> + Send,
    Sink: FnMut(Run, Option<T>) -> Result<(), EngineError> + Send,
{
    let halt = &Halt::new(options.control.clone());
    let request = set.request_bytes(disk.block)?;
    let _memory = options.take_memory(halt, request)?;
    let store = job.purpose == Purpose::Store;
    let places = options.memory / if store { 2 } else { 8 };
    let shared = &Shared {
        halt,
        disk,
        pool: Pool::new(options.memory - places),
        places: Budget::new(places),
        per_request: disk.per_request(request),
        purpose: job.purpose,
    };
    let (feed, intake) = queue::<Note<P>>(set.threads())?;
    let (read_in, read_out) = unbounded::<Completion<Note<P>>>();
    let (done_in, done_out) = unbounded::<(u64, Outcome<T>)>();
    let is_stored = AtomicBool::new(false);
    let latency = std::thread::scope(|scope| {
        let (priority, zeroes) = (options.priority, done_in.clone());
        let mut prepare = job.prepare;
        spawn(scope, halt, "icecore-plan", move || {
            priority.apply();
            shared.plan(plan, &mut prepare, &feed, &zeroes)
        });
        for mut worker in job.workers {
            let (from, to) = (read_out.clone(), done_in.clone());
            spawn(scope, halt, "icecore-work", move || {
                priority.apply();
                shared.work(&mut worker, &from, &to)
            });
        }
        drop((read_out, done_in));
        let sink = &mut job.sink;
        let (caller, is_stored) = (std::thread::current(), &is_stored);
        let sink = spawn(scope, halt, "icecore-sink", move || {
            priority.apply();
            let stored = shared.sink(sink, &done_out);
            is_stored.store(true, Relaxed);
            caller.unpark();
            stored
        });
        let io = spawn(scope, halt, "icecore-io", move || {
            let progress = &halt.control.progress;
            Ok(set.run(intake, halt, &|mut done: Completion<Note<P>>| {
                drop(done.request.note.ticket.take());
                progress.read_bytes.fetch_add(u64::from(done.request.len), Relaxed);
                // Nobody listens only after a failure.
                drop(read_in.send(done));
            }))
        });
        let latency = io.and_then(|io| io.join().ok().flatten());
        // All is read and nothing lies unread: a slow store may take its time for the rest.
        while sink.as_ref().is_some_and(|sink| !sink.is_finished()) && !is_stored.load(Relaxed) {
            halt.pulse();
            std::thread::park_timeout(WAKE);
        }
        latency
    });
    halt.outcome()?;
    Ok(latency.unwrap_or_default())
}

impl Shared<'_> {
    fn plan<P, T>(
        &self,
        plan: impl Iterator<Item = Result<Run, PlanError>>,
        prepare: &mut impl FnMut(Run) -> Result<P, EngineError>,
        feed: &Feed<Note<P>>,
        zeroes: &Sender<(u64, Outcome<T>)>,
    ) -> Result<(), EngineError> {
        let mut seq = 0;
        for run in plan {
            let run = run?;
            if run.kind == Kind::Zero {
                let hold = self.places.reserve(ITEM_COST, || self.halt.stopped())?;
                drop(zeroes.send((seq, Outcome { run, out: None, _hold: hold })));
                seq += 1;
                continue;
            }
            let mut first = run.first;
            while first < run.first + run.count {
                let paced = self.disk.per_request(self.halt.control.pacing.request_bytes());
                let count = self.per_request.min(paced).min(run.first + run.count - first);
                let piece = Run { first, count, ..run };
                self.ask(seq, piece, prepare, feed)?;
                first += count;
                seq += 1;
            }
        }
        Ok(())
    }

    /// Reserves all that one piece will need on its way, then has it read.
    fn ask<P>(
        &self,
        seq: u64,
        run: Run,
        prepare: &mut impl FnMut(Run) -> Result<P, EngineError>,
        feed: &Feed<Note<P>>,
    ) -> Result<(), EngineError> {
        let span = self.disk.span(run.first, run.count);
        let results = if self.purpose == Purpose::Store { span.len } else { 0 };
        let hold = self.places.reserve(place_bytes(run.count) + results, || self.halt.stopped())?;
        let prepared = prepare(run)?;
        // A request is at most 32 bits long.
        let len = span.len as u32;
        let buf = self.pool.get(len as usize, || self.halt.stopped())?;
        // Last, so that nothing counts as under way that still waits for memory.
        let ticket = self.halt.control.pacing.enter(span.len, || self.halt.stopped());
        let ticket = Some(ticket.ok_or(EngineError::Cancelled)?);
        let note = Note { seq, run, prepared, hold, ticket };
        feed.send(
            Request { op: Op::Read, offset: span.offset, len, buf: Some(buf), note },
            self.halt,
        )
    }

    fn work<P, T>(
        &self,
        worker: &mut impl FnMut(Piece<'_, P>) -> Result<(T, u64), EngineError>,
        from: &Receiver<Completion<Note<P>>>,
        to: &Sender<(u64, Outcome<T>)>,
    ) -> Result<(), EngineError> {
        for Completion { request, hole } in from {
            if self.halt.stopped() {
                continue;
            }
            let Note { seq, run, prepared, mut hold, .. } = request.note;
            let bytes = request.buf.as_deref().filter(|_| !hole);
            let piece = Piece { run, disk: self.disk, prepared, bytes };
            let (out, held) = worker(piece)?;
            drop(request.buf);
            hold.shrink_to(place_bytes(run.count) + held);
            drop(to.send((seq, Outcome { run, out: Some(out), _hold: hold })));
        }
        Ok(())
    }

    fn sink<T>(
        &self,
        sink: &mut impl FnMut(Run, Option<T>) -> Result<(), EngineError>,
        from: &Receiver<(u64, Outcome<T>)>,
    ) -> Result<(), EngineError> {
        let mut reorder = Reorder::new();
        for (seq, result) in from {
            if self.halt.stopped() {
                continue;
            }
            reorder.insert(seq, result);
            while let Some(Outcome { run, out, _hold }) = reorder.pop() {
                let zero = out.is_none();
                sink(run, out)?;
                if self.purpose == Purpose::Store {
                    self.count(run, zero);
                }
            }
        }
        if !reorder.is_empty() && !self.halt.stopped() {
            return Err(EngineError::Lanes("a part of the disk got lost on its way".into()));
        }
        Ok(())
    }
}

impl Shared<'_> {
    fn count(&self, run: Run, zero: bool) {
        let bytes = self.disk.span(run.first, run.count).len;
        let progress = &self.halt.control.progress;
        progress.done_bytes.fetch_add(bytes, Relaxed);
        if zero {
            progress.zero_bytes.fetch_add(bytes, Relaxed);
        }
    }
}

/// Memory that a run of `count` blocks takes between planner and sink beside its data: ids,
/// parents, places.
fn place_bytes(count: u64) -> u64 {
    ITEM_COST + count * 128
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::EngineChoice;
    use crate::backend::conformance::engines;
    use crate::lane::Lane;
    use crate::pacing::Pace;
    use crate::plan::Planner;

    /// A store that is slow with the last of it must not be taken for a worker that hangs.
    #[test]
    fn the_pulse_goes_on_until_all_is_stored() {
        let size = 1u64 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let mut set = LaneSet::new(Lane::files(file, 1).unwrap(), EngineChoice::Auto).unwrap();
        let options = Options { workers: 1, ..Options::new(Budget::new(8 << 20), 8 << 20) };
        let pulse = || options.control.pulse.load(Relaxed);
        let mut beats = Vec::new();
        let job = Job {
            prepare: |_| Ok(()),
            workers: vec![|piece: Piece<'_, ()>| Ok(((), piece.run.count * 65536))],
            sink: |_: Run, _: Option<()>| {
                // By then the rest is read.
                std::thread::sleep(Duration::from_millis(400));
                let before = pulse();
                std::thread::sleep(Duration::from_millis(600));
                beats.push(pulse() - before);
                Ok(())
            },
            purpose: Purpose::Store,
        };
        let disk = Blocks { size, block: 65536 };
        let plan = std::iter::once(Ok(Run { first: 0, count: 16, kind: Kind::Data }));
        read(&mut set, disk, plan, &options, job).unwrap();
        assert!(!beats.is_empty() && beats.iter().all(|beats| *beats >= 2), "{beats:?}");
    }

    /// A sink that takes nothing for a while must not let more than the memory be read.
    #[test]
    fn a_slow_sink_bounds_what_is_read() {
        let size = 64u64 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for choice in engines() {
            let lanes = Lane::files(file.try_clone().unwrap(), 2).unwrap();
            let mut set = LaneSet::new(lanes, choice).unwrap();
            let options = Options { workers: 2, ..Options::new(Budget::new(8 << 20), 8 << 20) };
            let (open, progress) = (AtomicBool::new(false), &options.control.progress);
            let disk = Blocks { size, block: 65536 };
            let mut order = Vec::new();
            let job = Job {
                prepare: |_| Ok(()),
                workers: vec![|piece: Piece<'_, ()>| Ok(((), piece.run.count * 65536)); 2],
                sink: |run: Run, _: Option<()>| {
                    while !open.load(Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    order.push(run.first);
                    Ok(())
                },
                purpose: Purpose::Store,
            };
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(400));
                    let ahead = progress.read_bytes.load(Relaxed);
                    open.store(true, Relaxed);
                    assert!((1 << 20..=8 << 20).contains(&ahead), "{ahead} bytes ahead");
                });
                let plan = Planner::new(crate::prove::whole_disk(size), disk);
                read(&mut set, disk, plan, &options, job).unwrap();
            });
            assert_eq!(order, (0..64).map(|n| n * 16).collect::<Vec<_>>());
            assert_eq!(progress.done_bytes.load(Relaxed), size);
        }
    }

    /// A pause holds requests back, not the sign of life: nobody may take the run for stalled.
    /// After it requests are as small as they are asked to be.
    #[test]
    fn a_paused_run_asks_for_nothing_and_shows_life() {
        let size = 8u64 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for choice in engines() {
            let lanes = Lane::files(file.try_clone().unwrap(), 2).unwrap();
            let mut set = LaneSet::new(lanes, choice).unwrap();
            let options = Options { workers: 1, ..Options::new(Budget::new(8 << 20), 8 << 20) };
            let control = &options.control;
            control.pacing.govern(Pace::PAUSE);
            let disk = Blocks { size, block: 65536 };
            let job = Job {
                prepare: |run: Run| {
                    // The first piece was cut before the pace was set.
                    assert!(run.first == 0 || run.count <= 2, "{run:?}");
                    Ok(())
                },
                workers: vec![|_: Piece<'_, ()>| Ok(((), 0))],
                sink: |_, _: Option<()>| Ok(()),
                purpose: Purpose::Hash,
            };
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let pulse = || control.pulse.load(Relaxed);
                    let wait = |from: u64| {
                        while pulse() < from + 2 {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                    };
                    wait(0);
                    wait(pulse());
                    assert_eq!(control.progress.read_bytes.load(Relaxed), 0);
                    control.pacing.govern(Pace {
                        in_flight: 1,
                        request_bytes: 128 << 10,
                        ..Pace::FREE
                    });
                });
                let plan = Planner::new(crate::prove::whole_disk(size), disk);
                read(&mut set, disk, plan, &options, job).unwrap();
            });
            assert_eq!(control.progress.read_bytes.load(Relaxed), size);
        }
    }

    #[test]
    fn a_panic_in_a_worker_stops_everyone() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let mut set = LaneSet::new(Lane::files(file, 1).unwrap(), EngineChoice::Auto).unwrap();
        let options = Options { workers: 1, ..Options::new(Budget::new(4 << 20), 4 << 20) };
        let disk = Blocks { size: 64 << 20, block: 65536 };
        let job = Job {
            prepare: |_| Ok(()),
            workers: vec![|_: Piece<'_, ()>| -> Result<((), u64), EngineError> { panic!("test") }],
            sink: |_, _: Option<()>| Ok(()),
            purpose: Purpose::Hash,
        };
        let run = std::panic::AssertUnwindSafe(|| {
            let plan = Planner::new(crate::prove::whole_disk(disk.size), disk);
            read(&mut set, disk, plan, &options, job)
        });
        assert!(std::panic::catch_unwind(run).is_err());
    }
}
