//! A libvirt of the test's own: without systemd, in a mount namespace, seen by nobody else.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{During, Result};
use crate::icecore::{Icecore, Run};
use crate::place::{Scratch, guest_files};
use crate::process::{Background, run, wait_until};
use crate::shell::Shell;

const START_DEADLINE: Duration = Duration::from_secs(60);
/// Boot to an agent that answers takes 5 to 15 s alone, more beside other guests.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);

/// Its own folders over those of the host; ends when its parent does.
const NAMESPACE: &str = r#"
set -e
for dir in run etc lib log; do mkdir -p "$1/$dir"; done
cp -a /etc/libvirt/. "$1/etc/"; cp -a /var/lib/libvirt/. "$1/lib/"
mount --bind "$1/run" /run
mount --bind "$1/etc" /etc/libvirt
mount --bind "$1/lib" /var/lib/libvirt
mount --bind "$1/log" /var/log/libvirt
mkdir -p /run/lock /run/libvirt /run/dbus /etc/libvirt/hooks
printf '%s\n' 'user = "root"' 'group = "root"' 'security_driver = "none"' \
  'cgroup_controllers = []' 'namespaces = []' \
  'swtpm_user = "root"' 'swtpm_group = "root"' > /etc/libvirt/qemu.conf
touch "$1/ready"
exec sleep infinity
"#;

/// The channel of the guest's agent.
pub const AGENT_CHANNEL: &str =
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";

/// A libvirt daemon.
#[derive(Debug)]
pub struct Libvirt {
    daemon: Option<Background>,
    logs: Option<Background>,
    // After the daemons, whose folders these are.
    namespace: Background,
    scratch: Scratch,
}

impl Libvirt {
    /// Starts it.
    pub fn start() -> Result<Self> {
        Self::with_hook(|_| Ok(()))
    }

    /// Starts it when `install` has put hooks into the folder that it is given.
    pub fn with_hook(install: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let scratch = Scratch::new()?;
        std::fs::set_permissions(scratch.path(), Permissions::from_mode(0o755))?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--"]);
        command.args(["sh", "-c", NAMESPACE, "sh"]).arg(scratch.path()).stdin(Stdio::null());
        let namespace = Background::spawn(&mut command)?;
        let mut libvirt = Self { daemon: None, logs: None, namespace, scratch };
        let ready = libvirt.scratch.join("ready");
        wait_until("the namespace", START_DEADLINE, || Ok(ready.exists()))?;
        install(&libvirt.scratch.join("etc/hooks/qemu.d"))?;
        libvirt.logs = Some(libvirt.spawn("virtlogd")?);
        libvirt.start_daemon()?;
        Ok(libvirt)
    }

    fn spawn(&self, daemon: &str) -> Result<Background> {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.namespace.pid().to_string());
        command.args(["--mount", "--", daemon]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Background::spawn(&mut command)
    }

    /// Starts the daemon (again).
    pub fn start_daemon(&mut self) -> Result<()> {
        self.daemon = Some(self.spawn("libvirtd")?);
        wait_until("libvirtd", START_DEADLINE, || Ok(self.virsh(&["version"]).is_ok()))
    }

    /// Kills the daemon, as a crash would; its domains run on.
    pub fn kill_daemon(&mut self) {
        self.daemon = None;
    }

    /// How it is reached.
    pub fn uri(&self) -> String {
        let socket = self.scratch.join("run/libvirt/libvirt-sock");
        format!("qemu:///system?socket={}", socket.display())
    }

    /// The process whose mount namespace it runs in.
    pub fn namespace(&self) -> u32 {
        self.namespace.pid()
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Runs virsh; a failure is one with what it said.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("virsh");
        command.arg("--connect").arg(self.uri()).args(arguments).env("LC_ALL", "C");
        Ok(String::from_utf8_lossy(&run(&mut command)?.stdout).into_owned())
    }

    /// Defines a domain of this name with the test guest: `vda` (ext4, with the ordered writer) and
    /// `vdb` (raw content), both qcow2.
    pub fn define(&self, name: &str) -> Result<Domain<'_>> {
        self.define_with(name, AGENT_CHANNEL)
    }

    /// The same without a channel for the guest's agent.
    pub fn define_without_agent(&self, name: &str) -> Result<Domain<'_>> {
        self.define_with(name, "")
    }

    /// The same with these devices beside the disks and the guest's shell.
    pub fn define_with(&self, name: &str, devices: &str) -> Result<Domain<'_>> {
        self.define_edited(name, devices, |xml| xml)
    }

    /// The same with its XML changed by `edit`.
    pub fn define_edited(
        &self,
        name: &str,
        devices: &str,
        edit: impl FnOnce(String) -> String,
    ) -> Result<Domain<'_>> {
        for (disk, size) in [("vda", "192M"), ("vdb", "64M")] {
            let image = self.path(&format!("{name}-{disk}.qcow2"));
            run(Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(image)
                .arg(size))?;
        }
        let (kernel, initrd) = guest_files()?;
        let disk = |id: &str| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
                 <source file='{}'/><target dev='{id}' bus='virtio'/><serial>{id}</serial></disk>",
                self.path(&format!("{name}-{id}.qcow2")).display()
            )
        };
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{}</kernel>\
             <initrd>{}</initrd><cmdline>console=ttyS0 quiet panic=-1 tsc=reliable \
             random.trust_cpu=on lab.disk=vda:ext4,vdb:raw lab.writer=vda</cmdline></os>\
             <features><acpi/></features><cpu mode='maximum'/><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>{}{}\
             <serial type='file'><source path='{}'/></serial>\
             <controller type='virtio-serial' index='0'/>\
             {devices}<channel type='unix'><source mode='bind' path='{}'/>\
             <target type='virtio' name='icecore.lab.shell'/></channel>\
             <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>\
             <memballoon model='none'/></devices></domain>",
            kernel.display(),
            initrd.display(),
            disk("vda"),
            disk("vdb"),
            self.path(&format!("{name}.log")).display(),
            self.path(&format!("{name}.sh")).display(),
        );
        let file = self.path(&format!("{name}.xml"));
        std::fs::write(&file, edit(xml))?;
        self.virsh(&["define", &file.to_string_lossy()])?;
        Ok(Domain { libvirt: self, name: name.to_owned() })
    }

    /// A domain that is there.
    pub fn domain(&self, name: &str) -> Domain<'_> {
        Domain { libvirt: self, name: name.to_owned() }
    }

    fn kill_guests(&self) {
        let Ok(entries) = std::fs::read_dir(self.scratch.join("run/libvirt/qemu")) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|extension| extension == "pid")
                && let Ok(text) = std::fs::read_to_string(&path)
                && let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw)
            {
                // One that has ended is what is wanted.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.kill_daemon();
        self.kill_guests();
        self.logs = None;
    }
}

/// A domain of it.
#[derive(Debug)]
pub struct Domain<'a> {
    libvirt: &'a Libvirt,
    name: String,
}

impl Domain<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image of a disk.
    pub fn image(&self, disk: &str) -> PathBuf {
        self.libvirt.path(&format!("{}-{disk}.qcow2", self.name))
    }

    /// Runs virsh on it.
    pub fn virsh(&self, command: &str, more: &[&str]) -> Result<String> {
        let mut arguments = vec![command, "--domain", &self.name];
        arguments.extend(more);
        self.libvirt.virsh(&arguments)
    }

    /// Starts it and waits for the guest's shell and its agent.
    pub fn boot(&self) -> Result<Shell> {
        self.virsh("start", &[])?;
        self.wait_ready(&format!("{}.sh", self.name))
    }

    /// Waits for a guest whose shell is behind this socket.
    pub fn wait_ready(&self, socket: &str) -> Result<Shell> {
        let shell = self.wait_shell(socket)?;
        wait_until("the guest agent", BOOT_DEADLINE, || {
            Ok(self.virsh("dumpxml", &[])?.contains("guest_agent.0' state='connected'"))
        })?;
        Ok(shell)
    }

    /// Waits for the shell alone, of a guest without an agent.
    pub fn wait_shell(&self, socket: &str) -> Result<Shell> {
        let mut shell = Shell::connect(&self.libvirt.path(socket))?;
        shell.wait_ready(BOOT_DEADLINE).during("guest boot")?;
        Ok(shell)
    }

    /// Runs a QMP command through libvirt's monitor.
    pub fn qmp(&self, command: &str) -> Result<serde_json::Value> {
        let answer = self.virsh("qemu-monitor-command", &["--cmd", command])?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// Whether it runs.
    pub fn state(&self) -> Result<String> {
        Ok(self.virsh("domstate", &[])?.trim().to_owned())
    }

    /// Its checkpoints.
    pub fn checkpoints(&self) -> Result<Vec<String>> {
        let names = self.virsh("checkpoint-list", &["--name"])?;
        Ok(names.lines().map(str::trim).filter(|n| !n.is_empty()).map(str::to_owned).collect())
    }

    /// Whether a backup job is at work on it.
    pub fn has_job(&self) -> bool {
        self.virsh("backup-dumpxml", &[]).is_ok()
    }

    /// An icecore command about it.
    pub fn icecore(&self, icecore: &Icecore, subcommand: &str) -> Run {
        let run = icecore.on_repository(subcommand).arg("--libvirt");
        run.arg(self.libvirt.uri()).arg(&self.name)
    }
}
