//! A small Debian of the test's own: a copy-on-write view of the one that set-up has made.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{Failure, Result};
use crate::place::{Scratch, provisioned};
use crate::process::{Background, run, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(30);

/// Mounts for its own eyes alone; they end with the process.
const NAMESPACE: &str = r#"
set -e
mkdir -p "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
mount -t tmpfs tmpfs "$1/root/run"
touch "$1/ready"
exec sleep infinity
"#;

/// The root of a Debian.
#[derive(Debug)]
pub struct Debian {
    namespace: Background,
    scratch: Scratch,
    /// Its systemd, where it was booted.
    init: Option<u32>,
}

impl Debian {
    /// A fresh one without a running systemd.
    pub fn new() -> Result<Self> {
        let below = below()?;
        let scratch = Scratch::new()?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--", "sh", "-c", NAMESPACE, "sh"]);
        command.arg(scratch.path()).arg(below).stdin(Stdio::null());
        let namespace = Background::spawn(&mut command)?;
        let debian = Self { namespace, scratch, init: None };
        let ready = debian.scratch.join("ready");
        wait_until("the Debian", START_DEADLINE, || Ok(ready.exists()))?;
        Ok(debian)
    }

    /// A fresh one whose systemd runs as its first process.
    pub fn boot() -> Result<Self> {
        let mut command = Command::new("systemd-nspawn");
        command.args(["--register=no", "--keep-unit", "--volatile=overlay", "--console=pipe"]);
        command.arg("--boot").arg("--directory").arg(below()?);
        if Path::new("/sys/fs/cgroup/systemd").exists() {
            // This machine has the older kind of control groups.
            command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "0");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let namespace = Background::spawn(&mut command)?;
        let mut debian = Self { namespace, scratch: Scratch::new()?, init: None };
        wait_until("the first process", START_DEADLINE, || {
            debian.init = child_of(debian.namespace.pid());
            Ok(debian.init.is_some())
        })?;
        wait_until("the Debian", START_DEADLINE, || {
            Ok(debian.run(&["systemctl", "is-system-running"]).is_ok())
        })?;
        Ok(debian)
    }

    /// Its root, as processes of its namespace see it.
    fn root(&self) -> PathBuf {
        self.scratch.join("root")
    }

    /// The same, seen from here.
    fn outside(&self) -> PathBuf {
        if let Some(init) = self.init {
            return PathBuf::from(format!("/proc/{init}/root"));
        }
        let root = self.root();
        let root = root.strip_prefix("/").unwrap_or(&root);
        PathBuf::from(format!("/proc/{}/root", self.namespace.pid())).join(root)
    }

    /// Puts a file into it.
    pub fn put(&self, file: &Path, path: &str) -> Result<()> {
        std::fs::copy(file, self.outside().join(path.trim_start_matches('/')))?;
        Ok(())
    }

    /// A command in it.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        match self.init {
            Some(init) => command.arg("--target").arg(init.to_string()).args(["--all", "--"]),
            None => {
                command.arg("--target").arg(self.namespace.pid().to_string());
                command.args(["--mount", "--", "chroot"]).arg(self.root())
            }
        };
        command.args(words);
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    /// Runs a command in it; a failure is one with what it said.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let output = run(&mut self.command(words))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a script in it, with nobody who could answer a question.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-euc", script])
    }

    /// Starts a command in it.
    pub fn start(&self, words: &[&str]) -> Result<Background> {
        let mut command = self.command(words);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Background::spawn(&mut command)
    }
}

/// The one that set-up has made.
fn below() -> Result<PathBuf> {
    let below = provisioned().join("debian-root");
    if below.join("complete").exists() {
        return Ok(below);
    }
    let why = format!("no Debian in {}: run `cargo xtask setup --long`", below.display());
    Err(Failure::new(why))
}

fn child_of(parent: u32) -> Option<u32> {
    let children =
        std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

impl Drop for Debian {
    /// The daemon's workers are nobody's children here: whoever lives in this root ends.
    fn drop(&mut self) {
        let place = |path: &Path| std::fs::metadata(path).map(|at| (at.dev(), at.ino())).ok();
        let Some(root) = place(&self.outside()) else { return };
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw)
                && place(&entry.path().join("root")) == Some(root)
            {
                // One that has ended is what is wanted.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}
