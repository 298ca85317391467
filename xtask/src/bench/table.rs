//! What was measured, as a table and as JSON.

use std::fmt;

use serde_json::{Value, json};

use super::measure::Sample;

/// The row that everything is compared with: reading alone.
pub const YARDSTICK: &str = "read: nbdcopy to null (Y)";

/// Rows in the order in which they first came up.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<(String, Vec<Sample>)>,
    /// Rows without a figure, and why.
    skipped: Vec<(String, String)>,
}

/// Median, minimum, maximum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// None of no values.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let median = f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Self { median, min, max })
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

impl Table {
    /// Adds one run.
    pub fn add(&mut self, name: &str, sample: Sample) {
        match self.rows.iter_mut().find(|(row, _)| row == name) {
            Some((_, samples)) => samples.push(sample),
            None => self.rows.push((name.to_owned(), vec![sample])),
        }
    }

    /// Notes why there is no figure.
    pub fn skip(&mut self, name: &str, why: String) {
        if !self.skipped.iter().any(|(row, _)| row == name) {
            self.skipped.push((name.to_owned(), why));
        }
    }

    /// One figure of a row over its runs.
    pub fn spread(&self, name: &str, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        let (_, samples) = self.rows.iter().find(|(row, _)| row == name)?;
        Spread::of(samples.iter().filter_map(figure))
    }

    /// The median wall time of a row.
    pub fn wall(&self, name: &str) -> Option<f64> {
        self.spread(name, |sample| Some(sample.wall_s)).map(|spread| spread.median)
    }

    /// Everything, the single runs too.
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|(name, samples)| self.row(name, samples));
        let rows: Vec<Value> = rows.collect();
        let skipped: Vec<Value> =
            self.skipped.iter().map(|(name, why)| json!({ "name": name, "why": why })).collect();
        json!({ "rows": rows, "skipped": skipped })
    }

    fn row(&self, name: &str, samples: &[Sample]) -> Value {
        let figure = |get: fn(&Sample) -> Option<f64>| self.spread(name, get).map(Spread::json);
        json!({
            "name": name,
            "runs": samples.len(),
            "wall_s": figure(|sample| Some(sample.wall_s)),
            "client_cpu_s": figure(|sample| Some(sample.client_cpu_s)),
            "server_cpu_s": figure(|sample| sample.server_cpu_s),
            "peak_mib": figure(|sample| Some(sample.peak_mib)),
            "stored_mib": figure(|sample| sample.stored_mib),
            "wall_to_y": self.wall(YARDSTICK).zip(self.wall(name)).map(|(y, wall)| wall / y),
        })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| row | wall s: median (min-max) | / Y | client CPU s | server CPU s | \
             peak MiB | stored MiB |\n|---|---|---|---|---|---|---|"
        )?;
        for (name, _) in &self.rows {
            let cell = |get: fn(&Sample) -> Option<f64>, digits: usize| {
                let spread = self.spread(name, get);
                spread.map_or_else(|| "-".to_owned(), |s| format!("{:.digits$}", s.median))
            };
            let wall = self.spread(name, |sample| Some(sample.wall_s));
            let wall = wall.map_or_else(String::new, |s| {
                format!("{:.2} ({:.2}-{:.2})", s.median, s.min, s.max)
            });
            let ratio = self.wall(YARDSTICK).zip(self.wall(name));
            let ratio = ratio.map_or_else(|| "-".to_owned(), |(y, own)| format!("{:.2}", own / y));
            writeln!(
                f,
                "| {name} | {wall} | {ratio} | {} | {} | {} | {} |",
                cell(|sample| Some(sample.client_cpu_s), 2),
                cell(|sample| sample.server_cpu_s, 2),
                cell(|sample| Some(sample.peak_mib), 0),
                cell(|sample| sample.stored_mib, 1),
            )?;
        }
        for (name, why) in &self.skipped {
            writeln!(f, "| {name} | not measured: {} | | | | | |", why.replace(['\n', '|'], " "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        let mut table = Table::default();
        let sample = |wall_s| Sample { wall_s, ..Sample::default() };
        [3.0, 1.0, 2.0].into_iter().for_each(|wall| table.add(YARDSTICK, sample(wall)));
        [5.0, 7.0].into_iter().for_each(|wall| table.add("full", sample(wall)));
        assert_eq!((table.wall(YARDSTICK), table.wall("full")), (Some(2.0), Some(6.0)));
        let text = table.to_string();
        assert!(text.contains("| full | 6.00 (5.00-7.00) | 3.00 | 0.00 | - |"), "{text}");
        assert_eq!(table.json()["rows"][1]["wall_to_y"], 3.0);
    }
}
