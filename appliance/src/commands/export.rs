//! `icecore export`.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use icecore_nbd_client::server::{Listening, Server, ServerOptions};
use icecore_repository::DiskId;

use super::point::find;
use crate::cli::OK;
use crate::cli::args::ExportArgs;
use crate::context::Context;
use crate::export::{Label, Overlay, PointExport};
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::output;

/// A client of a point waits for a slow store rather than for an error.
const REPLY_DEADLINE: Duration = Duration::from_secs(60);
/// How often the end is looked for.
const POLL: Duration = Duration::from_millis(100);

/// Runs `icecore export`: serves until it is interrupted.
pub async fn run(context: &Context, args: ExportArgs) -> Outcome<u8> {
    let tried = format!("export disk {} of point {}", args.disk, args.point);
    let repository = context.open_read_only(&args.repo.repo)?;
    let point = find(&repository, &args.point, args.vm.as_deref(), &tried)?;
    let disk: DiskId = args.disk.parse().map_err(|e| Failure::usage(&tried, e))?;
    let reader =
        repository.disk_reader(&point, &disk).map_err(|e| Failure::from_repository(&tried, e))?;
    let overlay = match &args.overlay {
        None => None,
        Some(path) => {
            let label = Label {
                icecore_overlay: 1,
                point: point.id.to_string(),
                disk: disk.to_string(),
                size_bytes: reader.size_bytes(),
                block_bytes: reader.block_size().bytes(),
            };
            Some(Overlay::open(path, label).map_err(|e| overlay_failure(path, &e, &tried))?)
        }
    };
    let description = format!("{} at {}", point.vm, point.meta.captured_at);
    let size = reader.size_bytes();
    let export = Arc::new(PointExport::new(reader, description, overlay));
    let options = ServerOptions { reply_deadline: REPLY_DEADLINE, ..ServerOptions::default() };
    let server = Server::new(vec![(disk.to_string(), Arc::clone(&export) as _)], options);
    let interrupt = Interrupt::listen()?;
    let (listening, uri) = listen(&server, &args, &tried).await?;
    announce(context, &uri, size)?;
    while !interrupt.is_set() {
        tokio::time::sleep(POLL).await;
    }
    listening.stop().await;
    let flushed = icecore_nbd_client::server::Export::flush(&*export);
    flushed.map_err(|e| Failure::failed(tried, format!("the overlay was not flushed: {e}")))?;
    Ok(OK)
}

fn overlay_failure(path: &Path, e: &io::Error, tried: &str) -> Failure {
    let path = path.display();
    match e.kind() {
        io::ErrorKind::WouldBlock => {
            Failure::refused(tried, format!("another export has the overlay {path} open"))
                .next("end that one first, or name another overlay")
        }
        _ => Failure::failed(tried, format!("the overlay {path}: {e}")),
    }
}

/// Makes room for a socket: one that nobody answers on was left by an export that was killed.
fn clear_stale(socket: &Path, tried: &str) -> Outcome<()> {
    let there = match socket.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        there => there.map_err(|e| Failure::failed(tried, e))?,
    };
    let refused = |why| {
        Err(Failure::refused(tried, format!("{} {why}", socket.display())).next("name another"))
    };
    if !there.file_type().is_socket() {
        return refused("is there already, and no socket");
    }
    match UnixStream::connect(socket) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(socket).map_err(|e| Failure::failed(tried, e))
        }
        _ => refused("is a socket that someone listens on"),
    }
}

async fn listen(server: &Server, args: &ExportArgs, tried: &str) -> Outcome<(Listening, String)> {
    let failed = |e: std::io::Error| Failure::failed(tried, e);
    if let Some(socket) = &args.socket {
        clear_stale(socket, tried)?;
        let listening = server.listen_unix(socket, 0o600).map_err(failed)?;
        return Ok((listening, format!("nbd+unix:///{}?socket={}", args.disk, socket.display())));
    }
    let text = args.listen.as_deref().unwrap_or_default();
    let address: SocketAddr = text.parse().map_err(|e| {
        Failure::usage(tried, format!("{text} is no ADDR:PORT: {e}")).next("as in 127.0.0.1:10809")
    })?;
    let listening = server.listen_tcp(address).await.map_err(failed)?;
    let bound = listening.address().unwrap_or(address);
    Ok((listening, format!("nbd://{bound}/{}", args.disk)))
}

fn announce(context: &Context, uri: &str, size_bytes: u64) -> Outcome<()> {
    if context.json {
        return output::json(&serde_json::json!({ "uri": uri, "size_bytes": size_bytes }));
    }
    output::print(&format!("serving {uri}\nend with Ctrl-C\n"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::failure::Status;

    #[test]
    fn only_a_socket_that_nobody_answers_on_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        clear_stale(&socket, "export").unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(clear_stale(&socket, "export").unwrap_err().status, Status::Refused);
        drop(listener);
        clear_stale(&socket, "export").unwrap();
        std::fs::write(&socket, b"x").unwrap();
        assert_eq!(clear_stale(&socket, "export").unwrap_err().status, Status::Refused);
        assert!(socket.exists());
    }
}
