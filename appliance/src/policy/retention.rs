//! Which points stay: by their order, and by the hour, day, week, month and year they stand for.
//!
//! A rule counts the stretches of time that have a point, not those on the clock: a VM that was off
//! for a month loses nothing, and a clock that is a year ahead deletes nothing. A clock that is
//! behind cannot be told from points of the future; then nothing is decided.

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Zoned};
use serde::{Deserialize, Serialize};

/// A point may be so far ahead of the clock: hosts that share a repository differ by seconds, and
/// ids are never smaller than those before them.
pub const CLOCK_MARGIN: SignedDuration = SignedDuration::from_hours(1);

/// How many points of each kind stay; the newest of an hour, day, week, month or year stands for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// The newest points, whenever they were taken.
    pub last: u32,
    /// One of each of so many hours that have a point.
    pub hourly: u32,
    /// One of each of so many days.
    pub daily: u32,
    /// One of each of so many weeks, Monday to Sunday.
    pub weekly: u32,
    /// One of each of so many months.
    pub monthly: u32,
    /// One of each of so many years.
    pub yearly: u32,
}

impl Keep {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn count(&self, rule: Rule) -> u32 {
        match rule {
            Rule::Last => self.last,
            Rule::Hourly => self.hourly,
            Rule::Daily => self.daily,
            Rule::Weekly => self.weekly,
            Rule::Monthly => self.monthly,
            Rule::Yearly => self.yearly,
            Rule::Protected | Rule::Newest | Rule::Future => 0,
        }
    }
}

/// Why a point stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// It is among the newest.
    Last,
    /// It is the newest of its hour.
    Hourly,
    /// It is the newest of its day.
    Daily,
    /// It is the newest of its week.
    Weekly,
    /// It is the newest of its month.
    Monthly,
    /// It is the newest of its year.
    Yearly,
    /// It is protected.
    Protected,
    /// It is the newest good one: that never goes.
    Newest,
    /// It is of the future, by a clock that was told to be right.
    Future,
}

/// The rules that count.
const COUNTING: [Rule; 6] =
    [Rule::Last, Rule::Hourly, Rule::Daily, Rule::Weekly, Rule::Monthly, Rule::Yearly];

/// A good point of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its instant.
    pub at: Timestamp,
    /// Whether it is protected.
    pub protected: bool,
}

/// What becomes of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The point.
    pub point: String,
    /// Its instant.
    pub captured_at: Timestamp,
    /// The rules that keep it; it goes when there is none.
    pub rules: Vec<Rule>,
}

impl Verdict {
    /// Whether it stays.
    pub fn stays(&self) -> bool {
        !self.rules.is_empty()
    }
}

/// What is made of a point that is later than now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The clock may be wrong: nothing is decided.
    Doubted,
    /// The clock is right: such points stay and stand for nothing.
    Trusted,
}

/// The clock says less than a point does: nothing may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClockBehind {
    /// The newest point.
    pub newest: String,
    /// Its instant.
    pub at: Timestamp,
}

/// Decides about the good points of one VM; the verdicts are in the order of time, oldest first.
///
/// # Errors
/// [`ClockBehind`] when a point is later than now and the clock is not trusted.
pub fn decide(
    points: &[Candidate<'_>],
    keep: &Keep,
    zone: &TimeZone,
    now: Timestamp,
    clock: Clock,
) -> Result<Vec<Verdict>, ClockBehind> {
    let mut ordered: Vec<Candidate<'_>> = points.to_vec();
    ordered.sort_by(|a, b| (a.at, a.id).cmp(&(b.at, b.id)));
    let ahead = |point: &Candidate<'_>| point.at.duration_since(now) > CLOCK_MARGIN;
    if let Some(newest) = ordered.last().filter(|p| ahead(p) && clock == Clock::Doubted) {
        return Err(ClockBehind { newest: newest.id.to_owned(), at: newest.at });
    }
    let mut verdicts: Vec<Verdict> = ordered.iter().map(verdict).collect();
    let present: Vec<usize> = (0..ordered.len()).filter(|at| !ahead(&ordered[*at])).collect();
    for verdict in &mut verdicts[present.len()..] {
        verdict.rules.push(Rule::Future);
    }
    for rule in COUNTING {
        let mut left = keep.count(rule);
        let mut seen = None;
        for &at in present.iter().rev() {
            let stretch = stretch(rule, &ordered[at].at.to_zoned(zone.clone()), at);
            if left > 0 && seen.as_ref() != Some(&stretch) {
                verdicts[at].rules.push(rule);
                left -= 1;
                seen = Some(stretch);
            }
        }
    }
    if let Some(&newest) = present.last() {
        verdicts[newest].rules.push(Rule::Newest);
    }
    Ok(verdicts)
}

fn verdict(point: &Candidate<'_>) -> Verdict {
    let rules = if point.protected { vec![Rule::Protected] } else { Vec::new() };
    Verdict { point: point.id.to_owned(), captured_at: point.at, rules }
}

/// What of time a point stands for under a rule; the newest of two with the same stands for both.
fn stretch(rule: Rule, at: &Zoned, place: usize) -> [i64; 3] {
    let date = at.date();
    let year = i64::from(date.year());
    match rule {
        // An hour that comes twice in autumn is two.
        Rule::Hourly => {
            let day = i64::from(date.day_of_year());
            [year, day * 24 + i64::from(at.hour()), i64::from(at.offset().seconds())]
        }
        Rule::Daily => [year, i64::from(date.day_of_year()), 0],
        Rule::Weekly => {
            let week = date.iso_week_date();
            [i64::from(week.year()), i64::from(week.week()), 0]
        }
        Rule::Monthly => [year, i64::from(date.month()), 0],
        Rule::Yearly => [year, 0, 0],
        _ => [place as i64, 0, 0],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn berlin() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn points<'a>(ids: &'a [String], times: &[Timestamp]) -> Vec<Candidate<'a>> {
        let pairs = ids.iter().zip(times);
        pairs.map(|(id, at)| Candidate { id, at: *at, protected: false }).collect()
    }

    fn kept(times: &[Timestamp], keep: Keep, now: Timestamp) -> Vec<String> {
        let ids: Vec<String> = (0..times.len()).map(|n| format!("p{n:03}")).collect();
        let all = points(&ids, times);
        let verdicts = decide(&all, &keep, &berlin(), now, Clock::Doubted).unwrap();
        verdicts.into_iter().filter(Verdict::stays).map(|v| v.captured_at.to_string()).collect()
    }

    #[test]
    fn the_newest_of_a_day_of_the_zone_stands_for_it() {
        let times =
            ["2026-11-01T10:00Z", "2026-11-01T22:30Z", "2026-11-01T23:30Z", "2026-11-02T10:00Z"];
        let times: Vec<Timestamp> = times.map(time).to_vec();
        let keep = Keep { daily: 2, ..Keep::default() };
        // 23:30 UTC is the next day in Berlin.
        assert_eq!(
            kept(&times, keep, time("2026-11-03T00:00Z")),
            ["2026-11-01T22:30:00Z", "2026-11-02T10:00:00Z"]
        );
    }

    #[test]
    fn the_hour_that_comes_twice_is_two_hours() {
        let times = ["2026-10-25T00:30Z", "2026-10-25T01:30Z"].map(time);
        let keep = Keep { hourly: 2, ..Keep::default() };
        assert_eq!(kept(&times, keep, time("2026-10-26T00:00Z")).len(), 2);
    }

    #[test]
    fn a_clock_that_is_behind_decides_nothing_and_one_that_is_ahead_deletes_nothing_more() {
        let times = ["2026-11-01T10:00Z", "2026-11-02T10:00Z", "2026-11-03T10:00Z"].map(time);
        let ids: Vec<String> = (0..3).map(|n| n.to_string()).collect();
        let all = points(&ids, &times);
        let keep = Keep { daily: 2, ..Keep::default() };
        let at = |now, clock| decide(&all, &keep, &berlin(), time(now), clock);
        let behind = at("2025-11-03T10:00Z", Clock::Doubted).unwrap_err();
        assert_eq!(behind.newest, "2");
        let usual = at("2026-11-03T11:00Z", Clock::Doubted).unwrap();
        assert_eq!(at("2036-11-03T11:00Z", Clock::Doubted).unwrap(), usual);
        // By a clock that is right the point of the future stays and stands for nothing.
        let trusted = at("2026-11-02T11:00Z", Clock::Trusted).unwrap();
        assert_eq!(trusted[2].rules, [Rule::Future]);
        assert!(trusted[0].rules == [Rule::Daily] && trusted[1].stays());
    }

    #[test]
    fn without_a_rule_the_newest_stays_and_what_is_protected() {
        let times = ["2026-11-01T10:00Z", "2026-11-02T10:00Z", "2026-11-03T10:00Z"].map(time);
        let ids: Vec<String> = (0..3).map(|n| n.to_string()).collect();
        let mut all = points(&ids, &times);
        all[0].protected = true;
        let now = time("2026-11-04T10:00Z");
        let verdicts = decide(&all, &Keep::default(), &berlin(), now, Clock::Doubted).unwrap();
        let rules: Vec<_> = verdicts.into_iter().map(|verdict| verdict.rules).collect();
        assert_eq!(rules, [vec![Rule::Protected], vec![], vec![Rule::Newest]]);
    }

    fn keeps() -> impl Strategy<Value = Keep> {
        let n = 0u32..5;
        (n.clone(), n.clone(), n.clone(), n.clone(), n.clone(), n).prop_map(
            |(last, hourly, daily, weekly, monthly, yearly)| Keep {
                last,
                hourly,
                daily,
                weekly,
                monthly,
                yearly,
            },
        )
    }

    fn histories() -> impl Strategy<Value = Vec<(Timestamp, bool)>> {
        // Around a change of the clock, and further away.
        let near = 1_792_800_000i64..1_793_100_000;
        let far = 1_600_000_000i64..1_800_000_000;
        let second = prop_oneof![near, far];
        let point = (second, prop::bool::weighted(0.1));
        let point = point.prop_map(|(s, p)| (Timestamp::from_second(s).unwrap(), p));
        prop::collection::vec(point, 0..40)
    }

    fn surviving(history: &[(String, Timestamp, bool)], keep: &Keep) -> BTreeSet<String> {
        let all: Vec<Candidate<'_>> = history
            .iter()
            .map(|(id, at, protected)| Candidate { id, at: *at, protected: *protected })
            .collect();
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let verdicts = decide(&all, keep, &berlin(), now, Clock::Doubted).unwrap();
        verdicts.into_iter().filter(Verdict::stays).map(|verdict| verdict.point).collect()
    }

    proptest! {
        #[test]
        fn to_keep_more_keeps_no_less_and_twice_is_once(
            history in histories(), keep in keeps(), more in keeps(),
        ) {
            let history: Vec<(String, Timestamp, bool)> = history.into_iter().enumerate()
                .map(|(n, (at, protected))| (format!("p{n:03}"), at, protected)).collect();
            let kept = surviving(&history, &keep);
            let sum = Keep {
                last: keep.last + more.last,
                hourly: keep.hourly + more.hourly,
                daily: keep.daily + more.daily,
                weekly: keep.weekly + more.weekly,
                monthly: keep.monthly + more.monthly,
                yearly: keep.yearly + more.yearly,
            };
            prop_assert!(kept.is_subset(&surviving(&history, &sum)));
            let left: Vec<_> =
                history.iter().filter(|(id, ..)| kept.contains(id)).cloned().collect();
            prop_assert_eq!(&surviving(&left, &keep), &kept);
            for (id, _, protected) in &history {
                prop_assert!(!protected || kept.contains(id));
            }
            // The newest never goes, and neither does everything.
            let newest = history.iter().max_by_key(|(id, at, _)| (*at, id.clone()));
            prop_assert!(newest.is_none_or(|(id, ..)| kept.contains(id)));
            let counted = [keep.last, keep.hourly, keep.daily, keep.weekly, keep.monthly, keep.yearly];
            let protected = history.iter().filter(|(.., protected)| *protected).count();
            prop_assert!(kept.len() <= counted.iter().sum::<u32>() as usize + protected + 1);
        }
    }
}
