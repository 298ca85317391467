//! Which points stay.

use serde::{Deserialize, Serialize};

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
}
