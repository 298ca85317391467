//! `icecore gc`.

use icecore_repository::{GcOptions, GcReport};

use crate::cli::OK;
use crate::cli::args::GcArgs;
use crate::context::Context;
use crate::daemon::client::{self, Client};
use crate::daemon::request::GcBody;
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::names::human_bytes;
use crate::output;
use crate::state::JobKind;

/// Runs `icecore gc`.
pub async fn run(context: &Context, args: GcArgs) -> Outcome<u8> {
    let tried = format!("collect garbage in {}", args.repo.repo);
    if context.through_daemon {
        let repo = Some(client::repo(context, &args.repo.repo, &tried)?);
        let body = GcBody { repo, dry_run: args.dry_run };
        let show = |context: &Context, report| print(context, &args, &report);
        return Client::new(context, tried).run("/v1/gc", &body, show).await;
    }
    let interrupt = Interrupt::listen()?;
    let named = context.repository_name(&args.repo.repo)?;
    let job = Job::begin(context, JobKind::Gc, &named, &[], &tried)?;
    job.save(context)?;
    let outcome = collect(context, &args, &interrupt, &tried).await;
    let report = job.end(context, outcome)?;
    print(context, &args, &report)?;
    Ok(OK)
}

/// A gc may be cut off anywhere: the next one finds what it left.
async fn collect(
    context: &Context,
    args: &GcArgs,
    interrupt: &Interrupt,
    tried: &str,
) -> Outcome<GcReport> {
    let repository = context.open(&args.repo.repo)?;
    let options = GcOptions { dry_run: args.dry_run, ..GcOptions::default() };
    let about = tried.to_owned();
    let work = move || repository.gc(&options).map_err(|e| Failure::from_repository(&about, e));
    interrupt.race(tried, work).await
}

fn print(context: &Context, args: &GcArgs, report: &GcReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let verb = if args.dry_run { "would delete" } else { "deleted" };
    output::print(&format!(
        "{verb} {} packs and {} maps, {}\n",
        report.packs_deleted,
        report.runs_deleted,
        human_bytes(report.bytes_freed)
    ))?;
    if report.points_locked + report.objects_locked > 0 {
        output::print(&format!(
            "kept {} deleted points and {} objects without a point: they are locked; run gc again \
             when their locks have run out\n",
            report.points_locked, report.objects_locked
        ))?;
    }
    Ok(())
}
