//! `icecore schedule run`: what is due now, begun by a timer instead of the daemon.
//!
//! Each run is the same command that a person would type, in a process of its own: what kills one
//! backup does not end the others. They follow one another, so `concurrency` is the daemon's alone.

use std::process::Stdio;

use jiff::Timestamp;
use serde::Serialize;
use tokio::process::Command;

use super::schedule::known_vms;
use crate::cli::OK;
use crate::config::ScheduleConfig;
use crate::context::Context;
use crate::failure::{Failure, Outcome, Status};
use crate::output::{self, Rows, when};
use crate::policy::notify::{self, Event};
use crate::policy::schedule::{DueRun, MissedRun, Tick, tick};
use crate::state::locks::{Lock, LockKey};
use crate::state::{JobId, marks};

#[derive(Debug, Serialize)]
struct RunReport {
    runs: Vec<Ran>,
    missed: Vec<MissedRun>,
    dry_run: bool,
}

#[derive(Debug, Serialize)]
struct Ran {
    #[serde(flatten)]
    run: DueRun,
    /// Exit status of the backup; none when it was not begun, or a signal ended it.
    backup: Option<i32>,
    /// Exit status of the prune that followed, where the schedule has a retention.
    prune: Option<i32>,
}

/// Begins what is due, and waits for it.
pub async fn run(context: &Context, dry_run: bool) -> Outcome<u8> {
    let tried = "run the schedules";
    let now = Timestamp::now();
    let _one_at_a_time =
        Lock::take(&context.state, &LockKey::schedules(), &JobId::new(now)?, tried)?;
    let known = known_vms(&context.config);
    let Tick { runs, missed, marks: dealt_with } =
        tick(&context.config, &known, &marks::load(&context.state), now);
    if !dry_run {
        // Before the first run: what is killed now is made up for by nobody, and flooded by nobody.
        marks::save(&context.state, &dealt_with)?;
        for one in &missed {
            let event = Event::Missed(one);
            notify::tell(context.config.notify.as_ref(), &event, Some(&one.vm));
        }
    }
    let mut report = RunReport { runs: Vec::new(), missed, dry_run };
    for run in runs {
        let ran = if dry_run { (None, None) } else { back_up(context, &run, tried).await? };
        report.runs.push(Ran { run, backup: ran.0, prune: ran.1 });
    }
    print(context, &report)?;
    let good = |ran: &Ran| ran.backup == Some(0) && ran.prune.is_none_or(|status| status == 0);
    let all_good = dry_run || report.runs.iter().all(good);
    Ok(if all_good { OK } else { Status::Failed as u8 })
}

async fn back_up(
    context: &Context,
    run: &DueRun,
    tried: &str,
) -> Outcome<(Option<i32>, Option<i32>)> {
    let level = format!("--level={}", run.level.name());
    let backup = command(context, &["backup", &run.vm, &level], &run.repository, tried).await?;
    let schedule = context.config.schedule.get(&run.schedule);
    let retention = schedule.filter(|_| backup == Some(0)).and_then(prune_arguments);
    let Some(arguments) = retention else { return Ok((backup, None)) };
    let mut all = vec!["prune", &run.vm];
    all.extend(arguments.iter().map(String::as_str));
    Ok((backup, command(context, &all, &run.repository, tried).await?))
}

/// The flags of the prune that follows a run of this schedule; none where all points stay.
pub fn prune_arguments(schedule: &ScheduleConfig) -> Option<Vec<String>> {
    let keep = schedule.retention?;
    let rules = [
        ("last", keep.last),
        ("hourly", keep.hourly),
        ("daily", keep.daily),
        ("weekly", keep.weekly),
        ("monthly", keep.monthly),
        ("yearly", keep.yearly),
    ];
    let given = rules.into_iter().filter(|(_, count)| *count > 0);
    let mut all: Vec<String> = given.map(|(rule, n)| format!("--keep-{rule}={n}")).collect();
    if let Some(zone) = schedule.zone().iana_name() {
        all.push(format!("--timezone={zone}"));
    }
    Some(all)
}

/// Runs this program as the caller of this one would; what it reports goes to standard error.
async fn command(
    context: &Context,
    arguments: &[&str],
    repository: &str,
    tried: &str,
) -> Outcome<Option<i32>> {
    let failed = |e: std::io::Error| Failure::failed(tried, e);
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(arguments).args(["--repo", repository, "--quiet"]);
    command.arg("--state-dir").arg(context.state.root());
    if let Some(config) = &context.config_path {
        command.arg("--config").arg(config);
    }
    command.env("ICECORE_CACHE_DIR", &context.cache_dir).envs(context.keys.variables());
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    Ok(command.status().await.map_err(failed)?.code())
}

fn print(context: &Context, report: &RunReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let mut table = Rows::new(&["schedule", "vm", "moment", "backup", "prune"]);
    for ran in &report.runs {
        let status = |status: Option<i32>| match status {
            Some(0) => "ok".to_owned(),
            Some(status) => format!("status {status}"),
            None => "-".to_owned(),
        };
        let (schedule, vm) = (ran.run.schedule.clone(), ran.run.vm.clone());
        let moment = when(ran.run.moment);
        table.add(vec![schedule, vm, moment, status(ran.backup), status(ran.prune)]);
    }
    table.print("nothing is due")?;
    for one in report.missed.iter().filter(|one| !one.made_up) {
        let moment = when(one.moment);
        output::print(&format!("left out: {} of {} at {moment}\n", one.schedule, one.vm))?;
    }
    Ok(())
}
