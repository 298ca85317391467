//! `icecore gc`.

use icecore_repository::GcOptions;

use crate::cli::OK;
use crate::cli::args::GcArgs;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::output;

/// Runs `icecore gc`.
pub fn run(context: &Context, args: GcArgs) -> Outcome<u8> {
    let tried = format!("collect garbage in {}", args.repo.repo);
    let repository = context.open(&args.repo.repo)?;
    let report = repository
        .gc(&GcOptions { dry_run: args.dry_run, ..GcOptions::default() })
        .map_err(|e| Failure::from_repository(&tried, e))?;
    if context.json {
        output::json(&report)?;
        return Ok(OK);
    }
    let verb = if args.dry_run { "would delete" } else { "deleted" };
    output::print(&format!(
        "{verb} {} packs and {} maps, {}\n",
        report.packs_deleted,
        report.runs_deleted,
        human_bytes(report.bytes_freed)
    ))?;
    Ok(OK)
}
