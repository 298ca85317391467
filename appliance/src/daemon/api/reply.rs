//! What the API says when it cannot do what it is asked: always one JSON document.

use axum::Json;
use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::failure::{Failure, Nature, Status};

/// A longer text of a library's own is cut off.
const TEXT_BYTES_MAX: usize = 4096;

/// An error.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// What an operator needs to know of an error.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// What was tried.
    pub tried: String,
    /// On what: the path of the request.
    pub on: String,
    /// Why it failed.
    pub why: String,
    /// What to do next.
    pub next: Option<String>,
    /// Exit status of a command that fails like this.
    pub exit_status: u8,
}

/// A failure on its way to a client.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    failure: Failure,
}

impl Refusal {
    /// With an HTTP status that a failure does not tell.
    pub fn with(status: StatusCode, failure: Failure) -> Self {
        Self { status, failure }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let status = match (failure.nature, failure.status) {
            (Nature::Missing, _) => StatusCode::NOT_FOUND,
            (Nature::Forbidden, _) => StatusCode::FORBIDDEN,
            (_, Status::Usage) => StatusCode::BAD_REQUEST,
            (_, Status::Refused) => StatusCode::CONFLICT,
            (Nature::Transient, _) => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, failure }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(std::sync::Arc::new(self.failure));
        response
    }
}

/// Gives every error its document: ours, and those of the libraries below.
pub async fn explain(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = next.run(request).await;
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let detail = match parts.extensions.get::<std::sync::Arc<Failure>>() {
        Some(failure) => ErrorDetail {
            tried: failure.tried.clone(),
            on: path,
            why: failure.why.clone(),
            next: failure.next.clone(),
            exit_status: failure.status as u8,
        },
        None => {
            let text = to_bytes(body, TEXT_BYTES_MAX).await.unwrap_or_default();
            let mut why = String::from_utf8_lossy(&text).into_owned();
            if why.is_empty() {
                why = status.canonical_reason().unwrap_or("refused").to_lowercase();
            }
            let next = Some("see GET /openapi.json".into());
            let exit_status = Status::Usage as u8;
            ErrorDetail { tried: method.to_string(), on: path, why, next, exit_status }
        }
    };
    parts.headers.remove(header::CONTENT_TYPE);
    parts.headers.remove(header::CONTENT_LENGTH);
    (parts.status, parts.headers, Json(ErrorBody { error: detail })).into_response()
}

/// The JSON body of a request; none at all is an empty object.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let read = Bytes::from_request(request, state).await;
        let bytes = read.map_err(IntoResponse::into_response)?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        let parsed = serde_json::from_slice(text).map_err(|e| {
            let failure = Failure::usage("read the body of the request", e);
            Refusal::from(failure.next("see GET /openapi.json")).into_response()
        });
        parsed.map(Self)
    }
}
