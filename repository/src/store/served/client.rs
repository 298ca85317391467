//! Requests to a repository server, and which of them are sent again.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::de::DeserializeOwned;

use super::{BYTES_HEADER, ERROR_HEADER, ServerAddress, kind_of, object_path};
use crate::store::http::{Answer, Ask, CA_VARIABLE, Http, Silence};
use crate::store::retry::{Fault, RetryPolicy};
use crate::store::{ObjectName, StoreError, StoreErrorKind};

/// Where the token is, where the address does not say it.
const TOKEN_VARIABLE: &str = "ICECORE_REPO_TOKEN_FILE";
/// A longer file holds something else.
const TOKEN_BYTES_MAX: u64 = 4096;
/// The longest answer to a listing: ten thousand names of the longest kind.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// What a server says of an error, at most.
const REASON_BYTES_MAX: u64 = 4096;
/// Bytes of an object that are compared at once.
const COMPARED_BYTES: u64 = 4 << 20;

/// A connection to a server, shared by all who use its store.
#[derive(Clone)]
pub(super) struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    http: Http,
    base: String,
    location: String,
    authorization: String,
    /// Whether the server has ever answered.
    known: AtomicBool,
}

impl Debug for Client {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("location", &self.shared.location).finish_non_exhaustive()
    }
}

/// What goes along with a request.
#[derive(Debug)]
pub(super) enum Body<'a> {
    /// GET, HEAD, DELETE.
    None,
    /// Nothing, where something could go along.
    Empty,
    Bytes(&'a [u8]),
    /// A document, written already.
    Json(&'a [u8]),
}

/// A request that failed for good.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) error: StoreError,
    /// Whether one of its tries may have had its effect all the same.
    pub(super) may_have_worked: bool,
}

/// One try that failed.
enum Attempt {
    Refused(StoreError),
    Silent(Fault, String),
}

impl Client {
    pub(super) fn new(address: &ServerAddress) -> Result<Self, StoreError> {
        let location = address.to_string();
        let failed = |reason: String| {
            let kind = StoreErrorKind::Credentials;
            StoreError::new(kind, "reach", "the repository", &location, reason)
        };
        let variable =
            |name| std::env::var_os(name).filter(|file| !file.is_empty()).map(PathBuf::from);
        let file = address.token_file.clone().or_else(|| variable(TOKEN_VARIABLE));
        let token = match file {
            Some(file) => read_token(&file).map_err(|why| {
                failed(format!("the token in {} cannot be used: {why}", file.display()))
            })?,
            None => {
                let how = format!("no token: name its file with {TOKEN_VARIABLE} or token_file");
                return Err(failed(how));
            }
        };
        let authorities = address.ca_file.clone().or_else(|| variable(CA_VARIABLE));
        let http = Http::new(address.uses_tls(), authorities.as_deref()).map_err(failed)?;
        let (base, authorization) = (address.base(), format!("Bearer {token}"));
        let known = AtomicBool::new(false);
        Ok(Self { shared: Arc::new(Shared { http, base, location, authorization, known }) })
    }

    pub(super) fn location(&self) -> &str {
        &self.shared.location
    }

    pub(super) fn error(
        &self,
        kind: StoreErrorKind,
        action: &'static str,
        object: &str,
        reason: impl Into<String>,
    ) -> StoreError {
        StoreError::new(kind, action, object, &self.shared.location, reason)
    }

    /// Asks for at most `bytes_max`, again and again where that may help; every request of this
    /// protocol may be repeated.
    pub(super) fn ask(
        &self,
        action: &'static str,
        object: &str,
        method: &'static str,
        path: &str,
        bytes_max: u64,
    ) -> Result<Vec<u8>, StoreError> {
        let body = if method == "POST" { Body::Empty } else { Body::None };
        let asked = self.repeat(action, object, || {
            let answer = self.send(action, object, method, path, &body, None)?;
            if let Some(bytes) = answer.length().filter(|bytes| *bytes > bytes_max) {
                let reason = format!("it has {bytes} bytes where at most {bytes_max} are possible");
                let kind = StoreErrorKind::Corrupt;
                return Err(Attempt::Refused(self.error(kind, action, object, reason)));
            }
            Ok(answer.body(bytes_max)?)
        });
        asked.map_err(|failed| failed.error)
    }

    /// As [`ask`](Self::ask), for a document.
    pub(super) fn ask_document<T: DeserializeOwned>(
        &self,
        action: &'static str,
        object: &str,
        method: &'static str,
        path: &str,
    ) -> Result<T, StoreError> {
        let body = self.ask(action, object, method, path, DOCUMENT_BYTES_MAX)?;
        serde_json::from_slice(&body).map_err(|error| {
            let reason = format!("the answer is not one of a repository server: {error}");
            self.error(StoreErrorKind::Io, action, object, reason)
        })
    }

    /// As [`ask`](Self::ask), for what has no answer but success.
    pub(super) fn tell(
        &self,
        action: &'static str,
        object: &str,
        method: &'static str,
        path: &str,
        body: Body<'_>,
    ) -> Result<(), StoreError> {
        self.try_tell(action, object, method, path, body).map_err(|failed| failed.error)
    }

    /// As [`tell`](Self::tell), for who can do something about an outcome that is not known.
    pub(super) fn try_tell(
        &self,
        action: &'static str,
        object: &str,
        method: &'static str,
        path: &str,
        body: Body<'_>,
    ) -> Result<(), Failed> {
        self.repeat(action, object, || {
            // Read to its end, so that the connection can be used again.
            let answer = self.send(action, object, method, path, &body, None)?;
            answer.body(REASON_BYTES_MAX).map(drop).map_err(Attempt::from)
        })
    }

    /// Says something once, whether it is heard or not.
    pub(super) fn mention(&self, method: &'static str, path: &str) {
        let url = format!("{}{path}", self.shared.base);
        let headers = vec![("authorization", self.shared.authorization.clone())];
        if let Ok(answer) =
            self.shared.http.send(&Ask { method, url, headers, body: None, until: None })
        {
            let _ = answer.body(REASON_BYTES_MAX);
        }
    }

    pub(super) fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        let (action, object) = ("look at", name.as_str());
        let path = object_path(name);
        let answered = self.repeat(action, object, || {
            let answer = self.send(action, object, "HEAD", &path, &Body::None, None)?;
            Ok(answer.header(BYTES_HEADER).and_then(|bytes| bytes.parse().ok()))
        });
        answered.map_err(|failed| failed.error)?.ok_or_else(|| {
            let reason = "the answer is not one of an Icecore repository server";
            self.error(StoreErrorKind::Io, action, object, reason)
        })
    }

    /// Fills a buffer from byte `offset` of an object on.
    pub(super) fn read_into(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        let (action, object, path) = ("read", name.as_str(), object_path(name));
        let last = offset.saturating_add(buffer.len() as u64 - 1);
        let read = self.repeat(action, object, || {
            let range = Some(format!("bytes={offset}-{last}"));
            let answer = self.send(action, object, "GET", &path, &Body::None, range)?;
            if answer.status() != 206 || answer.length() != Some(buffer.len() as u64) {
                let reason = "the server's answer is not the range that was asked for";
                let kind = StoreErrorKind::Io;
                return Err(Attempt::Refused(self.error(kind, action, object, reason)));
            }
            answer.fill(buffer).map_err(Attempt::from)
        });
        read.map_err(|failed| failed.error)
    }

    /// Whether an object has just these bytes.
    pub(super) fn holds(
        &self,
        name: &ObjectName,
        bytes: u64,
        hash: &blake3::Hash,
    ) -> Result<bool, StoreError> {
        if self.len(name)? != bytes {
            return Ok(false);
        }
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < bytes {
            let piece = (bytes - at).min(COMPARED_BYTES);
            let mut content = vec![0; usize::try_from(piece).unwrap_or_default()];
            self.read_into(name, at, &mut content)?;
            hasher.update(&content);
            at += piece;
        }
        Ok(hasher.finalize() == *hash)
    }

    fn repeat<T>(
        &self,
        action: &'static str,
        object: &str,
        mut attempt: impl FnMut() -> Result<T, Attempt>,
    ) -> Result<T, Failed> {
        let begun = Instant::now();
        let mut may_have_worked = false;
        for tries in 1.. {
            let (fault, reason) = match attempt() {
                Ok(answer) => return Ok(answer),
                Err(Attempt::Refused(error)) => return Err(Failed { error, may_have_worked }),
                Err(Attempt::Silent(fault, reason)) => (fault, reason),
            };
            may_have_worked |= fault == Fault::Transient;
            let known = self.shared.known.load(Ordering::Relaxed);
            let policy = if known { RetryPolicy::KNOWN_SERVER } else { RetryPolicy::NEW_SERVER };
            let mut luck = [0; 4];
            // Without randomness the pauses are only less spread.
            let _ = getrandom::fill(&mut luck);
            let luck = u32::from_le_bytes(luck);
            let Some(pause) = policy.pause(fault, tries, begun.elapsed(), luck) else {
                let kind = match fault {
                    Fault::Unreachable => StoreErrorKind::Unreachable,
                    _ => StoreErrorKind::Server,
                };
                let error = self.error(kind, action, object, reason);
                return Err(Failed { error, may_have_worked });
            };
            tracing::debug!(action, object, tries, "trying again: {reason}");
            std::thread::sleep(pause);
        }
        let error = self.error(StoreErrorKind::Server, action, object, "tried too often");
        Err(Failed { error, may_have_worked })
    }

    fn send(
        &self,
        action: &'static str,
        object: &str,
        method: &'static str,
        path: &str,
        body: &Body<'_>,
        range: Option<String>,
    ) -> Result<Answer, Attempt> {
        let refused =
            |kind, reason: String| Attempt::Refused(self.error(kind, action, object, reason));
        let mut headers = vec![("authorization", self.shared.authorization.clone())];
        headers.extend(range.map(|range| ("range", range)));
        let body = match body {
            Body::None => None,
            Body::Empty => Some(&[][..]),
            Body::Bytes(bytes) => Some(*bytes),
            Body::Json(document) => {
                headers.push(("content-type", "application/json".to_owned()));
                Some(*document)
            }
        };
        let url = format!("{}{path}", self.shared.base);
        let answer = match self.shared.http.send(&Ask { method, url, headers, body, until: None }) {
            Err(Silence::Untrusted(why)) => return Err(refused(StoreErrorKind::Credentials, why)),
            other => other?,
        };
        self.shared.known.store(true, Ordering::Relaxed);
        let status = answer.status();
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let kind = answer.header(ERROR_HEADER).and_then(kind_of);
        let reason = answer.body(REASON_BYTES_MAX).unwrap_or_default();
        let mut reason: String = String::from_utf8_lossy(&reason).escape_debug().collect();
        if reason.is_empty() {
            // The answer to HEAD has no body.
            reason = format!("the server answers with status {status}");
        }
        match (status, kind) {
            // Too much at once, or a proxy that does not reach its server just now.
            (429 | 503, _) => Err(Attempt::Silent(Fault::Busy, format!("{status}: {reason}"))),
            (408 | 502 | 504, _) => {
                Err(Attempt::Silent(Fault::Transient, format!("{status}: {reason}")))
            }
            (_, Some(kind)) => Err(refused(kind, reason)),
            // Without our header it is not our server that says so: least of all that nothing is
            // there.
            (status, None) => Err(refused(
                StoreErrorKind::Io,
                format!("HTTP status {status}, and not from an Icecore repository server"),
            )),
        }
    }
}

impl From<Silence> for Attempt {
    fn from(silence: Silence) -> Self {
        match silence {
            Silence::Unreachable(why) => Self::Silent(Fault::Unreachable, why),
            Silence::Broken(why) => Self::Silent(Fault::Transient, why),
            Silence::Impossible(why) | Silence::Untrusted(why) => Self::Silent(Fault::Final, why),
        }
    }
}

/// Reads a token from a file that only its owner may read.
fn read_token(path: &Path) -> Result<String, String> {
    use std::os::unix::fs::MetadataExt as _;
    let about = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if about.mode() & 0o077 != 0 {
        return Err("others than its owner may read it: chmod 600".to_owned());
    }
    if about.len() > TOKEN_BYTES_MAX {
        return Err("it is too long for a token".to_owned());
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let token = text.trim();
    if token.is_empty() || !token.chars().all(|c| c.is_ascii_graphic()) {
        return Err("it is no token".to_owned());
    }
    Ok(token.to_owned())
}
