//! Stretches of time in which runs may begin, or may not.

use jiff::ToSpan as _;
use jiff::civil::{Date, DateTime, Time};
use serde::Deserialize;

use super::calendar::{days_after_sunday, has, weekdays};

/// Every day of the week.
const ALL_DAYS: u64 = 0x7f;

/// `[WEEKDAYS] [DATE or DATE..DATE] [HH:MM-HH:MM]`: on such days, from one time to another. One that
/// ends before it begins goes on into the next morning; without times it is the whole day.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TimeRange {
    weekdays: u64,
    /// From one day to another, inclusive.
    dates: Option<(Date, Date)>,
    times: Option<(Time, Time)>,
}

impl TryFrom<String> for TimeRange {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut range = Self { weekdays: ALL_DAYS, dates: None, times: None };
        let mut words = text.split_whitespace().peekable();
        if words.peek().is_none() {
            return Err("a window is empty; write one as in 'Mon..Fri 22:00-06:00'".into());
        }
        if let Some(word) = words.next_if(|w| w.starts_with(|c: char| c.is_ascii_alphabetic())) {
            range.weekdays = weekdays(word)?;
        }
        if let Some(word) = words.next_if(|w| !w.contains(':')) {
            range.dates = Some(dates(word)?);
        }
        if let Some(word) = words.next_if(|w| w.contains(':')) {
            range.times = Some(times(word)?);
        }
        match words.next() {
            None => Ok(range),
            Some(word) => Err(format!("in '{text}': '{word}' is left over")),
        }
    }
}

fn dates(text: &str) -> Result<(Date, Date), String> {
    let one = |word: &str| {
        word.parse::<Date>().map_err(|_| format!("'{word}' is no date; write one as in 2026-12-24"))
    };
    let (from, to) = text.split_once("..").unwrap_or((text, text));
    let (from, to) = (one(from)?, one(to)?);
    if from <= to { Ok((from, to)) } else { Err(format!("'{text}' ends before it begins")) }
}

fn times(text: &str) -> Result<(Time, Time), String> {
    let wrong = || format!("'{text}' is no stretch of a day; write one as in 22:00-06:00");
    let one = |word: &str| {
        let (hour, minute) = word.split_once(':').ok_or_else(wrong)?;
        let (hour, minute) =
            (hour.parse().map_err(|_| wrong())?, minute.parse().map_err(|_| wrong())?);
        match (hour, minute) {
            // The end of a day is the beginning of the next.
            (24, 0) => Ok(Time::midnight()),
            _ => Time::new(hour, minute, 0, 0).map_err(|_| wrong()),
        }
    };
    let (from, to) = text.split_once('-').ok_or_else(wrong)?;
    Ok((one(from)?, one(to)?))
}

impl TimeRange {
    /// Whether a civil time lies in it.
    pub fn contains(&self, at: DateTime) -> bool {
        let Some((from, to)) = self.times else { return self.has_day(at.date()) };
        let time = at.time();
        if from < to {
            return self.has_day(at.date()) && (from..to).contains(&time);
        }
        let evening = self.has_day(at.date()) && time >= from;
        let yesterday = at.date().checked_sub(1.day());
        let morning = yesterday.is_ok_and(|day| self.has_day(day)) && time < to;
        evening || morning
    }

    fn has_day(&self, date: Date) -> bool {
        let dated = self.dates.is_none_or(|(from, to)| (from..=to).contains(&date));
        dated && has(self.weekdays, days_after_sunday(date.weekday()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(range: &str, at: &str) -> bool {
        TimeRange::try_from(range.to_owned()).unwrap().contains(at.parse().unwrap())
    }

    #[test]
    fn nights_go_on_into_the_morning() {
        // The 20th of November 2026 is a Friday.
        assert!(contains("22:00-06:00", "2026-11-20T23:30"));
        assert!(contains("22:00-06:00", "2026-11-20T05:59"));
        assert!(!contains("22:00-06:00", "2026-11-20T06:00"));
        assert!(contains("Fri 22:00-06:00", "2026-11-21T05:00"));
        assert!(!contains("Fri 22:00-06:00", "2026-11-20T05:00"));
        assert!(contains("Sat..Mon", "2026-11-22T12:00"));
        assert!(!contains("Sat..Mon", "2026-11-20T12:00"));
        assert!(contains("08:00-24:00", "2026-11-20T23:59"));
        assert!(contains("00:00-24:00", "2026-11-20T00:00"));
        assert!(contains("2026-12-24..2026-12-26", "2026-12-26T23:59"));
        assert!(!contains("2026-12-24..2026-12-26", "2026-12-27T00:00"));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "22:00", "25:00-26:00", "Fri Sat", "2026-12-24..2026-12-01", "Moon", "x-y:z"]
        {
            assert!(TimeRange::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}
