//! A job's progress as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::stream::{self, Stream};

use super::reply::{ErrorBody, Refusal};
use crate::daemon::supervisor::Supervisor;
use crate::job_view::{self, JobView, LOOK_INTERVAL};

/// Proxies end connections on which nothing is heard for a minute.
const ALIVE_INTERVAL: Duration = Duration::from_secs(15);

struct Watched {
    app: Arc<Supervisor>,
    id: String,
    last: Option<String>,
    over: bool,
}

/// One event `job` with the job's document at each change; the last one when it is over.
#[utoipa::path(
    get, path = "/v1/jobs/{id}/events", tag = "jobs", params(("id" = String, Path)),
    responses(
        (status = 200, body = String, content_type = "text/event-stream"),
        (status = "4XX", body = ErrorBody)
    )
)]
pub async fn events(
    State(app): State<Arc<Supervisor>>,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let tried = format!("follow job {id:?}");
    job_view::find(&app.settings().context.state, &id, &tried)?;
    let watched = Watched { app, id, last: None, over: false };
    let changes = stream::unfold(watched, |watched| async move { watched.next().await });
    Ok(Sse::new(changes).keep_alive(KeepAlive::new().interval(ALIVE_INTERVAL)))
}

impl Watched {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        while !self.over {
            let view = self.look()?;
            let text = serde_json::to_string(&view).ok()?;
            self.over = view.is_over();
            if self.last.as_ref() != Some(&text) {
                let event = Event::default().event("job").data(&text);
                self.last = Some(text);
                return Some((Ok(event), self));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        None
    }

    /// The stream ends with a job whose record is forgotten.
    fn look(&self) -> Option<JobView> {
        job_view::find(&self.app.settings().context.state, &self.id, "follow a job").ok()
    }
}
