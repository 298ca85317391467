//! The QEMU guest agent's channel.
//!
//! The agent knows no request ids and answers in order, so after a timeout the next answer may
//! belong to an earlier question. The channel is therefore brought back into step with
//! `guest-sync-delimited` and a fresh id before the next command; all that precedes its reply is
//! dropped. A freeze may itself block for hours in the guest: deadlines lie outside the call.
//!
//! QEMU qga/qapi-schema.json.

use std::path::{Path, PathBuf};
use std::time::Duration;

use qapi::Command;
use qapi::qga;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::errors::QmpError;
use crate::place::Place;
use crate::session::Failure;

mod link;

use link::{DELIMITER, Link};

pub use link::MAX_ANSWER_BYTES;

/// Ids of synchronisations stay in the range that every JSON implementation keeps exact.
const SYNC_ID_MASK: u64 = (1 << 53) - 1;

const READ_BYTES: usize = 16 << 10;

/// Whether the guest's filesystems are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezeStatus {
    /// None is.
    Thawed,
    /// Some are.
    Frozen,
}

/// A mounted filesystem of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Filesystem {
    /// Its device's name in the guest.
    #[serde(default)]
    pub name: String,
    /// Where it is mounted.
    #[serde(default)]
    pub mountpoint: String,
    /// Its type, such as `ext4`.
    #[serde(rename = "type", default)]
    pub kind: String,
}

/// What the agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AgentInfo {
    /// Its version.
    pub version: String,
    /// Its commands, enabled or not.
    #[serde(rename = "supported_commands", default)]
    pub commands: Vec<AgentCommand>,
}

/// One command of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AgentCommand {
    /// Its name.
    pub name: String,
    /// Whether it may be called now (while frozen, few may).
    pub enabled: bool,
}

impl AgentInfo {
    /// Whether the agent has the command and lets it be called now.
    pub fn allows(&self, command: &str) -> bool {
        self.commands.iter().any(|known| known.name == command && known.enabled)
    }
}

/// A connection to the agent's channel. It outlives timeouts: the next call resynchronises.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    stream: UnixStream,
    link: Link,
}

impl Agent {
    /// Connects to the host's end of the channel. That the agent lives shows with the first call.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        Self::reach(&path.to_owned().into(), deadline).await
    }

    /// Connects to the channel, wherever its host's end is.
    pub async fn reach(place: &Place, deadline: Duration) -> Result<Self, QmpError> {
        let until = Instant::now() + deadline;
        match place.open(until, deadline).await {
            Err(QmpError::NoGreeting { path, waited }) => {
                Err(QmpError::AgentSilent { path, waited })
            }
            Err(error) => Err(error),
            // A program that speaks for the agent ends when this connection does.
            Ok((stream, _)) => Ok(Self { path: place.name(), stream, link: Link::new() }),
        }
    }

    /// Runs one command, brought into step before where needed, all within `deadline`.
    ///
    /// [`QmpError::AgentSilent`]: the command was not sent. [`QmpError::Timeout`]: it was, and may
    /// still be carried out.
    pub async fn execute<C: Command>(
        &mut self,
        command: C,
        deadline: Duration,
    ) -> Result<C::Ok, QmpError> {
        let content = |why: serde_json::Error| QmpError::Content {
            command: C::NAME.into(),
            why: why.to_string(),
        };
        let arguments = serde_json::to_value(&command).map_err(content)?;
        let value = self.execute_raw(C::NAME, arguments, deadline).await?;
        serde_json::from_value(value).map_err(content)
    }

    /// Runs one command by name. `arguments` is an object, or `Null` for none.
    pub async fn execute_raw(
        &mut self,
        name: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let until = Instant::now() + deadline;
        tokio::time::timeout_at(until, self.synchronise(name))
            .await
            .map_err(|_| QmpError::AgentSilent { path: self.path.clone(), waited: deadline })??;
        tokio::time::timeout_at(until, self.ask(name, arguments))
            .await
            .map_err(|_| QmpError::Timeout { command: name.into(), waited: deadline })?
    }

    async fn synchronise(&mut self, name: &str) -> Result<(), QmpError> {
        self.discard_unasked(name)?;
        if self.link.is_in_step() {
            return Ok(());
        }
        let id = getrandom::u64().map_err(|error| self.closed(name, error))? & SYNC_ID_MASK;
        let command = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        let mut bytes = vec![DELIMITER];
        bytes.extend_from_slice(command.to_string().as_bytes());
        bytes.push(b'\n');
        self.link.hunt(id);
        self.stream.write_all(&bytes).await.map_err(|error| self.closed(name, error))?;
        while !self.link.is_in_step() {
            self.hear(name).await?;
        }
        Ok(())
    }

    /// Bytes that wait before a question was asked answer none: out of step.
    fn discard_unasked(&mut self, name: &str) -> Result<(), QmpError> {
        let mut buffer = [0; READ_BYTES];
        match self.stream.try_read(&mut buffer) {
            Ok(0) => Err(self.closed(name, "it was closed by the other side")),
            Ok(_) => {
                self.link.lose_step();
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(self.closed(name, error)),
        }
    }

    async fn ask(&mut self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut command = json!({"execute": name});
        if arguments.as_object().is_some_and(|map| !map.is_empty()) {
            command["arguments"] = arguments;
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(b'\n');
        // Until the answer is here, this future may be dropped at any moment.
        self.link.question_asked();
        self.stream.write_all(&bytes).await.map_err(|error| self.closed(name, error))?;
        loop {
            if let Some(answer) = self.hear(name).await? {
                return answer.map_err(|Failure { class, desc }| QmpError::Refused {
                    command: name.into(),
                    class,
                    desc,
                });
            }
        }
    }

    async fn hear(&mut self, name: &str) -> Result<Option<Result<Value, Failure>>, QmpError> {
        let mut buffer = [0; READ_BYTES];
        let count =
            self.stream.read(&mut buffer).await.map_err(|error| self.closed(name, error))?;
        if count == 0 {
            return Err(self.closed(name, "it was closed by the other side"));
        }
        let heard = self.link.feed(&buffer[..count]);
        heard.map_err(|error| QmpError::Content { command: name.into(), why: error.to_string() })
    }

    fn closed(&self, name: &str, why: impl std::fmt::Display) -> QmpError {
        let (command, path) = (name.to_owned(), self.path.clone());
        QmpError::Closed { command, path, why: why.to_string() }
    }

    /// Whether the agent answers at all.
    pub async fn ping(&mut self, deadline: Duration) -> Result<(), QmpError> {
        self.execute(qga::guest_ping {}, deadline).await.map(drop)
    }

    /// The agent's version and commands.
    pub async fn info(&mut self, deadline: Duration) -> Result<AgentInfo, QmpError> {
        let value = self.execute_raw("guest-info", Value::Null, deadline).await?;
        decode("guest-info", value)
    }

    /// Freezes all filesystems; returns how many. On any error some may be frozen: thaw.
    pub async fn freeze(&mut self, deadline: Duration) -> Result<u64, QmpError> {
        let count = self.execute(qga::guest_fsfreeze_freeze {}, deadline).await?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// Thaws all filesystems; returns how many were frozen.
    pub async fn thaw(&mut self, deadline: Duration) -> Result<u64, QmpError> {
        let count = self.execute(qga::guest_fsfreeze_thaw {}, deadline).await?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// Asks whether filesystems are frozen.
    pub async fn freeze_status(&mut self, deadline: Duration) -> Result<FreezeStatus, QmpError> {
        match self.execute(qga::guest_fsfreeze_status {}, deadline).await? {
            qga::GuestFsfreezeStatus::thawed => Ok(FreezeStatus::Thawed),
            qga::GuestFsfreezeStatus::frozen => Ok(FreezeStatus::Frozen),
        }
    }

    /// The guest's mounted filesystems; refused by the agent while frozen.
    pub async fn filesystems(&mut self, deadline: Duration) -> Result<Vec<Filesystem>, QmpError> {
        let value = self.execute_raw("guest-get-fsinfo", Value::Null, deadline).await?;
        decode("guest-get-fsinfo", value)
    }
}

fn decode<T: serde::de::DeserializeOwned>(command: &str, value: Value) -> Result<T, QmpError> {
    serde_json::from_value(value)
        .map_err(|error| QmpError::Content { command: command.into(), why: error.to_string() })
}
