//! An image served over NBD by a `qemu-storage-daemon` of our own.
//!
//! It dies with us (`setpriv --pdeathsig`), so that an image is never held after a kill -9.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::Format;
use crate::failure::{Failure, Outcome};

/// The daemon opens its socket in tens of milliseconds; a host under load gets this long.
const START_WAIT_MAX: Duration = Duration::from_secs(20);
const START_POLL: Duration = Duration::from_millis(5);

/// How an image is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// Read-only and without a lock, so that a VM may start meanwhile; with this bitmap of it.
    Shared { bitmap: Option<String> },
    /// Writable, under the image's write lock.
    Exclusive,
}

/// A storage daemon with one export.
#[derive(Debug)]
pub struct StorageDaemon {
    child: Child,
    socket: PathBuf,
}

/// The name of the one export.
pub const EXPORT: &str = "disk";

impl StorageDaemon {
    /// Serves `image` on a socket in `dir`, a private directory.
    pub fn start(image: &Path, format: Format, served: &Served, dir: &Path) -> Outcome<Self> {
        let tried = format!("serve the image {}", image.display());
        let socket = dir.join("image.sock");
        let mut daemon = Self { child: spawn(image, format, served, &socket, &tried)?, socket };
        daemon.wait(&tried)?;
        Ok(daemon)
    }

    /// Its NBD socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The name of its export.
    pub fn export(&self) -> &'static str {
        EXPORT
    }

    fn wait(&mut self, tried: &str) -> Outcome<()> {
        let started = Instant::now();
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
                return Err(Failure::failed(tried, self.last_words()));
            }
            if started.elapsed() > START_WAIT_MAX {
                return Err(Failure::failed(tried, "qemu-storage-daemon does not open its socket"));
            }
            std::thread::sleep(START_POLL);
        }
        Ok(())
    }

    fn last_words(&mut self) -> String {
        let mut said = String::new();
        if let Some(stderr) = self.child.stderr.as_mut() {
            // What could be read is said; there is nothing better to say when it cannot.
            let _ = std::io::Read::read_to_string(stderr, &mut said);
        }
        said.trim().replace('\n', "; ")
    }

    /// Ends the daemon: it flushes and closes the image before it goes.
    pub fn stop(mut self) -> Outcome<()> {
        let tried = "close an image";
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .map_err(|e| Failure::failed(tried, e))?;
        let status = self.child.wait().map_err(|e| Failure::failed(tried, e))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::failed(tried, format!("qemu-storage-daemon ended with {status}")))
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn spawn(
    image: &Path,
    format: Format,
    served: &Served,
    socket: &Path,
    tried: &str,
) -> Outcome<Child> {
    let read_only = matches!(served, Served::Shared { .. });
    let node = json!({
        "driver": format.name(), "node-name": "image", "read-only": read_only,
        "force-share": read_only, "discard": "unmap",
        "file": { "driver": protocol(image), "filename": image, "discard": "unmap" },
    });
    let mut export = json!({
        "type": "nbd", "id": "e", "node-name": "image", "name": EXPORT, "writable": !read_only,
    });
    if let Served::Shared { bitmap: Some(bitmap) } = served {
        export["bitmaps"] = json!([bitmap]);
    }
    let server = json!({ "addr": { "type": "unix", "path": socket }, "max-connections": 0 });
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "qemu-storage-daemon"])
        .args(["--blockdev", &node.to_string()])
        .args(["--nbd-server", &server.to_string()])
        .args(["--export", &export.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| {
            Failure::failed(tried, format!("qemu-storage-daemon does not start: {e}"))
                .next("install the packages qemu-utils and util-linux")
        })
}

fn protocol(image: &Path) -> &'static str {
    use std::os::unix::fs::FileTypeExt as _;
    match std::fs::metadata(image) {
        Ok(meta) if meta.file_type().is_block_device() => "host_device",
        _ => "file",
    }
}
