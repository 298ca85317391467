//! A small NBD server over the trait [`Export`]: for push receivers, for serving points, for tests.
//!
//! It promises an answer to each request within [`ServerOptions::reply_deadline`]: whatever an
//! export has not done by then is answered with an error. A client such as QEMU waits for replies
//! with its guest's locks held, so a slow receiver has to fail a copy and never delay it.

mod connection;
mod export;
pub(crate) mod negotiation;
pub(crate) mod replies;
pub(crate) mod requests;
mod transmission;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, tcp, unix};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

pub use export::{Access, Export, Features, MemoryExport, ZeroMode};

use crate::export_info::Dialect;
use crate::proto::PAYLOAD_BYTES_MAX;

/// Unit in which request memory is counted: also what a request without payload costs.
const BUDGET_UNIT_BYTES: u64 = 4096;
/// Pause after a failed accept (out of file descriptors, mostly), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of a server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The newest form of replies that is offered.
    pub dialect_max: Dialect,
    /// How long a client may take for its handshake.
    pub handshake_deadline: Duration,
    /// How long an answer may take, from the request's last byte to the reply's first.
    pub reply_deadline: Duration,
    /// How long a client may leave a reply unread before it is thrown out.
    pub unread_deadline: Duration,
    /// Memory for payloads of all connections together, bytes; at least 32 MiB.
    pub budget_bytes: u64,
    /// Most clients at once; more wait in the socket's queue.
    pub connections_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            dialect_max: Dialect::Extended,
            handshake_deadline: Duration::from_secs(10),
            reply_deadline: Duration::from_secs(2),
            unread_deadline: Duration::from_secs(60),
            budget_bytes: 2 * u64::from(PAYLOAD_BYTES_MAX),
            connections_max: 16,
        }
    }
}

/// An export under its name.
#[derive(Clone)]
struct Named {
    name: String,
    features: Features,
    contexts: Vec<String>,
    export: Arc<dyn Export>,
}

struct Shared {
    exports: Vec<Named>,
    options: ServerOptions,
    budget: Arc<Semaphore>,
    budget_units: u32,
    connected: AtomicUsize,
}

/// A server with its exports. Cloning shares it.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.shared.exports.iter().map(|e| e.name.as_str()).collect();
        f.debug_struct("Server").field("exports", &names).finish_non_exhaustive()
    }
}

impl Server {
    /// A server of named exports. A client that names none gets the only one.
    pub fn new(exports: Vec<(String, Arc<dyn Export>)>, options: ServerOptions) -> Server {
        let named = |(name, export): (String, Arc<dyn Export>)| Named {
            name,
            features: export.features(),
            contexts: export.contexts(),
            export,
        };
        let least = u64::from(PAYLOAD_BYTES_MAX);
        let units = options.budget_bytes.max(least).div_ceil(BUDGET_UNIT_BYTES);
        let budget_units = u32::try_from(units).unwrap_or(u32::MAX).min(1 << 28);
        Server {
            shared: Arc::new(Shared {
                exports: exports.into_iter().map(named).collect(),
                options,
                budget: Arc::new(Semaphore::new(budget_units as usize)),
                budget_units,
                connected: AtomicUsize::new(0),
            }),
        }
    }

    /// Listens on a new unix socket with these permission bits; it is removed at the end.
    /// Fails when something exists at the path.
    pub fn listen_unix(&self, path: &Path, mode: u32) -> io::Result<Listening> {
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        Ok(self.listen(Listener::Unix(listener), None, Some(path.to_owned())))
    }

    /// Listens on a TCP address; port 0 lets the kernel choose.
    pub async fn listen_tcp(&self, address: SocketAddr) -> io::Result<Listening> {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        Ok(self.listen(Listener::Tcp(listener), Some(local), None))
    }

    /// Serves one connected client to its end.
    pub async fn serve_stream(&self, stream: UnixStream) -> io::Result<()> {
        let (rx, tx) = stream.into_split();
        connection::serve(self.shared.clone(), rx, tx).await
    }

    /// Clients connected at present.
    pub fn connected(&self) -> usize {
        self.shared.connected.load(Ordering::Relaxed)
    }

    fn listen(
        &self,
        listener: Listener,
        address: Option<SocketAddr>,
        path: Option<PathBuf>,
    ) -> Listening {
        let (stop, stopped) = watch::channel(());
        let task = tokio::spawn(accept(self.shared.clone(), listener, stopped));
        Listening { server: self.clone(), stop: Some(stop), task, address, path }
    }
}

/// A server at work. Dropping it closes the socket and all connections.
#[derive(Debug)]
pub struct Listening {
    server: Server,
    stop: Option<watch::Sender<()>>,
    task: JoinHandle<()>,
    address: Option<SocketAddr>,
    path: Option<PathBuf>,
}

impl Listening {
    /// The TCP address, where it is one.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// The server.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Closes the socket and all connections, and waits until no export call runs any more: then
    /// nothing of a client can reach an export.
    pub async fn stop(mut self) {
        self.stop.take();
        // The accept task never panics and is not cancelled; either way it is over then.
        let _ = (&mut self.task).await;
        let shared = &self.server.shared;
        // Each export call holds a part of the budget: all of it free means none runs.
        let _ = shared.budget.acquire_many(shared.budget_units).await;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(path) = &self.path {
            // Someone may have removed it already: nothing is left to do then.
            let _ = std::fs::remove_file(path);
        }
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A client's two directions.
enum Client {
    Unix(unix::OwnedReadHalf, unix::OwnedWriteHalf),
    Tcp(tcp::OwnedReadHalf, tcp::OwnedWriteHalf),
}

impl Listener {
    async fn accept(&self) -> io::Result<Client> {
        match self {
            Listener::Unix(listener) => {
                let (rx, tx) = listener.accept().await?.0.into_split();
                Ok(Client::Unix(rx, tx))
            }
            Listener::Tcp(listener) => {
                let stream: TcpStream = listener.accept().await?.0;
                stream.set_nodelay(true)?;
                let (rx, tx) = stream.into_split();
                Ok(Client::Tcp(rx, tx))
            }
        }
    }
}

/// Accepts clients until told to stop; then drops, and so ends, all connections.
async fn accept(shared: Arc<Shared>, listener: Listener, mut stopped: watch::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        let room = connections.len() < shared.options.connections_max;
        tokio::select! {
            _ = stopped.changed() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            client = listener.accept(), if room => match client {
                Ok(Client::Unix(rx, tx)) => { connections.spawn(serve(shared.clone(), rx, tx)); }
                Ok(Client::Tcp(rx, tx)) => { connections.spawn(serve(shared.clone(), rx, tx)); }
                Err(error) => {
                    tracing::warn!(%error, "NBD server: accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    connections.shutdown().await;
}

async fn serve<R, W>(shared: Arc<Shared>, rx: R, tx: W)
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    if let Err(error) = connection::serve(shared, rx, tx).await {
        tracing::debug!(%error, "NBD server: a client's connection ended");
    }
}
