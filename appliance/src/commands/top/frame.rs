//! One view as lines of text. Pure: what was seen and the size of the screen are arguments.

use super::Seen;
use crate::commands::vm::VmRow;
use crate::governor::GuestNow;
use crate::job_view::JobView;
use crate::names::human_bytes;
use crate::output::{Rows, age, printable, when};
use crate::progress::Snapshot;
use crate::state::JobState;

/// Cells of a progress bar.
const BAR_CELLS: u64 = 20;

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub columns: usize,
    pub rows: usize,
}

/// The view; cut to a screen where there is one.
pub fn lines(seen: &Seen, size: Option<Size>) -> Vec<String> {
    let daemon = match &seen.daemon {
        Some(health) => format!(
            "icecore {}: {} jobs run, {} wait",
            health.version, health.jobs_running, health.jobs_waiting
        ),
        None => "icecore: no daemon answers; jobs that run go on without it".into(),
    };
    let mut lines = vec![format!("{}  {daemon}", when(seen.at)), String::new()];
    lines.extend(jobs(&seen.jobs));
    lines.push(String::new());
    lines.extend(vms(&seen.vms));
    if let Some(problem) = &seen.problem {
        lines.push(format!("points are not known: {}", printable(problem)));
    }
    let Some(size) = size else { return lines };
    // The last row stays empty, or the terminal would scroll.
    lines.truncate(size.rows.saturating_sub(2));
    lines.push("q leaves".into());
    lines.iter().map(|line| cut(line, size.columns)).collect()
}

fn jobs(jobs: &[JobView]) -> Vec<String> {
    let titles = ["job", "kind", "vm", "state", "progress", "rate", "left", "guest"];
    let mut rows = Rows::new(&titles);
    for JobView { record, state, progress } in jobs {
        let moved = progress.as_ref().filter(|progress| progress.total_bytes > 0);
        let state = match state {
            JobState::Running => format!("{:?}", record.status).to_lowercase(),
            other => other.word().to_owned(),
        };
        let of = |figure: fn(&Snapshot) -> String| moved.map(figure).unwrap_or_default();
        rows.add(vec![
            record.job.to_string(),
            record.kind.word().into(),
            record.vm.clone().unwrap_or_else(|| "-".into()),
            state,
            of(bar),
            of(|progress| format!("{}/s", human_bytes(progress.bytes_per_second))),
            of(|progress| progress.eta_seconds.map_or_else(|| "?".into(), age)),
            progress.as_ref().and_then(|now| now.guest.as_ref()).map(guest).unwrap_or_default(),
        ]);
    }
    rows.lines("no jobs")
}

fn bar(progress: &Snapshot) -> String {
    let (done, total) = (progress.done_bytes.min(progress.total_bytes), progress.total_bytes);
    let share = |of: u64| u64::try_from(u128::from(of) * u128::from(done) / u128::from(total));
    let cells = usize::try_from(share(BAR_CELLS).unwrap_or(0)).unwrap_or(0);
    let empty = usize::try_from(BAR_CELLS).unwrap_or(0).saturating_sub(cells);
    let percent = share(100).unwrap_or(0);
    let (bar, rest) = ("#".repeat(cells), "-".repeat(empty));
    format!("[{bar}{rest}] {percent:>3}% of {}", human_bytes(total))
}

/// The guest's own latency, before the instant and now, and what is done for its sake.
fn guest(now: &GuestNow) -> String {
    let latency = match (now.latency_ms, now.baseline_latency_ms) {
        (Some(now), Some(before)) => format!("{now:.1} ms, was {before:.1}"),
        (Some(now), None) => format!("{now:.1} ms"),
        (None, _) => "idle".into(),
    };
    match now.rate_limit_bytes {
        Some(rate) => format!("{latency}, held to {}/s", human_bytes(rate)),
        None => latency,
    }
}

fn vms(vms: &[VmRow]) -> Vec<String> {
    let mut rows = Rows::new(&["vm", "points", "last point", "age", "state"]);
    for row in vms {
        let seconds = row.last_point_age_seconds.map(|age| u64::try_from(age).unwrap_or(0));
        rows.add(vec![
            row.vm.clone(),
            row.points.to_string(),
            row.last_point_at.map_or_else(|| "none".into(), when),
            seconds.map_or_else(|| "-".into(), age),
            if row.protected { "ok" } else { "unprotected" }.into(),
        ]);
    }
    rows.lines("no VMs")
}

/// The beginning of a line, of so many characters; colours take no room and end with it.
fn cut(line: &str, columns: usize) -> String {
    let (mut out, mut room, mut coloured) = (String::new(), columns, false);
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' {
            coloured = true;
            out.push(character);
            for part in characters.by_ref() {
                out.push(part);
                if part == 'm' {
                    break;
                }
            }
        } else if room > 0 {
            room -= 1;
            out.push(character);
        }
    }
    if coloured {
        out.push_str("\u{1b}[0m");
    }
    out
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::state::{JobId, JobKind, JobRecord, JobStatus};

    fn seen() -> Seen {
        let at = Timestamp::UNIX_EPOCH;
        let mut record = JobRecord::new(JobId::new(at).unwrap(), JobKind::Backup, "/r", at);
        record.vm = Some("we\u{1b}b".into());
        record.status = JobStatus::Captured;
        let guest = GuestNow {
            baseline_latency_ms: Some(1.0),
            latency_ms: Some(1.26),
            rate_limit_bytes: Some(64 << 20),
        };
        let progress = Snapshot {
            label: "x".into(),
            done_bytes: 1 << 30,
            total_bytes: 4 << 30,
            bytes_per_second: 1 << 20,
            eta_seconds: Some(3072),
            guest: Some(guest),
            at,
        };
        let running = JobView { record, state: JobState::Running, progress: Some(progress) };
        Seen { at, daemon: None, jobs: vec![running], vms: Vec::new(), problem: None }
    }

    #[test]
    fn a_job_is_one_line_with_all_that_is_known() {
        let text = lines(&seen(), None).join("\n");
        for part in [
            "captured",
            "[#####---------------]  25% of 4.00 GiB",
            "1.00 MiB/s",
            "51 minutes",
            "1.3 ms, was 1.0, held to 64.0 MiB/s",
            "no VMs",
            "no daemon answers",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains('\u{1b}'), "a name brings no control characters along");
    }

    #[test]
    fn a_view_fits_every_screen() {
        for (columns, rows) in [(0, 0), (1, 1), (20, 3), (80, 24), (300, 100)] {
            let lines = lines(&seen(), Some(Size { columns, rows }));
            assert!(lines.len() <= rows.max(1), "{rows}");
            assert!(lines.iter().all(|line| line.chars().count() <= columns), "{lines:?}");
        }
    }

    #[test]
    fn a_colour_that_is_cut_ends() {
        assert_eq!(cut("\u{1b}[31mabc\u{1b}[0m", 2), "\u{1b}[31mab\u{1b}[0m\u{1b}[0m");
        assert_eq!(cut("äbc", 1), "ä");
    }

    #[test]
    fn a_bar_is_never_longer_than_its_end() {
        let mut progress = seen().jobs.remove(0).progress.unwrap();
        progress.done_bytes = u64::MAX;
        assert_eq!(bar(&progress), "[####################] 100% of 4.00 GiB");
        progress.total_bytes = u64::MAX;
        assert!(bar(&progress).contains("100%"));
    }
}
