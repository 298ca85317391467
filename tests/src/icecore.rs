//! The `icecore` binary, run from outside.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::place::Scratch;
use crate::process::{Background, collect, drain, wait_until};
use crate::vm::TestVm;

/// No command of a test takes longer; at the deadline it is killed and the test fails.
const RUN_DEADLINE: Duration = Duration::from_secs(180);

/// Names the key of an encrypted repository.
const KEY_FILE: &str = "ICECORE_KEY_FILE";

/// From the start of a backup to its copy.
const COPY_DEADLINE: Duration = Duration::from_secs(30);

/// One user of Icecore: a binary, a state folder and a repository.
#[derive(Debug)]
pub struct Icecore {
    scratch: Scratch,
    binary: PathBuf,
    repository: PathBuf,
    /// What it takes to reach the repository.
    environment: Vec<(String, OsString)>,
}

/// A repository somewhere, and what it takes to reach it.
#[derive(Clone, Debug, Default)]
pub struct Site {
    /// Its address, as on the command line.
    pub address: String,
    /// Environment variables that every command gets.
    pub environment: Vec<(String, OsString)>,
    /// More arguments for `repo init`.
    pub init: Vec<String>,
}

/// A new key file that only its owner may read.
fn make_key(path: &Path) -> Result<()> {
    let mut key = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut key)?;
    let mut private = OpenOptions::new();
    Ok(private.write(true).create_new(true).mode(0o600).open(path)?.write_all(&key)?)
}

impl Icecore {
    /// With a fresh state folder and a fresh repository with the defaults.
    pub fn new() -> Result<Self> {
        Self::with_init(&[])
    }

    /// With another binary, a fresh state folder and a fresh repository.
    pub fn with_binary(binary: PathBuf) -> Result<Self> {
        let scratch = Scratch::new()?;
        let repository = scratch.join("repository");
        Self { repository, binary, scratch, environment: Vec::new() }.init(&[])
    }

    /// With a fresh state folder and a new repository at a site.
    pub fn at(site: &Site) -> Result<Self> {
        let arguments: Vec<&str> = site.init.iter().map(String::as_str).collect();
        Self::without_repository_at(site)?.init(&arguments)
    }

    /// With the site of a repository that may be there or not.
    pub fn without_repository_at(site: &Site) -> Result<Self> {
        let Site { address, environment, .. } = site.clone();
        let (scratch, binary) = (Scratch::new()?, icecore_binary()?);
        Ok(Self { binary, repository: address.into(), scratch, environment })
    }

    /// Another host with the same repository: it has nothing of this one's state.
    pub fn another_host(&self) -> Result<Self> {
        Ok(Self {
            scratch: Scratch::new()?,
            binary: self.binary.clone(),
            repository: self.repository.clone(),
            environment: self.environment.clone(),
        })
    }

    /// With arguments of its own for `repo init`.
    pub fn with_init(arguments: &[&str]) -> Result<Self> {
        Self::without_repository()?.init(arguments)
    }

    /// With the path of a repository that is not there yet.
    pub fn without_repository() -> Result<Self> {
        let scratch = Scratch::new()?;
        let repository = scratch.join("repository");
        Ok(Self { binary: icecore_binary()?, repository, scratch, environment: Vec::new() })
    }

    /// With a fresh state folder, a fresh key file and a fresh repository that is encrypted with it.
    /// Every command gets the key through its environment.
    pub fn encrypted() -> Result<Self> {
        let mut icecore = Self::without_repository()?;
        let path = icecore.path("key");
        make_key(&path)?;
        icecore.environment.push((KEY_FILE.to_owned(), path.into()));
        icecore.init(&["--encrypt"])
    }

    fn init(self, arguments: &[&str]) -> Result<Self> {
        let init = self.command("repo").arg("init").arg(&self.repository);
        init.args(arguments).succeed()?;
        Ok(self)
    }

    /// The key of an encrypted repository.
    pub fn key_file(&self) -> Option<&Path> {
        let key = self.environment.iter().find(|(name, _)| name == KEY_FILE);
        key.map(|(_, path)| Path::new(path))
    }

    /// The repository's folder.
    pub fn repository(&self) -> &Path {
        &self.repository
    }

    /// A path in this user's own folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Leaves state and repository on disk and says where.
    pub fn keep(self) -> PathBuf {
        self.scratch.keep()
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// A subcommand with this user's state and cache, and nothing else.
    pub fn command(&self, subcommand: &str) -> Run {
        let mut command = Command::new(&self.binary);
        command.arg(subcommand).arg("--state-dir").arg(self.scratch.join("state"));
        command.env("ICECORE_CACHE_DIR", self.scratch.join("cache"));
        // Whatever whoever runs the tests has in his own.
        command.env_remove(KEY_FILE).env_remove("ICECORE_PASSPHRASE_FILE");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Run { command }
    }

    /// A subcommand on this user's repository, with JSON output.
    pub fn on_repository(&self, subcommand: &str) -> Run {
        self.command(subcommand).arg("--repo").arg(&self.repository).arg("--json")
    }

    /// A subcommand about a running VM, reached through its sockets.
    pub fn on_vm(&self, subcommand: &str, vm: &TestVm) -> Run {
        let run = self.on_repository(subcommand).arg("--qmp").arg(vm.qmp());
        let run = run.arg("--name").arg(vm.name());
        if vm.has_agent() { run.arg("--qga").arg(vm.qga()) } else { run }
    }

    /// `icecore backup` of a running VM.
    pub fn backup(&self, vm: &TestVm) -> Run {
        self.on_vm("backup", vm)
    }

    /// Like [`Icecore::backup`], with another socket for the agent.
    pub fn backup_through(&self, vm: &TestVm, agent: &Path) -> Run {
        let run = self.on_repository("backup").arg("--qmp").arg(vm.qmp());
        run.arg("--name").arg(vm.name()).arg("--qga").arg(agent)
    }

    /// Starts a backup whose copy takes long, and waits until it is copying.
    pub fn start_slow_backup(&self, vm: &TestVm) -> Result<Started> {
        let mut run = self.backup(vm).arg("--rate-limit").arg("4M").start()?;
        wait_until("the copy", COPY_DEADLINE, || {
            if run.runs()? {
                Ok(vm.is_being_copied()?)
            } else {
                Err(Failure::new("it ended early"))
            }
        })?;
        // So that the middle of the copy is meant, not its beginning.
        std::thread::sleep(Duration::from_millis(500));
        Ok(run)
    }

    /// `icecore rollback` of a running VM.
    pub fn rollback(&self, vm: &TestVm, point: &str) -> Run {
        self.on_vm("rollback", vm).arg("--to").arg(point)
    }

    /// Restores all disks of a point as raw files into a folder.
    pub fn restore_all(&self, point: &str, folder: &Path) -> Result<Value> {
        std::fs::create_dir_all(folder)?;
        self.on_repository("restore").arg(point).arg("--to").arg(folder).json()
    }

    /// `icecore check --read-data` of the whole repository; damage is a failure.
    pub fn check(&self) -> Result<Value> {
        self.on_repository("check").arg("--read-data").json()
    }
}

/// The binary under test. Cargo puts a package's tests into `deps`, beside which its binaries lie.
pub fn icecore_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("ICECORE_BIN") {
        return Ok(path.into());
    }
    let here = std::env::current_exe()?;
    let near = here.ancestors().skip(1).take(2).map(|dir| dir.join("icecore"));
    let found = near.into_iter().find(|path| path.is_file());
    found.ok_or_else(|| Failure::new("no icecore binary beside the tests: `cargo build` first"))
}

/// A run of the binary that is being put together.
#[derive(Debug)]
pub struct Run {
    command: Command,
}

impl Run {
    /// One more argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// More arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    /// An environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Without an environment variable that it would have.
    pub fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Runs it to its end, whatever its status.
    pub fn outcome(self) -> Result<Outcome> {
        self.start()?.finish()
    }

    /// Runs it; a status other than 0 is a failure with what it said.
    pub fn succeed(self) -> Result<Outcome> {
        self.expect(0)
    }

    /// Runs it; another status than this is a failure with what it said.
    pub fn expect(self, status: i32) -> Result<Outcome> {
        let shown = format!("{:?}", self.command);
        let outcome = self.outcome()?;
        if outcome.status == Some(status) {
            return Ok(outcome);
        }
        Err(Failure::new(format!("wanted status {status} of {shown}, got {outcome:?}")))
    }

    /// Runs it to success and parses the document it printed.
    pub fn json(self) -> Result<Value> {
        self.succeed()?.json()
    }

    /// Starts it and leaves it running.
    pub fn start(mut self) -> Result<Started> {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Background::spawn(&mut self.command)?;
        let stdout = drain(process.child.stdout.take());
        let stderr = drain(process.child.stderr.take());
        Ok(Started { process, stdout, stderr })
    }
}

/// A run in the background.
#[derive(Debug)]
pub struct Started {
    process: Background,
    stdout: std::thread::JoinHandle<Vec<u8>>,
    stderr: std::thread::JoinHandle<Vec<u8>>,
}

impl Started {
    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> Result<bool> {
        Ok(self.process.ended()?.is_none())
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Result<Outcome> {
        let status = self.process.wait_within(RUN_DEADLINE)?;
        Ok(Outcome {
            status: status.code(),
            stdout: String::from_utf8_lossy(&collect(self.stdout)).into_owned(),
            stderr: String::from_utf8_lossy(&collect(self.stderr)).into_owned(),
        })
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// The exit status; none when a signal ended it.
    pub status: Option<i32>,
    /// All of standard output.
    pub stdout: String,
    /// All of standard error.
    pub stderr: String,
}

impl Outcome {
    /// The document on standard output.
    pub fn json(&self) -> Result<Value> {
        let parsed = serde_json::from_str(&self.stdout);
        parsed.map_err(|error| Failure::new(format!("{error} in the output {:?}", self.stdout)))
    }
}
