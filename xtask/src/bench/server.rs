//! What serves the images: `qemu-nbd`, and a QEMU whose processor never starts.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use icecore_tests::{Background, Monitor, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::image::BLOCK;
use crate::step::{Failure, Result};

const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(300);
/// The backend of the device `vda`, which the monitor's `qemu-io` writes through.
const BACKEND: &str = "/machine/peripheral/vda/virtio-backend";

/// A `qemu-nbd` that goes on until it is dropped.
pub struct NbdServer {
    process: Background,
    socket: PathBuf,
}

impl NbdServer {
    /// Serves a qcow2 image.
    pub fn start(image: &Path, socket: PathBuf, writable: bool) -> Result<Self> {
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-e", "16", "-f", "qcow2", "-k"]).arg(&socket);
        if !writable {
            command.arg("-r");
        }
        let process = Background::spawn(command.arg(image))?;
        wait_for(&socket)?;
        Ok(Self { process, socket })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The address of its export.
    pub fn uri(&self) -> String {
        uri(&self.socket, "")
    }

    /// Ends it after everything has been written.
    pub fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        self.process.wait_within(STOP).map(drop)
    }
}

/// An NBD address.
pub fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn wait_for(socket: &Path) -> Result<()> {
    wait_until("a server's socket", START, || Ok(UnixStream::connect(socket).is_ok()))
}

/// A QEMU without a guest; one monitor is Icecore's, the other ours.
pub struct Vm {
    process: Background,
    monitor: Monitor,
    qmp: PathBuf,
}

impl Vm {
    /// Starts it on a qcow2 image as disk `vda`; `dir` takes its sockets.
    pub fn start(image: &Path, dir: &Path) -> Result<Self> {
        Self::start_on(&[image], dir)
    }

    /// Starts it on qcow2 images as disks `vda`, `vdb` and so on.
    pub fn start_on(images: &[impl AsRef<Path>], dir: &Path) -> Result<Self> {
        let (qmp, lab) = (dir.join("qmp.sock"), dir.join("lab.sock"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-S", "-nodefaults", "-display", "none", "-m", "64"]);
        for socket in [&qmp, &lab] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        for (image, letter) in images.iter().zip('a'..='z') {
            let name = if letter == 'a' { "disk".to_owned() } else { format!("disk{letter}") };
            let node = json!({
                "driver": "qcow2", "node-name": name, "discard": "unmap",
                "file": { "driver": "file", "filename": image.as_ref(), "discard": "unmap" },
            });
            command.arg("-blockdev").arg(node.to_string());
            command.args(["-device", &format!("virtio-blk-pci,drive={name},id=vd{letter}")]);
        }
        // There the monitor's `qemu-io` says of each write how long it took.
        let process = Background::spawn(command.stdout(Stdio::null()))?;
        wait_for(&lab)?;
        Ok(Self { process, monitor: Monitor::connect(&lab)?, qmp })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Icecore's monitor.
    pub fn qmp(&self) -> &Path {
        &self.qmp
    }

    /// Writes `content` through the device.
    pub fn write_block(&mut self, offset: u64, content: &Path) -> Result<()> {
        write_block(&mut self.monitor, BACKEND, offset, content)
    }

    /// Runs a command of QMP.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.monitor.execute(command, arguments)
    }
}

/// Writes `content` through the device of any QEMU.
pub fn write_block(
    monitor: &mut Monitor,
    backend: &str,
    offset: u64,
    content: &Path,
) -> Result<()> {
    let file = content.display();
    let line = format!("qemu-io -d {backend} \"write -s {file} {offset} {BLOCK}\"");
    // It says nothing when all is well.
    match monitor.human(&line)? {
        said if said.trim().is_empty() => Ok(()),
        said => Err(Failure::new(format!("{line}: {said}"))),
    }
}
