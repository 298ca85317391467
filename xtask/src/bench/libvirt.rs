//! A private libvirt, for virtnbdbackup can do nothing without one.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use icecore_tests::{Background, Monitor, wait_until};

use super::lab::{Lab, require};
use super::measure::{Children, Sample};
use super::server::write_block;
use crate::step::{Result, captured, program};

const DOMAIN: &str = "icecore-bench";
const START: Duration = Duration::from_secs(30);
/// libvirt chooses its own ids for devices; this is the first virtio disk.
const BACKEND: &str = "/machine/peripheral/virtio-disk0/virtio-backend";

/// A libvirt daemon with one domain.
pub struct Libvirt {
    _daemon: Background,
    _logs: Background,
    dir: PathBuf,
    /// Of the domain while it runs.
    running: Option<(Monitor, u32)>,
}

impl Libvirt {
    /// Starts the daemon and defines a domain on `image`, powered off.
    pub fn start(lab: &Lab, image: &Path) -> Result<Self> {
        require("virtnbdbackup")?;
        require("libvirtd")?;
        let dir = lab.fresh("libvirt")?;
        // The domain runs as a user of its own and makes a socket here.
        std::fs::set_permissions(&dir, Permissions::from_mode(0o777))?;
        let conf = dir.join("libvirtd.conf");
        let run = dir.display();
        std::fs::write(&conf, format!("unix_sock_dir = \"{run}\"\nauth_unix_rw = \"none\"\n"))?;
        let quiet = |name: &str| {
            let mut command = Command::new(name);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let logs = Background::spawn(&mut quiet("virtlogd"))?;
        let mut daemon = quiet("libvirtd");
        daemon.arg("-f").arg(&conf).arg("-p").arg(dir.join("libvirtd.pid"));
        let daemon = Background::spawn(&mut daemon)?;
        let libvirt = Self { _daemon: daemon, _logs: logs, dir, running: None };
        wait_until("libvirtd", START, || Ok(captured(&mut libvirt.virsh("version")).is_ok()))?;
        let xml = libvirt.dir.join("domain.xml");
        std::fs::write(&xml, domain(image, &libvirt.dir))?;
        let _ = captured(libvirt.virsh("undefine").args([DOMAIN, "--checkpoints-metadata"]));
        captured(libvirt.virsh("define").arg(&xml))?;
        Ok(libvirt)
    }

    /// Starts the domain; its processor stays stopped.
    pub fn boot(&mut self) -> Result<()> {
        captured(self.virsh("start").args([DOMAIN, "--paused"]))?;
        let pid = std::fs::read_to_string(format!("/run/libvirt/qemu/{DOMAIN}.pid"))?;
        let pid = pid.trim().parse().map_err(|error| {
            crate::step::Failure::new(format!("the pid of {DOMAIN} is not understood: {error}"))
        })?;
        self.running = Some((Monitor::connect(&self.dir.join("lab.sock"))?, pid));
        Ok(())
    }

    /// Writes a block through the domain's device.
    pub fn write_block(&mut self, offset: u64, content: &Path) -> Result<()> {
        match &mut self.running {
            Some((monitor, _)) => write_block(monitor, BACKEND, offset, content),
            None => Ok(()),
        }
    }

    /// A copy of the powered-off domain, which the tool serves by a `qemu-nbd` of its own.
    pub fn copy(&self, lab: &Lab, compress: bool) -> Result<Sample> {
        let out = lab.fresh("virtnbdbackup")?;
        let mut command = self.tool("copy", &out);
        if compress {
            command.arg("--compress");
        }
        lab.measure(command, Children::Server, None, Some(&out))
    }

    /// A point of the running domain.
    pub fn online(&self, lab: &Lab, level: &str) -> Result<Sample> {
        let out = if level == "full" { lab.fresh("virt-online")? } else { lab.path("virt-online") };
        let pid = self.running.as_ref().map(|(_, pid)| *pid);
        lab.measure(self.tool(level, &out), Children::Client, pid, Some(&out))
    }

    fn tool(&self, level: &str, out: &Path) -> Command {
        let mut command = program("virtnbdbackup");
        command.arg("-U").arg(self.uri()).args(["-n", "-d", DOMAIN, "-l", level, "-o"]).arg(out);
        command
    }

    fn uri(&self) -> String {
        format!("qemu:///system?socket={}", self.dir.join("libvirt-sock").display())
    }

    fn virsh(&self, subcommand: &str) -> Command {
        let mut command = program("virsh");
        command.arg("-c").arg(self.uri()).arg(subcommand);
        command
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if self.running.is_some() {
            let _ = captured(self.virsh("destroy").arg(DOMAIN));
        }
        let _ = captured(self.virsh("undefine").args([DOMAIN, "--checkpoints-metadata"]));
    }
}

fn domain(image: &Path, dir: &Path) -> String {
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
         <name>{DOMAIN}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
         <seclabel type='none'/><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{}'/><target dev='vda' bus='virtio'/></disk>\
         <memballoon model='none'/></devices><qemu:commandline><qemu:arg value='-qmp'/>\
         <qemu:arg value='unix:{}/lab.sock,server=on,wait=off'/></qemu:commandline></domain>",
        image.display(),
        dir.display(),
    )
}
