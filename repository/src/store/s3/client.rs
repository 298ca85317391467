//! Speaks to the server: signs, sends, counts, and tries again as the policy says.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::address::S3Address;
use super::answer::{Nonsense, Refusal};
use super::credentials::Credentials;
use super::settings::{BucketStyle, S3Settings};
use super::sign::{self, Signed};
use crate::store::http::{Answer, Ask, Http, Silence};
use crate::store::retry::{Fault, RetryPolicy};
use crate::store::traffic::{Charge, Meter};
use crate::store::{StoreError, StoreErrorKind};

/// Errors are short; what is longer is no error of an object store.
const REFUSAL_BYTES_MAX: u64 = 64 << 10;

/// One request, but for who asks and when.
#[derive(Debug, Clone, Default)]
pub(super) struct Request<'a> {
    pub(super) method: &'static str,
    /// Key in the bucket; empty for the bucket itself.
    pub(super) key: String,
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Option<&'a [u8]>,
    /// From then on nothing of it is sent or waited for.
    pub(super) until: Option<Instant>,
}

/// Why a request failed for good.
#[derive(Debug)]
pub(super) enum Trouble {
    Refused(Refusal),
    Silent(Silence),
    Nonsense(Nonsense),
}

/// A request that failed for good, and how often it was sent.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) trouble: Trouble,
    pub(super) tries: u32,
}

impl From<Silence> for Trouble {
    fn from(silence: Silence) -> Self {
        Self::Silent(silence)
    }
}

impl Trouble {
    fn fault(&self) -> Fault {
        match self {
            Self::Refused(refusal) => refusal.fault(),
            Self::Silent(Silence::Unreachable(_)) => Fault::Unreachable,
            Self::Silent(Silence::Broken(_)) | Self::Nonsense(_) => Fault::Transient,
            Self::Silent(Silence::Impossible(_) | Silence::Untrusted(_)) => Fault::Final,
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Refused(refusal) => refusal.words(),
            Self::Silent(Silence::Unreachable(why)) => format!("it cannot be reached: {why}"),
            Self::Silent(Silence::Broken(why)) => format!("the connection broke: {why}"),
            Self::Silent(Silence::Impossible(why) | Silence::Untrusted(why)) => why.clone(),
            Self::Nonsense(why) => why.clone(),
        }
    }

    fn kind(&self) -> StoreErrorKind {
        let refusal = match self {
            Self::Refused(refusal) => refusal,
            Self::Silent(Silence::Unreachable(_)) => return StoreErrorKind::Unreachable,
            Self::Silent(Silence::Untrusted(_)) => return StoreErrorKind::Credentials,
            Self::Silent(_) | Self::Nonsense(_) => return StoreErrorKind::Server,
        };
        match (refusal.status, refusal.code.as_str()) {
            (_, "QuotaExceeded" | "XMinioStorageFull" | "EntityTooLarge") | (507, _) => {
                StoreErrorKind::NoSpace
            }
            (404, _) => StoreErrorKind::NotFound,
            (412, _) => StoreErrorKind::AlreadyExists,
            (416, _) => StoreErrorKind::Corrupt,
            (401 | 403, _) => StoreErrorKind::Credentials,
            _ if refusal.fault() == Fault::Stale => StoreErrorKind::Credentials,
            _ => StoreErrorKind::Server,
        }
    }
}

impl Failed {
    /// Whether the server's answer had this status.
    pub(super) fn has_status(&self, status: u16) -> bool {
        matches!(&self.trouble, Trouble::Refused(refusal) if refusal.status == status)
    }

    /// Whether the server's answer was this.
    pub(super) fn has_code(&self, code: &str) -> bool {
        matches!(&self.trouble, Trouble::Refused(refusal) if refusal.code == code)
    }

    /// Whether the request may have had its effect although it failed.
    pub(super) fn may_have_happened(&self) -> bool {
        !matches!(
            &self.trouble,
            Trouble::Refused(Refusal { status: 400..500, .. })
                | Trouble::Silent(
                    Silence::Unreachable(_) | Silence::Impossible(_) | Silence::Untrusted(_)
                )
        ) || self.tries > 1
    }

    pub(super) fn error(&self, action: &'static str, object: &str, location: &str) -> StoreError {
        let times = if self.tries > 1 { format!(" ({} tries)", self.tries) } else { String::new() };
        let why = format!("{}{times}", self.trouble.words());
        StoreError::new(self.trouble.kind(), action, object, location, why)
    }
}

/// A bucket at a server.
#[derive(Debug)]
pub(super) struct Client {
    http: Http,
    settings: S3Settings,
    credentials: RwLock<Credentials>,
    bucket: String,
    /// Seconds that the server's clock is ahead of ours, once it has complained.
    clock_ahead: AtomicI64,
    has_answered: AtomicBool,
    pub(super) meter: Meter,
}

impl Drop for Client {
    fn drop(&mut self) {
        let traffic = self.meter.read();
        if traffic.requests() > 0 {
            tracing::info!(
                bucket = %self.bucket, writes = traffic.writes, reads = traffic.reads,
                lists = traffic.lists, deletes = traffic.deletes, retries = traffic.retries,
                sent_bytes = traffic.sent_bytes, received_bytes = traffic.received_bytes,
                "requests to the object store"
            );
        }
    }
}

impl Client {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// Words, when credentials or certificates cannot be read.
    pub(super) fn new(address: &S3Address, settings: S3Settings) -> Result<Self, String> {
        Ok(Self {
            http: Http::new(settings.scheme == "https", settings.ca_bundle.as_deref())?,
            credentials: RwLock::new(settings.credentials.load()?),
            settings,
            bucket: address.bucket().to_owned(),
            clock_ahead: AtomicI64::new(0),
            has_answered: AtomicBool::new(false),
            meter: Meter::default(),
        })
    }

    /// The time, by the server's clock where it differs much.
    pub(super) fn now(&self) -> Timestamp {
        let ahead = SignedDuration::from_secs(self.clock_ahead.load(Ordering::Relaxed));
        Timestamp::now().saturating_add(ahead).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    pub(super) fn settings(&self) -> &S3Settings {
        &self.settings
    }

    /// Sends a request until `take` has got what it wants of a good answer.
    pub(super) fn call<T>(
        &self,
        charge: Charge,
        request: &Request<'_>,
        mut take: impl FnMut(Answer) -> Result<T, Trouble>,
    ) -> Result<T, Failed> {
        let begun = Instant::now();
        let left = || request.until.map(|until| until.saturating_duration_since(Instant::now()));
        let mut tries = 0;
        if left().is_some_and(|left| left.is_zero()) {
            let why = "there was no time left to ask".to_owned();
            return Err(Failed { trouble: Silence::Impossible(why).into(), tries });
        }
        loop {
            tries += 1;
            let trouble = match self.once(charge, request).and_then(&mut take) {
                Ok(taken) => return Ok(taken),
                Err(trouble) => trouble,
            };
            let pause = self.pause(&trouble, tries, begun.elapsed());
            let in_time = |pause: &Duration| left().is_none_or(|left| *pause < left);
            let Some(pause) = pause.filter(in_time) else {
                return Err(Failed { trouble, tries });
            };
            tracing::debug!(
                method = request.method, key = %request.key, why = %trouble.words(), tries,
                pause_ms = pause.as_millis() as u64, "a request is tried again"
            );
            self.meter.retry();
            std::thread::sleep(pause);
        }
    }

    fn pause(&self, trouble: &Trouble, tries: u32, elapsed: Duration) -> Option<Duration> {
        let policy = if self.has_answered.load(Ordering::Relaxed) {
            RetryPolicy::KNOWN_SERVER
        } else {
            RetryPolicy::NEW_SERVER
        };
        let mut luck = [0; 4];
        // Without randomness all wait equally long, which is no worse than without a policy.
        let _ = getrandom::fill(&mut luck);
        policy.pause(trouble.fault(), tries, elapsed, u32::from_le_bytes(luck))
    }

    fn once(&self, charge: Charge, request: &Request<'_>) -> Result<Answer, Trouble> {
        let ask = self.signed(request);
        let sent = request.body.map_or(0, |body| body.len() as u64);
        self.meter.request(charge, sent);
        let answer = self.http.send(&ask)?;
        self.has_answered.store(true, Ordering::Relaxed);
        let status = answer.status();
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let date = answer.header("date").map(str::to_owned);
        let region = answer.header("x-amz-bucket-region").map(str::to_owned);
        let body = answer.body(REFUSAL_BYTES_MAX).unwrap_or_default();
        let mut refusal = Refusal::read(status, &body);
        if refusal.fault() == Fault::Stale {
            self.look_anew(date.as_deref());
        }
        if let (true, Some(region)) = (matches!(status, 301 | 307 | 400), region)
            && region != self.settings.region
        {
            refusal.message = format!("the bucket is in the region {region}: set AWS_REGION");
        }
        Err(Trouble::Refused(refusal))
    }

    /// Takes the credentials and the time from where they are now.
    fn look_anew(&self, server_date: Option<&str>) {
        match self.settings.credentials.load() {
            Ok(fresh) => *self.credentials.write().unwrap_or_else(PoisonError::into_inner) = fresh,
            Err(why) => tracing::warn!(%why, "the credentials could not be read again"),
        }
        let date = server_date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok());
        if let Some(date) = date {
            let ahead = date.timestamp().as_second() - Timestamp::now().as_second();
            self.clock_ahead.store(ahead, Ordering::Relaxed);
        }
    }

    fn signed<'a>(&self, request: &Request<'a>) -> Ask<'a> {
        let settings = &self.settings;
        let (authority, path) = match settings.style {
            BucketStyle::Host => {
                let authority = format!("{}.{}", self.bucket, settings.authority);
                (authority, format!("{}/{}", settings.base_path, request.key))
            }
            BucketStyle::Path => {
                let slash = if request.key.is_empty() { "" } else { "/" };
                let bucket = format!("{}/{}", settings.base_path, self.bucket);
                (settings.authority.clone(), format!("{bucket}{slash}{}", request.key))
            }
        };
        let query: Vec<(&str, &str)> =
            request.query.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let signed = Signed {
            method: request.method,
            authority: &authority,
            path: &path,
            query: &query,
            headers: &request.headers,
            body: request.body.unwrap_or_default(),
        };
        let now = self.now();
        let credentials = self.credentials.read().unwrap_or_else(PoisonError::into_inner).clone();
        let headers = sign::headers(&signed, &credentials, &settings.region, now);
        let query = sign::query(&query);
        let mark = if query.is_empty() { "" } else { "?" };
        let url = format!("{}://{authority}{path}{mark}{query}", settings.scheme);
        Ask { method: request.method, url, headers, body: request.body, until: request.until }
    }
}
