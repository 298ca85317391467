//! Figures for Prometheus: what has ended since the daemon began, and what the repositories hold.

mod seen;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::Notify;

pub use self::seen::Seen;
use self::text::Text;
use super::supervisor::Load;
use crate::state::{JobKind, JobRecord, JobState};

/// All figures.
#[derive(Debug, Default)]
pub struct Metrics {
    inner: Mutex<Inner>,
    /// Told when a job has ended: what was seen of the repositories may be old.
    pub stale: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    ended: BTreeMap<(&'static str, &'static str), u64>,
    seconds: BTreeMap<&'static str, (f64, u64)>,
    vms: BTreeMap<String, OfVm>,
    fallbacks: BTreeMap<(String, String), u64>,
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
    guest: Guest,
}

/// What the governor saw of a guest.
#[derive(Debug, Default)]
struct Guest {
    /// None of a guest that was idle, or that nobody looked after.
    before_ms: Option<f64>,
    worst_ms: Option<f64>,
    slowed_seconds: f64,
}

/// Counters begin at 0: `increase()` does not see one that appears with a failure already in it.
const KINDS: [JobKind; 6] = [
    JobKind::Backup,
    JobKind::Restore,
    JobKind::Rollback,
    JobKind::Check,
    JobKind::Gc,
    JobKind::Copy,
];
const ENDS: [JobState; 4] =
    [JobState::Succeeded, JobState::Failed, JobState::Cancelled, JobState::Interrupted];

type Figure = (&'static str, &'static str, &'static str, fn(&OfVm) -> Option<f64>);

/// What is told of each VM from the reports of its backups.
const FIGURES: [Figure; 8] = [
    ("icecore_read_bytes_total", "counter", "Read from guests.", |v| Some(v.read_bytes as f64)),
    ("icecore_stored_bytes_total", "counter", "Stored of it.", |v| Some(v.stored_bytes as f64)),
    ("icecore_freeze_milliseconds", "gauge", "The last freeze.", |v| Some(v.freeze_ms)),
    ("icecore_pause_milliseconds", "gauge", "The last pause.", |v| Some(v.pause_ms)),
    ("icecore_filesystem_consistent", "gauge", "Whether the last point is.", |v| {
        Some(f64::from(u8::from(v.frozen)))
    }),
    (
        "icecore_guest_latency_before_milliseconds",
        "gauge",
        "Mean latency of the guest's requests before the last backup; none of an idle guest.",
        |v| v.guest.before_ms,
    ),
    (
        "icecore_guest_latency_worst_milliseconds",
        "gauge",
        "The worst mean while the last backup read; what is above the one before was added by it.",
        |v| v.guest.worst_ms,
    ),
    (
        "icecore_backup_slowed_seconds_total",
        "counter",
        "How long backups were held back for the guest's sake.",
        |v| Some(v.guest.slowed_seconds),
    ),
];

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
        if let (JobKind::Backup, JobState::Succeeded, Some(result), Some(vm)) =
            (record.kind, state, &record.result, &record.vm)
        {
            inner.backed_up(vm, result);
        }
        drop(inner);
        self.stale.notify_one();
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
        if let Some(seen) = &inner.seen {
            seen.write(&mut text);
        }
        text.finish()
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
        let governor = &result["governor"];
        of_vm.guest.before_ms = governor["baseline_latency_ms"].as_f64();
        of_vm.guest.worst_ms = governor["worst_latency_ms"].as_f64();
        of_vm.guest.slowed_seconds += figure(governor, "slowed_seconds");
        for reason in disks.iter().filter_map(|disk| disk["reason"].as_str()) {
            *self.fallbacks.entry((vm.to_owned(), reason.to_owned())).or_default() += 1;
        }
    }

    fn of_jobs(&self, text: &mut Text) {
        let name = "icecore_jobs_ended_total";
        text.family(name, "counter", "Jobs that ended since the daemon began.");
        for (kind, state) in KINDS.iter().flat_map(|kind| ENDS.map(|state| (kind, state))) {
            let pair = (kind.word(), state.word());
            let count = self.ended.get(&pair).copied().unwrap_or(0);
            text.line(name, &[("kind", pair.0), ("state", pair.1)], count as f64);
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
        let known = self.seen.iter().flat_map(|seen| &seen.schedules);
        let schedules: BTreeSet<&String> = known.chain(self.missed.keys()).collect();
        for schedule in schedules {
            let count = self.missed.get(schedule).copied().unwrap_or(0);
            text.line(name, &[("schedule", schedule)], count as f64);
        }
        let name = "icecore_fallbacks_total";
        text.family(name, "counter", "Disks that were read whole, and why.");
        for ((vm, reason), count) in &self.fallbacks {
            text.line(name, &[("vm", vm), ("reason", reason)], *count as f64);
        }
    }

    fn of_vms(&self, text: &mut Text) {
        for (name, kind, help, figure) in FIGURES {
            text.family(name, kind, help);
            for (vm, of_vm) in &self.vms {
                if let Some(figure) = figure(of_vm) {
                    text.line(name, &[("vm", vm)], figure);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

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
            "governor": { "baseline_latency_ms": 1.5, "worst_latency_ms": 2.0, "slowed_seconds": 4.0 },
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
            "icecore_guest_latency_before_milliseconds{vm=\"a\\\"b\"} 1.5",
            "icecore_backup_slowed_seconds_total{vm=\"a\\\"b\"} 4",
            "icecore_fallbacks_total{vm=\"a\\\"b\",reason=\"BitmapMissing\"} 1",
        ] {
            assert!(text.lines().any(|have| have == line), "{line}\n{text}");
        }
    }
}
