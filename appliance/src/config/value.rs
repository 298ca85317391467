//! Values as they are written in the configuration.

use std::ops::Range;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use crate::names;
use crate::policy::calendar::Calendar;

/// A text that has to lead somewhere: it remembers where it stands, so that a complaint can say so.
#[derive(Debug, Clone, Deserialize)]
#[serde(transparent)]
pub struct Reference(Spanned<String>);

impl Reference {
    /// The bytes of the file in which it stands.
    pub(super) fn span(&self) -> Range<usize> {
        self.0.span()
    }
}

impl std::ops::Deref for Reference {
    type Target = str;

    fn deref(&self) -> &str {
        self.0.get_ref()
    }
}

/// A name in which `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Pattern(String);

impl Pattern {
    /// A pattern from its text.
    pub fn of(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Whether it names one thing only.
    pub fn is_plain(&self) -> bool {
        !self.0.contains('*')
    }

    /// Whether `name` fits.
    pub fn matches(&self, name: &str) -> bool {
        let Some((head, rest)) = self.0.split_once('*') else { return self.0 == name };
        let Some(mut left) = name.strip_prefix(head) else { return false };
        let parts: Vec<&str> = rest.split('*').collect();
        let (tail, middle) = parts.split_last().unwrap_or((&"", &[]));
        // The earliest place for each part leaves the most for those behind it.
        for part in middle {
            match left.find(part) {
                Some(at) => left = &left[at + part.len()..],
                None => return false,
            }
        }
        left.ends_with(tail)
    }
}

/// A time zone by its IANA name.
#[derive(Debug, Clone)]
pub struct Zone(pub jiff::tz::TimeZone);

impl<'de> Deserialize<'de> for Zone {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        jiff::tz::TimeZone::get(&name).map(Self).map_err(|_| {
            D::Error::custom(format!("'{name}' is no time zone; write one as in Europe/Berlin"))
        })
    }
}

pub(super) fn cron<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Calendar>, D::Error> {
    let text = String::deserialize(from)?;
    Calendar::from_cron(&text).map(Some).map_err(D::Error::custom)
}

pub(super) fn calendar<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Calendar>, D::Error> {
    let text = String::deserialize(from)?;
    Calendar::from_systemd(&text).map(Some).map_err(D::Error::custom)
}

pub(super) fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    names::long_duration(&String::deserialize(from)?).map_err(D::Error::custom)
}

pub(super) fn rate<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    names::rate(&String::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, fits) in [
            ("vm1", "vm1", true),
            ("vm1", "vm10", false),
            ("*", "", true),
            ("web-*", "web-1", true),
            ("web-*", "xweb-1", false),
            ("*a*a", "aa", true),
            ("*a*a", "a", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
        ] {
            assert_eq!(Pattern::of(pattern).matches(name), fits, "{pattern} {name}");
        }
    }
}
