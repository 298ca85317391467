//! A hostile client of our own NBD server, both phases, over a socket pair.

use std::sync::Arc;
use std::time::Duration;

use icecore_nbd_client::server::{Access, MemoryExport, Server, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// The server must notice the end of its client at once; this is only against hanging.
const END_DEADLINE: Duration = Duration::from_secs(10);
const EXPORT_BYTES: usize = 256 << 10;

/// The bytes are all that the client ever sends; what the server answers is read and dropped.
pub fn nbd_server(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(talk(data));
}

async fn talk(data: &[u8]) {
    let export = MemoryExport::new(vec![0; EXPORT_BYTES], Access::Writable);
    let server = Server::new(vec![("disk".to_owned(), Arc::new(export))], ServerOptions::default());
    let (client, ours) = UnixStream::pair().expect("a socket pair");
    let (mut from, mut to) = client.into_split();
    let client = async move {
        // The server may hang up in the middle of it.
        let _ = to.write_all(data).await;
        let _ = to.shutdown().await;
    };
    let reader = async move {
        let mut buffer = vec![0; 64 << 10];
        while matches!(from.read(&mut buffer).await, Ok(1..)) {}
    };
    let whole = async { tokio::join!(server.serve_stream(ours), client, reader) };
    let ended = tokio::time::timeout(END_DEADLINE, whole).await;
    assert!(ended.is_ok(), "the server outlived its client");
}
