//! Latencies of requests, recorded per thread without locks and merged at the end.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Significant digits that a histogram keeps: 1 % is finer than any latency repeats.
const DIGITS: u8 = 2;

/// Longest latency told apart, in microseconds: an hour, far beyond any stall limit.
const MAX_MICROS: u64 = 3_600_000_000;

/// Latencies of requests, from when they were submitted until they were complete.
#[derive(Debug, Clone)]
pub struct Latency(Option<Histogram<u64>>);

impl Default for Latency {
    fn default() -> Self {
        Self(Histogram::new_with_max(MAX_MICROS, DIGITS).ok())
    }
}

impl Latency {
    /// Adds one request.
    pub(crate) fn record(&mut self, took: Duration) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    /// Adds all of `other`.
    pub(crate) fn merge(&mut self, other: &Self) {
        if let (Some(mine), Some(theirs)) = (&mut self.0, &other.0)
            && let Err(error) = mine.add(theirs)
        {
            tracing::debug!(%error, "latencies of one thread are left out");
        }
    }

    /// How many requests were recorded.
    pub fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, Histogram::len)
    }

    /// The latency that `quantile` (0.0..=1.0) of the requests did not exceed.
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.0.as_ref().map_or(0, |h| h.value_at_quantile(quantile)))
    }

    /// The median.
    pub fn p50(&self) -> Duration {
        self.quantile(0.5)
    }

    /// 99 % were not slower.
    pub fn p99(&self) -> Duration {
        self.quantile(0.99)
    }

    /// The slowest.
    pub fn max(&self) -> Duration {
        Duration::from_micros(self.0.as_ref().map_or(0, Histogram::max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_quantiles() {
        let (mut all, mut other) = (Latency::default(), Latency::default());
        (1..=50).for_each(|ms| all.record(Duration::from_millis(ms)));
        (51..=100).for_each(|ms| other.record(Duration::from_millis(ms)));
        all.merge(&other);
        assert_eq!(all.count(), 100);
        let near = |got: Duration, ms: f64| (got.as_secs_f64() * 1e3 / ms - 1.0).abs() < 0.02;
        assert!(near(all.p50(), 50.0) && near(all.p99(), 99.0) && near(all.max(), 100.0));
    }
}
