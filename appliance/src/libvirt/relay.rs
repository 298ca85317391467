//! The relay: a process that speaks QMP, or the guest agent's protocol, on its standard input and
//! output for a domain whose sockets libvirt holds.
//!
//! A guardian starts it in place of connecting to a socket. Commands go through libvirt's monitor
//! passthrough; the agent is frozen and thawed by libvirt's own calls. What libvirt fails at is
//! never told as QEMU's answer: the connection ends, as that of a QEMU that is gone would.

use std::io::{BufRead as _, Read as _, Write as _};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, sync_channel};

use icecore_qmp::{NOBODY_THERE, Place};
use serde_json::{Value, json};

use super::console::{Console, quoted};
use super::{Domain, Kind, Virsh, VirshError};

/// The hidden subcommand's name.
pub const SUBCOMMAND: &str = "__relay";
/// A guardian asks one thing after another; what it does not wait for any more is a few commands.
const LINES_WAITING_MAX: usize = 64;
/// No request of a guardian is longer.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// Precedes the reply to `guest-sync-delimited` (QEMU qga/qapi-schema.json).
const DELIMITER: u8 = 0xFF;
/// Seconds that libvirt waits for the agent's answer to a question.
const AGENT_SECONDS: u32 = 2;

/// What it speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    Monitor,
    Agent,
}

impl std::str::FromStr for Channel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "monitor" => Ok(Self::Monitor),
            "agent" => Ok(Self::Agent),
            other => Err(format!("'{other}' is neither 'monitor' nor 'agent'")),
        }
    }
}

/// Where the guardian of a domain reaches its monitor or agent.
pub fn place(domain: &Domain, channel: Channel) -> Place {
    let channel = match channel {
        Channel::Monitor => "monitor",
        Channel::Agent => "agent",
    };
    let words = ["/proc/self/exe", SUBCOMMAND, channel, domain.virsh.uri(), &domain.uuid];
    Place::Program(words.map(str::to_owned).to_vec())
}

/// Why it ends before its input does.
enum Ended {
    /// The domain does not run, or is gone.
    NobodyThere,
    /// virsh or libvirt failed.
    Failed,
}

impl From<std::io::Error> for Ended {
    fn from(_: std::io::Error) -> Self {
        Self::Failed
    }
}

impl From<VirshError> for Ended {
    fn from(error: VirshError) -> Self {
        match error.kind {
            Kind::NotRunning | Kind::NoDomain => Self::NobodyThere,
            _ => Self::Failed,
        }
    }
}

/// Body of the process.
pub fn run(channel: Channel, uri: &str, uuid: &str) -> ExitCode {
    match serve(channel, uri, uuid) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Ended::NobodyThere) => ExitCode::from(NOBODY_THERE),
        Err(Ended::Failed) => ExitCode::FAILURE,
    }
}

fn serve(channel: Channel, uri: &str, uuid: &str) -> Result<(), Ended> {
    let virsh = Virsh::new(uri).map_err(|_| Ended::Failed)?;
    let mut console = Console::open(&virsh)?;
    let lines = listen(&console)?;
    // Its welcome is no answer. One that reaches no libvirt ends here.
    drop(console.ask("")?);
    let mut relay = Relay { console, uuid: uuid.to_owned(), guest_touched: false };
    if channel == Channel::Monitor {
        say(&relay.greeting()?)?;
    }
    for line in lines {
        // An agent's parser is reset by a delimiter before the first request.
        let start = line.iter().position(|byte| *byte != DELIMITER).unwrap_or(0);
        let Ok(request) = serde_json::from_slice::<Value>(&line[start..]) else {
            return Err(Ended::Failed);
        };
        match channel {
            Channel::Monitor => say(&relay.qemu_answer(request)?)?,
            Channel::Agent => relay.answer_for_agent(&request)?,
        }
    }
    Ok(())
}

/// Lines from the guardian. When it is gone, so is this process at once, whatever virsh waits for.
fn listen(console: &Console) -> std::io::Result<Receiver<Vec<u8>>> {
    let (sender, lines) = sync_channel(LINES_WAITING_MAX);
    let virsh = console.pid();
    std::thread::Builder::new().name("requests".into()).spawn(move || {
        let mut input = std::io::stdin().lock();
        loop {
            let mut line = Vec::new();
            let read = (&mut input).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
            if !line.ends_with(b"\n") || read.is_err() || sender.send(line).is_err() {
                if let Some(virsh) = virsh {
                    // One that has ended is what is wanted.
                    let _ = rustix::process::kill_process(virsh, rustix::process::Signal::KILL);
                }
                std::process::exit(0);
            }
        }
    })?;
    Ok(lines)
}

fn say(message: &Value) -> std::io::Result<()> {
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    write(&line)
}

fn write(bytes: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

struct Relay {
    console: Console,
    uuid: String,
    /// A freeze or a thaw was asked for: only the agent's own word tells the state from then on.
    guest_touched: bool,
}

impl Relay {
    fn ask(&mut self, command: &str) -> Result<Result<String, VirshError>, Ended> {
        Ok(self.console.ask(command)?)
    }

    fn greeting(&mut self) -> Result<Value, Ended> {
        let answer = self.passed_through(&json!({"execute": "query-version"}))?;
        Ok(json!({"QMP": {"version": answer["return"], "capabilities": []}}))
    }

    fn passed_through(&mut self, request: &Value) -> Result<Value, Ended> {
        let command =
            format!("qemu-monitor-command {} {}", self.uuid, quoted(&request.to_string()));
        let answer = self.ask(&command)??;
        serde_json::from_str(&answer).map_err(|_| Ended::Failed)
    }

    /// One command for QEMU; its answer carries the id that came with it.
    fn qemu_answer(&mut self, mut request: Value) -> Result<Value, Ended> {
        let id = request.as_object_mut().and_then(|request| request.remove("id"));
        // libvirt has negotiated already.
        let mut answer = match request["execute"].as_str() {
            Some("qmp_capabilities") => json!({"return": {}}),
            _ => self.passed_through(&request)?,
        };
        if let (Some(answer), Some(id)) = (answer.as_object_mut(), id) {
            answer.insert("id".into(), id);
        }
        Ok(answer)
    }

    fn answer_for_agent(&mut self, request: &Value) -> Result<(), Ended> {
        let done = match request["execute"].as_str() {
            Some("guest-sync-delimited") => {
                write(&[DELIMITER])?;
                Ok(request["arguments"]["id"].clone())
            }
            Some("guest-fsfreeze-freeze") => {
                self.guest_touched = true;
                self.counted("domfsfreeze")?
            }
            Some("guest-fsfreeze-thaw") => {
                self.guest_touched = true;
                // Whether it was thawed the status tells.
                Ok(self.counted("domfsthaw")??)
            }
            _ => self.asked_of_agent(request)?,
        };
        let answer = match done {
            Ok(value) => json!({ "return": value }),
            Err(e) => json!({"error": {"class": "GenericError", "desc": e.said}}),
        };
        Ok(say(&answer)?)
    }

    fn counted(&mut self, command: &str) -> Result<Result<Value, VirshError>, Ended> {
        let answer = self.ask(&format!("{command} {}", self.uuid))?;
        Ok(answer.map(|said| super::domain::count(&said).into()))
    }

    fn asked_of_agent(&mut self, request: &Value) -> Result<Result<Value, VirshError>, Ended> {
        let request = quoted(&request.to_string());
        let command =
            format!("qemu-agent-command {} --timeout {AGENT_SECONDS} {request}", self.uuid);
        match self.ask(&command)? {
            Ok(answer) => {
                let answer: Value = serde_json::from_str(&answer).map_err(|_| Ended::Failed)?;
                Ok(Ok(answer["return"].clone()))
            }
            // Nothing was asked of the guest yet: the reason is worth telling.
            Err(e) if !self.guest_touched => Ok(Err(e)),
            Err(e) => Err(e.into()),
        }
    }
}
