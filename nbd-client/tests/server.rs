//! Our server: against our own client, and against the tools of others.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::MIB;
use icecore_nbd_client::proto::{BASE_ALLOCATION, export_flag};
use icecore_nbd_client::server::{
    Access, Export, Features, Listening, MemoryExport, Server, ServerOptions,
};
use icecore_nbd_client::{
    Cause, Changed, ChangedKind, Control, Dialect, Endpoint, Errno, Extent, Flow, Options, Uri,
};

const SIZE: u64 = 8 * MIB + 4096 + 512;

fn pattern() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    bytes[..65536].fill(0x5a);
    bytes[(3 * MIB) as usize..(4 * MIB) as usize].fill(0xa5);
    let tail = bytes.len() - 512;
    bytes[tail..].fill(0x77);
    bytes
}

fn serve(dir: &Path, export: Arc<dyn Export>, options: ServerOptions) -> (Listening, Uri) {
    let socket = dir.join("own");
    let server = Server::new(vec![("disk".to_owned(), export)], options);
    let listening = server.listen_unix(&socket, 0o600).expect("listen");
    (listening, Uri { endpoint: Endpoint::Unix(socket), export: "disk".to_owned() })
}

#[tokio::test]
async fn our_client_and_our_server_agree_in_every_dialect() {
    let dir = tempfile::tempdir().expect("dir");
    for dialect_max in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let disk = Arc::new(MemoryExport::new(pattern(), Access::Writable));
        let options = ServerOptions { dialect_max, ..ServerOptions::default() };
        let (listening, uri) = serve(dir.path(), disk.clone(), options);
        let contexts = vec![BASE_ALLOCATION.to_owned()];
        let options = Options { optional_contexts: contexts, ..Options::default() };
        let mut control = Control::connect(&uri, &options).await.expect("connect");
        assert_eq!(control.session().dialect, dialect_max);
        let mut buffer = vec![1; SIZE as usize];
        control.read(0, &mut buffer).await.expect("read");
        assert!(buffer == pattern());
        let allocation = control.context(BASE_ALLOCATION);
        assert_eq!(allocation.is_some(), dialect_max > Dialect::Simple);
        if allocation.is_some() {
            let mut seen = Vec::new();
            let receive = |item: Changed| {
                seen.push((item.offset, item.length, item.kind));
                Flow::Continue(())
            };
            control.changed(Extent::new(0, SIZE), None, allocation, receive).await.expect("map");
            let tail = SIZE - SIZE % 4096;
            let expected = [
                (0, 65536, ChangedKind::Data),
                (65536, 3 * MIB - 65536, ChangedKind::Zero),
                (3 * MIB, MIB, ChangedKind::Data),
                (4 * MIB, tail - 4 * MIB, ChangedKind::Zero),
                (tail, SIZE - tail, ChangedKind::Data),
            ];
            assert_eq!(seen, expected);
        }
        control.write(MIB, &vec![9; MIB as usize]).await.expect("write");
        control.write_zeroes(3 * MIB, MIB).await.expect("zeroes");
        control.flush().await.expect("flush");
        control.disconnect().await.expect("disconnect");
        let mut expected = pattern();
        expected[MIB as usize..(2 * MIB) as usize].fill(9);
        expected[(3 * MIB) as usize..(4 * MIB) as usize].fill(0);
        assert!(disk.content() == expected);
        listening.stop().await;
    }
}

#[tokio::test]
async fn trim_and_fast_zero_are_declined_unless_wanted() {
    let dir = tempfile::tempdir().expect("dir");
    for wanted in [false, true] {
        let disk = MemoryExport::new(pattern(), Access::Writable).with_features(|features| {
            features.trim = wanted;
            features.fast_zero = wanted;
        });
        let (listening, uri) = serve(dir.path(), Arc::new(disk), ServerOptions::default());
        let mut control = Control::connect(&uri, &Options::default()).await.expect("connect");
        assert_eq!(control.export().has(export_flag::SEND_TRIM), wanted);
        assert_eq!(control.export().has(export_flag::SEND_FAST_ZERO), wanted);
        assert_eq!(control.trim(0, 4096).await.is_ok(), wanted);
        listening.stop().await;
    }
}

/// An export that does nothing for a while.
struct Slow(Duration);

impl Export for Slow {
    fn features(&self) -> Features {
        Features::new(MIB, Access::Writable)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        std::thread::sleep(self.0);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        std::thread::sleep(self.0);
        Ok(())
    }
}

#[tokio::test]
async fn a_slow_export_is_answered_with_an_error_in_time() {
    let dir = tempfile::tempdir().expect("dir");
    let options =
        ServerOptions { reply_deadline: Duration::from_millis(200), ..ServerOptions::default() };
    let (listening, uri) = serve(dir.path(), Arc::new(Slow(Duration::from_secs(2))), options);
    let mut control = Control::connect(&uri, &Options::default()).await.expect("connect");
    let start = Instant::now();
    let error = control.write(0, &[1; 4096]).await.expect_err("too slow");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(matches!(&error.cause, Cause::Request(e) if e.errno == Errno::EIO), "{error}");
    let start_of_stop = Instant::now();
    listening.stop().await;
    // The write still ran: stop() had to wait for it, so that nothing reaches the export later.
    assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start_of_stop.elapsed());
}

#[tokio::test]
async fn the_tools_of_others_read_and_write_our_export() {
    let dir = tempfile::tempdir().expect("dir");
    let disk = Arc::new(MemoryExport::new(pattern(), Access::Writable));
    let (listening, uri) = serve(dir.path(), disk.clone(), ServerOptions::default());
    let uri = uri.to_string();
    let copy = dir.path().join("copy").display().to_string();
    let other = dir.path().join("other").display().to_string();
    let expected = pattern();
    let work = tokio::task::spawn_blocking(move || {
        let size = common::run("nbdinfo", &["--size", &uri]);
        assert_eq!(size.trim(), SIZE.to_string());
        let map = common::run("nbdinfo", &["--map", &uri]);
        assert!(map.contains("65536") && map.contains("hole,zero"), "{map}");
        let list = common::run("nbdinfo", &["--list", &uri]);
        assert!(list.contains("export=\"disk\""), "{list}");
        common::run("nbdcopy", &[&uri, &copy]);
        assert!(std::fs::read(&copy).expect("copy") == expected);
        common::run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &other]);
        assert!(std::fs::read(&other).expect("copy")[..SIZE as usize] == expected[..]);
        common::run("qemu-io", &["-f", "raw", "-c", "write -P 0x42 2M 64k", "-c", "flush", &uri]);
        common::run("qemu-io", &["-f", "raw", "-c", "read -P 0x42 2M 64k", &uri]);
        std::fs::write(&copy, vec![0x66; SIZE as usize]).expect("file");
        common::run("nbdcopy", &[&copy, &uri]);
    });
    work.await.expect("tools");
    assert!(disk.content().iter().all(|byte| *byte == 0x66));
    listening.stop().await;
}

/// fio writes and verifies with 16 requests in flight.
#[tokio::test]
async fn fio_verifies_what_it_wrote() {
    let dir = tempfile::tempdir().expect("dir");
    let disk = Arc::new(MemoryExport::new(vec![0; (4 * MIB) as usize], Access::Writable));
    let (listening, uri) = serve(dir.path(), disk, ServerOptions::default());
    let work = tokio::task::spawn_blocking(move || {
        let uri = format!("--uri={uri}");
        let job = ["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--size=4M"];
        let more = [
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--thread",
            "--minimal",
        ];
        common::run("fio", &[&job[..], &more[..], &[uri.as_str()]].concat());
    });
    work.await.expect("fio");
    listening.stop().await;
}

#[tokio::test]
async fn tcp_works_and_unknown_names_are_refused() {
    let disk = Arc::new(MemoryExport::new(pattern(), Access::ReadOnly));
    let second = Arc::new(MemoryExport::new(vec![1; 4096], Access::ReadOnly));
    let exports: Vec<(String, Arc<dyn Export>)> =
        vec![("a".to_owned(), disk), ("b".to_owned(), second)];
    let server = Server::new(exports, ServerOptions::default());
    let listening = server.listen_tcp("127.0.0.1:0".parse().expect("address")).await.expect("tcp");
    let port = listening.address().expect("tcp").port();
    let uri =
        |export: &str| -> Uri { format!("nbd://127.0.0.1:{port}/{export}").parse().expect("uri") };
    let listed = Control::list_exports(&uri("").endpoint, &Options::default()).await.expect("list");
    let names: Vec<_> = listed.iter().map(|export| export.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    let mut control = Control::connect(&uri("b"), &Options::default()).await.expect("connect");
    assert_eq!(control.export().size_bytes, 4096);
    assert!(matches!(
        control.write(0, &[0; 512]).await.expect_err("read-only").cause,
        Cause::Submit(_)
    ));
    for name in ["", "c"] {
        let error = Control::connect(&uri(name), &Options::default()).await.expect_err("unknown");
        assert!(matches!(error.cause, Cause::Handshake(_)), "{error}");
    }
    listening.stop().await;
}
