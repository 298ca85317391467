//! The blocks of a point in the order in which a restore needs them.

use icecore_repository::{BlockIndex, DiskReader, Entries, Entry};

use crate::error::{EngineError, Span};
use crate::pipeline::write::Step;
use crate::plan::{Blocks, PlanError};

/// A run of whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// Number of the first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Ascending, disjoint runs of blocks, or why their source could not go on.
pub type BlockRanges<'a> = Box<
    dyn Iterator<Item = Result<BlockRange, Box<dyn std::error::Error + Send + Sync>>> + Send + 'a,
>;

/// Makes the same ranges anew each time: they are gone through once to write and once to verify.
pub type RangesOf<'a> = &'a (dyn Fn() -> BlockRanges<'a> + Sync);

impl Blocks {
    /// The length of `range` if it lies within the disk.
    pub(crate) fn checked(&self, range: BlockRange) -> Result<u64, PlanError> {
        let fits = range.first.checked_add(range.count).is_some_and(|end| end <= self.count());
        if fits {
            return Ok(range.count);
        }
        let block = u64::from(self.block);
        let span = Span::new(range.first.saturating_mul(block), range.count.saturating_mul(block));
        Err(PlanError::BeyondEnd { span, size: self.size })
    }
}

/// Skipping so many blocks costs more than opening the map anew at the place wanted.
const SEEK_BLOCKS: u64 = 4096;

/// Goes through the DATA blocks of a point in ascending order, with leaps.
pub(crate) struct Cursor<'a> {
    point: &'a DiskReader,
    disk: Blocks,
    entries: Option<Entries>,
    ahead: Option<Entry>,
    at: u64,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(point: &'a DiskReader, disk: Blocks) -> Self {
        Self { point, disk, entries: None, ahead: None, at: 0 }
    }

    /// The next DATA block at or after `from`; `from` never descends.
    pub(crate) fn peek(&mut self, from: u64) -> Result<Option<Entry>, EngineError> {
        if self.entries.is_none() || from > self.at.saturating_add(SEEK_BLOCKS) {
            self.ahead = self.ahead.filter(|entry| entry.index.0 >= from);
            if self.ahead.is_none() {
                self.entries = Some(self.point.entries(BlockIndex(from)));
            }
        }
        self.at = from;
        while self.ahead.is_none_or(|entry| entry.index.0 < from) {
            match self.entries.as_mut().and_then(Iterator::next) {
                Some(entry) => self.ahead = Some(entry.map_err(|source| self.failed(source))?),
                None => return Ok(None),
            }
        }
        Ok(self.ahead)
    }

    /// All DATA blocks among `count` from `first`.
    pub(crate) fn collect(&mut self, first: u64, count: u64) -> Result<Vec<Entry>, EngineError> {
        let mut found = Vec::new();
        let mut at = first;
        while let Some(entry) = self.peek(at)?.filter(|entry| entry.index.0 < first + count) {
            at = entry.index.0 + 1;
            found.push(entry);
        }
        Ok(found)
    }

    fn failed(&self, source: icecore_repository::Error) -> EngineError {
        EngineError::Repository { span: self.disk.span(self.at, 1), source }
    }
}

/// Turns runs of blocks into the steps that give a target the content of a point.
pub(crate) struct Steps<'a> {
    cursor: Cursor<'a>,
    ranges: BlockRanges<'a>,
    /// The rest of the present range: first block, end.
    rest: (u64, u64),
    per_request: u64,
    skip_zeroes: bool,
    over: bool,
}

impl<'a> Steps<'a> {
    /// `skip_zeroes`: the target is known to be blank.
    pub(crate) fn new(
        point: &'a DiskReader,
        disk: Blocks,
        ranges: BlockRanges<'a>,
        per_request: u64,
        skip_zeroes: bool,
    ) -> Self {
        let cursor = Cursor::new(point, disk);
        Self { cursor, ranges, rest: (0, 0), per_request, skip_zeroes, over: false }
    }

    fn step(&mut self) -> Result<Option<Step>, EngineError> {
        loop {
            let (first, end) = self.rest;
            if first >= end {
                if !self.next_range()? {
                    return Ok(None);
                }
                continue;
            }
            match self.cursor.peek(first)?.filter(|entry| entry.index.0 < end) {
                Some(entry) if entry.index.0 == first => return self.data(first, end).map(Some),
                next => {
                    let stop = next.map_or(end, |entry| entry.index.0);
                    self.rest.0 = stop;
                    let count = stop - first;
                    return Ok(Some(match self.skip_zeroes {
                        true => Step::Skip { first, count },
                        false => Step::Zero { first, count },
                    }));
                }
            }
        }
    }

    fn next_range(&mut self) -> Result<bool, EngineError> {
        let Some(range) = self.ranges.next() else { return Ok(false) };
        let range = range.map_err(PlanError::Source)?;
        let count = self.cursor.disk.checked(range)?;
        if range.first < self.rest.1 {
            let span = self.cursor.disk.span(range.first, count);
            let after = self.cursor.disk.span(self.rest.1, 0).offset;
            return Err(PlanError::Descending { span, after }.into());
        }
        self.rest = (range.first, range.first + count);
        Ok(true)
    }

    /// The consecutive DATA blocks from `first` on, up to one request.
    fn data(&mut self, first: u64, end: u64) -> Result<Step, EngineError> {
        let stop = end.min(first + self.per_request);
        let mut entries = Vec::with_capacity(usize::try_from(stop - first).unwrap_or(0));
        let mut at = first;
        while at < stop {
            match self.cursor.peek(at)?.filter(|entry| entry.index.0 == at) {
                Some(entry) => entries.push(entry),
                None => break,
            }
            at += 1;
        }
        self.rest.0 = at;
        Ok(Step::Data(entries))
    }
}

impl Iterator for Steps<'_> {
    type Item = Result<Step, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let step = self.step();
        self.over = step.is_err();
        step.transpose()
    }
}
