//! Folds the newest runs of a map into one, so that their number stays logarithmic.

use crate::content::ZERO_NODE;
use crate::error::Result;

use super::view::{MapView, Region};
use super::writer::RunWriter;
use super::{PageSlots, Slot, empty_page};

/// How many of the parent's runs (given by their bytes, newest first) the new run swallows.
///
/// A run is swallowed as long as it is at most twice what has been gathered: so each run that stays
/// is more than twice as large as the next newer one, and a byte of map is rewritten only when at
/// least half as many new bytes came. That bounds the rewriting per point by the change, amortised.
pub(crate) fn merge_count(new_bytes: u64, parent_bytes: &[u64]) -> usize {
    let mut gathered = new_bytes;
    let mut count = 0;
    for &bytes in parent_bytes {
        if bytes > gathered.saturating_mul(2) {
            break;
        }
        gathered = gathered.saturating_add(bytes);
        count += 1;
    }
    count
}

/// Whether older runs stay below the folded one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Below {
    /// Zeroes must be kept: they hide what is older.
    Older,
    /// The result is the base; what is not mentioned is zero.
    Nothing,
}

/// Writes all that `view` says into `writer`. The hashes in the newest layer are already those of
/// the new point, so nothing is computed again.
pub(crate) fn fold(view: &mut MapView, below: Below, writer: &mut RunWriter) -> Result<()> {
    let mut from = 0;
    while let Some(number) = view.next_region(from) {
        let region = view.region(number)?;
        if region.is_all_zero() {
            if below == Below::Older {
                writer.zero_region(number);
            }
        } else {
            fold_region(view, &region, below, writer)?;
        }
        from = number + 1;
    }
    Ok(())
}

fn fold_region(
    view: &mut MapView,
    region: &Region,
    below: Below,
    writer: &mut RunWriter,
) -> Result<()> {
    let mut slots = empty_page();
    let mut from = 0;
    let mut pages = 0;
    while let Some(page) = region.next_page(from) {
        slots.fill(None);
        view.lay(region, page, &mut slots)?;
        if below == Below::Nothing {
            drop_zeroes(&mut slots);
        }
        if slots.iter().any(Option::is_some) {
            writer.page(page, &slots, region.leaf(page))?;
            pages += 1;
        }
        from = u16::from(page) + 1;
    }
    if pages > 0 {
        writer.end_region(region.number, view.node(region.number))?;
    } else {
        debug_assert_eq!(view.node(region.number), ZERO_NODE, "no page, no content");
    }
    Ok(())
}

fn drop_zeroes(slots: &mut PageSlots) {
    for slot in slots.iter_mut() {
        if *slot == Some(Slot::Zero) {
            *slot = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// A chain of points: the runs stay few, and metadata written stays in proportion.
        #[test]
        fn runs_stay_few_and_writing_stays_in_proportion(
            base in 1_u64..10_000_000,
            changes in prop::collection::vec(1_u64..5_000, 1..200),
        ) {
            let mut runs = vec![base];
            let (mut written, mut changed) = (base, base);
            for new in changes {
                let count = merge_count(new, &runs);
                let folded: u64 = new + runs.drain(..count).sum::<u64>();
                runs.insert(0, folded);
                written += folded;
                changed += new;
                prop_assert!(runs.len() <= super::super::MAP_RUNS_MAX);
                prop_assert!(runs.windows(2).all(|pair| pair[1] > 2 * pair[0]));
            }
            // Each byte is written once, and again only when its run grows by half: log1.5(1e7) = 40.
            prop_assert!(written <= 41 * changed, "{written} for {changed}");
        }
    }

    #[test]
    fn a_small_change_leaves_a_large_base_alone() {
        assert_eq!(merge_count(100, &[1_000_000]), 0);
        assert_eq!(merge_count(100, &[150, 1_000_000]), 1);
        assert_eq!(merge_count(100, &[150, 400, 1_300]), 3);
        assert_eq!(merge_count(100, &[]), 0);
    }
}
