//! `icecore serve`, run from outside, and a plain HTTP client for its socket.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::icecore::{Icecore, Run};
use crate::process::{Background, wait_until};
use crate::vm::TestVm;

/// A daemon listens within this time, also on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// No answer takes longer, but that of an event stream.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// No job of a test takes longer.
const JOB_DEADLINE: Duration = Duration::from_secs(90);

/// A daemon of a user of its own.
#[derive(Debug)]
pub struct Daemon {
    process: Background,
    config: PathBuf,
    socket: PathBuf,
    log: PathBuf,
}

/// An answer to a request.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The head, as it came.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as a document.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body)
            .map_err(|e| Failure::new(format!("{e} in the answer {self:?}")))
    }

    /// The document, or a failure where the status is another.
    pub fn expect(&self, status: u16) -> Result<Value> {
        if self.status == status {
            return self.json();
        }
        Err(Failure::new(format!("wanted status {status}, got {self:?}")))
    }
}

impl Icecore {
    /// Writes a configuration with these VMs, this user's repository as `main`, a socket, and
    /// `more`; its path.
    pub fn write_config(&self, vms: &[&TestVm], more: &str) -> Result<PathBuf> {
        let socket = self.path("api/api.sock");
        let repository = self.repository().display();
        let mut text = format!("[api]\nsocket = '{}'\n", socket.display());
        text += more;
        text += &format!("\n[repository.main]\nurl = '{repository}'\n");
        if let Some(key) = self.key_file() {
            text += &format!("key_file = '{}'\n", key.display());
        }
        for vm in vms {
            text += &format!("[vm.{}]\nqmp = '{}'\n", vm.name(), vm.qmp().display());
        }
        let path = self.path("icecore.toml");
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Starts a daemon and waits until it answers.
    pub fn serve(&self, vms: &[&TestVm], more: &str) -> Result<Daemon> {
        let config = self.write_config(vms, more)?;
        self.serve_again(&config)
    }

    /// Starts a daemon with a configuration that is there.
    pub fn serve_again(&self, config: &Path) -> Result<Daemon> {
        self.serve_in(config, &[])
    }

    /// The same, with variables in its environment.
    pub fn serve_in(&self, config: &Path, variables: &[(&str, &OsStr)]) -> Result<Daemon> {
        let log = self.path("daemon.log");
        let mut command = Command::new(self.binary());
        command.arg("serve").arg("--config").arg(config);
        command
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--cache-dir")
            .arg(self.path("cache"));
        command.envs(variables.iter().copied());
        let stderr = File::options().append(true).create(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let process = Background::spawn(&mut command)?;
        let socket = self.path("api/api.sock");
        let mut daemon = Daemon { process, config: config.to_owned(), socket, log };
        wait_until("the daemon", START_DEADLINE, || {
            if daemon.process.ended()?.is_some() {
                return Err(Failure::new(format!("the daemon ended: {}", daemon.log()?)));
            }
            Ok(daemon.get("/healthz").is_ok_and(|answer| answer.status == 200))
        })?;
        Ok(daemon)
    }

    /// A subcommand that goes through the daemon.
    pub fn through(&self, daemon: &Daemon, subcommand: &str) -> Run {
        let run = self.command(subcommand).arg("--daemon").arg("--config").arg(&daemon.config);
        run.arg("--json")
    }
}

impl Daemon {
    /// All that it wrote.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Kills it, and nothing else.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits for its end; its exit status.
    pub fn finish(mut self) -> Result<Option<i32>> {
        Ok(self.process.wait_within(START_DEADLINE)?.code())
    }

    /// GET.
    pub fn get(&self, path: &str) -> Result<Answer> {
        self.ask("GET", path, "")
    }

    /// POST with a JSON body.
    pub fn post(&self, path: &str, body: &str) -> Result<Answer> {
        self.ask("POST", path, body)
    }

    /// Any request. HTTP/1.0, so that the answer ends with the connection and has no chunks.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> Result<Answer> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.0\r\nhost: icecore\r\n");
        // Who is refused in the middle of his body may see an error after the answer.
        let sent = write!(stream, "{head}content-length: {length}\r\n\r\n{body}");
        let mut text = Vec::new();
        let read = stream.read_to_end(&mut text);
        if text.is_empty() {
            sent?;
            read?;
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let (head, body) = text
            .split_once("\r\n\r\n")
            .ok_or_else(|| Failure::new(format!("{method} {path}: no answer in {text:?}")))?;
        let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| Failure::new(format!("no status in {head:?}")))?;
        Ok(Answer { status, head: head.to_owned(), body: body.to_owned() })
    }

    /// Asks for a job that is accepted; its id.
    pub fn submit(&self, path: &str, body: &str) -> Result<String> {
        let answer = self.post(path, body)?.expect(202)?;
        let job = answer["job"].as_str();
        job.map(ToOwned::to_owned).ok_or_else(|| Failure::new(format!("no job in {answer}")))
    }

    /// A job's document.
    pub fn job(&self, job: &str) -> Result<Value> {
        self.get(&format!("/v1/jobs/{job}"))?.expect(200)
    }

    /// Waits until a job is in this state; its document.
    pub fn wait_for(&self, job: &str, state: &str) -> Result<Value> {
        let mut last = Value::Null;
        let over = ["succeeded", "failed", "cancelled", "interrupted"];
        wait_until(&format!("job {job} {state}"), JOB_DEADLINE, || {
            last = self.job(job)?;
            let now = last["state"].as_str().unwrap_or_default();
            if now != state && over.contains(&now) {
                return Err(Failure::new(format!("wanted {state}: {last}")));
            }
            Ok(now == state)
        })?;
        Ok(last)
    }
}
