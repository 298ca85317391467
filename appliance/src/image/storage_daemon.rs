//! An image served over NBD by a `qemu-storage-daemon` of our own.
//!
//! It ends with us (`setpriv --pdeathsig`), so that an image is not held after a kill -9. One that
//! may write is asked to end, whatever happened: killed, it would leave the image's bitmaps behind as
//! not to be trusted.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::Format;
use super::info::{in_use, protocol, tells_of_lock, utf8};
use crate::failure::{Failure, Outcome};

/// What setpriv says of a program that is not there.
const ABSENT: &str = "failed to execute";
/// Debian 12 has qemu-storage-daemon in the second one, later releases in the first.
const PACKAGES: &str = "install the packages qemu-utils, qemu-system-common and util-linux";

/// The daemon opens its socket in tens of milliseconds; a host under load gets this long.
const START_WAIT_MAX: Duration = Duration::from_secs(20);
/// Flushing on the way out takes as long as the storage does; then it is killed.
const END_WAIT_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

/// How an image is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// Read-only and without a lock, so that a VM may start meanwhile; with this bitmap of it.
    Shared { bitmap: Option<String> },
    /// Writable, under the image's write lock; with this bitmap of it, which goes on recording.
    Exclusive { bitmap: Option<String> },
}

/// A storage daemon with one export.
#[derive(Debug)]
pub struct StorageDaemon {
    child: Child,
    socket: PathBuf,
    writes: bool,
}

/// The name of the one export.
pub const EXPORT: &str = "disk";

/// Tells the sockets of one process apart.
static STARTED: AtomicU64 = AtomicU64::new(0);

impl StorageDaemon {
    /// Serves `image` on a new socket in `dir`, a private directory of the run.
    pub fn start(image: &Path, format: Format, served: &Served, dir: &Path) -> Outcome<Self> {
        let tried = format!("serve the image {}", image.display());
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let socket = dir.join(format!("image-{number}.sock"));
        // QEMU would take the name over, and whoever connects by it would end up at another image.
        if socket.symlink_metadata().is_ok() {
            return Err(Failure::failed(tried, format!("{} exists already", socket.display())));
        }
        let child = spawn(image, format, served, &socket, &tried)?;
        let writes = matches!(served, Served::Exclusive { .. });
        let mut daemon = Self { child, socket, writes };
        daemon.wait(image, &tried)?;
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

    fn wait(&mut self, image: &Path, tried: &str) -> Outcome<()> {
        let started = Instant::now();
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
                let said = self.last_words();
                return Err(match tells_of_lock(&said) {
                    true => in_use(image, tried, &said),
                    false if said.contains(ABSENT) => Failure::failed(tried, said).next(PACKAGES),
                    false => Failure::failed(tried, said),
                });
            }
            if started.elapsed() > START_WAIT_MAX {
                return Err(Failure::failed(tried, "qemu-storage-daemon does not open its socket"));
            }
            std::thread::sleep(POLL);
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
        self.end()
    }

    /// As [`stop`](Self::stop), where another takes its place.
    pub fn end(&mut self) -> Outcome<()> {
        let tried = "close an image";
        self.ask_to_end().map_err(|e| Failure::failed(tried, e))?;
        let status = self.child.wait().map_err(|e| Failure::failed(tried, e))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::failed(tried, format!("qemu-storage-daemon ended with {status}")))
    }

    fn ask_to_end(&self) -> std::io::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM)?)
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    fn end_within(&mut self, limit: Duration) {
        let asked = Instant::now();
        while !self.has_ended() && asked.elapsed() < limit {
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        // After stop() it has been waited for, and its pid may be another's.
        if self.writes && !self.has_ended() && self.ask_to_end().is_ok() {
            self.end_within(END_WAIT_MAX);
        }
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
        "file": { "driver": protocol(image), "filename": utf8(image, tried)?, "discard": "unmap" },
    });
    let mut export = json!({
        "type": "nbd", "id": "e", "node-name": "image", "name": EXPORT, "writable": !read_only,
    });
    if let Served::Shared { bitmap: Some(bitmap) } | Served::Exclusive { bitmap: Some(bitmap) } =
        served
    {
        export["bitmaps"] = json!([bitmap]);
    }
    let addr = json!({ "type": "unix", "path": utf8(socket, tried)? });
    let server = json!({ "addr": addr, "max-connections": 0 });
    Command::new("setpriv")
        .args(["--pdeathsig", if read_only { "KILL" } else { "TERM" }, "--", "qemu-storage-daemon"])
        .args(["--blockdev", &node.to_string()])
        .args(["--nbd-server", &server.to_string()])
        .args(["--export", &export.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| {
            Failure::failed(tried, format!("qemu-storage-daemon does not start: {e}"))
                .next(PACKAGES)
        })
}
