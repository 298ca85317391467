//! Whether the scratch's storage still answers, found out by a process that may get stuck.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::recover::{ProbeCommand, ScratchHealth};

/// Longest wait for a probe. Storage slower than this breaks the snapshot anyway
/// (`cbw-timeout`), and what drains would halt the guest for as long.
pub const PROBE_WAIT: Duration = Duration::from_secs(5);

/// Tells a process of ours that it is a probe, and of which directory.
pub const PROBE_VARIABLE: &str = "ICECORE_GUARDIAN_PROBE";

const PROBE_BYTES: [u8; 4096] = [0x1c; 4096];

/// Runs a probe.
pub async fn run(probe: &ProbeCommand) -> ScratchHealth {
    let mut command = Command::new(&probe.program);
    command.args(&probe.arguments).envs(probe.environment.iter().map(|(key, value)| (key, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else {
        // No process to be had says nothing about the storage; not to undo would be worse.
        return ScratchHealth::Answers;
    };
    match timeout(PROBE_WAIT, child.wait()).await {
        // A write that fails at once (full, gone) has answered.
        Ok(_) => ScratchHealth::Answers,
        Err(_) => {
            // It ends when its storage comes back; until then no signal reaches it.
            let _ = child.start_kill();
            ScratchHealth::Hangs
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
