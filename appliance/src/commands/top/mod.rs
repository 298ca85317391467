//! `icecore top`: what this host's jobs and VMs do, redrawn as it changes.
//!
//! The daemon is asked. Where none answers, the state directory tells of the jobs, which go on
//! without it.

mod frame;
mod screen;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use self::screen::Screen;
use super::vm::{self, VmRow};
use crate::cli::OK;
use crate::cli::args::{Global, TopArgs};
use crate::context::Context;
use crate::daemon::Health;
use crate::daemon::client::Client;
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::job_view::{self, JobView};
use crate::output;
use crate::state::JobState;

/// Points come and go slowly, and every repository is asked for them.
const VMS_INTERVAL: Duration = Duration::from_secs(30);
/// More jobs that wait than this fill no screen.
const WAITING_SHOWN_MAX: usize = 50;
/// Of those that ended, the latest.
const ENDED_SHOWN: usize = 5;
const TRIED: &str = "look at this host's jobs";

/// What one look saw.
#[derive(Debug, Serialize)]
struct Seen {
    at: Timestamp,
    /// None where no daemon answers.
    daemon: Option<Health>,
    /// Those that run, those that wait, and the latest that ended.
    jobs: Vec<JobView>,
    vms: Vec<VmRow>,
    /// Why the VMs are not known.
    problem: Option<String>,
}

/// Runs `icecore top`.
pub async fn run(global: &Global, args: &TopArgs) -> Outcome<u8> {
    let context = Arc::new(Context::new(global)?);
    let screen = if args.once || context.json { None } else { Screen::enter()? };
    let Some(screen) = screen else {
        let mut seen = look(Arc::clone(&context), Duration::ZERO).await?;
        seen.with_vms(vms(Arc::clone(&context), Duration::ZERO).await);
        return match context.json {
            true => output::json(&seen).map(|()| OK),
            false => output::print(&(frame::lines(&seen, None).join("\n") + "\n")).map(|()| OK),
        };
    };
    watch(context, &screen, Duration::from_secs(args.interval)).await
}

/// Draws until somebody has seen enough.
async fn watch(context: Arc<Context>, screen: &Screen, interval: Duration) -> Outcome<u8> {
    let interrupt = Interrupt::listen()?;
    let mut keys = screen::keys(TRIED)?;
    let mut seen = look(Arc::clone(&context), Duration::ZERO).await?;
    let mut jobs = Box::pin(look(Arc::clone(&context), interval));
    let mut points = Box::pin(vms(Arc::clone(&context), Duration::ZERO));
    loop {
        screen.draw(&frame::lines(&seen, Some(screen.size())))?;
        tokio::select! {
            now = &mut jobs => {
                seen.with_jobs(now?);
                jobs.set(look(Arc::clone(&context), interval));
            }
            now = &mut points => {
                seen.with_vms(now);
                points.set(vms(Arc::clone(&context), VMS_INTERVAL));
            }
            Some(key) = keys.recv() => {
                if matches!(key, b'q' | b'Q') {
                    return Ok(OK);
                }
            }
            () = interrupt.wait() => return Ok(OK),
        }
    }
}

impl Seen {
    fn with_jobs(&mut self, now: Self) {
        let (vms, problem) = (std::mem::take(&mut self.vms), self.problem.take());
        *self = Self { vms, problem, ..now };
    }

    fn with_vms(&mut self, asked: Outcome<Vec<VmRow>>) {
        match asked {
            Ok(vms) => (self.vms, self.problem) = (vms, None),
            // What was seen before is still the best that is known.
            Err(failure) => self.problem = Some(failure.why),
        }
    }
}

/// The jobs, after a pause.
async fn look(context: Arc<Context>, pause: Duration) -> Outcome<Seen> {
    tokio::time::sleep(pause).await;
    let client = Client::new(&context, TRIED);
    let (daemon, jobs) = match client.health().await {
        Ok(health) => (Some(health), of_daemon(&client).await?),
        Err(failure) => (None, of_host(&context, failure)?),
    };
    Ok(Seen { at: Timestamp::now(), daemon, jobs, vms: Vec::new(), problem: None })
}

async fn of_daemon(client: &Client<'_>) -> Outcome<Vec<JobView>> {
    let mut jobs = client.jobs_where("state=running").await?;
    jobs.extend(client.jobs_where(&format!("state=queued&limit={WAITING_SHOWN_MAX}")).await?);
    let ended = client.jobs_where(&format!("limit={}", WAITING_SHOWN_MAX + ENDED_SHOWN)).await?;
    jobs.extend(ended.into_iter().filter(JobView::is_over).take(ENDED_SHOWN));
    Ok(jobs)
}

/// Where the daemon is silent and this user may not read what it keeps, its failure is the answer.
fn of_host(context: &Context, failure: Failure) -> Outcome<Vec<JobView>> {
    let kept = context.state.root().join("jobs");
    match std::fs::read_dir(&kept) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failure),
        _ => {}
    }
    let (open, over): (Vec<_>, Vec<_>) =
        job_view::all(&context.state).into_iter().partition(|view| !view.is_over());
    let (mut jobs, waiting): (Vec<_>, Vec<_>) =
        open.into_iter().partition(|view| view.state == JobState::Running);
    jobs.extend(waiting.into_iter().take(WAITING_SHOWN_MAX));
    jobs.extend(over.into_iter().take(ENDED_SHOWN));
    Ok(jobs)
}

/// The VMs and their points, after a pause.
async fn vms(context: Arc<Context>, pause: Duration) -> Outcome<Vec<VmRow>> {
    tokio::time::sleep(pause).await;
    let client = Client::new(&context, TRIED);
    if client.health().await.is_ok() {
        return client.vms().await;
    }
    let asked = tokio::task::spawn_blocking(move || vm::rows(&context, None));
    asked.await.unwrap_or_else(|e| Err(Failure::failed(TRIED, e)))
}
