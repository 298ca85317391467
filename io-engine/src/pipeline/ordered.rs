//! Brings what parallel workers produce back into order. Pure.

use std::collections::VecDeque;

/// Items that arrive in any order and leave by ascending number without gaps.
pub(crate) struct Reorder<T> {
    next: u64,
    waiting: VecDeque<Option<T>>,
}

impl<T> Reorder<T> {
    pub(crate) fn new() -> Self {
        Self { next: 0, waiting: VecDeque::new() }
    }

    /// Takes the item with number `seq` in; a number comes once.
    pub(crate) fn insert(&mut self, seq: u64, item: T) {
        let Some(ahead) = seq.checked_sub(self.next).and_then(|n| usize::try_from(n).ok()) else {
            return;
        };
        if self.waiting.len() <= ahead {
            self.waiting.resize_with(ahead + 1, || None);
        }
        self.waiting[ahead] = Some(item);
    }

    /// The next item in order, if it is here.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let item = self.waiting.front_mut()?.take()?;
        self.waiting.pop_front();
        self.next += 1;
        Some(item)
    }

    /// Whether nothing waits for a number that never came.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn everything_leaves_in_order(order in Just((0u64..40).collect::<Vec<_>>()).prop_shuffle()) {
            let (mut reorder, mut out) = (Reorder::new(), Vec::new());
            for (arrived, seq) in order.iter().enumerate() {
                reorder.insert(*seq, *seq);
                while let Some(item) = reorder.pop() {
                    out.push(item);
                }
                prop_assert!(out.len() <= arrived + 1);
            }
            prop_assert!(reorder.is_empty());
            prop_assert_eq!(out, (0..40).collect::<Vec<_>>());
        }
    }
}
