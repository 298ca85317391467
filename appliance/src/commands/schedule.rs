//! `icecore schedule`.

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::OK;
use crate::cli::args::ScheduleCommand;
use crate::config::{Config, LibvirtConfig, Pattern, ScheduleConfig};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::libvirt::{Domain, Virsh};
use crate::output::{self, Rows, when};
use crate::policy::schedule::{Plan, offset};

#[derive(Debug, Serialize)]
struct ScheduleRow {
    schedule: String,
    /// As it is written in the configuration.
    moments: String,
    timezone: Option<String>,
    repository: String,
    vms: Vec<String>,
    jitter_seconds: u64,
    next_at: Option<Timestamp>,
    next_vm: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
struct Turn {
    at: Timestamp,
    schedule: String,
    vm: String,
    repository: String,
}

/// Runs `icecore schedule …`.
pub async fn run(context: &Context, command: ScheduleCommand) -> Outcome<u8> {
    match command {
        ScheduleCommand::List => list(context),
        ScheduleCommand::Next { schedule, count } => next(context, schedule.as_deref(), count),
        ScheduleCommand::Run { dry_run } => super::schedule_run::run(context, dry_run).await,
    }
}

/// The VMs that are known by name: those of the configuration, and libvirt's where it answers.
pub fn known_vms(config: &Config) -> Vec<String> {
    let domains = config.libvirt.as_ref().map(domains).unwrap_or_default();
    let named = config.schedule.values().flat_map(|schedule| &schedule.vms);
    let plain = named.filter(|name| Pattern::of(name).is_plain()).map(|name| name.to_string());
    let mut all: Vec<String> = config.vm.keys().cloned().chain(plain).chain(domains).collect();
    all.sort();
    all.dedup();
    all
}

fn domains(libvirt: &LibvirtConfig) -> Vec<String> {
    let names = Virsh::new(&libvirt.uri).map_err(|failure| failure.to_string());
    let names = names.and_then(|virsh| Domain::names(&virsh).map_err(|e| e.to_string()));
    match names {
        Ok(names) => names.into_iter().filter(|name| libvirt.has(name)).collect(),
        Err(why) => {
            tracing::warn!("the domains of {} are not known now: {why}", libvirt.uri);
            Vec::new()
        }
    }
}

fn list(context: &Context) -> Outcome<u8> {
    let known = known_vms(&context.config);
    let now = Timestamp::now();
    let row = |(name, schedule): (&String, &ScheduleConfig)| {
        let next = turns(name, schedule, &known, now, 1).into_iter().min_by_key(|turn| turn.at);
        let vms = Config::vms_of(schedule, &known).into_iter().map(ToOwned::to_owned).collect();
        ScheduleRow {
            schedule: name.clone(),
            moments: schedule.moments().map(ToString::to_string).unwrap_or_default(),
            timezone: schedule.zone().iana_name().map(ToOwned::to_owned),
            repository: schedule.repository.to_string(),
            vms,
            jitter_seconds: schedule.jitter.as_secs(),
            next_at: next.as_ref().map(|turn| turn.at),
            next_vm: next.map(|turn| turn.vm),
        }
    };
    let rows: Vec<ScheduleRow> = context.config.schedule.iter().map(row).collect();
    if context.json {
        output::json(&rows)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["schedule", "when", "zone", "repository", "vms", "next run"]);
    for row in rows {
        table.add(vec![
            row.schedule,
            row.moments,
            row.timezone.unwrap_or_else(|| "-".into()),
            row.repository,
            row.vms.join(", "),
            row.next_at.map_or_else(|| "never".into(), when),
        ]);
    }
    table.print("no schedules: add [schedule.NAME] to the configuration")?;
    Ok(OK)
}

fn next(context: &Context, only: Option<&str>, count: usize) -> Outcome<u8> {
    if let Some(name) = only.filter(|name| !context.config.schedule.contains_key(*name)) {
        let why = format!("the configuration has no schedule {name}");
        return Err(Failure::usage("show the next runs", why).next("see 'icecore schedule list'"));
    }
    let known = known_vms(&context.config);
    let now = Timestamp::now();
    let wanted = context.config.schedule.iter().filter(|(name, _)| only.is_none_or(|o| o == *name));
    let mut all: Vec<Turn> =
        wanted.flat_map(|(name, schedule)| turns(name, schedule, &known, now, count)).collect();
    all.sort_by(|a, b| (a.at, &a.schedule, &a.vm).cmp(&(b.at, &b.schedule, &b.vm)));
    all.truncate(count);
    if context.json {
        output::json(&all)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["at", "schedule", "vm", "repository"]);
    for turn in all {
        table.add(vec![when(turn.at), turn.schedule, turn.vm, turn.repository]);
    }
    table.print("nothing is scheduled")?;
    Ok(OK)
}

/// The next turns of each VM of a schedule.
fn turns(
    name: &str,
    schedule: &ScheduleConfig,
    known: &[String],
    now: Timestamp,
    count: usize,
) -> Vec<Turn> {
    let Some(plan) = Plan::of(schedule) else { return Vec::new() };
    let of_vm = |vm: &str| {
        let offset = offset(name, vm, schedule.jitter);
        let following = std::iter::successors(plan.next(offset, now), |at| plan.next(offset, *at));
        let turn = |at| Turn {
            at,
            schedule: name.to_owned(),
            vm: vm.to_owned(),
            repository: schedule.repository.to_string(),
        };
        following.take(count).map(turn).collect::<Vec<_>>()
    };
    Config::vms_of(schedule, known).into_iter().flat_map(of_vm).collect()
}
