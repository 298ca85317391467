//! Which bytes of a read have come.

use std::collections::BTreeMap;

/// The parts of one read that have come: disjoint, not touching, by their start.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    parts: BTreeMap<u32, u32>,
    bytes: u64,
}

impl Coverage {
    /// Notes `start..start + length`; false when a part of it was there before.
    pub(super) fn add(&mut self, start: u32, length: u32) -> bool {
        let end = u64::from(start) + u64::from(length);
        if self.parts.range(..=start).next_back().is_some_and(|(_, &to)| to > start)
            || self.parts.range(start..).next().is_some_and(|(&from, _)| u64::from(from) < end)
        {
            return false;
        }
        self.bytes += u64::from(length);
        let mut part = (start, end as u32);
        if let Some((&from, &to)) = self.parts.range(..=start).next_back()
            && to == start
        {
            part.0 = from;
        }
        if let Some(to) = self.parts.remove(&part.1) {
            part.1 = to;
        }
        self.parts.insert(part.0, part.1);
        true
    }

    /// Bytes that have come.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::Coverage;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Against a plain array of flags.
        #[test]
        fn agrees_with_a_bit_array(parts in prop::collection::vec((0u32..200, 1u32..40), 0..60)) {
            let mut model = [false; 256];
            let mut coverage = Coverage::default();
            for (start, length) in parts {
                let range = start as usize..(start + length) as usize;
                let free = model[range.clone()].iter().all(|seen| !seen);
                prop_assert_eq!(coverage.add(start, length), free);
                if free {
                    model[range].fill(true);
                }
                let seen = model.iter().filter(|seen| **seen).count() as u64;
                prop_assert_eq!(coverage.bytes(), seen);
            }
        }
    }

    #[test]
    fn neighbours_merge_so_that_a_whole_read_is_one_part() {
        let mut coverage = Coverage::default();
        for piece in [3u32, 1, 0, 2] {
            assert!(coverage.add(piece * 8, 8));
        }
        assert_eq!(coverage.parts.len(), 1);
    }
}
