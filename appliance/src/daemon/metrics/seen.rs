//! What repositories and job records say at a moment, whoever ran the jobs and whenever.

use std::collections::BTreeMap;

use icecore_repository::Repository;
use jiff::Timestamp;

use super::text::Text;
use crate::commands::quota::{self, QuotaRow};
use crate::commands::vm::{self, VmRow};
use crate::context::Context;
use crate::state::{JobKind, JobRecord, JobState, jobs};

/// What configured repositories hold and what this host's records tell.
#[derive(Debug)]
pub struct Seen {
    at: Timestamp,
    vms: Vec<VmRow>,
    repositories: Vec<OfRepository>,
    quotas: Vec<QuotaRow>,
    proofs: Proofs,
    /// Those of the configuration.
    pub schedules: Vec<String>,
}

#[derive(Debug)]
struct OfRepository {
    name: String,
    facts: Option<(u64, u64)>,
}

/// When what is stored was last proven.
#[derive(Debug, Default, PartialEq)]
struct Proofs {
    /// By the repository's place.
    checked: BTreeMap<String, Timestamp>,
    /// By VM: all disks of a restore had the content root of their point.
    restored: BTreeMap<String, Timestamp>,
}

impl Seen {
    /// Asks every configured repository; blocks for as long as they take.
    pub fn look(context: &Context) -> Self {
        let mut quotas = Vec::new();
        let mut facts = |name: &String, opened: &Repository| {
            let info = opened.info().ok()?;
            // A quota that is not known now is not shown.
            quotas.extend(quota::rows_of(&context.config, opened, name, None).unwrap_or_default());
            Some((info.stored_bytes, info.points))
        };
        let repositories = context.config.repository.keys().map(|name| {
            let opened = context.open_read_only(name).ok();
            let facts = opened.and_then(|opened| facts(name, &opened));
            OfRepository { name: name.clone(), facts }
        });
        let repositories: Vec<_> = repositories.collect();
        let within = |repository: &&OfRepository| repository.facts.is_some();
        let names = repositories.iter().filter(within).map(|r| r.name.as_str()).collect();
        let vms = vm::rows(context, Some(names)).unwrap_or_default();
        let proofs = Proofs::of(&jobs::all(&context.state));
        let schedules = context.config.schedule.keys().cloned().collect();
        Self { at: Timestamp::now(), vms, repositories, quotas, proofs, schedules }
    }

    /// Writes all of it.
    pub fn write(&self, text: &mut Text) {
        let name = "icecore_repositories_seen_timestamp_seconds";
        text.family(name, "gauge", "When the repositories were last looked at.");
        text.line(name, &[], self.at.as_second() as f64);
        self.of_vms(text);
        self.of_repositories(text);
        self.of_quotas(text);
        self.proofs.write(text);
    }

    fn of_vms(&self, text: &mut Text) {
        let name = "icecore_vm_last_point_timestamp_seconds";
        text.family(name, "gauge", "When the VM's newest point was taken.");
        for row in &self.vms {
            if let Some(at) = row.last_point_at {
                text.line(name, &[("vm", &row.vm)], at.as_second() as f64);
            }
        }
        let name = "icecore_vm_unprotected";
        text.family(name, "gauge", "1 for a configured VM that has no point.");
        for row in self.vms.iter().filter(|row| row.configured) {
            text.line(name, &[("vm", &row.vm)], f64::from(u8::from(!row.protected)));
        }
    }

    fn of_repositories(&self, text: &mut Text) {
        let name = "icecore_repository_up";
        text.family(name, "gauge", "Whether the repository answers.");
        for repository in &self.repositories {
            let up = f64::from(u8::from(repository.facts.is_some()));
            text.line(name, &[("repository", &repository.name)], up);
        }
        type Figure = (&'static str, &'static str, fn(&(u64, u64)) -> u64);
        let figures: [Figure; 2] = [
            ("icecore_repository_stored_bytes", "What its packs and maps take.", |facts| facts.0),
            ("icecore_repository_points", "Its points.", |facts| facts.1),
        ];
        for (name, help, figure) in figures {
            text.family(name, "gauge", help);
            for repository in &self.repositories {
                if let Some(facts) = &repository.facts {
                    text.line(name, &[("repository", &repository.name)], figure(facts) as f64);
                }
            }
        }
    }

    fn of_quotas(&self, text: &mut Text) {
        type Figure = (&'static str, &'static str, fn(&QuotaRow) -> Option<u64>);
        let figures: [Figure; 4] = [
            ("icecore_quota_points", "Points of a project.", |row| Some(row.used.points)),
            ("icecore_quota_points_limit", "How many it may have.", |row| row.points_max),
            ("icecore_quota_stored_bytes", "What a project's points take.", |row| {
                Some(row.used.stored_bytes)
            }),
            ("icecore_quota_stored_bytes_limit", "What they may take.", |row| row.stored_bytes_max),
        ];
        for (name, help, figure) in figures {
            text.family(name, "gauge", help);
            for row in &self.quotas {
                let labels = [("project", &*row.project), ("repository", &*row.repository)];
                if let Some(figure) = figure(row) {
                    text.line(name, &labels, figure as f64);
                }
            }
        }
    }
}

impl Proofs {
    /// Records come oldest first: the last one counts.
    fn of(records: &[JobRecord]) -> Self {
        let mut proofs = Self::default();
        for record in records.iter().filter(|record| record.state(false) == JobState::Succeeded) {
            let at = record.ended_at.unwrap_or(record.started_at);
            match record.kind {
                JobKind::Check => {
                    proofs.checked.insert(record.repository.clone(), at);
                }
                JobKind::Restore => {
                    if let Some(vm) = verified_vm(record) {
                        proofs.restored.insert(vm, at);
                    }
                }
                JobKind::Backup | JobKind::Rollback | JobKind::Gc | JobKind::Copy => {}
            }
        }
        proofs
    }

    fn write(&self, text: &mut Text) {
        let name = "icecore_last_check_timestamp_seconds";
        text.family(name, "gauge", "When a check on this host last found nothing wrong.");
        for (repository, at) in &self.checked {
            text.line(name, &[("path", repository)], at.as_second() as f64);
        }
        let name = "icecore_last_verified_restore_timestamp_seconds";
        text.family(name, "gauge", "When a restore of the VM on this host was last proven whole.");
        for (vm, at) in &self.restored {
            text.line(name, &[("vm", vm)], at.as_second() as f64);
        }
    }
}

/// The VM of a restore whose every disk was proven.
fn verified_vm(record: &JobRecord) -> Option<String> {
    let result = record.result.as_ref()?;
    let disks = result["disks"].as_array().filter(|disks| !disks.is_empty())?;
    let all = disks.iter().all(|disk| disk["root_verified"] == true);
    all.then(|| result["vm"].as_str().map(ToOwned::to_owned)).flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::state::JobId;

    fn ended(kind: JobKind, second: i64, result: serde_json::Value) -> JobRecord {
        let at = Timestamp::from_second(second).unwrap();
        let mut record = JobRecord::new(JobId::new(at).unwrap(), kind, "/r", at);
        (record.ended, record.ended_at) = (Some(JobState::Succeeded), Some(at));
        record.result = Some(result);
        record
    }

    #[test]
    fn only_a_restore_whose_every_disk_is_proven_counts() {
        let restore = |second, roots: &[bool]| {
            let disks: Vec<_> = roots.iter().map(|root| json!({ "root_verified": root })).collect();
            ended(JobKind::Restore, second, json!({ "vm": "web", "disks": disks }))
        };
        let records = [
            restore(1, &[true, true]),
            restore(2, &[true, false]),
            restore(3, &[]),
            ended(JobKind::Check, 4, json!({})),
        ];
        let proofs = Proofs::of(&records);
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(proofs.restored, BTreeMap::from([("web".to_owned(), at(1))]));
        assert_eq!(proofs.checked, BTreeMap::from([("/r".to_owned(), at(4))]));
        let mut failed = ended(JobKind::Check, 5, json!({}));
        failed.ended = Some(JobState::Failed);
        assert_eq!(Proofs::of(&[failed]), Proofs::default());
    }
}
