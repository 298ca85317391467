//! HTTP to one server: a pool of connections, time limits, the host's own certificates. It knows
//! nothing of what is said.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, Method, Request, Response};
use ureq::tls::{PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};
use ureq::{Agent, AsSendBody, Proxy};

/// A server that is there answers a connection within this.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// The longest silence in a transfer: a connection that a firewall has forgotten is given up early
/// enough for other tries.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// The longest wait for the answer to a POST. With it a server does something to what it has already:
/// completing a large upload takes some of them half a minute.
const WORK_MAX: Duration = Duration::from_secs(60);
/// Idle connections kept: those of the uploads, the readers and the heartbeat of one process.
const IDLE_MAX: usize = 16;
/// Servers close idle connections, many after 20 s or more; one that is closed costs a retry.
const IDLE_AGE_MAX: Duration = Duration::from_secs(15);

/// Names the file with the certificates that servers are checked against.
pub(crate) const CA_VARIABLE: &str = "ICECORE_CA_FILE";

/// Where distributions keep the certificates of the authorities that they trust.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Connections to servers.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    agent: Agent,
}

/// What is asked.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) method: &'static str,
    pub(crate) url: String,
    pub(crate) headers: Vec<(&'static str, String)>,
    /// None for a request that has none, like GET.
    pub(crate) body: Option<&'a [u8]>,
    /// When the whole of it is given up.
    pub(crate) until: Option<Instant>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Silence {
    /// No connection was made: the request has had no effect.
    Unreachable(String),
    /// The connection broke, or took too long: the request may have had its effect.
    Broken(String),
    /// The request or the set-up is wrong: trying again is useless.
    Impossible(String),
    /// The server's certificate was refused: nothing was sent.
    Untrusted(String),
}

/// An answer, its body not yet read.
pub(crate) struct Answer {
    response: Response<ureq::Body>,
}

impl Http {
    /// For servers whose certificates `bundle` vouches for, or the host's own list of authorities.
    ///
    /// # Errors
    /// Words, when the certificates cannot be read.
    pub(crate) fn new(uses_tls: bool, bundle: Option<&Path>) -> Result<Self, String> {
        let roots = if uses_tls { read_bundle(bundle)? } else { Vec::new() };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(provider)
            .root_certs(RootCerts::from(roots))
            .build();
        // In clear only this host may be asked, or one that the user has named so: no proxy.
        let proxy = uses_tls.then(Proxy::try_from_env).flatten();
        let config = Agent::config_builder()
            .proxy(proxy)
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("icecore/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_MAX))
            .timeout_per_read(Some(SILENCE_MAX))
            .timeout_per_write(Some(SILENCE_MAX))
            .max_idle_connections(IDLE_MAX)
            .max_idle_connections_per_host(IDLE_MAX)
            .max_idle_age(IDLE_AGE_MAX)
            .build();
        Ok(Self { agent: config.new_agent() })
    }

    /// Asks once.
    pub(crate) fn send(&self, ask: &Ask<'_>) -> Result<Answer, Silence> {
        let mut request = Request::builder().method(ask.method).uri(&ask.url);
        for (name, value) in &ask.headers {
            request = request.header(*name, value);
        }
        let impossible = |error: ureq::http::Error| Silence::Impossible(error.to_string());
        let answered = match ask.body {
            Some(body) => self.run(request.body(body).map_err(impossible)?, ask.until),
            None => self.run(request.body(()).map_err(impossible)?, ask.until),
        };
        answered.map(|response| Answer { response }).map_err(Silence::from)
    }

    fn run(
        &self,
        request: Request<impl AsSendBody>,
        until: Option<Instant>,
    ) -> Result<Response<ureq::Body>, ureq::Error> {
        let wait = if request.method() == Method::POST { WORK_MAX } else { SILENCE_MAX };
        let whole = until.map(|until| until.saturating_duration_since(Instant::now()));
        let configured = self.agent.configure_request(request);
        let timed = configured.timeout_recv_response(Some(wait)).timeout_global(whole);
        self.agent.run(timed.build())
    }
}

impl From<ureq::Error> for Silence {
    fn from(error: ureq::Error) -> Self {
        use ureq::Timeout::{Connect, Resolve};
        let refused = |error: &std::io::Error| {
            use std::io::ErrorKind as Kind;
            matches!(
                error.kind(),
                Kind::ConnectionRefused | Kind::HostUnreachable | Kind::NetworkUnreachable
            )
        };
        let text = error.to_string();
        match error {
            ureq::Error::Io(error) if is_of_certificate(&error) => {
                Self::Untrusted(format!("{error}{}", certificate_hint(&error)))
            }
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => Self::Unreachable(text),
            ureq::Error::Timeout(Connect | Resolve) => Self::Unreachable(text),
            ureq::Error::Io(error) if refused(&error) => Self::Unreachable(text),
            ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => {
                Self::Broken(text)
            }
            other => Self::Impossible(other.to_string()),
        }
    }
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let headers: &HeaderMap = self.response.headers();
        headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The length that the server announced.
    pub(crate) fn length(&self) -> Option<u64> {
        self.header("content-length").and_then(|text| text.parse().ok())
    }

    /// Fills `buffer` from the body.
    pub(crate) fn fill(mut self, buffer: &mut [u8]) -> Result<(), Silence> {
        let reader = self.response.body_mut().as_reader();
        { reader }.read_exact(buffer).map_err(broken)
    }

    /// The whole body, of which there may be at most `bytes_max`.
    pub(crate) fn body(mut self, bytes_max: u64) -> Result<Vec<u8>, Silence> {
        let mut body = Vec::new();
        let reader = self.response.body_mut().as_reader();
        reader.take(bytes_max + 1).read_to_end(&mut body).map_err(broken)?;
        if body.len() as u64 > bytes_max {
            return Err(Silence::Broken(format!("the answer has more than {bytes_max} bytes")));
        }
        Ok(body)
    }
}

fn is_of_certificate(error: &std::io::Error) -> bool {
    let source = error.get_ref().and_then(|source| source.downcast_ref::<rustls::Error>());
    matches!(source, Some(rustls::Error::InvalidCertificate(_)))
}

/// Help for what `openssl req -x509` makes unless it is told otherwise.
fn certificate_hint(error: &std::io::Error) -> &'static str {
    match error.to_string().contains("CaUsedAsEndEntity") {
        true => {
            " (an authority's own certificate is no server's: make one with \
                 basicConstraints=critical,CA:FALSE)"
        }
        false => "",
    }
}

fn broken(error: std::io::Error) -> Silence {
    Silence::Broken(error.to_string())
}

fn read_bundle(named: Option<&Path>) -> Result<Vec<ureq::tls::Certificate<'static>>, String> {
    let found = || SYSTEM_BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file());
    let Some(path) = named.map(Path::to_path_buf).or_else(found) else {
        return Err("this host has no list of certificate authorities; install its package \
                    ca-certificates, or name a file of certificates"
            .to_owned());
    };
    let pem = std::fs::read(&path).map_err(|error| {
        format!("the certificates in {} cannot be read: {error}", path.display())
    })?;
    let items = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<_> = items.collect();
    if certificates.is_empty() {
        return Err(format!("there is no certificate in {}", path.display()));
    }
    Ok(certificates)
}
