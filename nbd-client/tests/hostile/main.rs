//! Servers that break the protocol, one file per kind of misuse. After each the connection is dead,
//! memory stayed bounded, and nothing was reported as success.
#![allow(clippy::panic, reason = "test code outside of #[test] functions")]

mod chunks;
mod cookies;
mod coverage;
mod errors;
mod handshake;
mod lengths;
mod ranges;
mod status;
mod time;

use std::time::Duration;

use icecore_nbd_client::testing::{Act, RequestHeader, Script, Scripted};
use icecore_nbd_client::{Cause, Control, Dialect, Options, ProtocolError};

const DIALECTS: [Dialect; 2] = [Dialect::Structured, Dialect::Extended];
const SIZE: u64 = 1 << 20;

/// An open export of 1 MiB on a scripted server, with the contexts `a` and `b`.
async fn open(
    dialect: Dialect,
    answer: impl FnMut(Dialect, &RequestHeader, &[u8]) -> Vec<Act> + Send + 'static,
) -> (Control, Scripted) {
    let script = Script::new(SIZE).dialect(dialect).contexts(&["a", "b"]);
    let mut server = Scripted::start(script, answer).expect("scripted server");
    let contexts = match dialect {
        Dialect::Simple => Vec::new(),
        _ => vec!["a".to_owned(), "b".to_owned()],
    };
    let options = Options {
        contexts,
        connect_deadline: Duration::from_secs(5),
        progress_deadline: Duration::from_millis(500),
        ..Options::default()
    };
    let control = Control::over(client(&mut server), "disk", &options).await.expect("connect");
    (control, server)
}

/// The client's end as a tokio socket.
fn client(server: &mut Scripted) -> tokio::net::UnixStream {
    let socket = server.client().expect("the client's end");
    socket.set_nonblocking(true).expect("nonblocking");
    tokio::net::UnixStream::from_std(socket).expect("tokio socket")
}

/// Reads 8 KiB from a server that answers like this; expects a protocol error, and a connection
/// that takes nothing more.
async fn read_breaks(
    dialect: Dialect,
    mut answer: impl FnMut(Dialect, &RequestHeader) -> Vec<u8> + Send + 'static,
) -> ProtocolError {
    let (mut control, server) =
        open(dialect, move |dialect, request, _| vec![Act::Send(answer(dialect, request))]).await;
    let error = control.read(4096, &mut [0; 8192]).await.expect_err("a broken reply");
    let again = control.read(0, &mut [0; 512]).await.expect_err("a dead connection");
    assert!(matches!(again.cause, Cause::Poisoned), "{again}");
    drop(control);
    server.join().expect("scripted server");
    match error.cause {
        Cause::Protocol(error) => error,
        other => panic!("not a protocol error: {other}"),
    }
}
