//! The read plan: from ranges of bytes to requests of whole blocks. Pure.

use crate::error::Span;

/// One range of a disk and what is to be done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadItem {
    /// May have changed: read it.
    Data(Span),
    /// May have changed and is known to read as zeroes: recorded without being read.
    Zero(Span),
}

impl ReadItem {
    /// Its range, in bytes.
    pub fn span(&self) -> Span {
        match self {
            Self::Data(span) | Self::Zero(span) => *span,
        }
    }
}

/// One item of a plan, or why its source could not go on; such an error fails the run.
pub type PlanItem = Result<ReadItem, Box<dyn std::error::Error + Send + Sync>>;

/// Why a plan cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Items must ascend and not overlap.
    #[error("{span} begins before byte {after}, where the one before it ended")]
    Descending {
        /// The item.
        span: Span,
        /// End of the item before.
        after: u64,
    },
    /// An item reaches past the end of the disk.
    #[error("{span} reaches past the end of the disk at {size}; did it shrink?")]
    BeyondEnd {
        /// The item.
        span: Span,
        /// Size of the disk, in bytes.
        size: u64,
    },
    /// The source of the plan failed.
    #[error("{0}")]
    Source(Box<dyn std::error::Error + Send + Sync>),
}

/// What is done with a run of whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    Data,
}

/// Consecutive whole blocks of one kind; the last block of a disk may be short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) kind: Kind,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// Geometry of a disk in whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) size: u64,
    pub(crate) block: u32,
}

impl Blocks {
    /// Number of blocks, the short one included.
    pub(crate) fn count(&self) -> u64 {
        self.size.div_ceil(u64::from(self.block))
    }

    /// The bytes of `count` blocks from `first`, cut at the end of the disk.
    pub(crate) fn span(&self, first: u64, count: u64) -> Span {
        let start = (first * u64::from(self.block)).min(self.size);
        let end = (first + count).saturating_mul(u64::from(self.block)).min(self.size);
        Span::new(start, end - start)
    }

    /// How many blocks make one request of at most `max` bytes; at least one.
    pub(crate) fn per_request(&self, max: u32) -> u64 {
        u64::from((max / self.block).max(1))
    }
}

/// Turns ascending items into ascending, disjoint, merged runs of whole blocks.
///
/// A block touched by changed bytes is read, unless the zeroes cover it wholly. So of a zero range
/// only the whole blocks inside stay zero; its edges are read.
pub(crate) struct Planner<I> {
    items: I,
    disk: Blocks,
    /// End of the last item, in bytes.
    after: u64,
    /// Runs of the current item not yet merged, in order.
    fresh: [Option<Run>; 3],
    pending: Option<Run>,
    failed: bool,
}

impl<I: Iterator<Item = PlanItem>> Planner<I> {
    pub(crate) fn new(items: I, disk: Blocks) -> Self {
        Self { items, disk, after: 0, fresh: [None; 3], pending: None, failed: false }
    }

    fn check(&mut self, item: PlanItem) -> Result<ReadItem, PlanError> {
        let item = item.map_err(PlanError::Source)?;
        let (span, size) = (item.span(), self.disk.size);
        if span.offset < self.after {
            return Err(PlanError::Descending { span, after: self.after });
        }
        match span.offset.checked_add(span.len).filter(|end| *end <= size) {
            Some(end) => self.after = end,
            None => return Err(PlanError::BeyondEnd { span, size }),
        }
        Ok(item)
    }

    /// The runs of one item, before they are merged with their neighbours.
    fn widen(&self, item: ReadItem) -> [Option<Run>; 3] {
        let span = item.span();
        let (start, end, block) = (span.offset, span.offset + span.len, u64::from(self.disk.block));
        let (outer, outer_end) = (start / block, end.div_ceil(block));
        let inner = start.div_ceil(block);
        let inner_end = if end == self.disk.size { outer_end } else { end / block };
        let run = |kind, first: u64, end: u64| {
            (end > first).then(|| Run { kind, first, count: end - first })
        };
        match item {
            _ if span.len == 0 => [None; 3],
            ReadItem::Data(_) => [run(Kind::Data, outer, outer_end), None, None],
            ReadItem::Zero(_) => {
                if inner >= inner_end {
                    return [run(Kind::Data, outer, outer_end), None, None];
                }
                [
                    run(Kind::Data, outer, inner),
                    run(Kind::Zero, inner, inner_end),
                    run(Kind::Data, inner_end, outer_end),
                ]
            }
        }
    }

    /// Adds `run` behind what is pending; gives what can no longer change.
    fn merge(&mut self, mut run: Run) -> Option<Run> {
        let Some(mut last) = self.pending.take() else {
            self.pending = Some(run);
            return None;
        };
        if run.first < last.end() {
            // Both read one block, which the one before has: zeroes never share a block.
            run.count = run.end().saturating_sub(last.end());
            run.first = last.end();
        }
        if run.count == 0 {
            self.pending = Some(last);
            return None;
        }
        if run.kind == last.kind && run.first == last.end() {
            last.count += run.count;
            self.pending = Some(last);
            return None;
        }
        self.pending = Some(run);
        Some(last)
    }
}

impl<I: Iterator<Item = PlanItem>> Iterator for Planner<I> {
    type Item = Result<Run, PlanError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(fresh) = self.fresh.iter_mut().find(|slot| slot.is_some()) {
                let run = fresh.take()?;
                match self.merge(run) {
                    Some(done) => return Some(Ok(done)),
                    None => continue,
                }
            }
            if self.failed {
                return None;
            }
            let Some(item) = self.items.next() else {
                return self.pending.take().map(Ok);
            };
            match self.check(item) {
                Ok(item) => self.fresh = self.widen(item),
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u32 = 4096;

    fn plan(items: Vec<ReadItem>, size: u64) -> Result<Vec<Run>, PlanError> {
        Planner::new(items.into_iter().map(Ok), Blocks { size, block: BLOCK }).collect()
    }

    #[test]
    fn the_edges_of_zeroes_are_read_and_the_short_end_is_whole() {
        let size = 10 * 4096 + 100;
        let runs = plan(vec![ReadItem::Zero(Span::new(100, size - 100))], size).unwrap();
        let data = Run { kind: Kind::Data, first: 0, count: 1 };
        assert_eq!(runs, [data, Run { kind: Kind::Zero, first: 1, count: 10 }]);
        let last = Blocks { size, block: BLOCK }.span(10, 1);
        assert_eq!(last, Span::new(40960, 100));
    }

    #[test]
    fn a_zero_range_inside_one_block_is_read() {
        let runs = plan(vec![ReadItem::Zero(Span::new(10, 20))], 1 << 20).unwrap();
        assert_eq!(runs, [Run { kind: Kind::Data, first: 0, count: 1 }]);
    }

    #[test]
    fn bad_plans_are_refused() {
        let data = |offset, len| ReadItem::Data(Span::new(offset, len));
        assert!(matches!(plan(vec![data(0, 10)], 9), Err(PlanError::BeyondEnd { .. })));
        assert!(matches!(plan(vec![data(8, u64::MAX)], 9), Err(PlanError::BeyondEnd { .. })));
        let back = plan(vec![data(10, 10), data(15, 1)], 100);
        assert!(matches!(back, Err(PlanError::Descending { after: 20, .. })));
        let mut failing =
            Planner::new([Err("no status".into())].into_iter(), Blocks { size: 1, block: BLOCK });
        assert!(matches!(failing.next(), Some(Err(PlanError::Source(_)))));
        assert!(failing.next().is_none());
    }

    fn items() -> impl Strategy<Value = (Vec<ReadItem>, u64)> {
        let step = prop_oneof![1u64..3000, (1u64..8).prop_map(|n| n * 4096), 4000u64..30_000];
        let gap = prop_oneof![Just(0u64), 1u64..9000];
        prop::collection::vec((gap, step, any::<bool>()), 0..40).prop_flat_map(|parts| {
            let mut at = 0;
            let mut items = Vec::new();
            for (gap, len, zero) in parts {
                let span = Span::new(at + gap, len);
                at = span.offset + len;
                items.push(if zero { ReadItem::Zero(span) } else { ReadItem::Data(span) });
            }
            (Just(items), at.max(1)..at + 9000)
        })
    }

    /// What each block must become, block by block, from the definition.
    fn model(items: &[ReadItem], disk: Blocks) -> Vec<Option<Kind>> {
        let block = u64::from(disk.block);
        let mut kinds = vec![None; usize::try_from(disk.count()).unwrap()];
        for (index, kind) in kinds.iter_mut().enumerate() {
            let (start, end) = (index as u64 * block, (index as u64 + 1) * block);
            for item in items {
                let span = item.span();
                let item_end = span.offset + span.len;
                if span.offset >= end || item_end <= start {
                    continue;
                }
                let covered = span.offset <= start && item_end >= end.min(disk.size);
                *kind = Some(match item {
                    ReadItem::Zero(_) if covered => Kind::Zero,
                    _ => Kind::Data,
                });
            }
        }
        kinds
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn only_what_zeroes_cover_wholly_is_not_read((items, size) in items()) {
            let disk = Blocks { size, block: BLOCK };
            let runs = plan(items.clone(), size).unwrap();
            let mut kinds = vec![None; usize::try_from(disk.count()).unwrap()];
            let mut before: Option<Run> = None;
            for run in runs {
                prop_assert!(run.count > 0);
                if let Some(before) = before {
                    prop_assert!(before.end() <= run.first, "ascending and disjoint");
                }
                for index in run.first..run.end() {
                    kinds[usize::try_from(index).unwrap()] = Some(run.kind);
                }
                before = Some(run);
            }
            prop_assert_eq!(kinds, model(&items, disk));
        }
    }
}
