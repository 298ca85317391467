//! Against the `nbd` crate, an independent peer that knows nothing newer than EXPORT_NAME.

use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use icecore_nbd_client::server::{Access, Export, MemoryExport, Server, ServerOptions};
use icecore_nbd_client::{Cause, Control, Dialect, Endpoint, HandshakeError, Options, Uri};

const SIZE: usize = 1 << 20;

fn pattern() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512) as u8).collect()
}

#[tokio::test]
async fn our_client_falls_back_to_export_name() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("bind");
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accept");
        nbd::server::handshake(&stream, |name| {
            assert_eq!(name, "rustnbd");
            Ok(nbd::Export::<()> { size: SIZE as u64, ..nbd::Export::default() })
        })
        .expect("handshake");
        let mut disk = Cursor::new(pattern());
        nbd::server::transmission(&stream, &mut disk).expect("transmission");
        disk.into_inner()
    });
    let uri = Uri { endpoint: Endpoint::Unix(socket), export: "rustnbd".to_owned() };
    let mut control = Control::connect(&uri, &Options::default()).await.expect("connect");
    assert_eq!(control.session().dialect, Dialect::Simple);
    let mut buffer = vec![0; SIZE];
    control.read(0, &mut buffer).await.expect("read");
    assert!(buffer == pattern());
    control.write(4096, &[0xcc; 4096]).await.expect("write");
    control.flush().await.expect("flush");
    let error = control.write_zeroes(0, 4096).await.expect_err("it does not offer zeroes");
    assert!(matches!(error.cause, Cause::Submit(_)), "{error}");
    control.disconnect().await.expect("disconnect");
    let disk = server.join().expect("server");
    assert!(disk[4096..8192].iter().all(|byte| *byte == 0xcc));
}

#[tokio::test]
async fn a_legacy_server_cannot_pass_for_one_with_a_clean_bitmap() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("bind");
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accept");
        // It fails at our ABORT; what matters is what the client says.
        let _ = nbd::server::handshake(&stream, |_| Ok(nbd::Export::<()>::default()));
    });
    let uri = Uri { endpoint: Endpoint::Unix(socket), export: "rustnbd".to_owned() };
    let contexts = vec!["qemu:dirty-bitmap:x".to_owned()];
    let options = Options { contexts, ..Options::default() };
    let error = Control::connect(&uri, &options).await.expect_err("no contexts there");
    assert!(
        matches!(error.cause, Cause::Handshake(HandshakeError::ContextMissing { .. })),
        "{error}"
    );
    server.join().expect("server");
}

#[tokio::test]
async fn our_server_serves_a_legacy_client() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = Arc::new(MemoryExport::new(pattern(), Access::Writable));
    let export: Arc<dyn Export> = disk.clone();
    let server = Server::new(vec![("disk".to_owned(), export)], ServerOptions::default());
    let listening = server.listen_unix(&socket, 0o600).expect("listen");
    let client = tokio::task::spawn_blocking(move || {
        let mut stream = UnixStream::connect(&socket).expect("connect");
        let export = nbd::client::handshake(&mut stream, b"disk").expect("handshake");
        assert_eq!(export.size, SIZE as u64);
        let mut client = nbd::client::NbdClient::new(stream, &export);
        let mut buffer = vec![0; 8192];
        client.seek(SeekFrom::Start(512)).expect("seek");
        client.read_exact(&mut buffer).expect("read");
        assert!(buffer[..] == pattern()[512..512 + 8192]);
        client.seek(SeekFrom::Start(0)).expect("seek");
        client.write_all(&[0xdd; 4096]).expect("write");
        client.flush().expect("flush");
    });
    client.await.expect("client");
    assert!(disk.content()[..4096].iter().all(|byte| *byte == 0xdd));
    listening.stop().await;
}
