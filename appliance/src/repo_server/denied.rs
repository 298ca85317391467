//! Why a client does not get what it asked for, and how it is told.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use icecore_repository::store::served::{ERROR_HEADER, kind_name};
use icecore_repository::store::{StoreError, StoreErrorKind};

/// A refusal on its way to a client.
#[derive(Debug)]
pub struct Denied {
    status: StatusCode,
    kind: StoreErrorKind,
    why: String,
}

impl Denied {
    fn new(status: StatusCode, kind: StoreErrorKind, why: impl Into<String>) -> Self {
        Self { status, kind, why: why.into() }
    }

    /// No token, or none that is known here.
    pub fn unknown_token() -> Self {
        let why = "the token is missing or unknown, or it is not for this repository";
        Self::new(StatusCode::UNAUTHORIZED, StoreErrorKind::Credentials, why)
    }

    /// A known client may not do that.
    pub fn forbidden(why: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, StoreErrorKind::Permission, why)
    }

    /// What was asked makes no sense.
    pub fn nonsense(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, StoreErrorKind::Server, why)
    }

    /// There is no such repository.
    pub fn no_repository() -> Self {
        let why = "there is no repository of this name";
        Self::new(StatusCode::NOT_FOUND, StoreErrorKind::NotFound, why)
    }

    /// The server does not know that upload (any more).
    pub fn no_upload() -> Self {
        let why = "the server does not know this upload: it was restarted, or the upload was idle \
                   for too long";
        Self::new(StatusCode::GONE, StoreErrorKind::Server, why)
    }

    /// A read beyond the end of an object.
    pub fn beyond_end(bytes: u64) -> Self {
        let why = format!("it ends at byte {bytes}");
        Self::new(StatusCode::RANGE_NOT_SATISFIABLE, StoreErrorKind::Corrupt, why)
    }

    /// The repository may not take so much.
    pub fn over_quota(quota: u64) -> Self {
        let why = format!(
            "the quota of this repository on the server is {} and would be exceeded",
            crate::names::human_bytes(quota)
        );
        Self::new(StatusCode::INSUFFICIENT_STORAGE, StoreErrorKind::NoSpace, why)
    }

    /// Too much at once.
    pub fn busy(why: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, StoreErrorKind::Server, why)
    }

    /// A body that came too slowly or broke off.
    pub fn broken(why: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, StoreErrorKind::Server, why)
    }

    /// A body of an unknown length, or a longer one than is taken.
    pub fn wrong_length(why: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, StoreErrorKind::Server, why)
    }

    /// The server itself failed.
    pub fn internal(why: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, StoreErrorKind::Server, why)
    }
}

impl From<StoreError> for Denied {
    fn from(error: StoreError) -> Self {
        let status = match error.kind() {
            StoreErrorKind::NotFound => StatusCode::NOT_FOUND,
            StoreErrorKind::AlreadyExists => StatusCode::CONFLICT,
            StoreErrorKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            StoreErrorKind::ReadOnly => StatusCode::FORBIDDEN,
            // The server's own permissions, not the client's.
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        // Its text names paths of the server, which are nothing to its clients.
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!("{error}");
        }
        Self::new(status, error.kind(), error.reason())
    }
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        let kind = HeaderValue::from_static(kind_name(self.kind));
        let mut response = (self.status, self.why).into_response();
        response.headers_mut().insert(HeaderName::from_static(ERROR_HEADER), kind);
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}
