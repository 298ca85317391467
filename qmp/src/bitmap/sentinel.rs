//! Sentinels: two bits set by us when a bitmap is made, found set as long as nobody cleared it.
//!
//! The first and the last granule are marked dirty at once. A bitmap that was cleared, or whose
//! disk shrank and grew back (which drops the bits of the cut part), shows at least one of them
//! clean. The price is two granules read in vain.

use std::ops::Range;

use super::Granularity;

/// The granules that carry the sentinels of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sentinels {
    size_bytes: u64,
    granularity: Granularity,
}

impl Sentinels {
    /// For a bitmap made when the disk had this size.
    pub fn new(size_bytes: u64, granularity: Granularity) -> Self {
        Self { size_bytes, granularity }
    }

    /// The byte ranges to mark, cut at the disk's end; one for a disk of a single granule, none
    /// for an empty one.
    pub fn ranges(self) -> Vec<Range<u64>> {
        let Some(last_byte) = self.size_bytes.checked_sub(1) else { return Vec::new() };
        let granule = self.granularity.bytes();
        let first = 0..granule.min(self.size_bytes);
        let last = last_byte / granule * granule..self.size_bytes;
        if first == last { vec![first] } else { vec![first, last] }
    }

    /// A watch over the dirty ranges that will be read from the bitmap.
    pub fn watch(self) -> SentinelWatch {
        SentinelWatch { missing: self.ranges() }
    }
}

/// A sentinel was found clean: somebody cleared the bitmap, or the disk shrank and grew back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the sentinel at bytes {}..{} of the bitmap is clean: it was cleared by someone, or the disk \
     shrank and grew again", range.start, range.end
)]
pub struct SentinelClean {
    /// The granule, or what of it was not covered.
    pub range: Range<u64>,
}

/// Looks for the sentinels while dirty ranges stream by.
#[derive(Debug, Clone)]
pub struct SentinelWatch {
    missing: Vec<Range<u64>>,
}

impl SentinelWatch {
    /// One dirty range; ranges may come in any number of pieces, in ascending order.
    pub fn dirty(&mut self, range: Range<u64>) {
        for missing in &mut self.missing {
            if range.start <= missing.start {
                missing.start = missing.start.max(range.end);
            }
        }
        self.missing.retain(|missing| missing.start < missing.end);
    }

    /// After the last dirty range: whether every sentinel was found.
    pub fn finish(self) -> Result<(), SentinelClean> {
        match self.missing.into_iter().next() {
            None => Ok(()),
            Some(range) => Err(SentinelClean { range }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: Granularity = Granularity::DEFAULT;

    #[test]
    fn sentinels_lie_on_the_first_and_the_last_granule() {
        let ranges = |size| Sentinels::new(size, G).ranges();
        assert_eq!(ranges(0), []);
        assert_eq!(ranges(4097), std::slice::from_ref(&(0..4097)));
        assert_eq!(ranges(65536), std::slice::from_ref(&(0..65536)));
        assert_eq!(ranges(65537), [0..65536, 65536..65537]);
        assert_eq!(ranges(1 << 40), [0..65536, (1 << 40) - 65536..1 << 40]);
    }

    #[test]
    fn a_half_covered_sentinel_is_clean() {
        let mut watch = Sentinels::new(1 << 20, G).watch();
        watch.dirty(0..65536);
        watch.dirty((1 << 20) - 65536..(1 << 20) - 1);
        let clean = watch.finish().unwrap_err();
        assert_eq!(clean.range, (1 << 20) - 1..1 << 20);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// Against a bit-by-bit model: found exactly when every granule of a sentinel is dirty.
        #[test]
        fn found_exactly_when_dirty(granules in 1usize..40, bits: u64, tail in 1u64..512, cut in 1u64..700) {
            let granularity = Granularity::new(512).unwrap();
            let size = (granules as u64 - 1) * 512 + tail;
            let mut watch = Sentinels::new(size, granularity).watch();
            for index in (0..granules as u64).filter(|index| bits >> index & 1 == 1) {
                let (mut at, end) = (index * 512, size.min((index + 1) * 512));
                while at < end {
                    let upto = end.min(at + cut);
                    watch.dirty(at..upto);
                    at = upto;
                }
            }
            let set = |index: usize| bits >> index & 1 == 1;
            prop_assert_eq!(watch.finish().is_ok(), set(0) && set(granules - 1));
        }
    }
}
