//! When a backup slows down for its guest, and when it gives up. Pure: time is an argument.
//!
//! Additive increase, multiplicative decrease on the rate, with the latency of the guest's own
//! requests as the signal. What the latency *would* be without the backup is measured: before the
//! instant, and later by short pauses. A pause also tells whether the backup is the cause at all: a
//! guest that is slow by its own doing is not helped by a slower backup, and no reason to give up.

use std::time::Duration;

use icecore_io_engine::Pace;

use super::window::{Baseline, OPERATIONS_MIN, Window};

/// The guest's requests may take so many times as long as without a backup. A guest that waits for
/// each of its requests keeps 80 % of its pace at this.
pub const SLOWDOWN_MAX: f64 = 1.25;
/// Up to here the backup may go faster.
const SLOWDOWN_CALM: f64 = 1.1;
/// From here on one step back is not enough.
const SLOWDOWN_SEVERE: f64 = 2.0;
/// So much is no chance, even of a few requests.
const SLOWDOWN_GROSS: f64 = 4.0;

/// A guest that is so much faster than its baseline does something else now.
const SLOWDOWN_STALE: f64 = 0.7;

/// How fast a backup begins beside a busy guest, in bytes per second. It doubles with each calm
/// look until the guest first notices.
pub const RATE_START: u64 = 64 << 20;
/// No slower than this, in bytes per second: a backup that takes weeks is none.
pub const RATE_MIN: u64 = 4 << 20;
/// What a calm look adds, in bytes per second.
const RATE_STEP: u64 = 8 << 20;
/// From here on no limit is needed, in bytes per second: nothing is read faster.
const RATE_FREE: u64 = 4 << 30;
/// Largest request beside a busy guest, in bytes: the guest's next one may have to wait for it, and
/// at a few dozen MiB per second more than one in a hundred of the guest's requests does. With 1 MiB
/// the mean is soon right and the 99th percentile is not.
pub const REQUEST_BYTES: u32 = 128 << 10;
/// One request under way for so many bytes per second.
const RATE_OF_ONE_REQUEST: u64 = 32 << 20;

/// A judged stretch of time holds what the backup asks for in it, several requests of 1 MiB: between
/// two of them the guest is fast, and behind one it is slow.
const JUDGED_BYTES: u64 = 4 << 20;

/// Without an answered request for so long the guest asks for nothing. Longer than the two seconds
/// that one of its writes may hang in the filter: a write that hangs is not counted yet.
const IDLE_AFTER: Duration = Duration::from_secs(3);
/// A mean beyond this is harm, however few requests it is of.
const STALL_MS: f64 = 200.0;
/// Requests that were under way at a change of pace are not held against the new one.
const SETTLE: Duration = Duration::from_millis(250);
/// Longest wait for [`OPERATIONS_MIN`] answers.
const GATHER_MAX: Duration = Duration::from_secs(2);
/// As many requests may show a gross slowdown then.
const OPERATIONS_FEW: u64 = 4;
/// Longest pause, and the answers that end it early.
pub const PAUSE_MAX: Duration = Duration::from_millis(1500);
const PAUSE_OPERATIONS: u64 = 4 * OPERATIONS_MIN;
/// At least so long from one pause to the next.
pub const PAUSE_GAP: Duration = Duration::from_secs(5);
/// Steps back without a calm look after which a pause shows whether they are of use.
const CUTS_BEFORE_PAUSE: u32 = 3;
/// A backup that slows the guest [`SLOWDOWN_SEVERE`] at its least rate ends after this.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(30);

/// What to do now.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// Go on at this pace.
    Pace(Pace),
    /// End the backup, for this reason.
    GiveUp(String),
}

/// What a run's governor has seen and done.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// Mean latency of the guest's requests before the instant; none of a guest that was idle.
    pub baseline_latency_ms: Option<f64>,
    /// The worst mean that was judged while data were read.
    pub worst_latency_ms: f64,
    /// The last one.
    pub latest_latency_ms: Option<f64>,
    /// How long the backup was held back.
    pub slowed: Duration,
    /// The least rate that was set.
    pub least_rate_bytes: Option<u64>,
}

/// The governor of one backup.
#[derive(Debug)]
pub struct Governor {
    counted: Option<Window>,
    baseline: Baseline,
    gathered: Window,
    gathering_since: Duration,
    /// Bytes per second; none is no limit.
    rate: Option<u64>,
    stage: Stage,
    /// The guest has not been slowed yet.
    doubling: bool,
    cuts: u32,
    seen: Seen,
    paused_at: Option<Duration>,
    harm: Option<Harm>,
    figures: Figures,
}

/// The last look.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    at: Duration,
    asked_bytes: u64,
    /// When a request of the guest was last answered.
    busy_at: Duration,
    /// Bytes per second that were asked for lately.
    achieved: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    /// Nothing is judged before this.
    Settle(Duration),
    Steer,
    /// Nothing is asked for since then; before, the guest was slowed so many times.
    Pause {
        since: Duration,
        slowdown: f64,
    },
}

/// The guest is slowed although nothing slower is left.
#[derive(Debug, Clone, Copy)]
struct Harm {
    since: Duration,
    /// A pause has shown that the backup is the cause.
    proven: bool,
}

impl Governor {
    /// Begins to read at `now`, with what the guest did `before` the instant.
    pub fn new(now: Duration, before: &Window) -> Self {
        let mut baseline = Baseline::default();
        baseline.learn(before);
        let busy = before.operations() > 0;
        Self {
            counted: None,
            baseline,
            gathered: Window::default(),
            gathering_since: now,
            rate: busy.then_some(RATE_START),
            stage: Stage::Settle(now + SETTLE),
            doubling: true,
            cuts: 0,
            seen: Seen { at: now, busy_at: now, ..Seen::default() },
            paused_at: None,
            harm: None,
            figures: Figures {
                baseline_latency_ms: busy.then(|| before.mean_ms()),
                ..Figures::default()
            },
        }
    }

    /// What was seen and done so far.
    pub fn figures(&self) -> &Figures {
        &self.figures
    }

    /// The pace of now.
    pub fn pace(&self) -> Pace {
        match (self.stage, self.rate) {
            (Stage::Pause { .. }, _) => Pace::PAUSE,
            (_, None) => Pace::FREE,
            (_, Some(rate)) => {
                let in_flight = u32::try_from(rate / RATE_OF_ONE_REQUEST).unwrap_or(u32::MAX);
                Pace {
                    bytes_per_second: Some(rate),
                    in_flight: in_flight.max(1),
                    request_bytes: REQUEST_BYTES,
                }
            }
        }
    }

    /// A look at the guest: `counted` are its requests so far, `asked_bytes` what the backup has
    /// asked for so far.
    pub fn look(&mut self, now: Duration, counted: Window, asked_bytes: u64) -> Order {
        let window = match &self.counted {
            Some(earlier) => counted.since(earlier),
            None => Window::default(),
        };
        self.counted = Some(counted);
        self.measure(now, asked_bytes, &window);
        let order = match self.stage {
            Stage::Settle(until) if now < until => None,
            Stage::Settle(_) => {
                self.enter(Stage::Steer, now);
                None
            }
            Stage::Steer => self.steer(now, &window),
            Stage::Pause { since, slowdown } => {
                self.pause(now, since, slowdown, &window);
                None
            }
        };
        self.figures.least_rate_bytes =
            [self.figures.least_rate_bytes, self.rate].into_iter().flatten().min();
        order.unwrap_or_else(|| Order::Pace(self.pace()))
    }

    fn measure(&mut self, now: Duration, asked_bytes: u64, window: &Window) {
        let past = now.saturating_sub(self.seen.at);
        let seconds = past.as_secs_f64().max(1e-3);
        let achieved = asked_bytes.saturating_sub(self.seen.asked_bytes) as f64 / seconds;
        let held = match (self.stage, self.rate) {
            (Stage::Pause { .. }, _) => true,
            // What is asked for stays below a limit that does not bind.
            (_, Some(rate)) => achieved > 0.7 * rate as f64,
            (_, None) => false,
        };
        if held {
            self.figures.slowed += past;
        }
        let busy_at = if window.operations() > 0 { now } else { self.seen.busy_at };
        // Packs are written in bursts: one quiet look is no lower rate.
        let achieved = achieved.max(self.seen.achieved * 0.75);
        self.seen = Seen { at: now, asked_bytes, busy_at, achieved };
    }

    fn enter(&mut self, stage: Stage, now: Duration) {
        self.stage = stage;
        self.gathered = Window::default();
        self.gathering_since = now;
    }

    fn steer(&mut self, now: Duration, window: &Window) -> Option<Order> {
        self.gathered.add(window);
        if now.saturating_sub(self.seen.busy_at) >= IDLE_AFTER {
            self.rate = None;
            self.harm = None;
            self.enter(Stage::Steer, now);
            return None;
        }
        if now.saturating_sub(self.gathering_since) < self.stretch() {
            return None;
        }
        let gathered = self.gathered.clone();
        match self.baseline.slowdown(&gathered, OPERATIONS_MIN) {
            Some(slowdown) => self.judge(now, slowdown, gathered.mean_ms()),
            None if gathered.mean_ms() >= STALL_MS => {
                self.judge(now, SLOWDOWN_SEVERE, gathered.mean_ms())
            }
            None if gathered.operations() >= OPERATIONS_MIN => {
                // A busy guest of which nothing is known yet.
                self.begin_pause(now, 1.0);
                None
            }
            None if now.saturating_sub(self.gathering_since) >= GATHER_MAX => {
                match self.baseline.slowdown(&gathered, OPERATIONS_FEW) {
                    Some(slowdown) if slowdown >= SLOWDOWN_GROSS => {
                        self.judge(now, slowdown, gathered.mean_ms())
                    }
                    _ => {
                        self.enter(Stage::Steer, now);
                        None
                    }
                }
            }
            None => None,
        }
    }

    /// Least time that is judged as one.
    fn stretch(&self) -> Duration {
        let seconds = |rate: u64| JUDGED_BYTES as f64 / rate as f64;
        self.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(seconds(rate)))
    }

    fn judge(&mut self, now: Duration, slowdown: f64, mean_ms: f64) -> Option<Order> {
        self.figures.worst_latency_ms = self.figures.worst_latency_ms.max(mean_ms);
        self.figures.latest_latency_ms = Some(mean_ms);
        self.enter(Stage::Steer, now);
        if slowdown <= SLOWDOWN_MAX {
            self.harm = None;
            self.cuts = 0;
            if slowdown <= SLOWDOWN_CALM {
                self.go_faster();
            }
            if slowdown < SLOWDOWN_STALE && self.rate.is_some() {
                self.begin_pause(now, slowdown);
            }
            return None;
        }
        self.doubling = false;
        if self.rate == Some(RATE_MIN) {
            return self.at_the_least(now, slowdown, mean_ms);
        }
        self.go_slower(slowdown);
        self.cuts += 1;
        if self.cuts < CUTS_BEFORE_PAUSE || !self.begin_pause(now, slowdown) {
            self.enter(Stage::Settle(now + SETTLE), now);
        }
        None
    }

    fn go_faster(&mut self) {
        let faster = |rate: u64| match self.doubling {
            true => rate * 2,
            false => rate + RATE_STEP,
        };
        self.rate = self.rate.map(faster).filter(|rate| *rate < RATE_FREE);
    }

    fn go_slower(&mut self, slowdown: f64) {
        let kept = if slowdown >= SLOWDOWN_SEVERE { 0.5 } else { 0.75 };
        let limit = self.rate.unwrap_or(RATE_FREE) as f64;
        let from = if self.seen.achieved > 0.0 { limit.min(self.seen.achieved) } else { limit };
        self.rate = Some(((from * kept) as u64).max(RATE_MIN));
    }

    /// There is nothing slower: is it the backup, and for how long already?
    fn at_the_least(&mut self, now: Duration, slowdown: f64, mean_ms: f64) -> Option<Order> {
        if slowdown < SLOWDOWN_SEVERE {
            self.harm = None;
            self.begin_pause(now, slowdown);
            return None;
        }
        let harm = *self.harm.get_or_insert(Harm { since: now, proven: false });
        let long = now.saturating_sub(harm.since) >= GIVE_UP_AFTER;
        if long && harm.proven {
            return Some(Order::GiveUp(format!(
                "the guest's requests took {slowdown:.1} times as long as without the backup \
                 ({mean_ms:.1} ms) for {} s, although no more than {} MiB/s were read",
                GIVE_UP_AFTER.as_secs(),
                RATE_MIN >> 20
            )));
        }
        self.begin_pause(now, slowdown);
        None
    }

    /// Whether a pause begins; the last one must lie some time back.
    fn begin_pause(&mut self, now: Duration, slowdown: f64) -> bool {
        let due = self.paused_at.is_none_or(|last| now.saturating_sub(last) >= PAUSE_GAP);
        if due {
            self.paused_at = Some(now);
            self.enter(Stage::Pause { since: now, slowdown }, now);
        }
        due
    }

    /// Measures the guest alone.
    fn pause(&mut self, now: Duration, since: Duration, slowdown: f64, window: &Window) {
        let past = now.saturating_sub(since);
        if past > 2 * SETTLE {
            self.gathered.add(window);
        }
        if past < PAUSE_MAX && self.gathered.operations() < PAUSE_OPERATIONS {
            return;
        }
        if self.gathered.operations() >= OPERATIONS_MIN {
            // Against the baseline that the slowdown was measured by.
            let alone = self.baseline.slowdown(&self.gathered, OPERATIONS_MIN).unwrap_or(1.0);
            let caused = slowdown > alone * SLOWDOWN_MAX;
            if let Some(harm) = &mut self.harm {
                harm.proven |= caused;
            }
            if !caused {
                self.harm = None;
            }
            self.baseline.learn(&self.gathered);
            self.cuts = 0;
        }
        self.paused_at = Some(now);
        self.enter(Stage::Settle(now + SETTLE), now);
    }
}
