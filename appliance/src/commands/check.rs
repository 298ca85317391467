//! `icecore check`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use icecore_repository::store::Access;
use icecore_repository::{CheckOptions, CheckReport, scrub};

use super::point::find;
use crate::cli::args::CheckArgs;
use crate::cli::{DAMAGED, OK};
use crate::context::Context;
use crate::daemon::client::{self, Client};
use crate::daemon::request::CheckBody;
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::output::{self, Rows};
use crate::progress::{Meter, Progress};
use crate::state::JobKind;

/// Runs `icecore check`.
pub async fn run(context: &Context, args: CheckArgs) -> Outcome<u8> {
    let tried = format!("check the repository {}", args.repo.repo);
    if context.through_daemon && args.scrub {
        let why = "the daemon checks with its keys, and a scrub is for where there are none";
        return Err(Failure::usage(tried, why).next("leave out --daemon or --scrub"));
    }
    if context.through_daemon {
        let body = CheckBody {
            repo: Some(client::repo(context, &args.repo.repo, &tried)?),
            point: args.point.clone(),
            read_data: args.read_data,
            sample: args.sample,
        };
        let show = |context: &Context, report| print(context, &report, false).map(drop);
        return Client::new(context, tried).run("/v1/check", &body, show).await;
    }
    let interrupt = Interrupt::listen()?;
    let named = context.repository_name(&args.repo.repo)?;
    let mut job = Job::begin(context, JobKind::Check, &named, &[], &tried)?;
    job.record.point.clone_from(&args.point);
    job.save(context)?;
    let report = match check(context, &args, &interrupt, &tried).await {
        Ok(report) if !report.ok => {
            let why = format!("{} objects are damaged", report.errors.len());
            job.end_damaged(context, &report, &Failure::damaged(&tried, why));
            report
        }
        outcome => job.end(context, outcome)?,
    };
    print(context, &report, args.scrub)
}

async fn check(
    context: &Context,
    args: &CheckArgs,
    interrupt: &Interrupt,
    tried: &str,
) -> Outcome<CheckReport> {
    if args.scrub {
        return scrub_all(context, args, interrupt, tried).await;
    }
    // Writable where that is possible: packs found damaged are marked, so that the next point
    // builds nothing on them.
    let repository = context.open(&args.repo.repo)?;
    let point = match &args.point {
        Some(spec) => Some(find(&repository, spec, None, tried)?.id),
        None => None,
    };
    let options = CheckOptions { read_data: args.read_data, sample: args.sample, point };
    let counted = Arc::new(icecore_io_engine::Progress::default());
    let stored = repository.info().map_or(0, |info| info.stored_bytes);
    let total = if args.read_data { stored } else { 0 };
    let meter = Meter::new(total, Arc::clone(&counted));
    let _shown = Progress::show("checking".into(), meter, context);
    let about = tried.to_owned();
    let work = move || {
        repository
            .check(&options, |now| counted.read_bytes.store(now.bytes_read, Ordering::Relaxed))
            .map_err(|e| Failure::from_repository(&about, e))
    };
    interrupt.race(tried, work).await
}

/// Verifies checksums alone: neither a key nor the right to write is needed.
async fn scrub_all(
    context: &Context,
    args: &CheckArgs,
    interrupt: &Interrupt,
    tried: &str,
) -> Outcome<CheckReport> {
    let address = context.repository_address(&args.repo.repo)?;
    let counted = Arc::new(icecore_io_engine::Progress::default());
    let _shown = Progress::show("scrubbing".into(), Meter::new(0, Arc::clone(&counted)), context);
    let about = tried.to_owned();
    let memory = context.transfer_memory(&address)?;
    let work = move || {
        let store =
            address.open(Access::ReadOnly, memory).map_err(|e| Failure::usage(&about, e))?;
        scrub(store, |now| counted.read_bytes.store(now.bytes_read, Ordering::Relaxed))
            .map_err(|e| Failure::from_repository(&about, e))
    };
    interrupt.race(tried, work).await
}

fn print(context: &Context, report: &CheckReport, scrubbed: bool) -> Outcome<u8> {
    let status = if report.ok { OK } else { DAMAGED };
    if context.json {
        output::json(report)?;
        return Ok(status);
    }
    if report.ok {
        let (points, blocks) = (report.points_checked, report.blocks_checked);
        output::print(&match scrubbed {
            // Blocks are not looked into.
            true => format!("ok: every object of {points} points is as it was written\n"),
            false => format!("ok: {points} points and {blocks} blocks checked\n"),
        })?;
        return Ok(status);
    }
    let mut table = Rows::new(&["object", "kind", "detail"]);
    for error in &report.errors {
        table.add(vec![error.object.clone(), error.kind.to_string(), error.detail.clone()]);
    }
    table.print("damaged")?;
    Ok(status)
}
