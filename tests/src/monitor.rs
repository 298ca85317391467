//! A small blocking QMP client, for the test's own monitor of a QEMU.
//!
//! A QEMU of the laboratory has two: one for Icecore, one for the test, because each socket takes
//! one client.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::failure::{During, Failure, Result};

/// A `stop` with much dirty data flushes first; nothing that a test asks takes longer than this.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// A connection to one QMP socket.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// What has arrived of a line that is not complete yet.
    partial: Vec<u8>,
}

impl Monitor {
    /// Connects, reads the greeting and leaves capability negotiation behind.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).during(socket.display())?;
        let mut monitor =
            Self { reader: BufReader::new(stream), events: VecDeque::new(), partial: Vec::new() };
        let greeting = monitor.message(ANSWER_DEADLINE)?;
        if greeting.get("QMP").is_none() {
            return Err(Failure::new(format!("not a QMP greeting: {greeting}")));
        }
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command; its error is a failure with QEMU's text.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes()).during(command)?;
        let until = Instant::now() + ANSWER_DEADLINE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let message = self.message(left).during(command)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                return Err(Failure::new(format!("{command}: {error}")));
            } else {
                return Ok(message["return"].clone());
            }
        }
    }

    /// Runs a line of the human monitor and hands back what it printed.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Waits for an event of this name; events before it are dropped.
    pub fn wait_event(&mut self, name: &str, deadline: Duration) -> Result<Value> {
        let until = Instant::now() + deadline;
        loop {
            while let Some(event) = self.events.pop_front() {
                if event["event"] == name {
                    return Ok(event);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            let message = self.message(left).during(format!("event {name}"))?;
            self.events.push_back(message);
        }
    }

    /// The run state, such as `running`, `paused` or `prelaunch`.
    pub fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    fn message(&mut self, deadline: Duration) -> Result<Value> {
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::new("no answer from QMP in time"));
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(Failure::new("QMP closed the connection")),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(serde_json::from_slice(&line)?);
                }
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
