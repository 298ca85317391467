//! A QEMU process with its disks, under the test's control.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::agent::agent_answers;
use crate::disk::Disk;
use crate::failure::{During, Failure, Result};
use crate::image::image_to_raw;
use crate::monitor::Monitor;
use crate::place::Scratch;
use crate::process::{Background, wait_until};
use crate::reference::Reference;
use crate::shell::Shell;
use crate::spec::VmSpec;

/// QEMU opens its sockets within a second; a chroot on a busy machine takes longer.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Boot to an agent that answers takes 5 to 15 s alone, more beside other guests.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// For `quit`, or a guest's own clean end.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// A VM of the laboratory. Its disks stay when QEMU ends, until this value goes.
#[derive(Debug)]
pub struct TestVm {
    pub(crate) spec: VmSpec,
    // Before the folder: QEMU ends first.
    running: Option<Running>,
    scratch: Scratch,
}

#[derive(Debug)]
struct Running {
    process: Background,
    monitor: Arc<Mutex<Monitor>>,
    shell: Option<Mutex<Shell>>,
}

impl TestVm {
    pub(crate) fn create(spec: VmSpec) -> Result<Self> {
        let scratch = Scratch::new()?;
        for disk in &spec.disks {
            disk.create(scratch.path())?;
        }
        let mut vm = Self { spec, scratch, running: None };
        vm.power_on()?;
        Ok(vm)
    }

    /// Starts QEMU (again) on the disks as they are.
    pub fn power_on(&mut self) -> Result<()> {
        let dir = self.scratch.path();
        for socket in ["qmp", "lab", "qga", "shell"] {
            let _ = std::fs::remove_file(dir.join(format!("{socket}.sock")));
        }
        let log = File::create(dir.join("qemu.log"))?;
        let mut command = self.spec.command(dir)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut process = Background::spawn(&mut command)?;
        let monitor = connect_monitor(&mut process, dir)?;
        let shell = match self.spec.guest {
            true => Some(Mutex::new(Shell::connect(&dir.join("shell.sock"))?)),
            false => None,
        };
        let monitor = Arc::new(Mutex::new(monitor));
        self.running = Some(Running { process, monitor, shell });
        Ok(())
    }

    /// Waits until the guest runs commands and its agent, if it has one, answers.
    pub fn wait_ready(&self) -> Result<()> {
        self.wait_guest()?;
        if self.spec.agent {
            let socket = self.qga();
            wait_until("guest agent", BOOT_DEADLINE, || Ok(agent_answers(&socket)))?;
        }
        Ok(())
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The VM's own folder.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// The monitor socket for Icecore.
    pub fn qmp(&self) -> PathBuf {
        self.scratch.join("qmp.sock")
    }

    /// The guest agent's socket.
    pub fn qga(&self) -> PathBuf {
        self.scratch.join("qga.sock")
    }

    /// Whether it has a guest agent.
    pub fn has_agent(&self) -> bool {
        self.spec.agent
    }

    /// Its disks, in order.
    pub fn disks(&self) -> &[Disk] {
        &self.spec.disks
    }

    /// The image file of a disk.
    pub fn image(&self, id: &str) -> Result<PathBuf> {
        Ok(self.find_disk(id)?.file(self.scratch.path()))
    }

    pub(crate) fn find_disk(&self, id: &str) -> Result<&Disk> {
        let found = self.spec.disks.iter().find(|disk| disk.id == id);
        found.ok_or_else(|| Failure::new(format!("the VM has no disk {id}")))
    }

    /// The test's own monitor.
    pub fn monitor(&self) -> Result<MutexGuard<'_, Monitor>> {
        Ok(lock(&self.running()?.monitor))
    }

    pub(crate) fn shared_monitor(&self) -> Result<Arc<Mutex<Monitor>>> {
        Ok(Arc::clone(&self.running()?.monitor))
    }

    /// The node name of a disk that is attached by `-blockdev`.
    pub fn node(&self, id: &str) -> Result<String> {
        Ok(self.find_disk(id)?.drive())
    }

    /// Takes an external snapshot of a disk, as an operator's tool would: its image becomes the
    /// backing file of a new one.
    pub fn external_snapshot(&mut self, id: &str) -> Result<()> {
        let (node, file) = (self.node(id)?, self.scratch.join(format!("{id}-snapshot.qcow2")));
        let arguments = json!({
            "node-name": node, "snapshot-file": file, "format": "qcow2",
            "snapshot-node-name": format!("{node}-snapshot"),
        });
        self.monitor()?.execute("blockdev-snapshot-sync", arguments)?;
        let disk = self.spec.disks.iter_mut().find(|disk| disk.id == id);
        disk.into_iter().for_each(|disk| disk.moved_to = Some(file.clone()));
        Ok(())
    }

    /// Changes the size of a disk while it is in use, as the monitor allows it for one that is
    /// attached by `-drive`: whatever node the device has at the moment.
    pub fn resize(&self, id: &str, bytes: u64) -> Result<()> {
        let arguments = json!({ "device": self.node(id)?, "size": bytes });
        self.monitor()?.execute("block_resize", arguments).map(drop)
    }

    /// Runs a shell command in the guest; a status other than 0 is a failure.
    pub fn guest(&self, command: &str) -> Result<String> {
        self.shell()?.run(command)
    }

    fn shell(&self) -> Result<MutexGuard<'_, Shell>> {
        let shell = self.running()?.shell.as_ref();
        shell.map(lock).ok_or_else(|| Failure::new("this VM has no guest"))
    }

    /// Waits until the guest runs commands, whoever holds its agent.
    pub fn wait_guest(&self) -> Result<()> {
        match self.spec.guest {
            true => self.shell()?.wait_ready(BOOT_DEADLINE).during("guest boot"),
            false => Ok(()),
        }
    }

    /// Waits until the guest's writer has finished `rounds` more rounds.
    pub fn wait_writer(&self, rounds: u64) -> Result<()> {
        let Some(disk) = self.spec.writer.last().cloned() else {
            return Err(Failure::new("this VM has no writer"));
        };
        let command = format!("ordered-writer last {disk} 2>/dev/null || echo 0");
        let last = || -> Result<u64> { Ok(self.guest(&command)?.trim().parse().unwrap_or(0)) };
        let until = last()? + rounds;
        wait_until("the guest's writer", BOOT_DEADLINE, || Ok(last()? >= until))
    }

    /// Whether QEMU still runs.
    pub fn alive(&mut self) -> bool {
        match &mut self.running {
            Some(running) => matches!(running.process.ended(), Ok(None)),
            None => false,
        }
    }

    /// A failure, with QEMU's last words, when QEMU has died.
    pub fn require_alive(&mut self) -> Result<()> {
        if self.alive() {
            return Ok(());
        }
        Err(Failure::new(format!("QEMU has died: {}", self.qemu_log())))
    }

    /// What QEMU wrote to its standard error.
    pub fn qemu_log(&self) -> String {
        std::fs::read_to_string(self.scratch.join("qemu.log")).unwrap_or_default()
    }

    /// Sends QEMU a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.running()?.process.signal(signal);
        Ok(())
    }

    /// Kills QEMU as a power cut of the host's process would.
    pub fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.process.kill();
        }
    }

    /// Leaves QEMU running and its folder on disk: its process id, and where.
    pub fn leave_running(mut self) -> Result<(u32, PathBuf)> {
        let running = self.running.take().ok_or_else(|| Failure::new("QEMU is not running"))?;
        Ok((running.process.release(), self.scratch.keep()))
    }

    /// Ends QEMU by `quit`: images and bitmaps are stored, the guest is not asked.
    pub fn quit(&mut self) -> Result<()> {
        self.monitor()?.execute("quit", json!({}))?;
        self.await_end()
    }

    /// Has the guest shut down by itself.
    pub fn power_off(&mut self) -> Result<()> {
        self.shell()?.send("clean-poweroff")?;
        self.await_end()
    }

    /// Waits for QEMU's own end.
    pub fn await_end(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        running.process.wait_within(STOP_DEADLINE).during("QEMU's end").map(drop)
    }

    /// Reads all disks as they are now, into raw files: through a QEMU that is stopped for it, or
    /// from the images of one that is off.
    pub fn reference(&self) -> Result<Reference> {
        match &self.running {
            Some(running) => Reference::read(&running.monitor, self.dir(), &self.spec.disks),
            None => Reference::read_images(self.dir(), &self.spec.disks),
        }
    }

    /// What a disk's image holds, as a raw file; QEMU must be off, or stopped.
    pub fn disk_to_raw(&self, id: &str, raw: &Path) -> Result<()> {
        let disk = self.find_disk(id)?;
        image_to_raw(&disk.file(self.dir()), disk.format(), raw)
    }

    fn running(&self) -> Result<&Running> {
        self.running.as_ref().ok_or_else(|| Failure::new("QEMU is not running"))
    }
}

/// A test that failed while it held the lock is failing anyway.
pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connect_monitor(process: &mut Background, dir: &Path) -> Result<Monitor> {
    let until = Instant::now() + START_DEADLINE;
    loop {
        if let Some(status) = process.ended()? {
            let log = std::fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
            return Err(Failure::new(format!("QEMU did not start ({status}): {log}")));
        }
        match Monitor::connect(&dir.join("lab.sock")) {
            Ok(monitor) => return Ok(monitor),
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
