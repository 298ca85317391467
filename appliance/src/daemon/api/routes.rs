//! The routes. Whatever takes long is a job: its id is answered at once.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use icecore_repository::VmName;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::reply::{Body, ErrorBody, Refusal};
use crate::commands::vm::{self, VmRow};
use crate::context::Context;
use crate::daemon::access::{Caller, Role};
use crate::daemon::request::{
    BackupBody, CheckBody, CopyBody, GcBody, RestoreBody, RollbackBody, Wanted, repository,
};
use crate::daemon::supervisor::Supervisor;
use crate::failure::{Failure, Outcome, Status};
use crate::job_view::{self, JobView};
use crate::points;
use crate::report::PointRow;
use crate::state::{JobId, JobKind, JobState};

/// A repository that has not answered a listing by then is out of reach.
const REPOSITORY_WAIT: Duration = Duration::from_secs(30);
/// A repository that has not answered by then is left to the worker.
const STATIC_CHECK_WAIT: Duration = Duration::from_secs(3);
/// More jobs than this are asked for in several requests.
const JOBS_MAX: usize = 1000;

type App = State<Arc<Supervisor>>;
type Who = Extension<Caller>;

/// A job that was accepted.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// Its id; see `GET /v1/jobs/{id}`.
    pub job: JobId,
}

fn accepted(app: &Supervisor, caller: &Caller, wanted: Wanted) -> Result<Response, Refusal> {
    let record = app.submit(wanted, &caller.name)?;
    let place = format!("/v1/jobs/{}", record.job);
    let body = Json(Accepted { job: record.job });
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, place)], body).into_response())
}

/// Runs what may wait for a disk, and no longer than `wait`.
async fn blocking<T: Send + 'static>(
    app: &Arc<Supervisor>,
    wait: Duration,
    tried: &str,
    work: impl FnOnce(&Context) -> Outcome<T> + Send + 'static,
) -> Outcome<T> {
    let settings = app.settings();
    let asked = tokio::task::spawn_blocking(move || work(&settings.context));
    match tokio::time::timeout(wait, asked).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(e)) => Err(Failure::failed(tried, e)),
        Err(_) => {
            let why = format!("no answer within {} s", wait.as_secs());
            Err(Failure::failed(tried, why)
                .next("look whether the repository is there")
                .transient())
        }
    }
}

/// What the repository can say at once against a job: that it is none, or that it has no such
/// point. Everything else is for the worker.
async fn static_check(app: &Arc<Supervisor>, wanted: &Wanted, tried: &str) -> Outcome<()> {
    let (place, point) = (wanted.repository.clone(), wanted.point.clone());
    let (vm, tried_there) = (wanted.vm.clone(), tried.to_owned());
    let asked = blocking(app, STATIC_CHECK_WAIT, tried, move |context| {
        let repository = context.open_read_only(&place)?;
        let Some(point) = point else { return Ok(()) };
        let vm = vm.as_deref().map(VmName::new).transpose();
        let vm = vm.map_err(|e| Failure::usage(&tried_there, e))?;
        let found = repository.resolve(&point, vm.as_ref());
        found.map(drop).map_err(|e| Failure::from_repository(&tried_there, e))
    });
    match asked.await {
        Err(failure) if failure.status == Status::Usage => Err(failure),
        _ => Ok(()),
    }
}

async fn queue(
    app: &Arc<Supervisor>,
    caller: &Caller,
    wanted: Outcome<Wanted>,
) -> Result<Response, Refusal> {
    let wanted = wanted?;
    let tried = format!("start a {}", wanted.kind.word());
    static_check(app, &wanted, &tried).await?;
    accepted(app, caller, wanted)
}

/// Backs a VM up.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/backups", tag = "jobs", params(("vm" = String, Path)),
    request_body = BackupBody,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody))
)]
pub async fn back_up(
    State(app): App,
    Extension(caller): Who,
    Path(vm): Path<String>,
    Body(body): Body<BackupBody>,
) -> Result<Response, Refusal> {
    queue(&app, &caller, body.wanted(&app.settings().context, &caller, &vm)).await
}

/// Restores a point.
#[utoipa::path(
    post, path = "/v1/points/{point}/restore", tag = "jobs", params(("point" = String, Path)),
    request_body = RestoreBody,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody))
)]
pub async fn restore(
    State(app): App,
    Extension(caller): Who,
    Path(point): Path<String>,
    Body(body): Body<RestoreBody>,
) -> Result<Response, Refusal> {
    queue(&app, &caller, body.wanted(&app.settings().context, &caller, &point)).await
}

/// Rolls a VM back to a point.
#[utoipa::path(
    post, path = "/v1/vms/{vm}/rollback", tag = "jobs", params(("vm" = String, Path)),
    request_body = RollbackBody,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody))
)]
pub async fn roll_back(
    State(app): App,
    Extension(caller): Who,
    Path(vm): Path<String>,
    Body(body): Body<RollbackBody>,
) -> Result<Response, Refusal> {
    queue(&app, &caller, body.wanted(&app.settings().context, &caller, &vm)).await
}

/// Verifies a repository or one point.
#[utoipa::path(
    post, path = "/v1/check", tag = "jobs", request_body = CheckBody,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody))
)]
pub async fn check(
    State(app): App,
    Extension(caller): Who,
    Body(body): Body<CheckBody>,
) -> Result<Response, Refusal> {
    queue(&app, &caller, body.wanted(&app.settings().context, &caller)).await
}

/// Deletes what no point needs any more.
#[utoipa::path(
    post, path = "/v1/gc", tag = "jobs", request_body = GcBody,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody))
)]
pub async fn gc(
    State(app): App,
    Extension(caller): Who,
    Body(body): Body<GcBody>,
) -> Result<Response, Refusal> {
    queue(&app, &caller, body.wanted(&app.settings().context, &caller)).await
}

/// Copies points to another repository.
#[utoipa::path(
    post, path = "/v1/copy", tag = "jobs", request_body = CopyBody,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody))
)]
pub async fn copy(
    State(app): App,
    Extension(caller): Who,
    Body(body): Body<CopyBody>,
) -> Result<Response, Refusal> {
    queue(&app, &caller, body.wanted(&app.settings().context, &caller)).await
}

/// Which jobs.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct JobsQuery {
    state: Option<JobState>,
    kind: Option<JobKind>,
    vm: Option<String>,
    /// At most so many, the newest.
    limit: Option<usize>,
}

/// Lists jobs, newest first.
#[utoipa::path(
    get, path = "/v1/jobs", tag = "jobs", params(JobsQuery),
    responses((status = 200, body = [JobView]), (status = "4XX", body = ErrorBody))
)]
pub async fn jobs(
    State(app): App,
    Query(query): Query<JobsQuery>,
) -> Result<Json<Vec<JobView>>, Refusal> {
    let listed = blocking(&app, REPOSITORY_WAIT, "list jobs", move |context| {
        let views = job_view::all(&context.state).into_iter().filter(|view| {
            query.state.is_none_or(|state| view.state == state)
                && query.kind.is_none_or(|kind| view.record.kind == kind)
                && query.vm.as_ref().is_none_or(|vm| view.record.vm.as_ref() == Some(vm))
        });
        Ok(views.take(query.limit.unwrap_or(JOBS_MAX).min(JOBS_MAX)).collect())
    });
    Ok(Json(listed.await?))
}

/// One job.
#[utoipa::path(
    get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = JobView), (status = "4XX", body = ErrorBody))
)]
pub async fn job(State(app): App, Path(id): Path<String>) -> Result<Json<JobView>, Refusal> {
    let tried = format!("show job {id:?}");
    Ok(Json(job_view::find(&app.settings().context.state, &id, &tried)?))
}

/// Asks a job to end and to undo what it began; follow it to see when it has.
#[utoipa::path(
    post, path = "/v1/jobs/{id}/cancel", tag = "jobs", params(("id" = String, Path)),
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody))
)]
pub async fn cancel(
    State(app): App,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let tried = format!("cancel job {id:?}");
    caller.require(Role::Operate, &tried)?;
    let view = job_view::find(&app.settings().context.state, &id, &tried)?;
    app.cancel(&view)?;
    Ok((StatusCode::ACCEPTED, Json(Accepted { job: view.record.job })).into_response())
}

/// Which points.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PointsQuery {
    /// A configured repository; may be left out where there is only one.
    repo: Option<String>,
    /// Only of this VM.
    vm: Option<String>,
}

/// Lists points, oldest first.
#[utoipa::path(
    get, path = "/v1/points", tag = "points", params(PointsQuery),
    responses((status = 200, body = [PointRow]), (status = "4XX", body = ErrorBody))
)]
pub async fn list_points(
    State(app): App,
    Extension(caller): Who,
    Query(query): Query<PointsQuery>,
) -> Result<Json<Vec<PointRow>>, Refusal> {
    let tried = "list points";
    let name = repository(&app.settings().context, &caller, query.repo.as_deref(), tried)?;
    let listed = blocking(&app, REPOSITORY_WAIT, tried, move |context| {
        let repository = context.open_read_only(&name)?;
        points::rows(context, &repository, query.vm.as_deref())
    });
    Ok(Json(listed.await?))
}

/// Lists VMs: those of the configuration, and those that configured repositories know.
#[utoipa::path(
    get, path = "/v1/vms", tag = "vms",
    responses((status = 200, body = [VmRow]), (status = "4XX", body = ErrorBody))
)]
pub async fn vms(State(app): App) -> Result<Json<Vec<VmRow>>, Refusal> {
    let listed = blocking(&app, REPOSITORY_WAIT, "list VMs", |context| vm::rows(context, None));
    Ok(Json(listed.await?))
}

/// Whether the daemon is there.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Health {
    pub ok: bool,
    pub version: String,
    pub jobs_waiting: usize,
    pub jobs_running: usize,
}

/// Answers as long as the daemon does its work.
#[utoipa::path(get, path = "/healthz", tag = "daemon", responses((status = 200, body = Health)))]
pub async fn healthz(State(app): App) -> Json<Health> {
    let load = app.load();
    Json(Health {
        ok: true,
        version: env!("CARGO_PKG_VERSION").into(),
        jobs_waiting: load.waiting,
        jobs_running: load.running,
    })
}

/// Metrics in the text format of Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "daemon",
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub async fn metrics(State(app): App) -> Response {
    let text = app.metrics.text(app.load());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
