//! The governor beside guests that are made up: what holds whatever they do.

use std::time::Duration;

use icecore_io_engine::Pace;
use icecore_qmp::capture::guest_io::{Answered, DeviceIo};
use proptest::prelude::*;

use super::core::{
    GIVE_UP_AFTER, Governor, Order, PAUSE_GAP, PAUSE_MAX, RATE_MIN, RATE_START, SLOWDOWN_MAX,
};
use super::window::Window;

const LOOK: Duration = Duration::from_millis(250);
/// What the backup could read alone, in bytes per second.
const FULL_SPEED: u64 = 800 << 20;

/// A guest that waits for each of its writes.
#[derive(Debug, Clone, Copy)]
struct Guest {
    /// Latency of a write with no backup, in seconds.
    alone: f64,
    /// Reading at this rate doubles it, in bytes per second; 0 is a guest that does not care.
    doubled_by: f64,
    /// It is slowed so many times as long as the backup is not paused, however slow it is.
    by_presence: f64,
}

const CALM: Guest = Guest { alone: 1e-3, doubled_by: 0.0, by_presence: 1.0 };

struct World {
    governor: Governor,
    now: Duration,
    written: Answered,
    asked: u64,
    pace: Pace,
    gave_up: Option<String>,
    paused: Duration,
}

fn device(writes: Answered) -> Window {
    let (reads, flushes) = (Answered::default(), Answered::default());
    Window::total(&[DeviceIo { device: "vda".into(), reads, writes, flushes }])
}

impl World {
    /// After a second of `before` without a backup; none for an idle guest.
    fn new(before: Option<Guest>) -> Self {
        let second = before.map_or(Answered::default(), |guest| Answered {
            operations: (1.0 / guest.alone) as u64,
            nanoseconds: 1_000_000_000,
        });
        let window = device(second).since(&device(Answered::default()));
        let governor = Governor::new(Duration::ZERO, &window);
        let pace = governor.pace();
        let (now, paused) = (Duration::ZERO, Duration::ZERO);
        Self { governor, now, written: second, asked: 0, pace, gave_up: None, paused }
    }

    fn rate(&self) -> u64 {
        match self.pace {
            Pace { in_flight: 0, .. } => 0,
            pace => pace.bytes_per_second.unwrap_or(u64::MAX).min(FULL_SPEED),
        }
    }

    /// One look later; `noise` multiplies the latency.
    fn step(&mut self, guest: Option<Guest>, noise: f64) {
        let rate = self.rate();
        if let Some(guest) = guest {
            let load = if guest.doubled_by > 0.0 { rate as f64 / guest.doubled_by } else { 0.0 };
            let presence = if rate > 0 { guest.by_presence } else { 1.0 };
            let latency = guest.alone * (1.0 + load) * presence * noise;
            let operations = (LOOK.as_secs_f64() / latency).max(1.0);
            self.written.operations += operations as u64;
            self.written.nanoseconds += (latency * operations.floor() * 1e9) as u64;
        }
        self.now += LOOK;
        self.asked += (rate as f64 * LOOK.as_secs_f64()) as u64;
        match self.governor.look(self.now, device(self.written), self.asked) {
            Order::Pace(pace) => self.pace = pace,
            Order::GiveUp(why) => self.gave_up = Some(why),
        }
        if self.pace == Pace::PAUSE {
            self.paused += LOOK;
        }
    }

    fn run(&mut self, guest: Option<Guest>, seconds: u64) {
        for _ in 0..seconds * 4 {
            self.step(guest, 1.0);
        }
    }
}

#[test]
fn a_guest_without_io_imposes_no_limit() {
    let mut world = World::new(None);
    assert_eq!(world.pace, Pace::FREE);
    world.run(None, 60);
    assert_eq!(world.pace, Pace::FREE);
    assert_eq!(world.governor.figures().least_rate_bytes, None);
}

#[test]
fn a_guest_that_does_not_suffer_is_left_alone_within_seconds() {
    let mut world = World::new(Some(CALM));
    assert_eq!(world.pace.bytes_per_second, Some(RATE_START));
    world.run(Some(CALM), 3);
    assert!(world.rate() >= FULL_SPEED, "{:?}", world.pace);
}

#[test]
fn a_guest_that_turns_busy_without_a_baseline_is_measured_first() {
    let mut world = World::new(None);
    let guest = Guest { doubled_by: 200e6, ..CALM };
    world.run(Some(guest), 1);
    assert!(world.paused > Duration::ZERO, "{:?}", world.pace);
    world.run(Some(guest), 60);
    assert!((10 << 20..80 << 20).contains(&world.rate()), "{:?}", world.pace);
}

#[test]
fn who_is_harmed_at_the_least_rate_ends_the_backup_with_a_reason() {
    let mut world = World::new(Some(CALM));
    let guest = Guest { by_presence: 6.0, ..CALM };
    world.run(Some(guest), 20);
    assert_eq!(world.gave_up, None, "not at once");
    world.run(Some(guest), GIVE_UP_AFTER.as_secs() + 20);
    let why = world.gave_up.expect("given up");
    assert!(why.contains("6.0 times as long") && why.contains("4 MiB/s"), "{why}");
}

#[test]
fn a_guest_that_is_slow_by_its_own_doing_is_no_reason_to_slow_down_for_long() {
    let mut world = World::new(Some(CALM));
    let busier = Guest { alone: 20e-3, ..CALM };
    world.run(Some(busier), 40);
    assert_eq!(world.gave_up, None);
    assert!(world.rate() > 2 * RATE_START, "{:?}", world.pace);
}

#[test]
fn one_request_that_hangs_is_harm_and_no_idleness() {
    let mut world = World::new(Some(CALM));
    world.run(Some(CALM), 10);
    let before = world.rate();
    // Nothing is answered for two seconds, then one request that took them.
    world.run(None, 2);
    assert!(world.rate() >= before.min(FULL_SPEED) && world.governor.pace() == world.pace);
    world.written.operations += 1;
    world.written.nanoseconds += 2_000_000_000;
    world.step(None, 1.0);
    world.step(None, 1.0);
    assert!(world.rate() <= before / 2, "{:?}", world.pace);
}

#[test]
fn a_few_requests_that_take_much_longer_are_heard() {
    let guest = Guest { alone: 5e-3, ..CALM };
    let mut world = World::new(Some(guest));
    world.run(Some(guest), 5);
    let before = world.rate();
    // 120 ms each: eight in a second.
    world.run(Some(Guest { doubled_by: before as f64 / 24.0, ..guest }), 5);
    assert!(world.rate() <= before / 2, "{:?}", world.pace);
}

#[test]
fn the_limit_goes_when_the_guest_falls_silent() {
    let mut world = World::new(Some(CALM));
    world.run(Some(Guest { doubled_by: 50e6, ..CALM }), 30);
    assert!(world.rate() < FULL_SPEED / 4);
    world.run(None, 5);
    assert_eq!(world.pace, Pace::FREE);
    assert!(world.governor.figures().slowed > Duration::from_secs(20));
}

proptest! {
    /// In the long run the guest keeps its latency, the backup its floor, and it comes to an end.
    #[test]
    fn any_guest_is_served_and_any_backup_goes_on(
        alone in 20e-6f64..20e-3,
        doubled_by in 20e6f64..2e9,
        noise in prop::collection::vec(0.95f64..1.05, 480),
    ) {
        let guest = Guest { alone, doubled_by, by_presence: 1.0 };
        let mut world = World::new(Some(guest));
        let (mut slow, mut judged) = (0, 0);
        for (step, noise) in noise.iter().enumerate() {
            world.step(Some(guest), *noise);
            prop_assert!(world.gave_up.is_none());
            let rate = world.pace.bytes_per_second.unwrap_or(u64::MAX);
            prop_assert!(rate >= RATE_MIN && (world.pace == Pace::PAUSE || world.pace.in_flight > 0));
            if step >= 80 {
                judged += 1;
                let slowdown = 1.0 + world.rate() as f64 / doubled_by;
                slow += usize::from(slowdown > SLOWDOWN_MAX * 1.1);
            }
        }
        prop_assert!(slow * 10 <= judged, "slowed in {slow} of {judged} looks");
        let pauses = world.paused.as_secs_f64() / world.now.as_secs_f64();
        let most = (PAUSE_MAX + LOOK).as_secs_f64() / (PAUSE_GAP + PAUSE_MAX).as_secs_f64();
        prop_assert!(pauses <= most, "paused {pauses} of the time");
        // What the guest can bear, less what carefulness costs.
        let bearable = (0.25 * doubled_by).min(FULL_SPEED as f64);
        let read = world.asked as f64 / world.now.as_secs_f64();
        prop_assert!(read >= bearable * 0.15, "{read} of {bearable}");
    }

    /// A guest that is suddenly slowed several times is relieved within a few looks.
    #[test]
    fn harm_is_answered_within_two_seconds(alone in 20e-6f64..1e-3, factor in 3f64..10.0) {
        let mut world = World::new(Some(Guest { alone, ..CALM }));
        world.run(Some(Guest { alone, ..CALM }), 5);
        let before = world.rate();
        let guest = Guest { alone, doubled_by: before as f64 / factor, by_presence: 1.0 };
        world.run(Some(guest), 2);
        prop_assert!(world.rate() <= before / 4, "{before} to {:?}", world.pace);
    }

    /// Chance alone never slows a backup down for long.
    #[test]
    fn noise_is_no_harm(noise in prop::collection::vec(0.8f64..1.2, 240)) {
        let mut world = World::new(Some(CALM));
        for noise in noise {
            world.step(Some(CALM), noise);
        }
        prop_assert!(world.asked as f64 / world.now.as_secs_f64() > 0.7 * FULL_SPEED as f64);
    }
}
