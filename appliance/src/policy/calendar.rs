//! Moments that come again: cron's five fields and systemd's calendar expressions, in a time zone.
//!
//! Both grammars come to the same thing: days that fit, and times on such a day. A time that a
//! change of the clock leaves out is moved to just after it; a time that comes twice counts once,
//! the first time. Only where every hour is meant (`*:30`) does it count both times, as its minutes
//! go by evenly.

use jiff::Timestamp;
use jiff::civil::{Date, Weekday};
use jiff::tz::{AmbiguousOffset, TimeZone};

/// No moment further away is looked for: the 29th of February on a given weekday comes at least
/// once in 40 years.
const HORIZON_DAYS: usize = 41 * 366;
/// All 24 bits of the hours.
const ALL_HOURS: u64 = (1 << 24) - 1;
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
const WEEKDAYS_LONG: [&str; 7] =
    ["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"];
const MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];

/// Moments that come again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calendar {
    text: String,
    years: Vec<Years>,
    /// Bit n: the month n.
    months: u64,
    /// Bit n: the day n of a month.
    dates: u64,
    /// Bit n: n days after Sunday.
    weekdays: u64,
    /// Cron's rule: with both days given, one of them is enough.
    either_day: bool,
    hours: u64,
    minutes: u64,
    seconds: u64,
}

/// Years from one to another (inclusive), every so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Years {
    from: i16,
    to: i16,
    step: i16,
}

impl std::fmt::Display for Calendar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Calendar {
    /// Reads `minute hour day month weekday`, or `@daily` and its like.
    ///
    /// # Errors
    /// With what is wrong, for a person.
    pub fn from_cron(text: &str) -> Result<Self, String> {
        let named = match text.trim() {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            other => other,
        };
        let fields: Vec<&str> = named.split_whitespace().collect();
        let [minute, hour, date, month, weekday] = fields[..] else {
            return Err(format!(
                "'{text}' is no cron expression: five fields, minute hour day month weekday, \
                 as in '30 2 * * 1-5', or @daily"
            ));
        };
        let in_text = |error: String| format!("in '{text}': {error}");
        let set = |field, low, high, names: &[&str], base| {
            set(field, "-", low, high, names, base).map_err(in_text)
        };
        let calendar = Self {
            text: text.trim().to_owned(),
            years: Vec::new(),
            months: set(month, 1, 12, &MONTHS, 1)?,
            dates: set(date, 1, 31, &[], 0)?,
            weekdays: sunday_is_zero(set(weekday, 0, 7, &WEEKDAYS, 0)?),
            either_day: !date.starts_with('*') && !weekday.starts_with('*'),
            hours: set(hour, 0, 23, &[], 0)?,
            minutes: set(minute, 0, 59, &[], 0)?,
            seconds: 1,
        };
        calendar.possible()
    }

    /// Reads `[WEEKDAYS] [YEAR-MONTH-DAY] [HOUR:MINUTE[:SECOND]]` as systemd does (without `~` and
    /// zones), or `daily` and its like.
    ///
    /// # Errors
    /// With what is wrong, for a person.
    pub fn from_systemd(text: &str) -> Result<Self, String> {
        let in_text = |error: String| format!("in '{text}': {error}");
        let lower = text.trim().to_ascii_lowercase();
        let named = match lower.as_str() {
            "minutely" => "*-*-* *:*:00",
            "hourly" => "*-*-* *:00:00",
            "daily" => "*-*-* 00:00:00",
            "weekly" => "mon *-*-* 00:00:00",
            "monthly" => "*-*-01 00:00:00",
            "quarterly" => "*-01,04,07,10-01 00:00:00",
            "semiannually" => "*-01,07-01 00:00:00",
            "yearly" | "annually" => "*-01-01 00:00:00",
            other => other,
        };
        let mut calendar = Self {
            text: text.trim().to_owned(),
            years: Vec::new(),
            months: bits(1, 12, 1),
            dates: bits(1, 31, 1),
            weekdays: bits(0, 6, 1),
            either_day: false,
            hours: 1,
            minutes: 1,
            seconds: 1,
        };
        let mut rest: Vec<&str> = named.split_whitespace().collect();
        if rest.is_empty() {
            return Err("a calendar expression is empty; write one as in 'daily'".into());
        }
        if rest[0].starts_with(|c: char| c.is_ascii_alphabetic()) {
            calendar.weekdays = weekdays(rest.remove(0)).map_err(in_text)?;
        }
        if rest.first().is_some_and(|word| !word.contains(':')) {
            calendar.date(rest.remove(0)).map_err(in_text)?;
        }
        if rest.first().is_some_and(|word| word.contains(':')) {
            calendar.time(rest.remove(0)).map_err(in_text)?;
        }
        if let Some(word) = rest.first() {
            let what = "is left over; a zone goes into the key timezone";
            return Err(in_text(format!("'{word}' {what}")));
        }
        calendar.possible()
    }

    fn date(&mut self, text: &str) -> Result<(), String> {
        let parts: Vec<&str> = text.split('-').collect();
        let (years, month, date) = match parts[..] {
            [year, month, date] => (year, month, date),
            [month, date] => ("*", month, date),
            _ => return Err(format!("'{text}' is no date; write one as in *-*-01")),
        };
        self.years = if years == "*" { Vec::new() } else { list_of_years(years)? };
        self.months = set(month, "..", 1, 12, &[], 0)?;
        self.dates = set(date, "..", 1, 31, &[], 0)?;
        Ok(())
    }

    fn time(&mut self, text: &str) -> Result<(), String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (hour, minute, second) = match parts[..] {
            [hour, minute] => (hour, minute, "0"),
            [hour, minute, second] => (hour, minute, second),
            _ => return Err(format!("'{text}' is no time; write one as in 22:00")),
        };
        self.hours = set(hour, "..", 0, 23, &[], 0)?;
        self.minutes = set(minute, "..", 0, 59, &[], 0)?;
        self.seconds = set(second, "..", 0, 59, &[], 0)?;
        Ok(())
    }

    /// Refuses a day that no year has, such as the 31st of February.
    fn possible(self) -> Result<Self, String> {
        const LONGEST: [u32; 12] = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let first = self.dates.trailing_zeros();
        let there = (1..=12).any(|month| has(self.months, month) && first <= LONGEST[month - 1]);
        if there || self.either_day {
            return Ok(self);
        }
        Err(format!("'{}' never comes: no such month has a day {first}", self.text))
    }

    /// The first moment after `after`; none within 40 years when there is none.
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        // A day may hold moments of the one before: where a change of the clock moved them.
        let mut date = zone.to_datetime(after).date().yesterday().ok()?;
        let mut found: Option<Timestamp> = None;
        for _ in 0..HORIZON_DAYS {
            let had = found;
            let of_day = self.moments(date, zone).filter(|moment| *moment > after);
            found = of_day.chain(found).min();
            if had.is_some() {
                break;
            }
            date = date.tomorrow().ok()?;
        }
        found
    }

    /// The last moment in `after..=until`, `after` itself left out.
    pub fn last(&self, after: Timestamp, until: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let first = zone.to_datetime(after).date().yesterday().ok()?;
        let mut date = zone.to_datetime(until).date().tomorrow().ok()?;
        let mut found: Option<Timestamp> = None;
        while date >= first {
            let had = found;
            let of_day = self.moments(date, zone);
            found = of_day.filter(|moment| *moment > after && *moment <= until).chain(found).max();
            if had.is_some() {
                break;
            }
            date = date.yesterday().ok()?;
        }
        found
    }

    /// The moments of a civil day, wherever the zone puts them.
    fn moments<'a>(
        &'a self,
        date: Date,
        zone: &'a TimeZone,
    ) -> impl Iterator<Item = Timestamp> + 'a {
        let hours = (0..24).filter(move |hour| self.has_day(date) && has(self.hours, *hour));
        let minutes = move |hour| {
            let of_hour = (0..60).filter(|minute| has(self.minutes, *minute));
            of_hour.map(move |minute| (hour, minute))
        };
        let seconds = move |(hour, minute)| {
            let of_minute = (0..60).filter(|second| has(self.seconds, *second));
            of_minute.map(move |second| date.at(hour as i8, minute as i8, second as i8, 0))
        };
        let civil = hours.flat_map(minutes).flat_map(seconds);
        civil.flat_map(move |time| {
            let moment = zone.to_ambiguous_timestamp(time);
            let fold = matches!(moment.offset(), AmbiguousOffset::Fold { .. });
            let again = fold && self.hours == ALL_HOURS;
            let second = if again { moment.later().ok() } else { None };
            moment.compatible().ok().into_iter().chain(second)
        })
    }

    fn has_day(&self, date: Date) -> bool {
        let within = |years: &Years| {
            let year = date.year();
            (years.from..=years.to).contains(&year) && (year - years.from) % years.step == 0
        };
        let year = self.years.is_empty() || self.years.iter().any(within);
        let by_date = has(self.dates, date.day() as usize);
        let by_weekday = has(self.weekdays, days_after_sunday(date.weekday()));
        let day = if self.either_day { by_date || by_weekday } else { by_date && by_weekday };
        year && day && has(self.months, date.month() as usize)
    }
}

/// A set of weekdays as in `Mon,Wed..Fri`; bit n stands for n days after Sunday.
pub fn weekdays(text: &str) -> Result<u64, String> {
    let mut days = 0;
    for part in text.to_ascii_lowercase().split(',') {
        let (from, to) =
            part.split_once("..").or_else(|| part.split_once('-')).unwrap_or((part, part));
        let (from, to) = (weekday(from)?, weekday(to)?);
        // Sat..Mon goes over the end of the week.
        let length = (to + 7 - from) % 7;
        days |= (0..=length).fold(0, |days, n| days | 1 << ((from + n) % 7));
    }
    Ok(days)
}

/// The number of days after Sunday.
pub fn days_after_sunday(day: Weekday) -> usize {
    usize::from(day.to_sunday_zero_offset().unsigned_abs())
}

fn weekday(text: &str) -> Result<usize, String> {
    let all = WEEKDAYS.iter().zip(WEEKDAYS_LONG);
    let found = all.into_iter().position(|(short, long)| text == *short || text == long);
    found.ok_or_else(|| format!("'{text}' is no weekday; write one as in Mon"))
}

/// Whether bit `at` is set.
pub fn has(set: u64, at: usize) -> bool {
    set >> at & 1 == 1
}

fn bits(from: u32, to: u32, step: usize) -> u64 {
    (from..=to).step_by(step).fold(0, |set, at| set | 1 << at)
}

fn sunday_is_zero(weekdays: u64) -> u64 {
    (weekdays | weekdays >> 7) & 0x7f
}

/// A list such as `1,3-5,*/10` within `low..=high`; the names stand for `base` and what follows.
fn set(
    text: &str,
    range: &str,
    low: u32,
    high: u32,
    names: &[&str],
    base: usize,
) -> Result<u64, String> {
    let number = |word: &str| {
        let lower = word.to_ascii_lowercase();
        let named = names.iter().position(|name| *name == lower);
        let value = named.and_then(|at| u32::try_from(at + base).ok());
        let value = value.or_else(|| word.parse().ok()).filter(|n| (low..=high).contains(n));
        value.ok_or_else(|| format!("'{word}' is not within {low} to {high}"))
    };
    let mut all = 0;
    for part in text.split(',') {
        let (span, step) = match part.split_once('/') {
            Some((span, step)) => (span, Some(step)),
            None => (part, None),
        };
        let step = match step.map(str::parse::<usize>) {
            None => None,
            Some(Ok(step)) if step > 0 => Some(step),
            Some(_) => return Err(format!("'{part}' has no step; write one as in */15")),
        };
        let (from, to) = match span.split_once(range) {
            _ if span == "*" => (low, high),
            Some((from, to)) => (number(from)?, number(to)?),
            None if step.is_some() => (number(span)?, high),
            None => (number(span)?, number(span)?),
        };
        if from > to {
            return Err(format!("'{span}' ends before it begins"));
        }
        all |= bits(from, to, step.unwrap_or(1));
    }
    Ok(all)
}

fn list_of_years(text: &str) -> Result<Vec<Years>, String> {
    let year = |word: &str| {
        let year = word.parse::<i16>().ok().filter(|year| (1970..=9999).contains(year));
        year.ok_or_else(|| format!("'{word}' is no year"))
    };
    let one = |part: &str| {
        let (span, step) = part.split_once('/').unwrap_or((part, "1"));
        let step = step.parse::<i16>().ok().filter(|step| *step > 0);
        let step = step.ok_or_else(|| format!("'{part}' has no step"))?;
        let (from, to) = match span.split_once("..") {
            Some((from, to)) => (year(from)?, year(to)?),
            None if part.contains('/') => (year(span)?, 9999),
            None => (year(span)?, year(span)?),
        };
        Ok(Years { from, to, step })
    };
    text.split(',').map(one).collect()
}

#[cfg(test)]
#[path = "calendar_tests.rs"]
mod tests;
