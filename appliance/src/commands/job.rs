//! `icecore job`: the runs that this host remembers.

use std::time::{Duration, Instant};

use crate::cli::OK;
use crate::cli::args::JobCommand;
use crate::context::Context;
use crate::daemon::client::Client;
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::job_view::{self, Cancel, JobView};
use crate::output::{self, Rows, when};
use crate::progress::in_words;
use crate::state::JobState;

/// How often a followed job is told of.
const TELL_INTERVAL: Duration = Duration::from_secs(2);
/// How long `job cancel` waits for the end that it asked for: undoing takes seconds.
const CANCEL_WAIT: Duration = Duration::from_secs(30);

/// Runs `icecore job …`.
pub async fn run(context: &Context, command: JobCommand) -> Outcome<u8> {
    if context.through_daemon {
        return through_daemon(context, command).await;
    }
    match command {
        JobCommand::List => list(context, job_view::all(&context.state)),
        JobCommand::Show { job } => show(context, &job),
        JobCommand::Watch { job } => watch(context, &job).await,
        JobCommand::Cancel { job, force } => cancel(context, &job, force).await,
    }
}

async fn through_daemon(context: &Context, command: JobCommand) -> Outcome<u8> {
    match command {
        JobCommand::List => list(context, Client::new(context, "list jobs").jobs().await?),
        JobCommand::Show { job } => {
            output::json(&Client::new(context, format!("show job {job}")).job(&job).await?)?;
            Ok(OK)
        }
        JobCommand::Watch { job } => {
            let client = Client::new(context, format!("watch job {job}"));
            finish(context, client.follow(&job, None).await?)
        }
        JobCommand::Cancel { force: true, job } => {
            let why = "the daemon kills no job; leave --daemon out";
            Err(Failure::usage(format!("cancel job {job}"), why))
        }
        JobCommand::Cancel { job, .. } => {
            let tried = format!("cancel job {job}");
            let client = Client::new(context, tried.as_str());
            client.cancel(&job).await?;
            match tokio::time::timeout(CANCEL_WAIT, client.follow(&job, None)).await {
                Ok(over) => cancelled(context, &over?, &tried),
                Err(_) => still_at_it(&job),
            }
        }
    }
}

fn still_at_it(job: &str) -> Outcome<u8> {
    eprintln!("icecore: job {job} was asked to end and is still at it");
    Ok(OK)
}

fn list(context: &Context, views: Vec<JobView>) -> Outcome<u8> {
    if context.json {
        output::json(&views)?;
        return Ok(OK);
    }
    let titles = ["job", "kind", "vm", "state", "status", "done", "started", "point", "why"];
    let mut rows = Rows::new(&titles);
    for JobView { record, state, progress } in views {
        let done = progress
            .filter(|progress| progress.total_bytes > 0)
            .map(|progress| format!("{}%", 100 * progress.done_bytes / progress.total_bytes));
        rows.add(vec![
            record.job.to_string(),
            record.kind.word().into(),
            record.vm.unwrap_or_default(),
            state.word().into(),
            format!("{:?}", record.status).to_lowercase(),
            done.unwrap_or_default(),
            when(record.started_at),
            record.point.unwrap_or_default(),
            record.failure_reason.unwrap_or_default(),
        ]);
    }
    rows.print("no runs on this host yet")?;
    Ok(OK)
}

fn show(context: &Context, job: &str) -> Outcome<u8> {
    // A record is for reading as it is: its JSON is its table.
    output::json(&job_view::find(&context.state, job, &format!("show job {job}"))?)?;
    Ok(OK)
}

async fn watch(context: &Context, job: &str) -> Outcome<u8> {
    let tried = format!("watch job {job}");
    let interrupt = Interrupt::listen()?;
    let found = job_view::find(&context.state, job, &tried)?;
    let mut teller = Teller::new(context.quiet);
    let over = job_view::follow(&context.state, &found.record.job, &tried, |view| {
        if interrupt.is_set() {
            let mut left = Failure::interrupted(&tried);
            left.why = "no longer watched; the job goes on".into();
            return Err(left);
        }
        teller.tell(view);
        Ok(())
    });
    finish(context, over.await?)
}

/// Tells on stderr how a job goes on, now and then and whenever it gets further.
pub struct Teller {
    quiet: bool,
    last: Option<(Instant, String)>,
}

impl Teller {
    /// One that may have nothing to say.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, last: None }
    }

    /// Looks at the job once more.
    pub fn tell(&mut self, view: &JobView) {
        let stage = format!("{:?}", view.record.status).to_lowercase();
        let due = self.last.as_ref().is_none_or(|(at, told)| {
            *told != stage || (at.elapsed() >= TELL_INTERVAL && view.progress.is_some())
        });
        if self.quiet || !due || view.is_over() {
            return;
        }
        match &view.progress {
            Some(p) => {
                let (done, total) = (p.done_bytes, p.total_bytes);
                let words = in_words(&p.label, done, total, p.bytes_per_second, p.eta_seconds);
                eprintln!("{words}");
            }
            None => eprintln!("job {}: {stage}", view.record.job),
        }
        self.last = Some((Instant::now(), stage));
    }
}

fn finish(context: &Context, view: JobView) -> Outcome<u8> {
    if context.json {
        output::json(&view)?;
        return Ok(view.exit_status());
    }
    let record = &view.record;
    let mut text = format!("job {} {}", record.job, view.state.word());
    if let Some(point) = record.point.as_ref().filter(|_| view.state == JobState::Succeeded) {
        text += &format!(": point {point}");
    }
    if let Some(why) = &record.failure_reason {
        text += &format!(": {}", output::printable(why));
    }
    if let Some(next) = &record.next {
        text += &format!("\n  next: {}", output::printable(next));
    }
    output::print(&(text + "\n"))?;
    Ok(view.exit_status())
}

async fn cancel(context: &Context, job: &str, force: bool) -> Outcome<u8> {
    let tried = format!("cancel job {job}");
    let view = job_view::find(&context.state, job, &tried)?;
    job_view::cancel(&context.state, &view, if force { Cancel::Kill } else { Cancel::Ask })?;
    let over = job_view::follow(&context.state, &view.record.job, &tried, |_| Ok(()));
    match tokio::time::timeout(CANCEL_WAIT, over).await {
        Ok(over) => cancelled(context, &over?, &tried),
        Err(_) => still_at_it(job),
    }
}

/// Prints how a job that was asked to end has ended; one that was too far to be undone is refused.
fn cancelled(context: &Context, view: &JobView, tried: &str) -> Outcome<u8> {
    match view.state {
        JobState::Cancelled | JobState::Interrupted if context.json => output::json(view)?,
        JobState::Cancelled | JobState::Interrupted => {
            output::print(&format!("job {} {}\n", view.record.job, view.state.word()))?;
        }
        other => {
            let why = format!("it has ended before it could be: {}", other.word());
            return Err(Failure::refused(tried, why));
        }
    }
    Ok(OK)
}
