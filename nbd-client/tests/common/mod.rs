//! Servers of others for interop tests. A missing tool fails the test with its package's name.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::panic, reason = "test code outside of #[test] functions")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use icecore_nbd_client::{Endpoint, Uri};
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// The Debian package of each tool.
fn package(tool: &str) -> &'static str {
    match tool {
        "qemu-nbd" | "qemu-img" | "qemu-io" => "qemu-utils",
        "qemu-storage-daemon" => "qemu-system-common",
        "nbdkit" => "nbdkit",
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "fio" => "fio",
        _ => "unknown",
    }
}

/// Runs a tool to its end and gives its output; panics with what went wrong.
pub fn run(tool: &str, args: &[&str]) -> String {
    let output =
        Command::new(tool).args(args).stdin(Stdio::null()).output().unwrap_or_else(|e| {
            panic!("{tool}: {e}; install the Debian package {}", package(tool))
        });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// A server process that is killed at the end of the test.
pub struct Peer {
    child: Child,
    pub dir: TempDir,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn uri(&self, export: &str) -> Uri {
        Uri { endpoint: Endpoint::Unix(self.socket()), export: export.to_owned() }
    }
}

/// Starts a server in `dir` and waits until its socket `s` is there.
pub fn start(dir: TempDir, tool: &str, args: &[String]) -> Peer {
    let errors = std::fs::File::create(dir.path().join("stderr")).expect("log file");
    let child = Command::new(tool)
        .args(args)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .unwrap_or_else(|e| panic!("{tool}: {e}; install the Debian package {}", package(tool)));
    let mut peer = Peer { child, dir };
    wait_for(&mut peer.child, peer.dir.path());
    peer
}

fn wait_for(child: &mut Child, dir: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !dir.join("s").exists() {
        let ended = child.try_wait().expect("wait").is_some();
        let words = || std::fs::read_to_string(dir.join("stderr")).unwrap_or_default();
        assert!(!ended, "the server ended before it listened: {}", words());
        assert!(Instant::now() < deadline, "the server never listened: {}", words());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

/// A qcow2 of 64 MiB where *written* and *dirty* differ: data at 1 MiB (64 KiB) and 40 MiB (1 MiB)
/// written before the bitmap `b0`; 8 MiB (128 KiB) data and 16 MiB (64 KiB) zeroes after it.
pub fn image_with_bitmap(dir: &Path) -> String {
    let path = dir.join("disk.qcow2").display().to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "64M"]);
    run("qemu-io", &["-c", "write -P 0x11 1M 64k", "-c", "write -P 0x22 40M 1M", &path]);
    run("qemu-img", &["bitmap", "--add", &path, "b0"]);
    run("qemu-io", &["-c", "write -P 0x33 8M 128k", "-c", "write -z 16M 64k", &path]);
    path
}

/// `qemu-nbd` with more arguments in front of the image.
pub fn qemu_nbd(extra: &[&str], image: impl FnOnce(&Path) -> String) -> Peer {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = image(dir.path());
    let socket = dir.path().join("s").display().to_string();
    let mut args = strings(&["-t", "-e", "4", "-k", &socket]);
    args.extend(strings(extra));
    args.push(path);
    start(dir, "qemu-nbd", &args)
}

/// `nbdkit` in the foreground; `s` is its socket.
pub fn nbdkit(args: &[&str]) -> Peer {
    let dir = tempfile::tempdir().expect("temporary directory");
    let socket = dir.path().join("s").display().to_string();
    let mut all = strings(&["-f", "-U", &socket]);
    all.extend(strings(args));
    start(dir, "nbdkit", &all)
}
