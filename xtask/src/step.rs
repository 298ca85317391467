//! Running programs, and saying what takes how long.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

pub use icecore_tests::{Failure, Result, workspace_root};

/// What tasks provision and cache lies here, whatever cargo's own target folder is.
pub fn target() -> PathBuf {
    workspace_root().join("target")
}

/// Where cargo puts what it compiles.
pub fn cargo_target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(target, Into::into)
}

/// A program to be run in the workspace's root.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command.current_dir(workspace_root()).stdin(Stdio::null());
    command
}

/// Cargo, the one that runs this task.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = program(&std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command.args(arguments);
    command
}

/// A program that changes the system: by sudo for those who are not root.
pub fn privileged(name: &str) -> Result<Command> {
    if captured(program("id").arg("-u"))?.trim() == "0" {
        return Ok(program(name));
    }
    let mut command = program("sudo");
    command.args(["-n", name]);
    Ok(command)
}

/// Runs it, with its output shown; another status than 0 is a failure.
pub fn shown(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .map_err(|error| Failure::new(format!("cannot start {command:?}: {error}")))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("{command:?} ended with {status}")))
}

/// Runs it and hands back its standard output; what it said goes into a failure.
pub fn captured(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .map_err(|error| Failure::new(format!("cannot start {command:?}: {error}")))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("{command:?} ended with {}:\n{stdout}{stderr}", output.status)))
}

/// Does one step of a task and prints how long it took.
pub fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("xtask: {what} ...");
    let start = Instant::now();
    let result = work();
    eprintln!("xtask: {what}: {:.1} s", start.elapsed().as_secs_f64());
    result
}
