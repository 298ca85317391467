//! `icecore repo serve`: repositories of this machine for other hosts, over HTTPS.
//!
//! It is the directory store behind a door. Who comes in is told by a token; what he may do to an
//! object is told by `icecore_repository::rights`, by the object's name. The server has no key of any
//! repository and understands no object.

mod denied;
mod hosted;
mod lively;
mod routes;
pub mod tokens;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sd_notify::NotifyState;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::failure::{Failure, Outcome};
use denied::Denied;
use hosted::{Hosted, UPLOAD_IDLE_MAX};
use lively::Lively;
use tokens::{Client, Watched};

/// More connections than this wait until one ends: a host has a handful.
const CONNECTIONS_MAX: usize = 512;
const CONNECTIONS: u32 = CONNECTIONS_MAX as u32;
/// A client that has not sent its request's head by then is none; so long may TLS take, too.
const HEAD_WAIT: Duration = Duration::from_secs(20);
/// A connection on which nothing moves. Longer than an fsync takes, and than clients keep idle ones.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// What is under way when the server is told to end may take so long.
const END_WAIT: Duration = Duration::from_secs(20);
/// After a failed accept (no descriptors left) it is tried again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often uploads are looked at that nobody goes on with.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// How a server is set up.
pub struct Settings {
    pub listen: SocketAddr,
    pub directory: PathBuf,
    pub tokens: PathBuf,
    /// What a repository may take for which the tokens' file says nothing.
    pub quota: Option<u64>,
    /// None on a loopback address only.
    pub tls: Option<TlsAcceptor>,
}

/// What all connections share.
#[derive(Debug)]
pub struct Server {
    directory: PathBuf,
    tokens: Watched,
    quota: Option<u64>,
    repositories: Mutex<HashMap<String, Arc<Hosted>>>,
}

impl Server {
    fn bearer(&self, token: &str, repository: &str) -> Option<Client> {
        self.tokens.now().bearer(token, repository)
    }

    fn quota(&self, repository: &str) -> Option<u64> {
        self.tokens.now().quota(repository).or(self.quota)
    }

    /// A repository that is there. Opened once, under the lock: what it uses is counted once.
    fn repository(&self, name: &str) -> Result<Arc<Hosted>, Denied> {
        self.hosted(name, Hosted::open)
    }

    /// A repository, made if it is not there.
    fn make(&self, name: &str) -> Result<Arc<Hosted>, Denied> {
        self.hosted(name, Hosted::make)
    }

    fn hosted(
        &self,
        name: &str,
        get: impl FnOnce(&std::path::Path) -> Result<Hosted, Denied>,
    ) -> Result<Arc<Hosted>, Denied> {
        let mut known = self.repositories.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hosted) = known.get(name) {
            return Ok(Arc::clone(hosted));
        }
        let hosted = Arc::new(get(&self.directory.join(name))?);
        known.insert(name.to_owned(), Arc::clone(&hosted));
        Ok(hosted)
    }

    fn forget_idle_uploads(&self, patience: Duration) {
        let known = self.repositories.lock().unwrap_or_else(PoisonError::into_inner).clone();
        known.values().for_each(|hosted| hosted.forget_idle(patience));
    }
}

/// Serves until it is told to end.
pub async fn serve(settings: Settings) -> Outcome<()> {
    let tried = format!("serve repositories on {}", settings.listen);
    let failed = |e: std::io::Error| Failure::failed(&tried, e);
    let mut end = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    if !settings.directory.is_dir() {
        let why = format!("{} is no directory", settings.directory.display());
        return Err(Failure::missing(tried, why).next("make it, owned by the user of the server"));
    }
    let server = Arc::new(Server {
        directory: settings.directory,
        tokens: Watched::open(settings.tokens)?,
        quota: settings.quota,
        repositories: Mutex::default(),
    });
    let listener = TcpListener::bind(settings.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let tls = settings.tls.is_some();
    tracing::info!(%address, tls, directory = %server.directory.display(), "serving repositories");
    let (stop, stopping) = watch::channel(());
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let door = Door { tls: settings.tls, server: Arc::clone(&server), stopping, room };
    let accepting = tokio::spawn(door.clone().serve(listener));
    let sweeping = tokio::spawn(sweep(Arc::clone(&server)));
    tell(NotifyState::Ready);
    tokio::select! {
        _ = end.recv() => {}
        _ = interrupt.recv() => {}
    }
    tell(NotifyState::Stopping);
    accepting.abort();
    sweeping.abort();
    // Requests under way are answered, idle connections end.
    let _ = stop.send(());
    let ended = tokio::time::timeout(END_WAIT, door.room.acquire_many(CONNECTIONS)).await;
    if ended.is_err() {
        tracing::warn!("some requests were cut off");
    }
    // Their temporary files go with them.
    let forget = move || server.forget_idle_uploads(Duration::ZERO);
    let _ = tokio::task::spawn_blocking(forget).await;
    Ok(())
}

async fn sweep(server: Arc<Server>) {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let server = Arc::clone(&server);
        let forget = move || server.forget_idle_uploads(UPLOAD_IDLE_MAX);
        let _ = tokio::task::spawn_blocking(forget).await;
    }
}

/// What it takes to let somebody in.
#[derive(Clone)]
struct Door {
    tls: Option<TlsAcceptor>,
    server: Arc<Server>,
    stopping: watch::Receiver<()>,
    room: Arc<Semaphore>,
}

impl Door {
    async fn serve(self, listener: TcpListener) {
        loop {
            let Ok(permit) = Arc::clone(&self.room).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, from)) => {
                    let door = self.clone();
                    tokio::spawn(async move {
                        door.let_in(stream, from).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!("a connection was not accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn let_in(self, stream: TcpStream, from: SocketAddr) {
        // Small answers are waited for: they do not wait for more to say.
        let _ = stream.set_nodelay(true);
        let Some(tls) = self.tls.clone() else {
            return self.converse(Lively::new(stream, SILENCE_MAX), from).await;
        };
        match tokio::time::timeout(HEAD_WAIT, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.converse(Lively::new(stream, SILENCE_MAX), from).await,
            Ok(Err(error)) => tracing::info!(%from, "no TLS: {error}"),
            Err(_) => tracing::info!(%from, "no TLS in time"),
        }
    }

    async fn converse(
        mut self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        from: SocketAddr,
    ) {
        let service = TowerToHyperService::new(routes::router(self.server));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WAIT)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            _ = self.stopping.changed() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%from, "a connection ended: {error}");
        }
    }
}

/// Tells systemd, where it has asked to be told.
fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!("systemd was not told: {error}");
    }
}
