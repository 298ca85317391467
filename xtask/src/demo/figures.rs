//! The table at the end: only what `icecore --json` and the guest said.

use std::fmt;

use serde_json::Value;

/// Rows of a two-column table.
#[derive(Debug, Default)]
pub struct Figures(Vec<(String, String)>);

impl Figures {
    /// Adds a row.
    pub fn row(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.push((name.into(), value.into()));
    }

    /// Adds what a backup reported.
    pub fn backup(&mut self, name: &str, report: &Value) {
        let instant = &report["consistency"];
        self.row(
            format!("{name}: instant"),
            format!(
                "{}-consistent, {} file systems frozen for {} ms, paused {} ms",
                text(&instant["level"]),
                number(&instant["frozen_filesystems"]),
                milliseconds(&instant["freeze_ms"]),
                milliseconds(&instant["pause_ms"]),
            ),
        );
        for disk in array(&report["disks"]) {
            self.row(
                format!("{name}: {} ({})", text(&disk["disk"]), text(&disk["mode"])),
                format!(
                    "dirty {}, read {}, stored {}",
                    size(&disk["dirty_bytes"]),
                    size(&disk["read_bytes"]),
                    size(&disk["stored_bytes"]),
                ),
            );
        }
        self.row(format!("{name}: whole run"), seconds(&report["seconds"]));
    }

    /// Adds what a rollback reported.
    pub fn rollback(&mut self, report: &Value) {
        for disk in array(&report["disks"]) {
            self.row(
                format!("rollback: {}", text(&disk["disk"])),
                format!(
                    "differing {}, written {}, verified: {}",
                    size(&disk["differing_bytes"]),
                    size(&disk["written_bytes"]),
                    text(&disk["verified"]),
                ),
            );
        }
        self.row("rollback: safety point", text(&report["safety_point"]));
        self.row("rollback: whole run", seconds(&report["seconds"]));
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in &self.0 {
            writeln!(f, "  {name:width$}  {value}")?;
        }
        Ok(())
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// As it stands in the document; a missing field shows as `null`, never as a made-up figure.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn number(value: &Value) -> String {
    value.as_u64().map_or_else(|| value.to_string(), |number| number.to_string())
}

fn milliseconds(value: &Value) -> String {
    value.as_f64().map_or_else(|| value.to_string(), |number| format!("{number:.0}"))
}

fn seconds(value: &Value) -> String {
    value.as_f64().map_or_else(|| value.to_string(), |number| format!("{number:.2} s"))
}

fn size(value: &Value) -> String {
    let Some(bytes) = value.as_f64() else { return value.to_string() };
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.iter().find(|(_, shift)| bytes >= f64::from(1 << shift));
    unit.map_or_else(
        || format!("{bytes} B"),
        |(name, shift)| format!("{:.1} {name}", bytes / f64::from(1 << shift)),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_figure_that_is_not_there_is_not_made_up() {
        assert_eq!(size(&json!(65536)), "64.0 KiB");
        assert_eq!(size(&json!(12)), "12 B");
        assert_eq!(size(&json!(null)), "null");
        assert_eq!(seconds(&Value::Null), "null");
    }
}
