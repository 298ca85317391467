use proptest::prelude::*;

use super::*;

struct World {
    calendar: Calendar,
    window: Vec<TimeRange>,
    missed: Missed,
    marks: Option<Timestamp>,
}

impl World {
    fn new(calendar: &str, missed: Missed) -> Self {
        let calendar = Calendar::from_systemd(calendar).unwrap();
        Self { calendar, window: Vec::new(), missed, marks: None }
    }

    fn at(&mut self, now: &str) -> Step {
        self.now(now.parse().unwrap())
    }

    fn now(&mut self, now: Timestamp) -> Step {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let (window, missed) = (&self.window, self.missed);
        let plan = Plan { moments: &self.calendar, zone, window, blackout: &[], missed };
        let (step, mark) = plan.step(SignedDuration::ZERO, self.marks, now);
        self.marks = Some(mark);
        step
    }
}

fn runs(step: Step) -> bool {
    matches!(step, Step::Run { .. })
}

#[test]
fn a_moment_is_one_run() {
    let mut world = World::new("02:30", Missed::Run);
    assert_eq!(world.at("2026-11-20T00:00Z"), Step::Wait);
    let moment = "2026-11-20T01:30:00Z".parse().unwrap();
    assert_eq!(world.at("2026-11-20T01:30:10Z"), Step::Run { moment, late: false });
    assert_eq!(world.at("2026-11-20T01:30:20Z"), Step::Wait);
}

#[test]
fn days_without_a_daemon_are_made_up_for_once_or_left_out() {
    let mut world = World::new("02:30", Missed::Run);
    world.at("2026-11-20T00:00Z");
    let moment = "2026-11-25T01:30:00Z".parse().unwrap();
    assert_eq!(world.at("2026-11-25T12:00Z"), Step::Run { moment, late: true });
    assert_eq!(world.at("2026-11-25T12:01Z"), Step::Wait);
    let mut world = World::new("02:30", Missed::Skip);
    world.at("2026-11-20T00:00Z");
    assert_eq!(world.at("2026-11-25T12:00Z"), Step::Skip { moment });
    assert_eq!(world.at("2026-11-25T12:01Z"), Step::Wait);
    assert!(runs(world.at("2026-11-26T01:31Z")));
}

#[test]
fn a_clock_set_back_runs_nothing_twice_and_one_set_back_by_a_year_does_not_stop_all() {
    let mut world = World::new("02:30", Missed::Run);
    world.at("2026-11-20T00:00Z");
    assert!(runs(world.at("2026-11-20T01:31Z")));
    assert_eq!(world.at("2026-11-20T01:00Z"), Step::Wait);
    assert_eq!(world.at("2026-11-20T01:31Z"), Step::Wait);
    assert_eq!(world.at("2025-11-20T00:00Z"), Step::Wait);
    assert!(runs(world.at("2025-11-20T01:31Z")));
}

#[test]
fn a_closed_window_makes_a_run_wait_or_leaves_it_out() {
    let mut world = World::new("12:00", Missed::Run);
    world.window = vec![TimeRange::try_from("22:00-06:00".to_owned()).unwrap()];
    world.at("2026-11-20T00:00Z");
    assert_eq!(world.at("2026-11-20T11:01Z"), Step::Wait);
    assert!(runs(world.at("2026-11-20T21:00Z")));
    world.missed = Missed::Skip;
    assert!(matches!(world.at("2026-11-21T11:01Z"), Step::Skip { .. }));
    assert_eq!(world.at("2026-11-21T21:00Z"), Step::Wait);
}

#[test]
fn a_vm_that_is_out_of_sight_keeps_its_mark_and_two_have_one_each() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("icecore.toml");
    let text = "[repository.r]\nurl = '/r'\n[schedule.s]\ncalendar = '12:00'\nvms = ['*']\n\
                repository = 'r'\ntimezone = 'UTC'\nlevel = 'full'\n";
    std::fs::write(&path, text).unwrap();
    let config = Config::load(Some(&path)).unwrap();
    let at = |vms: &[&str], marks: &Marks, now: &str| {
        let vms: Vec<String> = vms.iter().map(ToString::to_string).collect();
        tick(&config, &vms, marks, now.parse().unwrap())
    };
    let first = at(&["a", "b"], &Marks::default(), "2026-11-20T00:00Z");
    assert!(first.runs.is_empty() && first.missed.is_empty());
    let without = at(&["b"], &first.marks, "2026-11-20T12:01Z");
    assert_eq!(without.runs.len(), 1);
    assert_eq!((&*without.runs[0].vm, without.runs[0].level), ("b", ScheduledLevel::Full));
    let back = at(&["a", "b"], &without.marks, "2026-11-20T13:00Z");
    assert_eq!(back.runs.iter().map(|run| &*run.vm).collect::<Vec<_>>(), ["a"]);
    assert_eq!(back.missed.len(), 1);
    assert!(back.missed[0].made_up && back.missed[0].vm == "a");
}

#[test]
fn jitter_is_the_same_each_time_and_spreads() {
    let jitter = Duration::from_secs(900);
    let all: Vec<i64> = (0..50).map(|n| offset("s", &format!("vm{n}"), jitter).as_secs()).collect();
    let again: Vec<i64> =
        (0..50).map(|n| offset("s", &format!("vm{n}"), jitter).as_secs()).collect();
    assert_eq!(all, again);
    assert!(all.iter().all(|seconds| (0..900).contains(seconds)));
    assert!(all.iter().any(|s| *s < 300) && all.iter().any(|s| *s > 600));
    assert_eq!(offset("s", "vm", Duration::ZERO), SignedDuration::ZERO);
}

#[test]
fn next_turns_honour_the_window() {
    let calendar = Calendar::from_systemd("12:00").unwrap();
    let window = [TimeRange::try_from("Sat 11:00-13:00".to_owned()).unwrap()];
    let zone = TimeZone::UTC;
    let plan = |missed| Plan {
        moments: &calendar,
        zone: zone.clone(),
        window: &window,
        blackout: &[],
        missed,
    };
    let friday = "2026-11-20T00:00Z".parse().unwrap();
    let next = |missed| plan(missed).next(SignedDuration::ZERO, friday).unwrap().to_string();
    assert_eq!(next(Missed::Skip), "2026-11-21T12:00:00Z");
    assert_eq!(next(Missed::Run), "2026-11-21T11:00:00Z");
    let never = [TimeRange::try_from("00:00-24:00".to_owned()).unwrap()];
    let closed =
        Plan { moments: &calendar, zone, window: &[], blackout: &never, missed: Missed::Run };
    assert_eq!(closed.next(SignedDuration::ZERO, friday), None);
}

proptest! {
    /// However the clock moves: no moment is run twice while it is set back by less than a day, and
    /// a tick is one run at the most.
    #[test]
    fn no_moment_twice(steps in prop::collection::vec(-80_000i64..400_000, 1..60)) {
        let mut world = World::new("*:0/30", Missed::Run);
        let mut now = 1_790_000_000i64;
        let mut newest = now;
        let mut seen = std::collections::BTreeSet::new();
        for step in steps {
            // Set back from the latest it ever was, so that steps back do not add up.
            now = if step < 0 { newest + step } else { now + step };
            newest = newest.max(now);
            if let Step::Run { moment, .. } = world.now(Timestamp::from_second(now).unwrap()) {
                prop_assert!(seen.insert(moment), "{moment} twice");
                prop_assert!(moment.as_second() <= now);
            }
        }
    }

}

proptest! {
    // Each case looks at the clock thousands of times.
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// A daemon that looks every minute runs each moment on time, over changes of the clock, too.
    #[test]
    fn a_steady_clock_misses_nothing(start in 1_792_700_000i64..1_793_000_000) {
        let mut world = World::new("*-*-* 02:30", Missed::Skip);
        let mut runs = 0;
        for minute in 0..4 * 1440 {
            match world.now(Timestamp::from_second(start + minute * 60).unwrap()) {
                Step::Run { late, .. } => {
                    prop_assert!(!late);
                    runs += 1;
                }
                Step::Skip { moment } => prop_assert!(false, "{moment} was skipped"),
                Step::Wait => {}
            }
        }
        prop_assert!((3..=5).contains(&runs), "{runs}");
    }
}
