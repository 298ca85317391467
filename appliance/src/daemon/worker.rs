//! The process of a job: the same binary with the command that the job stands for.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};

use crate::cli::args::{Global, IoEngine};
use crate::failure::{Failure, Outcome};
use crate::state::jobs::side_file;
use crate::state::{JobId, State};

/// The running binary, also after an upgrade has replaced its file.
const OWN_BINARY: &str = "/proc/self/exe";
/// What belongs to the daemon and not to its workers.
const OWN_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

/// Starts the worker of `job`. It outlives this daemon: nothing of it is a pipe to here, and a
/// signal to the daemon's process group does not reach it.
pub fn start(
    global: &Global,
    config: &Path,
    state: &State,
    job: &JobId,
    arguments: &[String],
) -> Outcome<Child> {
    let tried = format!("start the worker of job {job}");
    let path = side_file(state, job, "log");
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    let log = log.map_err(|e| Failure::failed(&tried, e))?;
    let mut command = Command::new(OWN_BINARY);
    command.arg("--config").arg(config).arg("--state-dir").arg(state.root());
    if let Some(cache) = &global.cache_dir {
        command.arg("--cache-dir").arg(cache);
    }
    let engine = match global.io_engine {
        IoEngine::Auto => "auto",
        IoEngine::Uring => "uring",
        IoEngine::Threads => "threads",
    };
    command.args(["--io-engine", engine, "--memory", &global.memory.to_string()]);
    command.args(["--quiet", "--json", "--as-job", job.as_str()]).args(arguments);
    let keys = [
        ("ICECORE_KEY_FILE", &global.key_file),
        ("ICECORE_PASSPHRASE_FILE", &global.passphrase_file),
    ];
    for (variable, file) in keys {
        if let Some(file) = file {
            command.env(variable, file);
        }
    }
    for variable in OWN_VARIABLES {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    command.spawn().map_err(|e| Failure::failed(tried, e))
}
