//! Figures for Prometheus: what has ended since the daemon began, and what the repositories hold.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde_json::Value;

use super::supervisor::Load;
use crate::commands::vm::{self, VmRow};
use crate::context::Context;
use crate::state::{JobKind, JobRecord, JobState};

/// All figures.
#[derive(Debug, Default)]
pub struct Metrics {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    ended: BTreeMap<(&'static str, &'static str), u64>,
    seconds: BTreeMap<&'static str, (f64, u64)>,
    vms: BTreeMap<String, OfVm>,
    fallbacks: BTreeMap<(String, String), u64>,
    checked: BTreeMap<String, Timestamp>,
    seen: Option<Seen>,
    reloads_failed: u64,
    missed: BTreeMap<String, u64>,
}

/// What the last and all backups of a VM said.
#[derive(Debug, Default)]
struct OfVm {
    read_bytes: u64,
    stored_bytes: u64,
    freeze_ms: f64,
    pause_ms: f64,
    frozen: bool,
}

/// What configured repositories hold, as of a moment.
#[derive(Debug)]
pub struct Seen {
    at: Timestamp,
    vms: Vec<VmRow>,
    repositories: Vec<Repository>,
}

#[derive(Debug)]
struct Repository {
    name: String,
    facts: Option<(u64, u64)>,
}

impl Seen {
    /// Asks every configured repository; blocks for as long as they take.
    pub fn look(context: &Context) -> Self {
        let repositories = context.config.repository.keys().map(|name| {
            let info = context.open_read_only(name).ok().and_then(|opened| opened.info().ok());
            let facts = info.map(|info| (info.stored_bytes, info.points));
            Repository { name: name.clone(), facts }
        });
        let repositories: Vec<_> = repositories.collect();
        let within = |repository: &&Repository| repository.facts.is_some();
        let names = repositories.iter().filter(within).map(|r| r.name.as_str()).collect();
        let vms = vm::rows(context, Some(names)).unwrap_or_default();
        Self { at: Timestamp::now(), vms, repositories }
    }
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a job that has ended.
    pub fn ended(&self, record: &JobRecord) {
        let kind = record.kind.word();
        let mut inner = self.lock();
        let state = record.state(false);
        *inner.ended.entry((kind, state.word())).or_default() += 1;
        if let Some(at) = record.ended_at {
            let seconds = at.duration_since(record.started_at).as_secs_f64().max(0.0);
            let sum = inner.seconds.entry(kind).or_default();
            *sum = (sum.0 + seconds, sum.1 + 1);
        }
        match (record.kind, state, &record.result, &record.vm) {
            (JobKind::Backup, JobState::Succeeded, Some(result), Some(vm)) => {
                inner.backed_up(vm, result);
            }
            (JobKind::Check, JobState::Succeeded, ..) => {
                let at = record.ended_at.unwrap_or(record.started_at);
                inner.checked.insert(record.repository.clone(), at);
            }
            _ => {}
        }
    }

    /// Takes over what the repositories hold.
    pub fn seen(&self, seen: Seen) {
        self.lock().seen = Some(seen);
    }

    /// Counts a run of a schedule that was not begun at its time.
    pub fn missed(&self, schedule: &str) {
        *self.lock().missed.entry(schedule.to_owned()).or_default() += 1;
    }

    /// Counts a configuration that was not taken over.
    pub fn reload_failed(&self) {
        self.lock().reloads_failed += 1;
    }

    /// The text format of Prometheus.
    pub fn text(&self, load: Load) -> String {
        let inner = self.lock();
        let mut text = Text::default();
        text.family("icecore_info", "gauge", "The daemon's version.");
        text.line("icecore_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        text.family("icecore_jobs", "gauge", "Jobs of this daemon by state.");
        text.line("icecore_jobs", &[("state", "queued")], load.waiting as f64);
        text.line("icecore_jobs", &[("state", "running")], load.running as f64);
        inner.of_jobs(&mut text);
        inner.of_vms(&mut text);
        inner.of_repositories(&mut text);
        text.0
    }
}

impl Inner {
    fn backed_up(&mut self, vm: &str, result: &Value) {
        let figure = |value: &Value, name: &str| value[name].as_f64().unwrap_or(0.0);
        let disks = result["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
        let sum = |name: &str| disks.iter().filter_map(|disk| disk[name].as_u64()).sum::<u64>();
        let of_vm = self.vms.entry(vm.to_owned()).or_default();
        of_vm.read_bytes += sum("read_bytes");
        of_vm.stored_bytes += sum("stored_bytes");
        let consistency = &result["consistency"];
        of_vm.freeze_ms = figure(consistency, "freeze_ms");
        of_vm.pause_ms = figure(consistency, "pause_ms");
        of_vm.frozen = consistency["level"] == "filesystem";
        for reason in disks.iter().filter_map(|disk| disk["reason"].as_str()) {
            *self.fallbacks.entry((vm.to_owned(), reason.to_owned())).or_default() += 1;
        }
    }

    fn of_jobs(&self, text: &mut Text) {
        let name = "icecore_jobs_ended_total";
        text.family(name, "counter", "Jobs that ended since the daemon began.");
        for ((kind, state), count) in &self.ended {
            text.line(name, &[("kind", kind), ("state", state)], *count as f64);
        }
        text.family("icecore_job_seconds", "summary", "How long jobs took.");
        for (kind, (seconds, count)) in &self.seconds {
            text.line("icecore_job_seconds_sum", &[("kind", kind)], *seconds);
            text.line("icecore_job_seconds_count", &[("kind", kind)], *count as f64);
        }
        let name = "icecore_config_reloads_failed_total";
        text.family(name, "counter", "Configurations that were wrong at a reload.");
        text.line(name, &[], self.reloads_failed as f64);
        let name = "icecore_runs_missed_total";
        text.family(name, "counter", "Runs of schedules that were not begun at their time.");
        for (schedule, count) in &self.missed {
            text.line(name, &[("schedule", schedule)], *count as f64);
        }
        let name = "icecore_fallbacks_total";
        text.family(name, "counter", "Disks that were read whole, and why.");
        for ((vm, reason), count) in &self.fallbacks {
            text.line(name, &[("vm", vm), ("reason", reason)], *count as f64);
        }
    }

    fn of_vms(&self, text: &mut Text) {
        type Figure = (&'static str, &'static str, &'static str, fn(&OfVm) -> f64);
        let figures: [Figure; 5] = [
            ("icecore_read_bytes_total", "counter", "Read from guests.", |v| v.read_bytes as f64),
            ("icecore_stored_bytes_total", "counter", "Stored of it.", |v| v.stored_bytes as f64),
            ("icecore_freeze_milliseconds", "gauge", "The last freeze.", |v| v.freeze_ms),
            ("icecore_pause_milliseconds", "gauge", "The last pause.", |v| v.pause_ms),
            ("icecore_filesystem_consistent", "gauge", "Whether the last point is.", |v| {
                f64::from(u8::from(v.frozen))
            }),
        ];
        for (name, kind, help, figure) in figures {
            text.family(name, kind, help);
            for (vm, of_vm) in &self.vms {
                text.line(name, &[("vm", vm)], figure(of_vm));
            }
        }
        let Some(seen) = &self.seen else { return };
        let name = "icecore_vm_last_point_timestamp_seconds";
        text.family(name, "gauge", "When the VM's newest point was taken.");
        for row in &seen.vms {
            if let Some(at) = row.last_point_at {
                text.line(name, &[("vm", &row.vm)], at.as_second() as f64);
            }
        }
        let name = "icecore_vm_unprotected";
        text.family(name, "gauge", "1 for a configured VM that has no point.");
        for row in seen.vms.iter().filter(|row| row.configured) {
            text.line(name, &[("vm", &row.vm)], f64::from(u8::from(!row.protected)));
        }
    }

    fn of_repositories(&self, text: &mut Text) {
        let name = "icecore_last_check_timestamp_seconds";
        text.family(name, "gauge", "When a check last found nothing wrong.");
        for (repository, at) in &self.checked {
            text.line(name, &[("path", repository)], at.as_second() as f64);
        }
        let Some(seen) = &self.seen else { return };
        let name = "icecore_repositories_seen_timestamp_seconds";
        text.family(name, "gauge", "When the repositories were last looked at.");
        text.line(name, &[], seen.at.as_second() as f64);
        text.family("icecore_repository_up", "gauge", "Whether the repository answers.");
        for repository in &seen.repositories {
            let up = f64::from(u8::from(repository.facts.is_some()));
            text.line("icecore_repository_up", &[("repository", &repository.name)], up);
        }
        text.family("icecore_repository_stored_bytes", "gauge", "What its packs and maps take.");
        text.family("icecore_repository_points", "gauge", "Its points.");
        for repository in &seen.repositories {
            let Some((stored, points)) = repository.facts else { continue };
            let labels = [("repository", repository.name.as_str())];
            text.line("icecore_repository_stored_bytes", &labels, stored as f64);
            text.line("icecore_repository_points", &labels, points as f64);
        }
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        let _ = match labels.is_empty() {
            true => writeln!(self.0, "{name} {value}"),
            false => writeln!(self.0, "{name}{{{}}} {value}", labels.join(",")),
        };
    }
}

/// Names of VMs may hold anything.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::JobId;

    #[test]
    fn a_backup_that_ended_is_counted_with_its_figures() {
        let metrics = Metrics::default();
        let job = JobId::new(Timestamp::UNIX_EPOCH).unwrap();
        let mut record = JobRecord::new(job, JobKind::Backup, "/r", Timestamp::UNIX_EPOCH);
        record.vm = Some("a\"b".into());
        record.ended = Some(JobState::Succeeded);
        record.ended_at = Some("1970-01-01T00:00:03Z".parse().unwrap());
        record.result = Some(serde_json::json!({
            "consistency": { "level": "filesystem", "freeze_ms": 12.5, "pause_ms": 3.0 },
            "disks": [
                { "read_bytes": 10, "stored_bytes": 4, "reason": "BitmapMissing" },
                { "read_bytes": 5, "stored_bytes": 1, "reason": null },
            ],
        }));
        metrics.ended(&record);
        let text = metrics.text(Load { waiting: 1, running: 2 });
        for line in [
            "icecore_jobs{state=\"queued\"} 1",
            "icecore_jobs_ended_total{kind=\"backup\",state=\"succeeded\"} 1",
            "icecore_job_seconds_sum{kind=\"backup\"} 3",
            "icecore_read_bytes_total{vm=\"a\\\"b\"} 15",
            "icecore_freeze_milliseconds{vm=\"a\\\"b\"} 12.5",
            "icecore_fallbacks_total{vm=\"a\\\"b\",reason=\"BitmapMissing\"} 1",
        ] {
            assert!(text.lines().any(|have| have == line), "{line}\n{text}");
        }
    }
}
