//! Steps -> parallel decoders -> writer.
//!
//! Writes need no order among themselves, so a decoded buffer goes straight to the lanes.

use std::fs::File;
use std::sync::atomic::Ordering::Relaxed;

use crossbeam_channel::{Receiver, Sender, unbounded};
use icecore_repository::{BlockDecoder, BlockIndex, Entry, Part, is_zero};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{Options, spawn};
use crate::backend::{Completion, Feed, LaneSet, Request, queue};
use crate::buffer::{Buffer, Pool};
use crate::control::Halt;
use crate::error::{Cause, EngineError, Span};
use crate::limits::{MAX_EFFECT, PAGE, SCATTERED_BYTES_MAX};
use crate::plan::Blocks;
use crate::stats::Latency;
use crate::wire::Op;

/// One step of a restore, in whole blocks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Consecutive DATA blocks, at most one request long.
    Data(Vec<Entry>),
    /// A run that must read as zeroes.
    Zero { first: u64, count: u64 },
    /// A run that does read as zeroes already, and shall.
    Skip { first: u64, count: u64 },
}

/// Those who fetch the blocks of a point, and how many bytes of the disk each is given at once.
pub(crate) struct Fetchers {
    pub(crate) each: Vec<BlockDecoder>,
    pub(crate) batch_bytes: u64,
}

/// A buffer to be filled and written.
struct Task {
    entries: Vec<Entry>,
    span: Span,
    buf: Buffer,
}

impl Task {
    fn part(&mut self) -> Part<'_> {
        let first = self.entries.first().map_or(BlockIndex(0), |entry| entry.index);
        Part { first, entries: &self.entries, out: &mut self.buf }
    }
}

/// Tasks that one worker does at once: what lies together in the repository is fetched at once.
type Batch = Vec<Task>;

struct Shared<'a> {
    halt: &'a Halt,
    /// Tasks of a batch are at most so long together, or it has one.
    batch_bytes: u64,
    disk: Blocks,
    pool: Pool,
    holes: Holes,
}

/// What is done about zeroes within blocks.
#[derive(Debug)]
pub(crate) enum Holes {
    /// They are written.
    Fill,
    /// They are left out: the target is this file, blank, and keeps holes of a page.
    Keep(File),
}

impl Holes {
    /// How many bytes of zeroes at the beginning of `bytes` are left out, and how many bytes to
    /// write follow.
    fn cut(&self, bytes: &[u8]) -> (usize, usize) {
        match self {
            Self::Fill => (0, bytes.len()),
            Self::Keep(_) => first_data(bytes),
        }
    }

    /// Makes room for a short write. Of itself ext4 sets aside up to 2 MiB around each: a million
    /// scattered ones then search all of the file system, and fill it.
    fn allocate(&self, span: Span) -> Result<(), EngineError> {
        let Self::Keep(file) = self else { return Ok(()) };
        if span.len >= SCATTERED_BYTES_MAX {
            return Ok(());
        }
        match fallocate(file, FallocateFlags::KEEP_SIZE, span.offset, span.len) {
            Err(Errno::NOSPC | Errno::DQUOT) => Err(EngineError::Io {
                op: Op::Write,
                span,
                cause: Cause::Os(std::io::Error::from(Errno::NOSPC)),
            }),
            // It was a hint: a file system that does not know it takes the write all the same.
            _ => Ok(()),
        }
    }
}

/// Carries out `steps` on `set`; everything is written, nothing is flushed when it returns.
pub(crate) fn write(
    set: &mut LaneSet,
    disk: Blocks,
    steps: impl Iterator<Item = Result<Step, EngineError>> + Send,
    fetchers: Fetchers,
    holes: Holes,
    options: &Options,
) -> Result<Latency, EngineError> {
    let halt = &Halt::new(options.control.clone());
    let request = set.request_bytes(disk.block)?;
    let _memory = options.take_memory(halt, request)?;
    // Whoever fills a batch waits for memory with what it has: it must not have all of it.
    let batch_bytes = fetchers.batch_bytes.min(options.memory / 2);
    let shared = &Shared { halt, batch_bytes, disk, pool: Pool::new(options.memory), holes };
    let (feed, intake) = queue::<()>(set.threads())?;
    let (task_in, task_out) = unbounded::<Batch>();
    let latency = std::thread::scope(|scope| {
        let (priority, zeroes) = (options.priority, feed.clone());
        spawn(scope, halt, "icecore-plan", move || {
            priority.apply();
            shared.plan(steps, &zeroes, &task_in)
        });
        for mut fetcher in fetchers.each {
            let (from, to) = (task_out.clone(), feed.clone());
            spawn(scope, halt, "icecore-work", move || {
                priority.apply();
                shared.work(&mut fetcher, &from, &to)
            });
        }
        drop((task_out, feed));
        let io = spawn(scope, halt, "icecore-io", move || {
            Ok(set.run(intake, halt, &|done: Completion<()>| count(halt, &done.request)))
        });
        io.and_then(|io| io.join().ok().flatten())
    });
    halt.outcome()?;
    Ok(latency.unwrap_or_default())
}

fn count(halt: &Halt, request: &Request<()>) {
    let (progress, bytes) = (&halt.control.progress, u64::from(request.len));
    progress.done_bytes.fetch_add(bytes, Relaxed);
    if request.op != Op::Write {
        progress.zero_bytes.fetch_add(bytes, Relaxed);
    }
}

impl Shared<'_> {
    fn plan(
        &self,
        steps: impl Iterator<Item = Result<Step, EngineError>>,
        zeroes: &Feed<()>,
        tasks: &Sender<Batch>,
    ) -> Result<(), EngineError> {
        let mut batch = Batch::new();
        for step in steps {
            match step? {
                Step::Zero { first, count } => self.zero(self.disk.span(first, count), zeroes)?,
                Step::Skip { first, count } => {
                    let skipped = self.disk.span(first, count).len;
                    self.halt.control.progress.skipped_bytes.fetch_add(skipped, Relaxed);
                }
                Step::Data(entries) => {
                    let Some(first) = entries.first() else { continue };
                    let span = self.disk.span(first.index.0, entries.len() as u64);
                    // Only the rate counts here: the memory bounds what is under way.
                    let pacing = &self.halt.control.pacing;
                    let ticket = pacing.enter(span.len, || self.halt.stopped());
                    drop(ticket.ok_or(EngineError::Cancelled)?);
                    // Whoever waits for memory must not hold what he waits for: a batch has no more
                    // than half of the pool, as the pool counts it.
                    let cost = |span: &Span| Pool::cost(span.len as usize) as u64;
                    let held: u64 = batch.iter().map(|task| cost(&task.span)).sum();
                    if !batch.is_empty() && held + cost(&span) > self.batch_bytes {
                        drop(tasks.send(std::mem::take(&mut batch)));
                    }
                    // At most one request, so within 32 bits.
                    let buf = self.pool.get(span.len as usize, || self.halt.stopped())?;
                    batch.push(Task { entries, span, buf });
                    if self.batch_bytes == 0 {
                        drop(tasks.send(std::mem::take(&mut batch)));
                    }
                }
            }
        }
        drop(tasks.send(batch));
        Ok(())
    }

    fn zero(&self, span: Span, feed: &Feed<()>) -> Result<(), EngineError> {
        let mut done = 0;
        while done < span.len {
            let len = (span.len - done).min(u64::from(MAX_EFFECT));
            let op = Op::WriteZeroes { may_trim: true };
            let offset = span.offset + done;
            let request = Request { op, offset, len: len as u32, buf: None, note: () };
            feed.send(request, self.halt)?;
            done += len;
        }
        Ok(())
    }

    fn work(
        &self,
        fetcher: &mut BlockDecoder,
        from: &Receiver<Batch>,
        to: &Feed<()>,
    ) -> Result<(), EngineError> {
        for mut batch in from {
            let Some(first) = batch.first().filter(|_| !self.halt.stopped()) else { continue };
            let span = first.span;
            let mut parts: Vec<Part<'_>> = batch.iter_mut().map(Task::part).collect();
            let read = fetcher.read_parts(&mut parts);
            read.map_err(|source| EngineError::Repository { span, source })?;
            for task in batch {
                self.put(task.span.offset, task.buf, to)?;
            }
        }
        Ok(())
    }

    /// Has a buffer written, whole or without its holes.
    fn put(&self, mut offset: u64, mut buf: Buffer, to: &Feed<()>) -> Result<(), EngineError> {
        while !buf.is_empty() {
            let (zeroes, data) = self.holes.cut(&buf);
            drop(buf.split_to(zeroes));
            offset += zeroes as u64;
            // At most one request long, so within 32 bits.
            let len = data as u32;
            let part = buf.split_to(data);
            if len > 0 {
                self.holes.allocate(Span::new(offset, u64::from(len)))?;
                let request = Request { op: Op::Write, offset, len, buf: Some(part), note: () };
                to.send(request, self.halt)?;
            }
            offset += u64::from(len);
        }
        Ok(())
    }
}

/// How many bytes of zero pages `bytes` begins with, and how many bytes of other pages follow.
fn first_data(bytes: &[u8]) -> (usize, usize) {
    let length = |zero: bool, of: &[u8]| {
        let pages = of.chunks(PAGE).take_while(|page| is_zero(page) == zero);
        pages.map(<[u8]>::len).sum::<usize>()
    };
    let zeroes = length(true, bytes);
    (zeroes, length(false, &bytes[zeroes..]))
}

/// Makes what was written durable, on each lane in turn: a server may promise nothing across
/// connections.
pub(crate) fn flush(set: &mut LaneSet, options: &Options) -> Result<Latency, EngineError> {
    let halt = &Halt::new(options.control.clone());
    let mut latency = Latency::default();
    set.each_lane(|single| {
        let (feed, intake) = queue::<()>(1)?;
        let request = Request { op: Op::Flush, offset: 0, len: 0, buf: None, note: () };
        feed.send(request, halt)?;
        drop(feed);
        latency.merge(&single.run(intake, halt, &|_| {}));
        halt.outcome()
    })?;
    Ok(latency)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_whole_pages() {
        let mut bytes = vec![0; 4 * PAGE + 100];
        assert_eq!(first_data(&bytes), (4 * PAGE + 100, 0));
        bytes[PAGE] = 1;
        bytes[3 * PAGE - 1] = 1;
        assert_eq!(first_data(&bytes), (PAGE, 2 * PAGE));
        assert_eq!(first_data(&bytes[PAGE..]), (0, 2 * PAGE));
        bytes[4 * PAGE + 99] = 1;
        assert_eq!(first_data(&bytes[3 * PAGE..]), (PAGE, 100));
        assert_eq!(first_data(&[]), (0, 0));
    }
}
