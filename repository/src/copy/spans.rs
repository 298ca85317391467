//! Which stretches of a disk are copied: pure.

use std::iter::Peekable;

use crate::error::Result;
use crate::geometry::{BlockIndex, BlockSize};

/// A stretch is read at once, so it is kept to this: a mebibyte in each worker's hands.
const SPAN_BYTES: u64 = 1 << 20;

/// How blocks of two sizes lie over each other: both are powers of two, so the larger one is whole in
/// either.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    from: u64,
    to: u64,
}

/// A stretch of units, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) count: u64,
}

impl Units {
    pub(super) fn new(from: BlockSize, to: BlockSize) -> Self {
        Self { from: u64::from(from.bytes()), to: u64::from(to.bytes()) }
    }

    fn bytes(self) -> u64 {
        self.from.max(self.to)
    }

    /// The unit in which a block of the source lies.
    pub(super) fn of_source(self, index: BlockIndex) -> u64 {
        index.0 / (self.bytes() / self.from)
    }

    /// The unit in which a disk was resized: blocks that have another length on the two disks lie
    /// in it and cannot be inherited.
    pub(super) fn boundary(self, size_bytes: u64, older_bytes: u64) -> Option<u64> {
        let common = size_bytes.min(older_bytes);
        let within = size_bytes != older_bytes && !common.is_multiple_of(self.bytes());
        within.then(|| common / self.bytes())
    }

    /// The bytes of a span on a disk of `size_bytes`.
    pub(super) fn range(self, span: Span, size_bytes: u64) -> std::ops::Range<u64> {
        let start = span.first * self.bytes();
        start..(start + span.count * self.bytes()).min(size_bytes)
    }

    /// Joins units, which ascend and may repeat, to spans.
    pub(super) fn spans<I: Iterator<Item = Result<u64>>>(self, units: I) -> Spans<I> {
        Spans { units: units.peekable(), most: (SPAN_BYTES / self.bytes()).max(1) }
    }
}

/// See [`Units::spans`].
pub(super) struct Spans<I: Iterator<Item = Result<u64>>> {
    units: Peekable<I>,
    most: u64,
}

impl<I: Iterator<Item = Result<u64>>> Iterator for Spans<I> {
    type Item = Result<Span>;

    fn next(&mut self) -> Option<Self::Item> {
        let first = match self.units.next()? {
            Ok(first) => first,
            Err(error) => return Some(Err(error)),
        };
        let mut span = Span { first, count: 1 };
        while span.count < self.most {
            let end = span.first + span.count;
            let near = |unit: &Result<u64>| unit.as_ref().is_ok_and(|unit| *unit <= end);
            match self.units.next_if(near) {
                Some(Ok(unit)) => span.count = unit + 1 - span.first,
                _ => break,
            }
        }
        // What repeats the last one belongs to this span.
        let end = span.first + span.count;
        while self.units.next_if(|unit| unit.as_ref().is_ok_and(|unit| *unit < end)).is_some() {}
        Some(Ok(span))
    }
}

/// The same units and one more in its place.
pub(super) fn including(
    units: impl Iterator<Item = Result<u64>>,
    extra: Option<u64>,
) -> impl Iterator<Item = Result<u64>> {
    let (mut units, mut extra) = (units.peekable(), extra);
    std::iter::from_fn(move || match (units.peek(), extra) {
        (Some(Ok(unit)), Some(before)) if *unit > before => extra.take().map(Ok),
        (None, Some(_)) => extra.take().map(Ok),
        _ => units.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn size(bytes: u64) -> BlockSize {
        BlockSize::new(bytes).unwrap()
    }

    #[test]
    fn a_unit_is_whole_in_blocks_of_both_sizes() {
        let finer = Units::new(size(65_536), size(4096));
        assert_eq!(finer.of_source(BlockIndex(3)), 3);
        let coarser = Units::new(size(4096), size(65_536));
        assert_eq!((coarser.of_source(BlockIndex(15)), coarser.of_source(BlockIndex(16))), (0, 1));
        assert_eq!(coarser.range(Span { first: 1, count: 2 }, 150_000), 65_536..150_000);
        assert_eq!(coarser.boundary(70_000, 150_000), Some(1));
        assert_eq!((coarser.boundary(65_536, 150_000), coarser.boundary(5, 5)), (None, None));
    }

    #[test]
    fn one_more_unit_comes_in_its_place() {
        let with = |units: &[u64], extra| -> Vec<u64> {
            let units = units.iter().map(|unit| Ok(*unit)).collect::<Vec<_>>();
            including(units.into_iter(), extra).map(Result::unwrap).collect()
        };
        assert_eq!(with(&[1, 5], Some(3)), [1, 3, 5]);
        assert_eq!(with(&[], Some(3)), [3]);
        assert_eq!(with(&[1, 3], Some(3)), [1, 3, 3]);
        assert_eq!(with(&[1], None), [1]);
    }

    proptest! {
        #[test]
        fn spans_cover_each_unit_once_and_nothing_else(
            units in proptest::collection::vec(0u64..400, 0..200), fine in any::<bool>()
        ) {
            let mut units = units;
            units.sort_unstable();
            let to = if fine { 65_536 } else { 1 << 20 };
            let rule = Units::new(size(4096), size(to));
            let most = SPAN_BYTES / to;
            let mut covered = Vec::new();
            for span in rule.spans(units.iter().map(|unit| Ok(*unit))) {
                let span = span.unwrap();
                prop_assert!((1..=most).contains(&span.count));
                covered.extend(span.first..span.first + span.count);
            }
            let wanted: Vec<u64> = units.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
            prop_assert_eq!(covered, wanted);
        }
    }
}
