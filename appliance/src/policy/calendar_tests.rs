use jiff::ToSpan as _;
use proptest::prelude::*;

use super::*;

fn zone(name: &str) -> TimeZone {
    TimeZone::get(name).unwrap()
}

/// The next moments after a civil time in Berlin, as UTC.
fn berlin(calendar: &Calendar, after: &str, count: usize) -> Vec<String> {
    let zone = zone("Europe/Berlin");
    let mut at =
        after.parse::<jiff::civil::DateTime>().unwrap().to_zoned(zone.clone()).unwrap().timestamp();
    let mut found = Vec::new();
    for _ in 0..count {
        at = calendar.next(at, &zone).unwrap();
        found.push(at.to_string());
    }
    found
}

fn cron(text: &str) -> Calendar {
    Calendar::from_cron(text).unwrap()
}

fn systemd(text: &str) -> Calendar {
    Calendar::from_systemd(text).unwrap()
}

#[test]
fn cron_and_calendar_expressions() {
    // The 20th of November 2026 is a Friday.
    for (calendar, expected) in [
        (cron("@daily"), "2026-11-20T23:00:00Z"),
        (cron("30 2 * * 1-5"), "2026-11-23T01:30:00Z"),
        (cron("30 2 * * mon-fri"), "2026-11-23T01:30:00Z"),
        (cron("*/15 * * * *"), "2026-11-20T11:15:00Z"),
        (cron("0 4 1 jan *"), "2027-01-01T03:00:00Z"),
        (cron("0 0 * * 7"), "2026-11-21T23:00:00Z"),
        // Both days given: one is enough.
        (cron("0 0 25 * sun"), "2026-11-21T23:00:00Z"),
        (systemd("daily"), "2026-11-20T23:00:00Z"),
        (systemd("weekly"), "2026-11-22T23:00:00Z"),
        (systemd("Mon..Fri 22:00"), "2026-11-20T21:00:00Z"),
        (systemd("Sat..Mon 22:00"), "2026-11-21T21:00:00Z"),
        (systemd("*-*-* 02:00"), "2026-11-21T01:00:00Z"),
        (systemd("*-*-01,15 03:00:30"), "2026-12-01T02:00:30Z"),
        (systemd("2028-02-29"), "2028-02-28T23:00:00Z"),
        (systemd("*-02-29 12:00"), "2028-02-29T11:00:00Z"),
        (systemd("*:0/20"), "2026-11-20T11:20:00Z"),
        (systemd("quarterly"), "2026-12-31T23:00:00Z"),
        (systemd("Friday"), "2026-11-26T23:00:00Z"),
    ] {
        assert_eq!(berlin(&calendar, "2026-11-20T12:00", 1), [expected], "{calendar}");
    }
}

#[test]
fn what_is_no_moment() {
    for text in [
        "",
        "* * * *",
        "60 * * * *",
        "* 24 * * *",
        "*/0 * * * *",
        "5-1 * * * *",
        "x * * * *",
        "@reboot",
        "0 0 31 2 *",
    ] {
        assert!(Calendar::from_cron(text).is_err(), "{text}");
    }
    for text in [
        "",
        "every day",
        "25:00",
        "*-13-01",
        "*-02-30",
        "Mon Tue",
        "10:00 Europe/Berlin",
        "10:00:00:00",
        "1",
    ] {
        assert!(Calendar::from_systemd(text).is_err(), "{text}");
    }
    assert_eq!(
        systemd("2001-01-01").next("2026-01-01T00:00Z".parse().unwrap(), &TimeZone::UTC),
        None
    );
}

#[test]
fn a_night_that_lacks_the_hour_has_one_run_and_one_that_repeats_it_has_one() {
    // In Berlin 02:00 to 03:00 is missing on 2026-03-29 and comes twice on 2026-10-25.
    let nightly = systemd("02:30");
    assert_eq!(
        berlin(&nightly, "2026-03-28T12:00", 2),
        ["2026-03-29T01:30:00Z", "2026-03-30T00:30:00Z"]
    );
    assert_eq!(
        berlin(&nightly, "2026-10-24T12:00", 2),
        ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
    );
    // What comes each hour comes each hour.
    assert_eq!(
        berlin(&systemd("*:30"), "2026-10-25T01:45", 3),
        ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:30:00Z"]
    );
    assert_eq!(
        berlin(&systemd("*:30"), "2026-03-29T00:45", 3),
        ["2026-03-29T00:30:00Z", "2026-03-29T01:30:00Z", "2026-03-29T02:30:00Z"]
    );
}

#[test]
fn a_day_that_a_zone_left_out_does_not_end_the_search() {
    // Samoa had no 30th of December 2011.
    let samoa = zone("Pacific/Apia");
    let after = "2011-12-29T12:00".parse::<jiff::civil::DateTime>().unwrap();
    let mut at = after.to_zoned(samoa.clone()).unwrap().timestamp();
    let mut days = Vec::new();
    for _ in 0..3 {
        at = systemd("10:00").next(at, &samoa).unwrap();
        days.push(samoa.to_datetime(at).date().to_string());
    }
    assert_eq!(days, ["2011-12-31", "2012-01-01", "2012-01-02"]);
}

fn calendars() -> impl Strategy<Value = Calendar> {
    let field = |low: u32, high: u32| {
        prop_oneof![
            Just("*".to_owned()),
            (low..=high).prop_map(|n| n.to_string()),
            (low..=high, low..=high).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))),
            (1..=high / 2).prop_map(|n| format!("*/{n}")),
        ]
    };
    let fields = (field(0, 59), field(0, 23), field(1, 28), field(1, 12), field(0, 6));
    fields
        .prop_map(|(m, h, d, mo, w)| Calendar::from_cron(&format!("{m} {h} {d} {mo} {w}")).unwrap())
}

fn zones() -> impl Strategy<Value = TimeZone> {
    let names = [
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "Asia/Kathmandu",
        "Pacific/Apia",
    ];
    prop::sample::select(names.to_vec()).prop_map(zone)
}

proptest! {
    /// In a zone without changes the answer is what trying every minute finds.
    #[test]
    fn next_is_the_first_fitting_minute(calendar in calendars(), start in 0i64..2_000_000_000) {
        let after = Timestamp::from_second(start).unwrap();
        let found = calendar.next(after, &TimeZone::UTC);
        let fits = |second: &i64| {
            let at = TimeZone::UTC.to_datetime(Timestamp::from_second(*second).unwrap());
            calendar.has_day(at.date())
                && has(calendar.hours, at.hour() as usize)
                && has(calendar.minutes, at.minute() as usize)
        };
        let first = (start / 60 + 1) * 60;
        let tried = (0..4 * 1440).map(|minute| first + minute * 60).find(fits);
        match tried {
            Some(second) => prop_assert_eq!(found.map(Timestamp::as_second), Some(second)),
            None => prop_assert!(found.is_none_or(|t| t.as_second() >= first + 4 * 86_400)),
        }
    }

    /// Moments ascend, `last` finds what `next` went over, and nothing lies between two of them.
    #[test]
    fn last_and_next_agree(calendar in calendars(), zone in zones(), start in 1_000_000_000i64..2_000_000_000) {
        let after = Timestamp::from_second(start).unwrap();
        let Some(first) = calendar.next(after, &zone) else { return Ok(()) };
        prop_assert!(first > after);
        prop_assert_eq!(calendar.last(after, first, &zone), Some(first));
        prop_assert_eq!(calendar.last(after, first - 1.second(), &zone), None);
        if let Some(second) = calendar.next(first, &zone) {
            prop_assert!(second > first);
            prop_assert_eq!(calendar.last(after, second - 1.second(), &zone), Some(first));
        }
    }

    /// A job with one time of day runs on each day once, whatever the clock does.
    #[test]
    fn one_time_of_day_is_one_run_a_day(hour in 0i8..24, minute in 0i8..60, zone in zones(), start in 1_300_000_000i64..2_000_000_000) {
        let calendar = Calendar::from_systemd(&format!("{hour}:{minute}")).unwrap();
        let mut at = calendar.next(Timestamp::from_second(start).unwrap(), &zone).unwrap();
        for _ in 0..40 {
            let next = calendar.next(at, &zone).unwrap();
            let hours = (next.as_second() - at.as_second()) / 3600;
            // A day has 23 to 25 hours, and the run of a day with a gap comes up to an hour late.
            prop_assert!((22..=26).contains(&hours) || hours == 47 || hours < 49 && zone.iana_name() == Some("Pacific/Apia"), "{hours}");
            at = next;
        }
    }

    #[test]
    fn no_text_panics(text in ".{0,40}") {
        let _ = Calendar::from_cron(&text);
        let _ = Calendar::from_systemd(&text);
    }
}
