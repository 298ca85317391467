//! The API: HTTP and JSON on a unix socket and, when configured, on TCP with TLS.

pub mod events;
pub mod listen;
pub mod reply;
pub mod routes;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::access::Caller;
use super::supervisor::Supervisor;
use crate::failure::Failure;
use reply::Refusal;
pub use routes::Health;

/// The largest request is a VM with a thousand disks.
const BODY_BYTES_MAX: usize = 256 << 10;
/// Who may not come in may still ask whether anybody is there.
const OPEN_PATH: &str = "/healthz";

/// Where a request comes from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// A peer of the unix socket: nobody, where its credentials say nothing.
    Unix(Option<Caller>),
    /// TCP: a token tells.
    Tcp,
}

#[derive(OpenApi)]
#[openapi(info(
    title = "Icecore",
    description = "Point-in-time backup and rollback of QEMU/KVM guests. Whatever takes long \
                   answers 202 with a job's id."
))]
struct Document;

fn documented() -> (Router<Arc<Supervisor>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(routes::back_up))
        .routes(routes!(routes::roll_back))
        .routes(routes!(routes::restore))
        .routes(routes!(routes::check))
        .routes(routes!(routes::gc))
        .routes(routes!(routes::copy))
        .routes(routes!(routes::jobs))
        .routes(routes!(routes::job))
        .routes(routes!(events::events))
        .routes(routes!(routes::cancel))
        .routes(routes!(routes::list_points))
        .routes(routes!(routes::vms))
        .routes(routes!(routes::healthz))
        .routes(routes!(routes::metrics))
        .split_for_parts()
}

/// All routes.
pub fn router(app: Arc<Supervisor>) -> Router {
    let (router, document) = documented();
    let document = Json(document);
    router
        .route("/openapi.json", get(move || std::future::ready(document.clone())))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), authenticate))
        .layer(middleware::from_fn(reply::explain))
        .with_state(app)
}

/// Lets in whom the origin or the token tells.
async fn authenticate(
    State(app): State<Arc<Supervisor>>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = match request.extensions().get::<Origin>() {
        Some(Origin::Unix(caller)) => caller.clone(),
        Some(Origin::Tcp) => token(&request).and_then(|token| app.settings().access.bearer(token)),
        None => None,
    };
    match caller {
        Some(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        None if request.uri().path() == OPEN_PATH => next.run(request).await,
        None => unknown(request.extensions().get::<Origin>()),
    }
}

fn token(request: &Request) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ").map(str::trim)
}

fn unknown(origin: Option<&Origin>) -> Response {
    let tried = "use the API";
    if let Some(Origin::Unix(_)) = origin {
        let failure = Failure::forbidden(tried, "your user may not use this socket")
            .next("be root, or a member of the group that [api] names");
        return Refusal::from(failure).into_response();
    }
    let failure = Failure::refused(tried, "the token is missing or unknown")
        .next("send 'Authorization: Bearer TOKEN' with a token of [api.tokens]");
    let mut response = Refusal::with(StatusCode::UNAUTHORIZED, failure).into_response();
    let challenge = HeaderValue::from_static("Bearer");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}
