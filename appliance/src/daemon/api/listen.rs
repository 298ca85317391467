//! Sockets and connections of the API.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::Origin;
use crate::daemon::access::Peer;
use crate::daemon::supervisor::Supervisor;
use crate::failure::{Failure, Outcome};
use crate::state::make_private_dir;

/// More clients than this wait until one leaves; a person has a few, a monitoring system one.
const CONNECTIONS_MAX: usize = 256;
/// A client that has not sent its request's head by then is none.
const HEAD_WAIT: Duration = Duration::from_secs(10);
/// After a failed accept (no descriptors left) it is tried again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Binds the unix socket, in place of one that a dead daemon left.
pub async fn bind_unix(path: &Path, group: Option<u32>) -> Outcome<UnixListener> {
    let tried = format!("listen on {}", path.display());
    let failed = |e: io::Error| Failure::failed(&tried, e);
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        make_private_dir(parent).map_err(failed)?;
        if group.is_some() {
            let open = std::fs::Permissions::from_mode(0o711);
            std::fs::set_permissions(parent, open).map_err(failed)?;
        }
    }
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Ok(about) if about.file_type().is_socket() => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(Failure::refused(tried, "somebody listens there already"));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        Ok(_) => return Err(Failure::refused(tried, "it is there and is no socket")),
        Err(e) => return Err(failed(e)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    if group.is_some() {
        std::os::unix::fs::chown(path, None, group).map_err(failed)?;
    }
    Ok(listener)
}

/// Serves the unix socket for ever.
pub async fn serve_unix(listener: UnixListener, router: Router, app: Arc<Supervisor>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let peer =
                    stream.peer_cred().ok().map(|who| Peer { uid: who.uid(), gid: who.gid() });
                let caller = peer.and_then(|peer| app.settings().access.peer(peer));
                let router = router.clone();
                tokio::spawn(async move {
                    converse(stream, Origin::Unix(caller), router).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves TCP with TLS for ever.
pub async fn serve_tcp(listener: TcpListener, tls: TlsAcceptor, router: Router) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (tls, router) = (tls.clone(), router.clone());
                tokio::spawn(async move {
                    // A client that cannot do TLS is its own problem.
                    if let Ok(Ok(stream)) =
                        tokio::time::timeout(HEAD_WAIT, tls.accept(stream)).await
                    {
                        converse(stream, Origin::Tcp, router).await;
                    }
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn converse<S>(stream: S, origin: Origin, router: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(origin.clone());
        TowerToHyperService::new(router.clone()).call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WAIT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(e) = connection.await {
        tracing::debug!("a connection of the API ended: {e}");
    }
}
