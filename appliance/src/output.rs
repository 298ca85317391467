//! Tables and JSON on stdout.

use std::io::{IsTerminal as _, Write as _};

use comfy_table::{Cell, Color, Table, presets};
use jiff::Timestamp;
use serde::Serialize;

use crate::failure::{Failure, Outcome};

/// Prints one JSON document.
pub fn json(value: &impl Serialize) -> Outcome<()> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|e| Failure::failed("write JSON", e))?;
    text.push('\n');
    print(&text)
}

/// Prints text; a reader that has gone away (`| head`) is no failure.
pub fn print(text: &str) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed("write to stdout", e))
        }
        _ => Ok(()),
    }
}

/// A table that is printed when it is complete.
#[derive(Debug)]
pub struct Rows {
    table: Table,
}

impl Rows {
    /// A table with these column titles.
    pub fn new(titles: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(titles.iter().map(|title| title.to_uppercase()));
        Self { table }
    }

    /// Adds a row.
    pub fn add(&mut self, cells: Vec<String>) {
        self.table.add_row(cells.into_iter().map(|text| coloured(printable(&text))));
    }

    /// Prints the table, or `empty` when it has no rows.
    pub fn print(self, empty: &str) -> Outcome<()> {
        print(&(self.lines(empty).join("\n") + "\n"))
    }

    /// Its lines, or `empty` when it has no rows.
    pub fn lines(self, empty: &str) -> Vec<String> {
        if self.table.is_empty() {
            return vec![empty.to_owned()];
        }
        self.table.trim_fmt().lines().map(str::to_owned).collect()
    }
}

/// Names from repositories and QEMU may hold anything: control characters never reach a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn coloured(text: String) -> Cell {
    let colour = match text.as_str() {
        "available" | "ok" | "succeeded" => Some(Color::Green),
        "error" | "failed" | "interrupted" | "damaged" | "inconsistent" => Some(Color::Red),
        "creating" | "captured" | "restoring" | "deleting" | "queued" | "running" => {
            Some(Color::Yellow)
        }
        _ => None,
    };
    match colour {
        Some(colour) if std::io::stdout().is_terminal() => Cell::new(text).fg(colour),
        _ => Cell::new(text),
    }
}

/// A time for a person: UTC, to the second.
pub fn when(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

/// An age, or a time that is left, for a person: in its largest unit.
pub fn age(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60) {
        (hours, _) if hours >= 48 => format!("{} days", hours / 24),
        (hours, _) if hours >= 2 => format!("{hours} hours"),
        (_, minutes) if minutes >= 2 => format!("{minutes} minutes"),
        _ => format!("{seconds} seconds"),
    }
}
