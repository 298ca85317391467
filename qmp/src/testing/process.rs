//! Real QEMU processes without a guest, killed when dropped.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take to open its monitor's socket.
const START_MAX: Duration = Duration::from_secs(20);

/// A QEMU or a storage daemon with a monitor in a folder of its own.
#[derive(Debug)]
pub struct Process {
    child: Child,
    monitor: PathBuf,
}

impl Process {
    /// Runs the command with a QMP monitor at `folder/qmp.sock`, and waits for the socket.
    pub fn start(mut command: Command, folder: &Path) -> io::Result<Self> {
        let monitor = folder.join("qmp.sock");
        let socket = format!("path={},server=on,wait=off", monitor.display());
        if command.get_program().to_string_lossy().contains("storage-daemon") {
            let chardev = format!("socket,id=icqmp,{socket}");
            command.args(["--chardev", &chardev, "--monitor", "chardev=icqmp"]);
        } else {
            command.arg("-qmp").arg(format!("unix:{socket}"));
        }
        let child = command.stdin(Stdio::null()).current_dir(folder).spawn()?;
        let mut process = Self { child, monitor };
        process.wait_for_socket()?;
        Ok(process)
    }

    fn wait_for_socket(&mut self) -> io::Result<()> {
        let until = Instant::now() + START_MAX;
        while !is_listening(&self.monitor)? {
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(format!("it ended at once: {status}")));
            }
            if Instant::now() > until {
                return Err(io::Error::other("its monitor did not listen"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The monitor's socket.
    pub fn monitor(&self) -> &Path {
        &self.monitor
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, such as `Signal::STOP`.
    pub fn signal(&self, signal: rustix::process::Signal) -> io::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Ends it with SIGKILL and waits for its end.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> io::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Whether somebody listens on the unix socket. Between bind and listen it is there and refuses;
/// trying it would take the one place that
/// a monitor has, so the kernel's table is asked (proc(5), `/proc/net/unix`, flag `SO_ACCEPTCON`).
pub fn is_listening(path: &Path) -> io::Result<bool> {
    let path = path.to_string_lossy();
    let sockets = std::fs::read_to_string("/proc/net/unix")?;
    Ok(sockets.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some("00010000") && columns.next_back() == Some(&path)
    }))
}

/// The system emulator under test: `ICECORE_TEST_QEMU`, else the installed one.
pub fn binary_under_test() -> OsString {
    std::env::var_os("ICECORE_TEST_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// A stopped machine without a guest, with no default devices, under the emulator given.
pub fn qemu_command(binary: impl Into<OsString>) -> Command {
    let mut command = Command::new(binary.into());
    command.args(["-M", "q35", "-S", "-accel", "tcg", "-m", "64", "-display", "none"]);
    command.args(["-nodefaults", "-serial", "none"]);
    command
}

/// A storage daemon.
pub fn daemon_command() -> Command {
    Command::new("qemu-storage-daemon")
}
