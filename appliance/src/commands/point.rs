//! `icecore point`: points of the repository, and those that never became one.

use icecore_repository::{Point, PointId, Repository, VmName};

use crate::cli::OK;
use crate::cli::args::{PointArgs, PointCommand};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::output::{self, Rows, when};
use crate::points;
use crate::report::PointRow;

/// Runs `icecore point …`.
pub fn run(context: &Context, command: PointCommand) -> Outcome<u8> {
    match command {
        PointCommand::List { vm, repo } => list(context, vm.as_deref(), &repo.repo),
        PointCommand::Show(args) => show(context, &args),
        PointCommand::Delete { point, with_descendants } => {
            delete(context, &point, with_descendants)
        }
        PointCommand::Protect(args) => protect(context, &args, true),
        PointCommand::Unprotect(args) => protect(context, &args, false),
    }
}

/// The id of the point that the user means, damaged or not.
fn find_id(repository: &Repository, args: &PointArgs, tried: &str) -> Outcome<PointId> {
    let vm = args.vm.as_deref().map(VmName::new).transpose();
    let vm = vm.map_err(|e| Failure::usage(tried, e))?;
    repository.resolve(&args.point, vm.as_ref()).map_err(|e| Failure::from_repository(tried, e))
}

/// Finds the point that the user means.
pub fn find(repository: &Repository, spec: &str, vm: Option<&str>, tried: &str) -> Outcome<Point> {
    let vm = vm.map(VmName::new).transpose().map_err(|e| Failure::usage(tried, e))?;
    repository
        .resolve(spec, vm.as_ref())
        .and_then(|id| repository.point(&id))
        .map_err(|e| Failure::from_repository(tried, e))
}

fn list(context: &Context, vm: Option<&str>, repo: &str) -> Outcome<u8> {
    let repository = context.open_read_only(repo)?;
    let rows = points::rows(context, &repository, vm)?;
    if context.json {
        output::json(&rows)?;
        return Ok(OK);
    }
    let titles =
        ["point", "vm", "status", "captured", "mode", "size", "new", "stored", "label", "why"];
    let mut table = Rows::new(&titles);
    for row in rows {
        table.add(cells(row));
    }
    table.print("no points yet; take one with 'icecore backup'")?;
    Ok(OK)
}

fn cells(row: PointRow) -> Vec<String> {
    let mut modes: Vec<String> = row
        .disks
        .iter()
        .filter_map(|disk| disk.mode)
        .map(|mode| format!("{mode:?}").to_lowercase())
        .collect();
    modes.sort();
    modes.dedup();
    vec![
        row.point.unwrap_or_else(|| "-".into()),
        row.vm.unwrap_or_default(),
        row.status.to_owned(),
        when(row.captured_at.unwrap_or(row.created_at)),
        modes.join(","),
        human_bytes(row.size_bytes),
        human_bytes(row.new_bytes),
        human_bytes(row.stored_bytes),
        row.label.unwrap_or_default(),
        row.failure_reason.unwrap_or_default(),
    ]
}

fn show(context: &Context, args: &PointArgs) -> Outcome<u8> {
    let tried = format!("show point {}", args.point);
    let repository = context.open_read_only(&args.repo.repo)?;
    let point = match find(&repository, &args.point, args.vm.as_deref(), &tried) {
        Ok(point) => point,
        Err(failure) => return show_uncommitted(context, &args.point, failure),
    };
    let detail =
        points::detail(&repository, &point).map_err(|e| Failure::from_repository(&tried, e))?;
    // A point has more to say than fits a table; JSON is its best print, for people too.
    output::json(&detail)?;
    Ok(OK)
}

/// A point that was never committed is shown from its job record.
fn show_uncommitted(context: &Context, spec: &str, not_found: Failure) -> Outcome<u8> {
    match points::uncommitted(context, None).into_iter().find(|r| r.point.as_deref() == Some(spec))
    {
        Some(row) => output::json(&row).map(|()| OK),
        None => Err(not_found),
    }
}

fn delete(context: &Context, args: &PointArgs, with_descendants: bool) -> Outcome<u8> {
    let tried = format!("delete point {}", args.point);
    let repository = context.open(&args.repo.repo)?;
    let point = find_id(&repository, args, &tried)?;
    let deleted: Vec<PointId> = if with_descendants {
        repository.delete_with_descendants(&point)
    } else {
        repository.delete_point(&point).map(|()| vec![point.clone()])
    }
    .map_err(|e| Failure::from_repository(&tried, e))?;
    report_deleted(context, &deleted)
}

/// Says which points are gone.
pub fn report_deleted(context: &Context, deleted: &[PointId]) -> Outcome<u8> {
    if context.json {
        output::json(&serde_json::json!({ "deleted": deleted }))?;
    } else {
        let names: Vec<String> = deleted.iter().map(ToString::to_string).collect();
        output::print(&format!(
            "deleted {}\nspace is given back by 'icecore gc'\n",
            names.join(", ")
        ))?;
    }
    Ok(OK)
}

fn protect(context: &Context, args: &PointArgs, protected: bool) -> Outcome<u8> {
    let verb = if protected { "protect" } else { "unprotect" };
    let tried = format!("{verb} point {}", args.point);
    let repository = context.open(&args.repo.repo)?;
    let point = find(&repository, &args.point, args.vm.as_deref(), &tried)?;
    if protected { repository.protect(&point.id) } else { repository.unprotect(&point.id) }
        .map_err(|e| Failure::from_repository(&tried, e))?;
    if context.json {
        output::json(&serde_json::json!({ "point": point.id, "protected": protected }))?;
    } else {
        output::print(&format!("{} is {verb}ed\n", point.id))?;
    }
    Ok(OK)
}
