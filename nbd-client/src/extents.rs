//! Algebra of extents: sorted runs of a disk, combined as streams.
//!
//! All functions take ascending, disjoint extents and give ascending, disjoint extents whose equal
//! neighbours are merged. They hold a constant number of extents, so a million of them cost nothing
//! but time.

use std::iter::Peekable;

/// A run of bytes with flags. What the flags mean depends on where they come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Start, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub length: u64,
    /// Flags; 0 where only the place matters.
    pub flags: u64,
}

impl Extent {
    /// An extent without flags.
    pub fn new(offset: u64, length: u64) -> Extent {
        Extent { offset, length, flags: 0 }
    }

    /// One past its last byte. Never above 2^63, the largest export.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// Both lists together, merged, without flags.
pub fn union(
    a: impl IntoIterator<Item = Extent>,
    b: impl IntoIterator<Item = Extent>,
) -> impl Iterator<Item = Extent> {
    combine(a, b, |a, b| a.or(b).map(|_| 0))
}

/// What lies in both lists, with the flags of `a`.
pub fn intersect(
    a: impl IntoIterator<Item = Extent>,
    b: impl IntoIterator<Item = Extent>,
) -> impl Iterator<Item = Extent> {
    combine(a, b, |a, b| a.filter(|_| b.is_some()))
}

/// What lies in `a` and not in `b`, with the flags of `a`.
pub fn subtract(
    a: impl IntoIterator<Item = Extent>,
    b: impl IntoIterator<Item = Extent>,
) -> impl Iterator<Item = Extent> {
    combine(a, b, |a, b| a.filter(|_| b.is_none()))
}

/// Combines two lists. For each run over which neither changes, `keep` gets the flags of both
/// (`None`: not there) and says the flags of the result (`None`: leave out).
pub fn combine<A, B, K>(a: A, b: B, keep: K) -> impl Iterator<Item = Extent>
where
    A: IntoIterator<Item = Extent>,
    B: IntoIterator<Item = Extent>,
    K: FnMut(Option<u64>, Option<u64>) -> Option<u64>,
{
    let (a, b) = (a.into_iter().peekable(), b.into_iter().peekable());
    merge_equal(Segments { a, b, at: 0 }.filter_map(keep_with(keep)))
}

fn keep_with<K>(mut keep: K) -> impl FnMut(Segment) -> Option<Extent>
where
    K: FnMut(Option<u64>, Option<u64>) -> Option<u64>,
{
    move |segment| {
        let flags = keep(segment.a, segment.b)?;
        Some(Extent { offset: segment.start, length: segment.end - segment.start, flags })
    }
}

/// Merges neighbours that touch and have equal flags.
pub fn merge_equal(extents: impl IntoIterator<Item = Extent>) -> impl Iterator<Item = Extent> {
    let mut extents = extents.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut run = extents.next()?;
        while let Some(more) =
            extents.next_if(|more| more.offset == run.end() && more.flags == run.flags)
        {
            run.length += more.length;
        }
        Some(run)
    })
}

/// Joins neighbours whose gap is at most `gap_max` bytes; flags are dropped.
pub fn join_near(
    extents: impl IntoIterator<Item = Extent>,
    gap_max: u64,
) -> impl Iterator<Item = Extent> {
    let mut extents = extents.into_iter().peekable();
    std::iter::from_fn(move || {
        let first = extents.next()?;
        let mut run = Extent::new(first.offset, first.length);
        while let Some(more) =
            extents.next_if(|more| more.offset.saturating_sub(run.end()) <= gap_max)
        {
            run.length = run.length.max(more.end() - run.offset);
        }
        Some(run)
    })
}

/// Widens each extent to multiples of `granularity`, cut at `limit`, and merges what then overlaps;
/// flags are dropped. `granularity` is at least 1.
pub fn align(
    extents: impl IntoIterator<Item = Extent>,
    granularity: u64,
    limit: u64,
) -> impl Iterator<Item = Extent> {
    let widened = extents.into_iter().filter_map(move |extent| {
        let start = extent.offset - extent.offset % granularity;
        let end = extent.end().div_ceil(granularity).saturating_mul(granularity).min(limit);
        (start < end).then(|| Extent::new(start, end - start))
    });
    join_near(widened, 0)
}

/// Cuts extents into pieces of at most `max` bytes (at least 1).
pub fn split(extents: impl IntoIterator<Item = Extent>, max: u64) -> impl Iterator<Item = Extent> {
    extents.into_iter().flat_map(move |extent| {
        let pieces = extent.length.div_ceil(max);
        (0..pieces).map(move |piece| {
            let offset = extent.offset + piece * max;
            Extent { offset, length: max.min(extent.end() - offset), flags: extent.flags }
        })
    })
}

/// A run over which neither list changes.
struct Segment {
    start: u64,
    end: u64,
    a: Option<u64>,
    b: Option<u64>,
}

/// Sweeps over two lists at once.
struct Segments<A: Iterator<Item = Extent>, B: Iterator<Item = Extent>> {
    a: Peekable<A>,
    b: Peekable<B>,
    at: u64,
}

/// The extent of a list that ends behind `at`, after dropping those that do not.
fn current(list: &mut Peekable<impl Iterator<Item = Extent>>, at: u64) -> Option<Extent> {
    while list.next_if(|extent| extent.end() <= at).is_some() {}
    list.peek().copied()
}

impl<A: Iterator<Item = Extent>, B: Iterator<Item = Extent>> Iterator for Segments<A, B> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        let (a, b) = (current(&mut self.a, self.at), current(&mut self.b, self.at));
        let first = a.iter().chain(&b).map(|extent| extent.offset).min()?;
        let start = self.at.max(first);
        // The nearest place behind `start` where a list begins or ends.
        let edge = |extent: &Extent| match extent.offset > start {
            true => extent.offset,
            false => extent.end(),
        };
        let end = a.iter().chain(&b).map(edge).min()?;
        self.at = end;
        let flags = |extent: Option<Extent>| {
            extent.filter(|extent| extent.offset <= start).map(|extent| extent.flags)
        };
        Some(Segment { start, end, a: flags(a), b: flags(b) })
    }
}
