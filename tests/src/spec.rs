//! What a test VM is made of, and QEMU's command line for it.

use std::path::Path;
use std::process::Command;

use crate::disk::{Bus, Disk, Fs};
use crate::failure::Result;
use crate::place::guest_files;
use crate::qemu::Qemu;
use crate::vm::TestVm;

/// Enough for the guest with its writer; `mkfs` and the page cache fit.
const GUEST_MEMORY_MIB: u32 = 256;

/// A description of a VM, from which it is started.
#[derive(Clone, Debug)]
pub struct VmSpec {
    pub(crate) name: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) agent: bool,
    pub(crate) guest: bool,
    pub(crate) writer: Vec<String>,
    pub(crate) qemu: Qemu,
}

impl VmSpec {
    /// A VM with the test guest and its agent, on the installed QEMU, with no disks yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            disks: Vec::new(),
            agent: true,
            guest: true,
            writer: Vec::new(),
            qemu: Qemu::Installed,
        }
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Without a guest agent.
    pub fn no_agent(mut self) -> Self {
        self.agent = false;
        self
    }

    /// Without a guest at all: QEMU is started and its processor stays stopped. It is there in a
    /// moment; the test writes through the device with [`TestVm::qemu_io`].
    pub fn no_guest(mut self) -> Self {
        self.guest = false;
        self.agent = false;
        self
    }

    /// Starts the ordered writer over these disks as soon as the guest is up.
    pub fn writer(mut self, disks: &[&str]) -> Self {
        self.writer = disks.iter().map(|id| (*id).to_owned()).collect();
        self
    }

    /// On another QEMU.
    pub fn qemu(mut self, qemu: Qemu) -> Self {
        self.qemu = qemu;
        self
    }

    /// Makes blank disks and starts QEMU; see [`TestVm::wait_ready`].
    pub fn start(self) -> Result<TestVm> {
        TestVm::create(self)
    }

    /// Makes blank disks, starts QEMU and waits for the guest (and its agent, if it has one).
    pub fn boot(self) -> Result<TestVm> {
        let vm = TestVm::create(self)?;
        vm.wait_ready()?;
        Ok(vm)
    }

    pub(crate) fn command(&self, dir: &Path) -> Result<Command> {
        let mut command = self.qemu.command()?;
        let machine =
            if self.disks.iter().any(|disk| disk.bus == Bus::Sata) { "q35" } else { "pc" };
        command.args(["-name", &self.name, "-machine", machine, "-accel", "tcg,thread=multi"]);
        command.args(["-cpu", "max", "-m", &GUEST_MEMORY_MIB.to_string()]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.arg("-serial").arg(format!("file:{}", dir.join("console.log").display()));
        for socket in ["qmp", "lab"] {
            let path = dir.join(format!("{socket}.sock"));
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        if self.guest {
            self.guest_arguments(&mut command, dir)?;
        } else {
            command.arg("-S");
        }
        self.disk_arguments(&mut command, dir);
        Ok(command)
    }

    fn guest_arguments(&self, command: &mut Command, dir: &Path) -> Result<()> {
        let (kernel, initrd) = guest_files()?;
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        command.arg("-append").arg(self.kernel_line());
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        self.port(command, dir, "shell", "icecore.lab.shell");
        if self.agent {
            self.port(command, dir, "qga", "org.qemu.guest_agent.0");
        }
        Ok(())
    }

    fn port(&self, command: &mut Command, dir: &Path, id: &str, name: &str) {
        let path = dir.join(format!("{id}.sock"));
        let path = path.display();
        command.arg("-chardev").arg(format!("socket,id={id},path={path},server=on,wait=off"));
        command.arg("-device").arg(format!("virtserialport,chardev={id},name={name}"));
    }

    fn kernel_line(&self) -> String {
        let disks: Vec<String> =
            self.disks.iter().map(|disk| format!("{}:{}", disk.id, disk.fs.name())).collect();
        let mut line = "console=ttyS0 quiet panic=-1 tsc=reliable random.trust_cpu=on".to_owned();
        line += &format!(" lab.disk={}", disks.join(","));
        if !self.writer.is_empty() {
            line += &format!(" lab.writer={}", self.writer.join(","));
        }
        line
    }

    fn disk_arguments(&self, command: &mut Command, dir: &Path) {
        let scsi = |iothread| {
            self.disks.iter().any(|disk| disk.bus == Bus::VirtioScsi && disk.iothread == iothread)
        };
        if scsi(false) {
            command.args(["-device", "virtio-scsi-pci,id=lab-scsi"]);
        }
        if scsi(true) {
            command.args(["-object", "iothread,id=lab-scsi-thread"]);
            command.args(["-device", "virtio-scsi-pci,id=lab-scsi-iot,iothread=lab-scsi-thread"]);
        }
        for (position, disk) in self.disks.iter().enumerate() {
            let index = self.disks[..position].iter().filter(|one| one.bus == disk.bus).count();
            command.args(disk.arguments(dir, index));
        }
    }

    /// The disks with a file system, in order.
    pub(crate) fn filesystems(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| disk.fs != Fs::Raw)
    }
}
