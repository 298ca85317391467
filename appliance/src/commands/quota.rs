//! `icecore quota`, and the quota of a backup.

use std::path::{Path, PathBuf};

use icecore_repository::{Point, Repository};
use serde::Serialize;

use crate::cli::OK;
use crate::cli::args::{QuotaCommand, QuotaSetArgs};
use crate::config::{self, Config, DEFAULT_PATH, QuotaConfig};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::output::{self, Rows};
use crate::policy::quota::{Usage, allowance, bytes_max};
use crate::state::replace_file;

/// A project's quota and its use in one repository.
#[derive(Debug, Serialize)]
pub struct QuotaRow {
    /// The project.
    pub project: String,
    /// The repository, by its configured name or as it was given.
    pub repository: String,
    /// Its VMs.
    pub vms: Vec<String>,
    /// What they use.
    pub used: Usage,
    /// How many points they may have.
    pub points_max: Option<u64>,
    /// How many bytes these may take.
    pub stored_bytes_max: Option<u64>,
    /// Why no further point may be begun.
    pub exceeded: Option<String>,
}

/// Runs `icecore quota …`.
pub fn run(context: &Context, command: QuotaCommand) -> Outcome<u8> {
    match command {
        QuotaCommand::List { repo } => print(context, rows(context, repo.repo.as_deref(), None)?),
        QuotaCommand::Show { project, repo } => {
            known(context, &project, "show a quota")?;
            print(context, rows(context, repo.repo.as_deref(), Some(&project))?)
        }
        QuotaCommand::Set(args) => set(context, &args),
    }
}

fn known(context: &Context, project: &str, tried: &str) -> Outcome<()> {
    let has_vm = || context.config.vm.values().any(|vm| vm.project.as_deref() == Some(project));
    if context.config.quota.contains_key(project) || has_vm() {
        return Ok(());
    }
    let why = format!("no VM has project = \"{project}\", and there is no [quota.{project}]");
    Err(Failure::usage(tried, why).next("see 'icecore quota list'"))
}

/// The quotas and their use, in one repository or in all that are configured.
pub fn rows(context: &Context, repo: Option<&str>, only: Option<&str>) -> Outcome<Vec<QuotaRow>> {
    let named: Vec<&str> = match repo {
        Some(repo) => vec![repo],
        None => context.config.repository.keys().map(String::as_str).collect(),
    };
    let mut rows = Vec::new();
    for name in named {
        let repository = context.open_read_only(name)?;
        rows.extend(rows_of(&context.config, &repository, name, only)?);
    }
    Ok(rows)
}

/// The quotas and their use in a repository that is open, which `name` is the name of.
pub fn rows_of(
    config: &Config,
    repository: &Repository,
    name: &str,
    only: Option<&str>,
) -> Outcome<Vec<QuotaRow>> {
    let points = repository.points().map_err(|e| Failure::from_repository("show quotas", e))?;
    let wanted = config.quota.iter().filter(|(project, _)| only.is_none_or(|o| o == *project));
    let row = |(project, quota): (&String, &QuotaConfig)| {
        let used = usage(config, project, &points);
        QuotaRow {
            project: project.clone(),
            repository: name.to_owned(),
            vms: vms_of(config, project).map(ToOwned::to_owned).collect(),
            used,
            points_max: quota.points,
            stored_bytes_max: bytes_max(quota),
            exceeded: allowance(quota, used).err(),
        }
    };
    Ok(wanted.map(row).collect())
}

fn vms_of<'a>(config: &'a Config, project: &'a str) -> impl Iterator<Item = &'a str> {
    let of_project = config.vm.iter().filter(move |(_, vm)| vm.project.as_deref() == Some(project));
    of_project.map(|(name, _)| name.as_str())
}

fn usage(config: &Config, project: &str, points: &[Point]) -> Usage {
    let ours = |point: &&Point| vms_of(config, project).any(|vm| vm == point.vm.as_str());
    Usage::of(points.iter().filter(ours).map(|point| point.stored_bytes))
}

/// How many bytes a new point of a VM may store, by the quota of its project; none: any number.
///
/// # Errors
/// Status 3 when the project has used its quota up.
pub fn of_backup(
    context: &Context,
    repository: &Repository,
    vm: &str,
    tried: &str,
) -> Outcome<Option<u64>> {
    let config = &context.config;
    let Some(project) = config.vm.get(vm).and_then(|vm| vm.project.as_deref()) else {
        return Ok(None);
    };
    let Some(quota) = config.quota.get(project) else { return Ok(None) };
    let points = repository.points().map_err(|e| Failure::from_repository(tried, e))?;
    allowance(quota, usage(config, project, &points)).map_err(|why| {
        Failure::refused(tried, format!("project {project} has no room: {why}"))
            .next("delete points ('icecore prune'), or raise it with 'icecore quota set'")
    })
}

fn print(context: &Context, rows: Vec<QuotaRow>) -> Outcome<u8> {
    if context.json {
        output::json(&rows)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["project", "repository", "points", "of", "stored", "of", "state"]);
    for row in rows {
        table.add(vec![
            row.project,
            row.repository,
            row.used.points.to_string(),
            row.points_max.map_or_else(|| "-".into(), |max| max.to_string()),
            human_bytes(row.used.stored_bytes),
            row.stored_bytes_max.map_or_else(|| "-".into(), human_bytes),
            row.exceeded.map_or_else(|| "ok".into(), |_| "used up".into()),
        ]);
    }
    table.print("no quotas: add [quota.PROJECT] to the configuration")?;
    Ok(OK)
}

/// Writes `conf.d/quota-PROJECT.toml`, which no other table shares; what an operator wrote by hand
/// elsewhere is left to him.
fn set(context: &Context, args: &QuotaSetArgs) -> Outcome<u8> {
    let tried = format!("set the quota of {}", args.project);
    known(context, &args.project, &tried)?;
    if args.points.is_none() && args.gigabytes.is_none() {
        return Err(
            Failure::usage(tried, "nothing is to be set").next("give --points N or --gigabytes N")
        );
    }
    let path = own_file(context.config_path.as_deref(), &args.project, &tried)?;
    let elsewhere = context.config.quota.contains_key(&args.project) && !path.exists();
    if elsewhere {
        let why = format!("[quota.{}] is in a file that was written by hand", args.project);
        return Err(Failure::refused(tried, why).next("change it there"));
    }
    let before = context.config.quota.get(&args.project).copied().unwrap_or_default();
    let quota = QuotaConfig {
        points: args.points.or(before.points),
        gigabytes: args.gigabytes.or(before.gigabytes),
    };
    write(&path, &args.project, &quota, &tried)?;
    // Whoever reads it next must not stumble over it.
    let after = config::load(context.config_path.as_deref())?;
    if let Some(problem) = after.problems.first() {
        return Err(Failure::failed(tried, format!("it is written, and now: {problem}")));
    }
    if context.json {
        output::json(
            &serde_json::json!({ "project": args.project, "file": path, "quota": quota }),
        )?;
    } else {
        output::print(&format!("written to {}\n", path.display()))?;
    }
    Ok(OK)
}

fn own_file(config: Option<&Path>, project: &str, tried: &str) -> Outcome<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if project.is_empty() || !project.chars().all(plain) {
        let why = "a project's name is of letters, digits, '-' and '_' to be set here";
        return Err(Failure::usage(tried, why).next("write [quota.\"…\"] into the configuration"));
    }
    let main = config.unwrap_or(Path::new(DEFAULT_PATH));
    Ok(main.with_file_name("conf.d").join(format!("quota-{project}.toml")))
}

fn write(path: &Path, project: &str, quota: &QuotaConfig, tried: &str) -> Outcome<()> {
    let mut text = format!("# Written by 'icecore quota set'.\n[quota.{project}]\n");
    text += &quota.points.map_or_else(String::new, |points| format!("points = {points}\n"));
    text += &quota.gigabytes.map_or_else(String::new, |size| format!("gigabytes = {size:?}\n"));
    let dir = path.parent().unwrap_or(Path::new("."));
    let written = std::fs::create_dir_all(dir).and_then(|()| replace_file(path, text.as_bytes()));
    written.map_err(|e| {
        Failure::failed(tried, format!("{}: {e}", path.display()))
            .next("run it as a user that may write the configuration")
    })
}
