//! Whether a failed request is tried again, and when: decided without clock, network or randomness.

use std::time::Duration;

/// What kind of failure a request met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Trying again changes nothing.
    Final,
    /// An error of the server, or a connection that broke.
    Transient,
    /// The server asks for less.
    Busy,
    /// No connection could be made.
    Unreachable,
    /// The credentials or the clock were refused, and have been looked at anew.
    Stale,
}

/// How often and how long a request is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries of one request, the first one included.
    pub tries_max: u32,
    /// Tries with credentials or a clock that are refused.
    pub stale_tries_max: u32,
    /// The longest pause after the first failure.
    pub pause_first: Duration,
    /// No pause is longer.
    pub pause_max: Duration,
    /// No try begins later than this after the first one, but that the second try of what was
    /// answered with silence always may: that alone can take longer.
    pub total_max: Duration,
}

/// A server that asks for less gets pauses so many times as long.
const BUSY_FACTOR: u32 = 4;

impl RetryPolicy {
    /// For a server that has answered before: outlasts a restart or a failover, but not by so much
    /// that a writer goes on when gc has long given it up.
    pub const KNOWN_SERVER: Self = Self {
        tries_max: 12,
        stale_tries_max: 3,
        pause_first: Duration::from_millis(100),
        pause_max: Duration::from_secs(8),
        total_max: Duration::from_secs(60),
    };
    /// For a server that has never answered: a wrong address is to be said soon.
    pub const NEW_SERVER: Self = Self { total_max: Duration::from_secs(4), ..Self::KNOWN_SERVER };

    /// How long to wait before the next try; none when the failure is to be reported.
    ///
    /// `tries` have been made, the first one `elapsed` ago. `luck` is any number: it spreads those
    /// that failed together over the second half of the pause.
    #[must_use]
    pub fn pause(
        &self,
        fault: Fault,
        tries: u32,
        elapsed: Duration,
        luck: u32,
    ) -> Option<Duration> {
        let tries_max = match fault {
            Fault::Final => return None,
            Fault::Stale => self.stale_tries_max.min(self.tries_max),
            Fault::Transient | Fault::Busy | Fault::Unreachable => self.tries_max,
        };
        if tries >= tries_max {
            return None;
        }
        let factor = if fault == Fault::Busy { BUSY_FACTOR } else { 1 };
        let doubled = 2u32.saturating_pow(tries.saturating_sub(1)).saturating_mul(factor);
        let longest = self.pause_first.saturating_mul(doubled).min(self.pause_max);
        let half = longest / 2;
        let pause = half + half.mul_f64(f64::from(luck) / f64::from(u32::MAX));
        let is_second = fault == Fault::Transient && tries == 1;
        (is_second || elapsed.saturating_add(pause) <= self.total_max).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_fault() -> impl Strategy<Value = Fault> {
        prop_oneof![
            Just(Fault::Final),
            Just(Fault::Transient),
            Just(Fault::Busy),
            Just(Fault::Unreachable),
            Just(Fault::Stale),
        ]
    }

    proptest! {
        #[test]
        fn every_request_ends(faults in prop::collection::vec((any_fault(), any::<u32>()), 40)) {
            let policy = RetryPolicy::KNOWN_SERVER;
            let (mut elapsed, mut tries) = (Duration::ZERO, 0);
            for (fault, luck) in faults {
                tries += 1;
                let Some(pause) = policy.pause(fault, tries, elapsed, luck) else { break };
                prop_assert!(fault != Fault::Final);
                prop_assert!(pause <= policy.pause_max);
                prop_assert!(pause >= policy.pause_first / 2);
                elapsed += pause;
            }
            prop_assert!(tries <= policy.tries_max);
            prop_assert!(elapsed <= policy.total_max);
        }

        #[test]
        fn pauses_grow_and_a_busy_server_gets_longer_ones(tries in 1u32..11, luck in any::<u32>()) {
            let policy = RetryPolicy { total_max: Duration::MAX, ..RetryPolicy::KNOWN_SERVER };
            let pause = |fault, tries| policy.pause(fault, tries, Duration::ZERO, luck);
            let (now, later) = (pause(Fault::Transient, tries), pause(Fault::Transient, tries + 1));
            prop_assert!(later.is_none_or(|later| Some(later) >= now));
            prop_assert!(pause(Fault::Busy, tries) >= now);
        }

        #[test]
        fn a_request_that_met_silence_is_sent_again(waited in 0u64..600, luck in any::<u32>()) {
            let waited = Duration::from_secs(waited);
            for policy in [RetryPolicy::KNOWN_SERVER, RetryPolicy::NEW_SERVER] {
                prop_assert!(policy.pause(Fault::Transient, 1, waited, luck).is_some());
                let late = policy.pause(Fault::Transient, 2, waited, luck).is_some();
                prop_assert!(!late || waited <= policy.total_max);
            }
        }

        #[test]
        fn refused_credentials_are_tried_a_few_times_only(luck in any::<u32>()) {
            let policy = RetryPolicy::KNOWN_SERVER;
            let tries = (1..).take_while(|tries| {
                policy.pause(Fault::Stale, *tries, Duration::ZERO, luck).is_some()
            });
            prop_assert_eq!(tries.count() as u32, policy.stale_tries_max - 1);
        }
    }
}
