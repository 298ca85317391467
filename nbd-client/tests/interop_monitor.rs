//! Against qemu-storage-daemon and a live QEMU: as servers of a bitmap on a block node, and, the
//! other way round, as the client that copies into our server (the way of a push backup).
#![allow(clippy::panic, reason = "test code outside of #[test] functions")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use common::{MIB, image_with_bitmap};
use icecore_nbd_client::proto::{BASE_ALLOCATION, export_flag};
use icecore_nbd_client::server::{Access, Export, MemoryExport, Server, ServerOptions};
use icecore_nbd_client::{Control, Dialect, Endpoint, Extent, Flow, Options, Uri, is_dirty};

/// A daemon whose monitor is its standard input and output.
struct Daemon {
    child: Child,
    tx: ChildStdin,
    rx: BufReader<ChildStdout>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(dir: &Path) -> Daemon {
        let monitor = ["--chardev", "stdio,id=m", "--monitor", "chardev=m"];
        Daemon::spawn("qemu-storage-daemon", "qemu-system-common", &monitor, dir)
    }

    /// A machine without a guest, which has the same monitor.
    fn machine(dir: &Path) -> Daemon {
        let args = [
            "-M",
            "q35",
            "-S",
            "-accel",
            "tcg",
            "-m",
            "64",
            "-display",
            "none",
            "-nodefaults",
            "-qmp",
            "stdio",
        ];
        Daemon::spawn("qemu-system-x86_64", "qemu-system-x86", &args, dir)
    }

    fn spawn(tool: &str, package: &str, args: &[&str], dir: &Path) -> Daemon {
        let mut child = Command::new(tool)
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{tool}: {e}; install the Debian package {package}"));
        let tx = child.stdin.take().expect("stdin");
        let rx = BufReader::new(child.stdout.take().expect("stdout"));
        let mut daemon = Daemon { child, tx, rx };
        daemon.line_with("QMP");
        daemon.run(r#"{"execute":"qmp_capabilities"}"#);
        daemon
    }

    /// Reads lines up to the first that contains `text`; a line with an error fails the test.
    fn line_with(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.rx.read_line(&mut line).expect("monitor") > 0, "the monitor closed");
            assert!(!line.contains("\"error\""), "{line}");
            if line.contains(text) {
                return line;
            }
        }
    }

    fn run(&mut self, command: &str) {
        writeln!(self.tx, "{command}").expect("monitor");
        self.line_with("\"return\"");
    }
}

#[tokio::test]
async fn a_bitmap_of_a_daemons_node_is_read_with_and_without_a_payload() {
    read_bitmap(Daemon::start).await;
}

#[tokio::test]
async fn a_bitmap_of_a_machines_node_is_read_with_and_without_a_payload() {
    read_bitmap(Daemon::machine).await;
}

async fn read_bitmap(start: fn(&Path) -> Daemon) {
    let dir = tempfile::tempdir().expect("dir");
    let image = image_with_bitmap(dir.path());
    let socket = dir.path().join("s");
    let mut daemon = start(dir.path());
    daemon.run(&format!(
        r#"{{"execute":"blockdev-add","arguments":{{"driver":"qcow2","node-name":"disk0","file":{{"driver":"file","filename":"{image}"}}}}}}"#
    ));
    // QEMU exports only bitmaps that do not record.
    daemon.run(
        r#"{"execute":"block-dirty-bitmap-disable","arguments":{"node":"disk0","name":"b0"}}"#,
    );
    daemon.run(&format!(
        r#"{{"execute":"nbd-server-start","arguments":{{"addr":{{"type":"unix","data":{{"path":"{}"}}}}}}}}"#,
        socket.display()
    ));
    daemon.run(
        r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"disk0","name":"disk0","writable":false,"bitmaps":["b0"],"allocation-depth":true}}"#,
    );
    let uri = Uri { endpoint: Endpoint::Unix(socket), export: "disk0".to_owned() };
    const BITMAP: &str = "qemu:dirty-bitmap:b0";
    const DEPTH: &str = "qemu:allocation-depth";
    for dialect_max in [Dialect::Structured, Dialect::Extended] {
        let contexts = [BASE_ALLOCATION, BITMAP, DEPTH].map(str::to_owned).to_vec();
        let options = Options { contexts, dialect_max, ..Options::default() };
        let mut control = Control::connect(&uri, &options).await.expect("connect");
        let payload = control.export().has(export_flag::BLOCK_STATUS_PAYLOAD);
        assert_eq!(payload, dialect_max == Dialect::Extended);
        let bitmap = control.context(BITMAP).expect("bitmap");
        let mut dirty = Vec::new();
        let receive = |extent: Extent| {
            if is_dirty(extent.flags) {
                dirty.push((extent.offset, extent.length));
            }
            Flow::Continue(())
        };
        control.extents(bitmap, [Extent::new(0, 64 * MIB)], receive).await.expect("extents");
        assert_eq!(dirty, [(8 * MIB, 128 << 10), (16 * MIB, 64 << 10)]);
    }
}

/// QEMU as the client of our server, the whole of `blockdev-backup` into it.
#[tokio::test]
async fn a_backup_job_pushes_into_our_server() {
    for dialect_max in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let dir = tempfile::tempdir().expect("dir");
        let image = image_with_bitmap(dir.path());
        let size = (64 * MIB) as usize;
        let target = Arc::new(MemoryExport::new(vec![0xee; size], Access::Writable));
        let export: Arc<dyn Export> = target.clone();
        let options = ServerOptions { dialect_max, ..ServerOptions::default() };
        let server = Server::new(vec![("t".to_owned(), export)], options);
        let socket = dir.path().join("push");
        let listening = server.listen_unix(&socket, 0o600).expect("listen");
        let path = dir.path().to_owned();
        let pushed = tokio::task::spawn_blocking(move || {
            let mut daemon = Daemon::start(&path);
            daemon.run(&format!(
                r#"{{"execute":"blockdev-add","arguments":{{"driver":"qcow2","node-name":"disk0","file":{{"driver":"file","filename":"{image}"}}}}}}"#
            ));
            daemon.run(&format!(
                r#"{{"execute":"blockdev-add","arguments":{{"driver":"nbd","node-name":"push","export":"t","server":{{"type":"unix","path":"{}"}}}}}}"#,
                socket.display()
            ));
            daemon.run(
                r#"{"execute":"blockdev-backup","arguments":{"job-id":"j","device":"disk0","target":"push","sync":"full"}}"#,
            );
            let end = daemon.line_with("BLOCK_JOB_COMPLETED");
            assert!(!end.contains("\"error\""), "{end}");
            daemon.run(r#"{"execute":"blockdev-del","arguments":{"node-name":"push"}}"#);
        });
        pushed.await.expect("push");
        listening.stop().await;
        let content = target.content();
        let is = |start: u64, length: u64, byte: u8| {
            content[start as usize..(start + length) as usize].iter().all(|b| *b == byte)
        };
        assert!(is(MIB, 65_536, 0x11) && is(40 * MIB, MIB, 0x22) && is(8 * MIB, 131_072, 0x33));
        assert!(is(0, MIB, 0) && is(16 * MIB, 65_536, 0) && is(48 * MIB, 16 * MIB, 0));
    }
}
