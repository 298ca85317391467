//! Clients that misbehave towards our server: each is thrown out or refused, and the next client is
//! served as if nothing had happened.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use icecore_nbd_client::proto::{
    EXTENDED_REQUEST_MAGIC, OPTION_MAGIC, REQUEST_MAGIC, command, command_flag, option,
};
use icecore_nbd_client::server::{
    Access, Export, Features, Listening, MemoryExport, Server, ServerOptions, ZeroMode,
};
use icecore_nbd_client::{Control, Endpoint, Errno, Options, Uri};

const SIZE: usize = 1 << 20;

struct Rig {
    listening: Listening,
    socket: PathBuf,
    disk: Arc<MemoryExport>,
    _dir: tempfile::TempDir,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = Arc::new(MemoryExport::new(vec![7; SIZE], Access::Writable));
    let export: Arc<dyn Export> = disk.clone();
    let options = ServerOptions {
        handshake_deadline: Duration::from_millis(300),
        unread_deadline: Duration::from_millis(300),
        ..ServerOptions::default()
    };
    let server = Server::new(vec![("disk".to_owned(), export)], options);
    let listening = server.listen_unix(&socket, 0o600).expect("listen");
    Rig { listening, socket, disk, _dir: dir }
}

impl Rig {
    /// Runs a client of raw bytes, then proves that an honest one is served.
    async fn survives(self, client: impl FnOnce(UnixStream) + Send + 'static) {
        let socket = self.socket.clone();
        let raw = tokio::task::spawn_blocking(move || client(connect(&socket)));
        raw.await.expect("raw client");
        let endpoint = Endpoint::Unix(self.socket.clone());
        let uri = Uri { endpoint, export: "disk".to_owned() };
        let mut control = Control::connect(&uri, &Options::default()).await.expect("connect");
        let mut buffer = vec![0; SIZE];
        control.read(0, &mut buffer).await.expect("read");
        assert!(buffer.iter().all(|byte| *byte == 7), "the disk was changed");
        control.disconnect().await.expect("disconnect");
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.listening.server().connected() > 0 {
            assert!(Instant::now() < deadline, "a connection is left over");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.listening.stop().await;
        assert!(self.disk.content().iter().all(|byte| *byte == 7));
        assert!(!self.socket.exists(), "the socket is left over");
    }
}

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    stream
}

/// Takes the greeting and sends flags.
fn greet(stream: &mut UnixStream, flags: u32) {
    stream.read_exact(&mut [0; 18]).expect("greeting");
    stream.write_all(&flags.to_be_bytes()).expect("flags");
}

fn option_bytes(code: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// Opens the export with EXPORT_NAME.
fn open(stream: &mut UnixStream) {
    greet(stream, 3);
    stream.write_all(&option_bytes(option::EXPORT_NAME, 4, b"disk")).expect("option");
    stream.read_exact(&mut [0; 10]).expect("export");
}

fn request(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut out = REQUEST_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&9_u64.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out
}

/// The server has closed: no byte comes any more.
fn assert_closed(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    // A reset instead of an end is as good.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 4096, "{} bytes came", rest.len());
}

/// The error number of a simple reply.
fn errno(stream: &mut UnixStream) -> u32 {
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).expect("reply");
    u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]])
}

#[tokio::test]
async fn garbage_and_unknown_flags_are_thrown_out() {
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0xff; 4], vec![0; 64]] {
        let send = move |mut stream: UnixStream| {
            stream.read_exact(&mut [0; 18]).expect("greeting");
            let _ = stream.write_all(&bytes);
            assert_closed(&mut stream);
        };
        rig().survives(send).await;
    }
}

#[tokio::test]
async fn huge_and_malformed_options_are_refused() {
    let huge = |mut stream: UnixStream| {
        greet(&mut stream, 3);
        stream.write_all(&option_bytes(option::GO, u32::MAX, &[])).expect("option");
        assert_closed(&mut stream);
    };
    rig().survives(huge).await;
    let endless = |mut stream: UnixStream| {
        greet(&mut stream, 3);
        for _ in 0..300 {
            if stream.write_all(&option_bytes(77, 0, &[])).is_err() {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.len() <= 256 * 64, "{} bytes of replies", rest.len());
    };
    rig().survives(endless).await;
    let malformed = |mut stream: UnixStream| {
        greet(&mut stream, 3);
        for data in [&[][..], &[0xff; 4], &[0, 0, 0, 1], &[0, 0, 0, 0, 0, 9]] {
            let bytes = option_bytes(option::GO, data.len() as u32, data);
            stream.write_all(&bytes).expect("option");
            let mut reply = [0; 20];
            stream.read_exact(&mut reply).expect("reply");
            assert_eq!(reply[12] & 0x80, 0x80, "no error for {data:?}");
            let length = u32::from_be_bytes([reply[16], reply[17], reply[18], reply[19]]);
            stream.read_exact(&mut vec![0; length as usize]).expect("reply");
        }
    };
    rig().survives(malformed).await;
}

#[tokio::test]
async fn a_client_that_never_finishes_its_handshake_is_thrown_out() {
    let silent = |mut stream: UnixStream| {
        let start = Instant::now();
        greet(&mut stream, 3);
        assert_closed(&mut stream);
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    };
    rig().survives(silent).await;
}

#[tokio::test]
async fn requests_outside_of_the_rules_are_refused_one_by_one() {
    let client = |mut stream: UnixStream| {
        open(&mut stream);
        let size = SIZE as u32;
        let (inval, nospc) = (Errno::EINVAL.code(), Errno::ENOSPC.code());
        let cases = [
            (request(0, command::READ, 0, size + 1), inval),
            (request(0, command::READ, u64::MAX, 2), inval),
            (request(0, command::READ, 0, 0), inval),
            (request(0, command::READ, 0, u32::MAX), inval),
            (request(command_flag::DF, command::READ, 0, 512), inval),
            (request(0, command::TRIM, 0, 512), inval),
            (request(command_flag::FAST_ZERO, command::WRITE_ZEROES, 0, 512), inval),
            (request(0, command::WRITE_ZEROES, 512, size), inval),
            (request(0, command::BLOCK_STATUS, 0, 512), inval),
            (request(0, 99, 0, 0), inval),
            ([request(0, command::WRITE, SIZE as u64, 512), vec![1; 512]].concat(), nospc),
            (request(0, command::FLUSH, 0, 0), 0),
        ];
        for (bytes, expected) in cases {
            stream.write_all(&bytes).expect("request");
            assert_eq!(errno(&mut stream), expected, "{bytes:02x?}");
        }
    };
    rig().survives(client).await;
}

#[tokio::test]
async fn lengths_that_cannot_be_trusted_end_the_connection() {
    for bytes in [
        request(0, command::WRITE, 0, (32 << 20) + 1),
        request(0, command::WRITE, 0, u32::MAX),
        EXTENDED_REQUEST_MAGIC.to_be_bytes().repeat(8),
    ] {
        let client = move |mut stream: UnixStream| {
            open(&mut stream);
            stream.write_all(&bytes).expect("request");
            assert_closed(&mut stream);
        };
        rig().survives(client).await;
    }
}

#[tokio::test]
async fn a_write_that_breaks_off_changes_nothing() {
    let client = |mut stream: UnixStream| {
        open(&mut stream);
        stream.write_all(&request(0, command::WRITE, 0, 65_536)).expect("request");
        stream.write_all(&[1; 1000]).expect("part of the payload");
    };
    rig().survives(client).await;
}

#[tokio::test]
async fn a_client_that_reads_no_replies_is_thrown_out() {
    let client = |mut stream: UnixStream| {
        open(&mut stream);
        stream.set_write_timeout(Some(Duration::from_secs(5))).expect("timeout");
        let start = Instant::now();
        for _ in 0..4096 {
            if stream.write_all(&request(0, command::READ, 0, SIZE as u32)).is_err() {
                break;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    };
    rig().survives(client).await;
}

/// An export whose calls never overlap with more memory than the budget allows for.
struct Counting {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Export for Counting {
    fn features(&self) -> Features {
        Features::new(1 << 40, Access::Writable)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(20));
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode) -> Result<(), Errno> {
        Ok(())
    }
}

#[tokio::test]
async fn payloads_of_all_clients_share_one_budget() {
    let counting = Arc::new(Counting { now: AtomicUsize::new(0), most: AtomicUsize::new(0) });
    let export: Arc<dyn Export> = counting.clone();
    let options = ServerOptions { budget_bytes: 32 << 20, ..ServerOptions::default() };
    let server = Server::new(vec![("d".to_owned(), export)], options);
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let listening = server.listen_unix(&socket, 0o600).expect("listen");
    let writer = |offset: u64| {
        let endpoint = Endpoint::Unix(socket.clone());
        let uri = Uri { endpoint, export: "d".to_owned() };
        async move {
            let mut control = Control::connect(&uri, &Options::default()).await.expect("connect");
            for round in 0..4 {
                let offset = offset + round * (16 << 20);
                control.write(offset, &vec![1; 16 << 20]).await.expect("write");
            }
        }
    };
    tokio::join!(writer(0), writer(1 << 30), writer(2 << 30));
    let most = counting.most.load(Ordering::SeqCst);
    assert!((2..=32).contains(&most), "{most} writes of 1 MiB at once with a budget of 32 MiB");
    listening.stop().await;
}
