//! Child processes that cannot outlive the test, and waiting with a deadline.

use std::io::Read;
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{During, Failure, Result};

/// How long helpers such as qemu-img may take before a test calls them hung.
const TOOL_DEADLINE: Duration = Duration::from_secs(120);

/// Runs a tool to its end; a status other than 0 is a failure with what it said.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = run_within(command, TOOL_DEADLINE)?;
    if output.status.success() {
        return Ok(output);
    }
    Err(Failure::new(format!(
        "{command:?} ended with {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout),
    )))
}

/// Runs a command to its end, whatever its status, and kills it at the deadline.
pub fn run_within(command: &mut Command, deadline: Duration) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Background::spawn(command)?;
    let stdout = drain(child.child.stdout.take());
    let stderr = drain(child.child.stderr.take());
    let status = child.wait_within(deadline).during(format!("{command:?}"))?;
    Ok(Output { status, stdout: collect(stdout), stderr: collect(stderr) })
}

type Drain = std::thread::JoinHandle<Vec<u8>>;

pub(crate) fn drain(source: Option<impl Read + Send + 'static>) -> Drain {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            // A killed child's pipe just ends; what arrived until then is what there is.
            let _ = source.read_to_end(&mut bytes);
        }
        bytes
    })
}

pub(crate) fn collect(drain: Drain) -> Vec<u8> {
    drain.join().unwrap_or_default()
}

/// A child process that is killed when its owner goes.
#[derive(Debug)]
pub struct Background {
    pub(crate) child: Child,
    released: bool,
}

impl Background {
    /// Starts it.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child = command.spawn().during(format!("start {command:?}"))?;
        Ok(Self { child, released: false })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard input, where that is a pipe.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Sends a signal; a process that has ended already is no failure.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Its status, when it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end; at the deadline it is killed and that is a failure.
    pub fn wait_within(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + deadline;
        // Short runs are common, so the first looks are close together.
        let mut pause = Duration::from_millis(2);
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        self.kill();
        Err(Failure::new(format!("still running after {} s, killed", deadline.as_secs())))
    }

    /// Lets it outlive this value.
    pub(crate) fn release(mut self) -> u32 {
        self.released = true;
        self.child.id()
    }

    /// Kills it for good.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if !self.released {
            self.kill();
        }
    }
}

/// Asks again and again until `ready` says yes or the deadline passes.
pub fn wait_until(
    what: &str,
    deadline: Duration,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let until = Instant::now() + deadline;
    loop {
        if ready()? {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(Failure::new(format!("{what}: not within {} s", deadline.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}
