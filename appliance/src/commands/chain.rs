//! `icecore chain`.

use std::collections::BTreeMap;

use icecore_repository::{ChainId, Point};
use jiff::Timestamp;
use serde::Serialize;

use super::point::report_deleted;
use crate::cli::OK;
use crate::cli::args::ChainCommand;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::output::{self, Rows, when};

#[derive(Debug, Serialize)]
struct ChainRow {
    chain: String,
    vm: String,
    points: usize,
    first_point: String,
    newest_point: String,
    first_at: Timestamp,
    newest_at: Timestamp,
    stored_bytes: u64,
}

/// Runs `icecore chain …`.
pub fn run(context: &Context, command: ChainCommand) -> Outcome<u8> {
    match command {
        ChainCommand::List { vm, repo } => list(context, vm.as_deref(), &repo.repo),
        ChainCommand::Delete { chain, repo } => delete(context, &chain, &repo.repo),
    }
}

fn list(context: &Context, vm: Option<&str>, repo: &str) -> Outcome<u8> {
    let repository = context.open_read_only(repo)?;
    let points = repository.points().map_err(|e| Failure::from_repository("list chains", e))?;
    let mut chains: BTreeMap<String, Vec<&Point>> = BTreeMap::new();
    for point in points.iter().filter(|p| vm.is_none_or(|vm| p.vm.as_str() == vm)) {
        chains.entry(point.chain.to_string()).or_default().push(point);
    }
    let rows: Vec<ChainRow> = chains.into_iter().filter_map(|(id, all)| row(id, &all)).collect();
    if context.json {
        output::json(&rows)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["chain", "vm", "points", "first", "newest", "stored"]);
    for row in rows {
        let stored = human_bytes(row.stored_bytes);
        let times = (when(row.first_at), when(row.newest_at));
        table.add(vec![row.chain, row.vm, row.points.to_string(), times.0, times.1, stored]);
    }
    table.print("no chains yet")?;
    Ok(OK)
}

fn row(chain: String, points: &[&Point]) -> Option<ChainRow> {
    let (first, newest) = (points.first()?, points.last()?);
    Some(ChainRow {
        chain,
        vm: newest.vm.to_string(),
        points: points.len(),
        first_point: first.id.to_string(),
        newest_point: newest.id.to_string(),
        first_at: first.meta.captured_at,
        newest_at: newest.meta.captured_at,
        stored_bytes: points.iter().map(|point| point.stored_bytes).sum(),
    })
}

fn delete(context: &Context, chain: &str, repo: &str) -> Outcome<u8> {
    let tried = format!("delete chain {chain}");
    let id: ChainId = chain.parse().map_err(|e| Failure::usage(&tried, e))?;
    let repository = context.open(repo)?;
    let deleted = repository.delete_chain(&id).map_err(|e| Failure::from_repository(&tried, e))?;
    report_deleted(context, &deleted)
}
