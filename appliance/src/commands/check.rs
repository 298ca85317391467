//! `icecore check`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use icecore_repository::CheckOptions;

use super::point::find;
use crate::cli::args::CheckArgs;
use crate::cli::{DAMAGED, OK};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Rows};
use crate::progress::{Meter, Progress};

/// Runs `icecore check`.
pub fn run(context: &Context, args: CheckArgs) -> Outcome<u8> {
    let tried = format!("check the repository {}", args.repo.repo);
    // Writable where that is possible: packs found damaged are marked, so that the next point
    // builds nothing on them.
    let repository = context.open(&args.repo.repo)?;
    let point = match &args.point {
        Some(spec) => Some(find(&repository, spec, None, &tried)?.id),
        None => None,
    };
    let options = CheckOptions { read_data: args.read_data, sample: args.sample, point };
    let counted = Arc::new(icecore_io_engine::Progress::default());
    let stored = repository.info().map_or(0, |info| info.stored_bytes);
    let total = if args.read_data { stored } else { 0 };
    let meter = Meter::new(total, Arc::clone(&counted));
    let progress = Progress::show("checking".into(), meter, context.quiet);
    let report = repository
        .check(&options, |now| counted.read_bytes.store(now.bytes_read, Ordering::Relaxed))
        .map_err(|e| Failure::from_repository(&tried, e))?;
    drop(progress);
    let status = if report.ok { OK } else { DAMAGED };
    if context.json {
        output::json(&report)?;
        return Ok(status);
    }
    if report.ok {
        let (points, blocks) = (report.points_checked, report.blocks_checked);
        output::print(&format!("ok: {points} points and {blocks} blocks checked\n"))?;
        return Ok(status);
    }
    let mut table = Rows::new(&["object", "kind", "detail"]);
    for error in &report.errors {
        table.add(vec![error.object.clone(), error.kind.to_string(), error.detail.clone()]);
    }
    table.print("damaged")?;
    Ok(status)
}
