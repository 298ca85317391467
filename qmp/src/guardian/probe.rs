//! Whether the scratch's storage still answers, found out by a process that may get stuck.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use crate::recover::ScratchHealth;

/// Longest wait for a probe. Storage slower than this breaks the snapshot anyway
/// (`cbw-timeout`), and what drains would halt the guest for as long.
pub const PROBE_WAIT: Duration = Duration::from_secs(5);

/// How long an answer of the storage counts: the rounds of undoing that follow each other at once.
/// Storage that breaks down within a second hangs what drains whether it was asked or not.
const FRESH: Duration = Duration::from_secs(1);

/// Tells a process of ours that it is a probe, and of which directory.
pub const PROBE_VARIABLE: &str = "ICECORE_GUARDIAN_PROBE";

const PROBE_BYTES: [u8; 4096] = [0x1c; 4096];

/// A command that runs [`body`] for the directory that [`PROBE_VARIABLE`] names, and then ends
/// with success, whatever the storage has answered.
#[derive(Debug, Clone)]
pub struct ProbeCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// Probes storage, with one process at a time.
#[derive(Debug)]
pub struct Probe {
    command: ProbeCommand,
    /// One that did not come back, and ends with its storage's trouble.
    stuck: Option<Child>,
    /// When a directory was last found to answer.
    answered: Option<(Instant, PathBuf)>,
}

impl Probe {
    /// Nothing is run yet.
    pub fn new(command: ProbeCommand) -> Self {
        Self { command, stuck: None, answered: None }
    }

    /// Believes no earlier answer.
    pub fn forget(&mut self) {
        self.answered = None;
    }

    /// Finds out about the storage of `directory`, within [`PROBE_WAIT`]. One that has answered
    /// within [`FRESH`] is not asked again.
    pub async fn run(&mut self, directory: &Path) -> ScratchHealth {
        let fresh = |(at, asked): &(Instant, PathBuf)| at.elapsed() < FRESH && asked == directory;
        if self.answered.as_ref().is_some_and(fresh) {
            return ScratchHealth::Answers;
        }
        let health = self.ask(directory).await;
        if health == ScratchHealth::Answers {
            self.answered = Some((Instant::now(), directory.to_owned()));
        }
        health
    }

    async fn ask(&mut self, directory: &Path) -> ScratchHealth {
        if let Some(stuck) = &mut self.stuck
            && matches!(stuck.try_wait(), Ok(None))
        {
            return ScratchHealth::Hangs;
        }
        let mut command = Command::new(&self.command.program);
        command.args(&self.command.arguments).env(PROBE_VARIABLE, directory);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(mut child) = command.spawn() else { return ScratchHealth::NotKnown };
        match timeout(PROBE_WAIT, child.wait()).await {
            Ok(Ok(status)) if status.success() => ScratchHealth::Answers,
            Ok(_) => ScratchHealth::NotKnown,
            Err(_) => {
                // It ends when its storage comes back; until then no signal reaches it.
                let _ = child.start_kill();
                self.stuck = Some(child);
                ScratchHealth::Hangs
            }
        }
    }
}

/// The probe's body: writes, synchronises and removes a small file in `directory`.
pub fn body(directory: &Path) -> std::io::Result<()> {
    let path: PathBuf = directory.join(format!(".icecore-probe-{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
    let written = file.write_all(&PROBE_BYTES).and_then(|()| file.sync_all());
    std::fs::remove_file(&path)?;
    written
}
