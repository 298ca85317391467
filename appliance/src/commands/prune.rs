//! `icecore prune`: deletes the points that no rule keeps, and says why each stays or goes.

use icecore_repository::{Point, PointId, Repository, VmName};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::cli::OK;
use crate::cli::args::PruneArgs;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Rows, when};
use crate::points;
use crate::policy::retention::{self, Candidate, Clock, Keep, Rule, Verdict};

/// What a prune did, or would do.
#[derive(Debug, Serialize)]
pub struct PruneReport {
    vm: String,
    dry_run: bool,
    /// What stays, and by which rules.
    kept: Vec<Verdict>,
    /// What goes, oldest first.
    removed: Vec<Removed>,
    /// What is no good point: it neither goes nor counts. And what no rule keeps, but a lock.
    left_alone: Vec<LeftAlone>,
}

#[derive(Debug, Serialize)]
struct Removed {
    point: String,
    captured_at: Timestamp,
    why: &'static str,
}

#[derive(Debug, Serialize)]
struct LeftAlone {
    point: String,
    why: String,
}

impl PruneReport {
    /// Whether anything goes.
    pub fn removed_any(&self) -> bool {
        !self.removed.is_empty()
    }
}

/// What is asked of a prune.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// The VM whose points are judged.
    pub vm: &'a VmName,
    /// What stays.
    pub keep: Keep,
    /// The zone of days and weeks.
    pub zone: TimeZone,
    /// What is made of points that are later than now.
    pub clock: Clock,
    /// Whether nothing is deleted.
    pub dry_run: bool,
}

/// Runs `icecore prune`.
pub fn run(context: &Context, args: PruneArgs) -> Outcome<u8> {
    let tried = format!("prune the points of {}", args.vm);
    let keep = args.keep();
    if keep.is_empty() {
        return Err(Failure::usage(&tried, "no rule says what to keep")
            .next("give --keep-last N, --keep-daily N or another --keep rule"));
    }
    let vm = VmName::new(&args.vm).map_err(|e| Failure::usage(&tried, e))?;
    let zone = match &args.timezone {
        Some(name) => TimeZone::get(name).map_err(|e| Failure::usage(&tried, e))?,
        None => TimeZone::system(),
    };
    let clock = if args.trust_clock { Clock::Trusted } else { Clock::Doubted };
    let repository = if args.dry_run {
        context.open_read_only(&args.repo.repo)?
    } else {
        context.open(&args.repo.repo)?
    };
    let request = Request { vm: &vm, keep, zone, clock, dry_run: args.dry_run };
    let report = prune(context, &repository, &request)?;
    print(context, &report)?;
    Ok(OK)
}

/// Judges the points of a VM and deletes those that no rule keeps; all others stay restorable.
///
/// # Errors
/// Status 2 when the VM has no point; 3 when a point is later than now and the clock is doubted.
pub fn prune(
    context: &Context,
    repository: &Repository,
    request: &Request<'_>,
) -> Outcome<PruneReport> {
    let tried = format!("prune the points of {}", request.vm);
    let failed = |e| Failure::from_repository(&tried, e);
    let points = repository.points().map_err(failed)?;
    let points: Vec<Point> = points.into_iter().filter(|p| &p.vm == request.vm).collect();
    if points.is_empty() {
        let why = format!("the repository has no point of {}", request.vm);
        return Err(Failure::usage(&tried, why).next("see 'icecore vm list --repo …'"));
    }
    let protected = repository.protected().map_err(failed)?;
    let mut left_alone = not_good(context, repository, &points, request.vm)?;
    let ids: Vec<(String, &Point)> = points.iter().map(|p| (p.id.to_string(), p)).collect();
    let good = ids.iter().filter(|(id, _)| !left_alone.iter().any(|one| &one.point == id));
    let candidates: Vec<Candidate<'_>> = good
        .map(|(id, point)| Candidate {
            id,
            at: point.meta.captured_at,
            protected: protected.contains(&point.id),
        })
        .collect();
    let now = Timestamp::now();
    let decided = retention::decide(&candidates, &request.keep, &request.zone, now, request.clock);
    let verdicts = decided.map_err(|behind| {
        let why = format!(
            "point {} is of {}, and the clock says {}: one of the two is wrong, and nothing goes",
            behind.newest,
            when(behind.at),
            when(now)
        );
        Failure::refused(&tried, why).next(
            "set the clock; with --trust-clock points of the future stay, and the rest is judged",
        )
    })?;
    let (kept, mut doomed): (Vec<Verdict>, Vec<Verdict>) =
        verdicts.into_iter().partition(Verdict::stays);
    left_alone.extend(take_locked(repository, &mut doomed).map_err(failed)?);
    if !request.dry_run {
        for verdict in &doomed {
            let id: PointId = verdict.point.parse().map_err(|e| Failure::failed(&tried, e))?;
            repository.delete_point(&id).map_err(failed)?;
        }
    }
    let why = "no rule keeps it";
    let removed = doomed
        .into_iter()
        .map(|gone| Removed { point: gone.point, captured_at: gone.captured_at, why })
        .collect();
    let (vm, dry_run) = (request.vm.to_string(), request.dry_run);
    Ok(PruneReport { vm, dry_run, kept, removed, left_alone })
}

/// Takes out of what would go what may not yet.
fn take_locked(
    repository: &Repository,
    doomed: &mut Vec<Verdict>,
) -> icecore_repository::Result<Vec<LeftAlone>> {
    let mut locked = Vec::new();
    for verdict in std::mem::take(doomed) {
        match repository.locked_until(&verdict.point.parse()?)? {
            Some(until) => locked.push(LeftAlone {
                point: verdict.point,
                why: format!("no rule keeps it, but it is locked until {}", when(until)),
            }),
            None => doomed.push(verdict),
        }
    }
    Ok(locked)
}

/// Points in which a check found damage, or which are being restored: they do not count, or what
/// stands for a day might be one that cannot be restored.
fn not_good(
    context: &Context,
    repository: &Repository,
    points: &[Point],
    vm: &VmName,
) -> Outcome<Vec<LeftAlone>> {
    let rows = points::rows(context, repository, Some(vm.as_str()))?;
    let mut all = Vec::new();
    for point in points {
        let id = point.id.to_string();
        let row = rows.iter().find(|row| row.point.as_deref() == Some(id.as_str()));
        let damaged = point.disks.iter().any(|disk| {
            let damaged = repository.disk_is_damaged(point, &disk.disk);
            // What cannot be told is no reason to take a point for a good one.
            damaged.unwrap_or(true)
        });
        match row {
            Some(row) if row.status != "available" => {
                all.push(LeftAlone { point: id, why: format!("it is {}", row.status) });
            }
            _ if damaged => {
                all.push(LeftAlone { point: id, why: "a check found damage in it".into() });
            }
            _ => {}
        }
    }
    Ok(all)
}

fn print(context: &Context, report: &PruneReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let mut table = Rows::new(&["point", "captured", "decision", "because"]);
    let goes = if report.dry_run { "would go" } else { "deleted" };
    let mut rows: Vec<(Timestamp, Vec<String>)> = Vec::new();
    for one in &report.kept {
        let rules: Vec<String> = one.rules.iter().map(|rule| name(*rule).to_owned()).collect();
        let cells =
            vec![one.point.clone(), when(one.captured_at), "stays".into(), rules.join(", ")];
        rows.push((one.captured_at, cells));
    }
    for one in &report.removed {
        let cells = vec![one.point.clone(), when(one.captured_at), goes.into(), one.why.into()];
        rows.push((one.captured_at, cells));
    }
    rows.sort();
    for (_, cells) in rows {
        table.add(cells);
    }
    for one in &report.left_alone {
        table.add(vec![one.point.clone(), "-".into(), "left alone".into(), one.why.clone()]);
    }
    table.print("no points")?;
    if !report.removed.is_empty() && !report.dry_run {
        output::print("space is given back by 'icecore gc'\n")?;
    }
    Ok(())
}

fn name(rule: Rule) -> &'static str {
    match rule {
        Rule::Last => "one of the last",
        Rule::Hourly => "hourly",
        Rule::Daily => "daily",
        Rule::Weekly => "weekly",
        Rule::Monthly => "monthly",
        Rule::Yearly => "yearly",
        Rule::Protected => "protected",
        Rule::Newest => "the newest",
        Rule::Future => "of the future",
    }
}
