//! Moves the blocks of one disk: read and verified in the source, hashed and packed for the
//! destination by a few threads, and pushed in order.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

use super::spans::{Span, Units, including};
use crate::decoder::BlockDecoder;
use crate::encoder::{BlockEncoder, Encoders};
use crate::error::{Error, Result};
use crate::geometry::{BlockIndex, BlockSize};
use crate::map::{PageCursor, Slot};
use crate::point::{DiskSummary, Encoded, Entry, ParentBlock};
use crate::reader::DiskReader;
use crate::sink::{DiskSink, DiskWriter, ParentCursor};

/// Threads that read and encode. More than there are cores on small hosts, because most of their time
/// goes into waiting where the source is not on this host.
const WORKERS: usize = 4;
/// Stretches in each worker's hands: one it works on, one that waits. With [`WORKERS`] and the length
/// of a stretch this bounds the memory to some 16 MiB.
const IN_HAND: usize = 2 * WORKERS;

/// What of a disk is read.
pub(super) enum Reach {
    /// What differs from this older disk of the source.
    DifferenceTo(Box<DiskReader>),
    /// All data. What lies between is pushed as zero, for a parent may hold something there.
    Whole,
    /// All data. What lies between is zero without being said.
    Data,
}

/// One disk on its way.
pub(super) struct Transfer {
    pub(super) from: DiskReader,
    pub(super) reach: Reach,
    pub(super) to: BlockSize,
    /// Whether both repositories give equal blocks equal ids: then a block that is known there is
    /// not read.
    pub(super) equal_ids: bool,
}

/// A stretch to be read, with what the destination's parent holds there.
struct Job {
    bytes: u64,
    from: BlockIndex,
    entries: Vec<Entry>,
    to: BlockIndex,
    parents: Vec<ParentBlock>,
}

/// A stretch that is ready to be pushed.
struct Done {
    bytes: u64,
    read_bytes: u64,
    to: BlockIndex,
    blocks: Vec<Encoded>,
}

impl Transfer {
    fn units(&self) -> Units {
        Units::new(self.from.block_size(), self.to)
    }

    /// The stretches that are copied, ascending. They follow from the maps alone.
    fn spans(&self) -> impl Iterator<Item = Result<Span>> + '_ {
        let (units, size, blocks) = (self.units(), self.from.size_bytes(), self.from.blocks());
        let mut resized = None;
        let indices: Box<dyn Iterator<Item = Result<BlockIndex>> + '_> = match &self.reach {
            Reach::DifferenceTo(older) => {
                resized = units.boundary(size, older.size_bytes());
                let inside =
                    move |at: &Result<BlockIndex>| at.as_ref().map_or(true, |at| at.0 < blocks);
                Box::new(self.from.diff(older).filter(inside))
            }
            Reach::Whole | Reach::Data => {
                let entries = self.from.entries(BlockIndex(0));
                Box::new(entries.map(|entry| entry.map(|entry| entry.index)))
            }
        };
        let of_source = indices.map(move |index| index.map(|index| units.of_source(index)));
        units.spans(including(of_source, resized))
    }

    /// Bytes of all stretches.
    pub(super) fn bytes(&self) -> Result<u64> {
        let (units, size) = (self.units(), self.from.size_bytes());
        let length = |span: Result<Span>| {
            let range = units.range(span?, size);
            Ok(range.end - range.start)
        };
        self.spans().map(length).sum()
    }

    /// Copies the disk; `each` is told of bytes done and may end it. Returns what was written and how
    /// many bytes of blocks were read.
    pub(super) fn run(
        &self,
        writer: DiskWriter,
        each: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<(DiskSummary, u64)> {
        let DiskWriter { mut cursor, encoders, sink } = writer;
        let mut output = Output { sink, gaps: self.gaps(), next: 0, read_bytes: 0 };
        let moved: Result<()> = std::thread::scope(|scope| {
            let lanes: Result<Vec<Lane>> =
                (0..WORKERS).map(|_| Lane::start(scope, self.worker(&encoders)?)).collect();
            let lanes = lanes?;
            let mut in_hand = VecDeque::new();
            let mut source = self.from.cursor();
            for (number, span) in self.spans().enumerate() {
                if in_hand.len() == IN_HAND {
                    oldest(&lanes, &mut in_hand, &mut output, each)?;
                }
                let job = self.job(span?, &mut source, &mut cursor)?;
                lanes[number % WORKERS].give(job)?;
                in_hand.push_back(number % WORKERS);
            }
            while !in_hand.is_empty() {
                oldest(&lanes, &mut in_hand, &mut output, each)?;
            }
            Ok(())
        });
        moved?;
        output.finish(self.to.blocks(self.from.size_bytes())?)
    }

    fn gaps(&self) -> Gaps {
        if matches!(self.reach, Reach::Whole) { Gaps::AreZero } else { Gaps::AreRight }
    }

    fn worker(&self, encoders: &Encoders) -> Result<Worker> {
        let (decoder, encoder) = (self.from.decoder()?, encoders.encoder()?);
        let (size, equal_ids) = (self.to.bytes() as usize, self.equal_ids);
        Ok(Worker { decoder, encoder, size, equal_ids, bytes: Vec::new() })
    }

    fn job(&self, span: Span, source: &mut PageCursor, parent: &mut ParentCursor) -> Result<Job> {
        let range = self.units().range(span, self.from.size_bytes());
        let blocks = |size: BlockSize| {
            let size = u64::from(size.bytes());
            range.start / size..range.end.div_ceil(size)
        };
        let (from, to) = (blocks(self.from.block_size()), blocks(self.to));
        let mut entries = Vec::new();
        for index in from.clone().map(BlockIndex) {
            if let Some(Slot::Data(id, location)) = source.slot(index)? {
                entries.push(Entry { index, id, location });
            }
        }
        // A stretch has at most 256 blocks.
        let parents = parent.parent_blocks(BlockIndex(to.start), (to.end - to.start) as u32)?;
        let (from, to) = (BlockIndex(from.start), BlockIndex(to.start));
        Ok(Job { bytes: range.end - range.start, from, entries, to, parents })
    }
}

/// Takes the oldest stretch in hand and pushes it.
fn oldest(
    lanes: &[Lane],
    in_hand: &mut VecDeque<usize>,
    output: &mut Output,
    each: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let Some(lane) = in_hand.pop_front() else { return Ok(()) };
    let done = lanes[lane].take()?;
    let bytes = done.bytes;
    output.push(done)?;
    each(bytes)
}

/// What the blocks are that are not copied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gaps {
    /// As in the parent, or zero where there is none.
    AreRight,
    AreZero,
}

/// The destination's side.
struct Output {
    sink: DiskSink,
    gaps: Gaps,
    next: u64,
    read_bytes: u64,
}

impl Output {
    fn push(&mut self, done: Done) -> Result<()> {
        self.fill_gap(done.to.0)?;
        self.next = done.to.0 + done.blocks.len() as u64;
        self.read_bytes += done.read_bytes;
        for (index, block) in (done.to.0..).zip(done.blocks) {
            self.sink.push(BlockIndex(index), block)?;
        }
        Ok(())
    }

    fn fill_gap(&mut self, until: u64) -> Result<()> {
        match self.gaps {
            Gaps::AreRight => Ok(()),
            Gaps::AreZero => {
                self.sink.push_zero_range(BlockIndex(self.next), until.saturating_sub(self.next))
            }
        }
    }

    fn finish(mut self, blocks: u64) -> Result<(DiskSummary, u64)> {
        self.fill_gap(blocks)?;
        Ok((self.sink.finish()?, self.read_bytes))
    }
}

/// Reads and encodes, in a thread of its own.
struct Worker {
    decoder: BlockDecoder,
    encoder: BlockEncoder,
    size: usize,
    equal_ids: bool,
    bytes: Vec<u8>,
}

impl Worker {
    fn run(&mut self, job: Job) -> Result<Done> {
        let Job { bytes, from, mut entries, to, parents } = job;
        let mut known: Vec<Option<Encoded>> = vec![None; parents.len()];
        if self.equal_ids {
            entries.retain(|entry| {
                // Blocks of both sides have one size then.
                let at = (entry.index.0 - from.0) as usize;
                known[at] = self.encoder.recognise(&entry.id, parents[at]);
                known[at].is_none()
            });
        }
        // At most a stretch, or one block.
        self.bytes.resize(bytes as usize, 0);
        self.decoder.read_many(from, &entries, &mut self.bytes)?;
        let read_bytes = self.decoder.raw_bytes(&entries);
        let pieces = self.bytes.chunks(self.size).zip(known).zip(parents);
        let encode = |((data, known), parent): ((&[u8], Option<Encoded>), ParentBlock)| {
            known.unwrap_or_else(|| self.encoder.encode(data, parent))
        };
        Ok(Done { bytes, read_bytes, to, blocks: pieces.map(encode).collect() })
    }
}

/// The ways to and from a worker, which ends with them.
struct Lane {
    jobs: SyncSender<Job>,
    done: Receiver<Result<Done>>,
}

impl Lane {
    fn start<'scope>(scope: &'scope Scope<'scope, '_>, mut worker: Worker) -> Result<Self> {
        let (jobs, taken) = sync_channel::<Job>(IN_HAND);
        let (tell, done) = sync_channel(IN_HAND);
        let work = move || {
            for job in taken {
                // Nobody listens any more after a failure elsewhere.
                if tell.send(worker.run(job)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("icecore-copy".into());
        thread.spawn_scoped(scope, work).map_err(|error| Error::Refused {
            what: format!("a thread that copies could not be started: {error}"),
            advice: "raise the limit of threads, or run fewer jobs at once",
        })?;
        Ok(Self { jobs, done })
    }

    fn give(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| ended())
    }

    fn take(&self) -> Result<Done> {
        self.done.recv().unwrap_or_else(|_| Err(ended()))
    }
}

fn ended() -> Error {
    Error::Refused {
        what: "a thread that copies ended by itself".into(),
        advice: "report this as a defect",
    }
}
