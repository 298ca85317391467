//! Which block status requests to send, and in which order to report their answers. No IO.
//!
//! Many requests are in flight, and answers come out of order and may be shorter than asked. The
//! oldest unit is reported as it comes; answers of later units wait in a bounded store. What does
//! not fit there is dropped and asked again when its turn comes, so memory is bounded for any
//! server.

use std::collections::VecDeque;

use crate::error::ProtocolError;
use crate::extents::Extent;

/// Requests in flight. One round trip is hidden well by a few.
pub(super) const WINDOW: usize = 8;
/// Extents that may wait for their turn: 6 MiB. Eight 2 GiB units of scattered 64 KiB granules.
pub(super) const WAITING_EXTENTS_MAX: usize = 1 << 18;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A request is to be sent from `at` on.
    Due,
    /// A request is in flight that began at `from`.
    Asked { from: u64 },
    /// Answered to its end.
    Complete,
}

/// A stretch that one request (and its continuations) asks for.
#[derive(Debug)]
struct Unit {
    tag: u64,
    at: u64,
    end: u64,
    state: State,
    /// The store was full: the rest of the present answer is dropped.
    cut: bool,
    runs: VecDeque<Extent>,
}

/// The plan of one walk over ascending ranges.
#[derive(Debug)]
pub(super) struct StatusPlan<I> {
    units: I,
    open: VecDeque<Unit>,
    next_tag: u64,
    waiting_max: usize,
}

impl<I: Iterator<Item = Extent>> StatusPlan<I> {
    /// A plan over ascending units, each small enough for one request.
    pub(super) fn new(units: I, waiting_max: usize) -> Self {
        StatusPlan { units, open: VecDeque::new(), next_tag: 0, waiting_max }
    }

    /// The next request to send: `(tag, offset, length)`.
    pub(super) fn next_request(&mut self) -> Option<(u64, u64, u64)> {
        let oldest = self.open.front().map(|unit| unit.tag);
        // A unit whose answer was cut waits until it is the oldest, else it would be cut again.
        let due =
            |unit: &&mut Unit| unit.state == State::Due && (!unit.cut || Some(unit.tag) == oldest);
        if let Some(unit) = self.open.iter_mut().find(due) {
            return Some(unit.ask());
        }
        if self.open.len() >= WINDOW {
            return None;
        }
        let range = self.units.next()?;
        let unit = Unit {
            tag: self.next_tag,
            at: range.offset,
            end: range.end(),
            state: State::Due,
            cut: false,
            runs: VecDeque::new(),
        };
        self.next_tag += 1;
        self.open.push_back(unit);
        self.open.back_mut().map(Unit::ask)
    }

    /// One extent of an answer.
    pub(super) fn run(&mut self, tag: u64, extent: Extent) {
        let waiting: usize = self.open.iter().skip(1).map(|unit| unit.runs.len()).sum();
        let full = waiting >= self.waiting_max;
        let oldest = self.open.front().map(|unit| unit.tag);
        let Some(unit) = self.open.iter_mut().find(|unit| unit.tag == tag) else { return };
        unit.cut |= full && Some(tag) != oldest;
        if unit.cut {
            return;
        }
        unit.at = extent.end();
        match unit.runs.back_mut() {
            Some(last) if last.flags == extent.flags && last.end() == extent.offset => {
                last.length += extent.length;
            }
            _ => unit.runs.push_back(extent),
        }
    }

    /// An answer has ended with success. A server must get somewhere with each answer.
    pub(super) fn completed(&mut self, tag: u64) -> Result<(), ProtocolError> {
        let Some(unit) = self.open.iter_mut().find(|unit| unit.tag == tag) else {
            return Err(ProtocolError::Driver("block status for a unit that is not open"));
        };
        let State::Asked { from } = unit.state else {
            return Err(ProtocolError::Driver("block status for a unit that was not asked"));
        };
        if unit.at == from && !unit.cut {
            return Err(ProtocolError::Status("a successful reply without progress"));
        }
        unit.state = if unit.at >= unit.end { State::Complete } else { State::Due };
        Ok(())
    }

    /// The next extent in ascending order, when it is known.
    pub(super) fn report(&mut self) -> Option<Extent> {
        loop {
            let oldest = self.open.front_mut()?;
            if let Some(extent) = oldest.runs.pop_front() {
                return Some(extent);
            }
            if oldest.state != State::Complete {
                return None;
            }
            self.open.pop_front();
        }
    }
}

impl Unit {
    fn ask(&mut self) -> (u64, u64, u64) {
        self.state = State::Asked { from: self.at };
        self.cut = false;
        (self.tag, self.at, self.end - self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extents::merge_equal;
    use proptest::prelude::*;

    /// A disk where granule n has the flags n % 3.
    fn flags(at: u64) -> u64 {
        at / 16 % 3
    }

    fn truth(ranges: &[Extent]) -> Vec<Extent> {
        let bytes = ranges.iter().flat_map(|range| range.offset..range.end());
        merge_equal(bytes.map(|at| Extent { offset: at, length: 1, flags: flags(at) })).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever the order and the shortness of answers, and however small the store: the
        /// reports are the truth, ascending, and the store keeps its bound.
        #[test]
        fn reports_are_the_truth_in_order(
            gaps in prop::collection::vec((0..40_u64, 1..200_u64), 0..14),
            picks in prop::collection::vec((any::<u16>(), 1..200_u64), 40),
            waiting_max in 0..20_usize,
        ) {
            let (mut at, mut units) = (0, Vec::new());
            for (gap, length) in gaps {
                units.push(Extent::new(at + gap, length));
                at += gap + length;
            }
            let mut plan = StatusPlan::new(units.clone().into_iter(), waiting_max);
            let (mut asked, mut reported) = (Vec::new(), Vec::new());
            for (pick, short) in picks.iter().cycle() {
                while let Some(request) = plan.next_request() {
                    asked.push(request);
                    prop_assert!(asked.len() <= WINDOW);
                }
                if asked.is_empty() {
                    break;
                }
                let (tag, offset, length) = asked.remove(usize::from(*pick) % asked.len());
                let answer = [Extent::new(offset, length.min(*short))];
                for run in truth(&answer) {
                    plan.run(tag, run);
                    // A run that touches the one before is merged, hence the one more.
                    let waiting: usize = plan.open.iter().skip(1).map(|u| u.runs.len()).sum();
                    prop_assert!(waiting <= waiting_max);
                }
                plan.completed(tag).expect("progress");
                reported.extend(std::iter::from_fn(|| plan.report()));
            }
            prop_assert!(plan.open.is_empty());
            prop_assert_eq!(merge_equal(reported).collect::<Vec<_>>(), truth(&units));
        }
    }

    #[test]
    fn an_answer_without_progress_is_refused() {
        let mut plan = StatusPlan::new([Extent::new(0, 64)].into_iter(), 8);
        let (tag, ..) = plan.next_request().expect("a request");
        assert!(plan.completed(tag).is_err());
    }
}
