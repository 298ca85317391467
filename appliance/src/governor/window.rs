//! What the guest's requests took in a stretch of time, and what they take without a backup.

use std::collections::BTreeMap;

use icecore_qmp::capture::guest_io::{Answered, DeviceIo};

/// Fewer answers say too little: the mean of a few requests is chance.
pub const OPERATIONS_MIN: u64 = 16;

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// Requests of one kind at one device: what a mean is taken of.
type Source = (String, Kind);

/// Answered requests by their source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Window(BTreeMap<Source, Answered>);

impl Window {
    /// All that QEMU has counted so far.
    pub fn total(devices: &[DeviceIo]) -> Self {
        let all = devices.iter().flat_map(|io| {
            let kinds =
                [(Kind::Read, io.reads), (Kind::Write, io.writes), (Kind::Flush, io.flushes)];
            kinds.map(|(kind, answered)| ((io.device.clone(), kind), answered))
        });
        Self(all.collect())
    }

    /// What was added to `earlier`. A device that is new, or began to count anew, is left out.
    pub fn since(&self, earlier: &Self) -> Self {
        let added = self.0.iter().filter_map(|(source, now)| {
            let before = earlier.0.get(source)?;
            let operations = now.operations.checked_sub(before.operations)?;
            let nanoseconds = now.nanoseconds.checked_sub(before.nanoseconds)?;
            (operations > 0).then(|| (source.clone(), Answered { operations, nanoseconds }))
        });
        Self(added.collect())
    }

    /// Adds what `other` holds.
    pub fn add(&mut self, other: &Self) {
        for (source, more) in &other.0 {
            let sum = self.0.entry(source.clone()).or_default();
            sum.operations += more.operations;
            sum.nanoseconds += more.nanoseconds;
        }
    }

    /// How many requests were answered.
    pub fn operations(&self) -> u64 {
        self.0.values().map(|answered| answered.operations).sum()
    }

    /// Their mean latency in milliseconds; 0 without any.
    pub fn mean_ms(&self) -> f64 {
        let nanoseconds: u64 = self.0.values().map(|answered| answered.nanoseconds).sum();
        nanoseconds as f64 / self.operations().max(1) as f64 / 1e6
    }
}

/// Mean nanoseconds of a request by its source, while nothing is asked for by the backup.
#[derive(Debug, Clone, Default)]
pub struct Baseline(BTreeMap<Source, f64>);

impl Baseline {
    /// Takes over the means of `window` where they are of enough requests.
    pub fn learn(&mut self, window: &Window) {
        let enough = window.0.iter().filter(|(_, a)| a.operations >= OPERATIONS_MIN);
        for (source, answered) in enough {
            let mean = answered.nanoseconds as f64 / answered.operations as f64;
            self.0.insert(source.clone(), mean);
        }
    }

    /// How many times as long as without a backup the requests of `window` took; none where too
    /// few of them, or fewer than `least`, have a baseline.
    pub fn slowdown(&self, window: &Window, least: u64) -> Option<f64> {
        let (mut operations, mut took, mut usual) = (0, 0.0, 0.0);
        for (source, answered) in &window.0 {
            if let Some(mean) = self.0.get(source) {
                operations += answered.operations;
                took += answered.nanoseconds as f64;
                usual += answered.operations as f64 * mean;
            }
        }
        let enough = operations >= least && operations * 2 >= window.operations();
        (enough && usual > 0.0).then(|| took / usual)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, writes: (u64, u64), flushes: (u64, u64)) -> DeviceIo {
        let answered = |(operations, nanoseconds)| Answered { operations, nanoseconds };
        DeviceIo {
            device: name.into(),
            reads: Answered::default(),
            writes: answered(writes),
            flushes: answered(flushes),
        }
    }

    #[test]
    fn another_mix_of_the_same_requests_is_no_slowdown() {
        let zero = Window::total(&[device("a", (0, 0), (0, 0)), device("b", (0, 0), (0, 0))]);
        let known =
            Window::total(&[device("a", (100, 100), (100, 9000)), device("b", (50, 500), (0, 0))]);
        let mut baseline = Baseline::default();
        baseline.learn(&known.since(&zero));
        let other =
            Window::total(&[device("a", (10, 10), (70, 6300)), device("b", (1000, 10000), (0, 0))]);
        let slowdown = baseline.slowdown(&other.since(&zero), OPERATIONS_MIN).unwrap();
        assert!((slowdown - 1.0).abs() < 1e-9, "{slowdown}");
        let twice =
            Window::total(&[device("a", (10, 20), (70, 12600)), device("b", (0, 0), (0, 0))]);
        assert!(
            (baseline.slowdown(&twice.since(&zero), OPERATIONS_MIN).unwrap() - 2.0).abs() < 1e-9
        );
    }

    #[test]
    fn little_is_unknown_and_a_count_that_restarts_is_left_out() {
        let mut baseline = Baseline::default();
        let zero = Window::total(&[device("a", (0, 0), (0, 0))]);
        let few = Window::total(&[device("a", (OPERATIONS_MIN - 1, 99), (0, 0))]);
        baseline.learn(&few.since(&zero));
        let many = Window::total(&[device("a", (100, 99), (0, 0)), device("new", (9, 9), (0, 0))]);
        assert_eq!(baseline.slowdown(&many.since(&zero), 1), None);
        assert_eq!(many.since(&zero).operations(), 100);
        assert_eq!(zero.since(&many).operations(), 0);
    }
}
