//! The QMP protocol as a state machine: bytes in, messages out, no IO and no clock.
//!
//! Every command carries an id of this session (a nonce and a counter). A reply is given to
//! nobody but the command whose id it bears: replies to cancelled commands meet their tombstone,
//! replies with a foreign id or none (QEMU may hand us the answer to the command of a client that
//! left) are counted and dropped. Events are opaque, so that unknown ones do no harm. Out-of-band
//! execution is not used: our commands are never sent while another must overtake them.
//!
//! QEMU docs/interop/qmp-spec.rst.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Map, Value, json};

use crate::features::QemuVersion;
use crate::frame::{FrameError, Framer, MAX_MESSAGE_BYTES};

/// Most commands that may wait for an answer, cancelled ones included: a QEMU that hangs would
/// otherwise collect tombstones for ever.
pub const MAX_PENDING: usize = 64;

/// Most replies that belong to nobody before the connection is given up as out of step.
pub const MAX_STRAYS: u32 = 64;

/// Id of one command in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(u64);

/// An event of QEMU, uninterpreted.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `BLOCK_JOB_COMPLETED`.
    pub name: String,
    /// Its data, `Null` where it has none.
    pub data: Value,
}

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// QMP error class.
    pub class: String,
    /// Reason in words.
    pub desc: String,
}

/// What the session learnt from the bytes fed to it.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// The greeting was read and capabilities negotiated: commands are answered from now on.
    Ready(QemuVersion),
    /// The answer to a command that still waits for it.
    Reply(CommandId, Result<Value, Failure>),
    /// The answer to a cancelled command came after all.
    Late(CommandId, Result<Value, Failure>),
    /// An event.
    Event(Event),
}

/// Why the connection is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The other side is no QMP server.
    #[error("its first words are no QMP greeting: {0}")]
    NotQmp(String),
    /// The bytes are no JSON objects within the limits.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A JSON object that is no QMP message, or not here.
    #[error("unexpected message: {0}")]
    Unexpected(String),
    /// The other side closed the connection.
    #[error("it was closed by the other side{}", if *.mid_message { " in the middle of a message" } else { "" })]
    Closed {
        /// Whether a message was incomplete.
        mid_message: bool,
    },
    /// More than [`MAX_STRAYS`] replies belonged to nobody.
    #[error("{MAX_STRAYS} replies bore ids that were never given out")]
    OutOfStep,
}

/// The queue of unanswered commands is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_PENDING} commands wait for an answer")]
pub struct QueueFull;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    AwaitGreeting,
    Negotiating(QemuVersion),
    Ready,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Caller,
    Tombstone,
}

/// One QMP connection, client side.
#[derive(Debug)]
pub struct Session {
    nonce: u32,
    phase: Phase,
    framer: Framer,
    next_id: u64,
    waiting: BTreeMap<CommandId, Waiting>,
    unsent: VecDeque<(CommandId, Vec<u8>)>,
    head_sent: usize,
    strays: u32,
    failed: Option<SessionError>,
}

/// The id of the negotiation; commands count from the next.
const NEGOTIATION: CommandId = CommandId(0);

impl Session {
    /// A new session. `nonce` (random) keeps its ids apart from those of other clients.
    pub fn new(nonce: u32) -> Self {
        let mut session = Self {
            nonce,
            phase: Phase::AwaitGreeting,
            framer: Framer::new(MAX_MESSAGE_BYTES),
            next_id: 0,
            waiting: BTreeMap::new(),
            unsent: VecDeque::new(),
            head_sent: 0,
            strays: 0,
            failed: None,
        };
        session.enqueue("qmp_capabilities", Map::new());
        session
    }

    /// Queues a command; it is sent once the session is ready.
    pub fn execute(
        &mut self,
        name: &str,
        arguments: Map<String, Value>,
    ) -> Result<CommandId, QueueFull> {
        if self.waiting.len() >= MAX_PENDING {
            return Err(QueueFull);
        }
        Ok(self.enqueue(name, arguments))
    }

    fn enqueue(&mut self, name: &str, arguments: Map<String, Value>) -> CommandId {
        let id = CommandId(self.next_id);
        self.next_id += 1;
        let mut command = Map::new();
        command.insert("execute".into(), name.into());
        if !arguments.is_empty() {
            command.insert("arguments".into(), Value::Object(arguments));
        }
        command.insert("id".into(), json!(self.wire_id(id)));
        let mut bytes = Value::Object(command).to_string().into_bytes();
        bytes.push(b'\n');
        self.unsent.push_back((id, bytes));
        self.waiting.insert(id, Waiting::Caller);
        id
    }

    fn wire_id(&self, id: CommandId) -> String {
        format!("icecore-{:08x}-{}", self.nonce, id.0)
    }

    fn known_id(&self, wire: &Value) -> Option<CommandId> {
        let number = wire.as_str()?.strip_prefix(&format!("icecore-{:08x}-", self.nonce))?;
        number.parse().ok().map(CommandId)
    }

    /// Nobody waits for this command any more. Withdrawn if no byte of it was sent; else its
    /// reply will come as [`Output::Late`], and whether it is carried out is unknown.
    pub fn cancel(&mut self, id: CommandId) -> Withdrawn {
        let Some(at) = self.unsent.iter().position(|(queued, _)| *queued == id) else {
            return self.bury(id);
        };
        if at == 0 && self.head_sent > 0 {
            return self.bury(id);
        }
        self.unsent.remove(at);
        self.waiting.remove(&id);
        Withdrawn::Yes
    }

    fn bury(&mut self, id: CommandId) -> Withdrawn {
        if let Some(state) = self.waiting.get_mut(&id) {
            *state = Waiting::Tombstone;
        }
        Withdrawn::No
    }

    /// Bytes to send now; empty when there is nothing to send (or no greeting yet).
    pub fn transmit(&self) -> &[u8] {
        let held = match self.phase {
            Phase::AwaitGreeting => true,
            Phase::Negotiating(_) => self.unsent.front().is_some_and(|c| c.0 != NEGOTIATION),
            Phase::Ready => false,
        };
        match self.unsent.front() {
            Some((_, bytes)) if !held && self.failed.is_none() => &bytes[self.head_sent..],
            _ => &[],
        }
    }

    /// The first `count` bytes of [`Session::transmit`] were sent.
    pub fn transmitted(&mut self, count: usize) {
        self.head_sent += count;
        if self.unsent.front().is_some_and(|(_, bytes)| self.head_sent >= bytes.len()) {
            self.unsent.pop_front();
            self.head_sent = 0;
        }
    }

    /// Takes received bytes. After an error the session stays failed with the same error.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<Vec<Output>, SessionError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let mut outputs = Vec::new();
        while !bytes.is_empty() {
            let step = self.framer.push(bytes).map_err(|error| self.frame_error(error));
            let step = step.and_then(|(used, message)| {
                bytes = &bytes[used..];
                message.map(|value| self.message(value)).transpose()
            });
            match step {
                Ok(output) => outputs.extend(output.flatten()),
                Err(error) => return Err(self.fail(error)),
            }
        }
        Ok(outputs)
    }

    /// The other side closed the connection.
    pub fn eof(&mut self) -> SessionError {
        let mid_message = self.framer.is_mid_message();
        self.fail(SessionError::Closed { mid_message })
    }

    fn fail(&mut self, error: SessionError) -> SessionError {
        self.failed.get_or_insert(error).clone()
    }

    fn frame_error(&self, error: FrameError) -> SessionError {
        match self.phase {
            Phase::AwaitGreeting => SessionError::NotQmp(error.to_string()),
            _ => SessionError::Frame(error),
        }
    }

    fn message(&mut self, value: Value) -> Result<Option<Output>, SessionError> {
        let Value::Object(mut message) = value else {
            return Err(SessionError::Unexpected("no object".into()));
        };
        if self.phase == Phase::AwaitGreeting {
            return self.greeting(&message).map(|()| None);
        }
        // A QEMU that a client reaches while it starts greets twice.
        if message.contains_key("QMP") && self.phase != Phase::Ready {
            return Ok(None);
        }
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let name = name.to_owned();
            let data = message.remove("data").unwrap_or(Value::Null);
            return Ok(Some(Output::Event(Event { name, data })));
        }
        let result = match (message.remove("return"), message.remove("error")) {
            (Some(value), None) => Ok(value),
            (None, Some(error)) => Err(failure(&error)),
            _ => return Err(SessionError::Unexpected(keys(&message))),
        };
        self.reply(message.remove("id"), result)
    }

    fn greeting(&mut self, message: &Map<String, Value>) -> Result<(), SessionError> {
        let Some(greeting) = message.get("QMP") else {
            return Err(SessionError::NotQmp(keys(message)));
        };
        let version = QemuVersion::from_greeting(greeting)
            .ok_or_else(|| SessionError::NotQmp("a greeting without a QEMU version".into()))?;
        self.phase = Phase::Negotiating(version);
        Ok(())
    }

    fn reply(
        &mut self,
        wire_id: Option<Value>,
        result: Result<Value, Failure>,
    ) -> Result<Option<Output>, SessionError> {
        let known = wire_id.and_then(|wire| self.known_id(&wire));
        let Some((id, waiting)) = known.and_then(|id| self.waiting.remove_entry(&id)) else {
            self.strays += 1;
            return if self.strays > MAX_STRAYS { Err(SessionError::OutOfStep) } else { Ok(None) };
        };
        if self.unsent.iter().any(|(queued, _)| *queued == id) {
            return Err(SessionError::Unexpected("a reply to a command that was not sent".into()));
        }
        if let Phase::Negotiating(version) = self.phase {
            result.map_err(|f| SessionError::NotQmp(format!("negotiation refused: {}", f.desc)))?;
            self.phase = Phase::Ready;
            return Ok(Some(Output::Ready(version)));
        }
        Ok(Some(match waiting {
            Waiting::Caller => Output::Reply(id, result),
            Waiting::Tombstone => Output::Late(id, result),
        }))
    }

    /// Commands that wait for an answer, cancelled ones included.
    pub fn pending(&self) -> usize {
        self.waiting.len()
    }
}

/// Whether a cancelled command was never sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withdrawn {
    /// No byte of it left: it will not be carried out.
    Yes,
    /// It was sent, wholly or in part.
    No,
}

fn failure(error: &Value) -> Failure {
    let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    Failure { class: text("class"), desc: text("desc") }
}

fn keys(message: &Map<String, Value>) -> String {
    let names: Vec<_> = message.keys().take(5).map(|k| crate::frame::quote(k.as_bytes())).collect();
    format!("an object with the keys {names:?}")
}

#[cfg(test)]
mod tests;
