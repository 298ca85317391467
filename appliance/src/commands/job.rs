//! `icecore job`: the runs that this host remembers.

use crate::cli::OK;
use crate::cli::args::JobCommand;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Rows, when};
use crate::state::jobs;

/// Runs `icecore job …`.
pub fn run(context: &Context, command: JobCommand) -> Outcome<u8> {
    match command {
        JobCommand::List => list(context),
        JobCommand::Show { job } => show(context, &job),
    }
}

fn list(context: &Context) -> Outcome<u8> {
    let mut records = jobs::all(&context.state);
    records.reverse();
    if context.json {
        output::json(&records)?;
        return Ok(OK);
    }
    let mut rows = Rows::new(&["job", "kind", "vm", "status", "started", "point", "why"]);
    for record in records {
        rows.add(vec![
            record.job.to_string(),
            format!("{:?}", record.kind).to_lowercase(),
            record.vm.unwrap_or_default(),
            format!("{:?}", record.status).to_lowercase(),
            when(record.started_at),
            record.point.unwrap_or_default(),
            record.failure_reason.unwrap_or_default(),
        ]);
    }
    rows.print("no runs on this host yet")?;
    Ok(OK)
}

fn show(context: &Context, job: &str) -> Outcome<u8> {
    let record = jobs::all(&context.state).into_iter().find(|record| record.job.as_str() == job);
    let Some(record) = record else {
        return Err(Failure::usage(format!("show job {job}"), "this host has no such job")
            .next("see 'icecore job list'"));
    };
    // A record is for reading as it is: its JSON is its table.
    output::json(&record)?;
    Ok(OK)
}
