//! What repositories and job records say at a moment, whoever ran the jobs and whenever.

use std::collections::BTreeMap;

use icecore_repository::Repository;
use jiff::Timestamp;

use super::text::Text;
use crate::commands::quota::{self, QuotaRow};
use crate::commands::vm::{self, VmRow};
use crate::context::Context;
use crate::state::{JobRecord, Proof, jobs};

/// The time of a proof that there is not: alerts on age see it as very old.
const NEVER: Timestamp = Timestamp::UNIX_EPOCH;

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
        let places = context.config.repository.keys();
        let places = places.filter_map(|name| context.repository_name(name).ok()).collect();
        let proofs = Proofs::of(&jobs::all(&context.state), places, &vms);
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
    /// Of what the configuration and the repositories name; never proven until a record tells it.
    fn of(records: &[JobRecord], repositories: Vec<String>, vms: &[VmRow]) -> Self {
        let with_points = vms.iter().filter(|row| row.last_point_at.is_some());
        let mut proofs = Self {
            checked: repositories.into_iter().map(|place| (place, NEVER)).collect(),
            restored: with_points.map(|row| (row.vm.clone(), NEVER)).collect(),
        };
        // Records come oldest first: the last one counts.
        for record in records {
            let at = record.ended_at.unwrap_or(record.started_at);
            match Proof::of(record) {
                Some(Proof::Checked(repository)) => drop(proofs.checked.insert(repository, at)),
                Some(Proof::Restored(vm)) => drop(proofs.restored.insert(vm, at)),
                None => {}
            }
        }
        proofs
    }

    fn write(&self, text: &mut Text) {
        let name = "icecore_last_check_timestamp_seconds";
        let help = "When a check with data on this host last found nothing wrong; 0 for never.";
        text.family(name, "gauge", help);
        for (repository, at) in &self.checked {
            text.line(name, &[("path", repository)], at.as_second() as f64);
        }
        let name = "icecore_last_verified_restore_timestamp_seconds";
        let help = "When a restore of the VM on this host was last proven whole; 0 for never.";
        text.family(name, "gauge", help);
        for (vm, at) in &self.restored {
            text.line(name, &[("vm", vm)], at.as_second() as f64);
        }
    }
}
