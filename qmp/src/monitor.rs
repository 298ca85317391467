//! A QMP connection on tokio: the [`Session`](crate::session::Session) with a socket, deadlines and callers.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use qapi::Command;
use serde_json::{Map, Value};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant;

use crate::errors::QmpError;
use crate::features::QemuVersion;
use crate::place::{self, Place};
use crate::session::{Event, Failure};

mod driver;

use driver::Driver;

/// Events kept for a subscriber that does not keep up; older ones are lost to it.
const EVENTS_KEPT: usize = 256;

/// Pause before a full backlog is tried again: a connect to a unix socket does not wait for it.
const BACKLOG_RETRY: Duration = Duration::from_millis(20);

/// Commands that are sent without waiting in between: half of what a session lets wait, so that
/// somebody else's command always finds room.
const COMMANDS_AT_ONCE: usize = crate::session::MAX_PENDING / 2;

/// A connected QMP monitor. Clones share the connection; it closes with the last of them.
#[derive(Debug, Clone)]
pub struct Monitor {
    shared: Arc<Shared>,
    calls: mpsc::UnboundedSender<Message>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    version: QemuVersion,
    peer: Option<i32>,
    next_call: AtomicU64,
    ended: Arc<OnceLock<String>>,
    events: broadcast::WeakSender<Event>,
}

type Answer = Result<Value, CallError>;

#[derive(Debug)]
enum CallError {
    Refused(Failure),
    Busy(usize),
}

#[derive(Debug)]
enum Message {
    Call { call: u64, name: String, arguments: Map<String, Value>, answer: oneshot::Sender<Answer> },
    Cancel { call: u64 },
}

impl Monitor {
    /// Connects to the monitor's unix socket and negotiates, all within `deadline`.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let until = Instant::now() + deadline;
        let stream = connect(path, until, deadline).await?;
        Self::negotiate(stream, path, until, deadline).await
    }

    /// Connects to a monitor, wherever it is, and negotiates, all within `deadline`.
    pub async fn reach(place: &Place, deadline: Duration) -> Result<Self, QmpError> {
        let until = Instant::now() + deadline;
        let (stream, child) = place.open(until, deadline).await?;
        let name = place.name();
        match Self::negotiate(stream, &name, until, deadline).await {
            Err(error) => Err(place::told_by(child, &name, error).await),
            met => met,
        }
    }

    /// Negotiates on a connected stream; `name` stands for its path in messages.
    pub async fn over(
        stream: UnixStream,
        name: &Path,
        deadline: Duration,
    ) -> Result<Self, QmpError> {
        Self::negotiate(stream, name, Instant::now() + deadline, deadline).await
    }

    async fn negotiate(
        stream: UnixStream,
        path: &Path,
        until: Instant,
        waited: Duration,
    ) -> Result<Self, QmpError> {
        let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let (read, write) = stream.into_split();
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let weak_events = events.downgrade();
        let mut driver = Driver::new(read, write, events);
        let silent = || QmpError::NoGreeting { path: path.to_owned(), waited };
        let version = tokio::time::timeout_at(until, driver.until_ready())
            .await
            .map_err(|_| silent())?
            .map_err(|ending| ending.while_connecting(path))?;
        let ended = Arc::clone(&driver.ended);
        let (calls, inbox) = mpsc::unbounded_channel();
        tokio::spawn(driver.run(inbox));
        let path = path.to_owned();
        let next_call = AtomicU64::new(0);
        let shared =
            Arc::new(Shared { path, version, peer, next_call, ended, events: weak_events });
        Ok(Self { shared, calls })
    }

    /// The version in QEMU's greeting.
    pub fn version(&self) -> QemuVersion {
        self.shared.version
    }

    /// The process that listened on the socket, where the kernel tells.
    pub fn peer(&self) -> Option<i32> {
        self.shared.peer
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Why the connection ended; `None` while it lives.
    pub fn ended(&self) -> Option<&str> {
        self.shared.ended.get().map(String::as_str)
    }

    /// Events from now on. A slow subscriber loses the oldest; the channel ends with the
    /// connection.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        match self.shared.events.upgrade() {
            Some(sender) => sender.subscribe(),
            None => broadcast::channel(1).1,
        }
    }

    /// Runs one command. On [`QmpError::Timeout`] it may still be carried out later; a call that
    /// is dropped counts as timed out.
    pub async fn execute<C: Command>(
        &self,
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
        &self,
        name: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        self.begin(name, arguments)?.answer(self, deadline).await
    }

    /// Runs commands that do not depend on each other's answers: they are sent without waiting in
    /// between. The answers come in the same order.
    pub async fn execute_all(
        &self,
        commands: impl IntoIterator<Item = (&str, Value)>,
        deadline: Duration,
    ) -> Result<Vec<Result<Value, QmpError>>, QmpError> {
        let mut commands = commands.into_iter();
        let mut answers = Vec::new();
        loop {
            let begun = commands.by_ref().take(COMMANDS_AT_ONCE);
            let begun = begun.map(|(name, arguments)| self.begin(name, arguments));
            let begun = begun.collect::<Result<Vec<_>, _>>()?;
            if begun.is_empty() {
                return Ok(answers);
            }
            for call in begun {
                answers.push(call.answer(self, deadline).await);
            }
        }
    }

    fn begin(&self, name: &str, arguments: Value) -> Result<Begun<'_>, QmpError> {
        let arguments = object(name, arguments)?;
        let call = self.shared.next_call.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let message = Message::Call { call, name: name.to_owned(), arguments, answer };
        self.calls.send(message).map_err(|_| self.closed(name))?;
        let cancel = CancelOnDrop { call, calls: &self.calls };
        Ok(Begun { name: name.to_owned(), answered, _cancel: cancel })
    }

    fn closed(&self, name: &str) -> QmpError {
        let why = self.ended().unwrap_or("its driver is gone").to_owned();
        QmpError::Closed { command: name.into(), path: self.shared.path.clone(), why }
    }
}

/// A command that was sent.
struct Begun<'a> {
    name: String,
    answered: oneshot::Receiver<Answer>,
    _cancel: CancelOnDrop<'a>,
}

impl Begun<'_> {
    async fn answer(self, monitor: &Monitor, deadline: Duration) -> Result<Value, QmpError> {
        match tokio::time::timeout(deadline, self.answered).await {
            Err(_) => Err(QmpError::Timeout { command: self.name, waited: deadline }),
            Ok(Err(_)) => Err(monitor.closed(&self.name)),
            Ok(Ok(answer)) => answer.map_err(|error| error.named(&self.name)),
        }
    }
}

impl CallError {
    fn named(self, command: &str) -> QmpError {
        let command = command.to_owned();
        match self {
            Self::Refused(Failure { class, desc }) => QmpError::Refused { command, class, desc },
            Self::Busy(pending) => QmpError::Busy { command, pending },
        }
    }
}

/// Tells the driver that nobody waits any more; the driver ignores calls already answered.
struct CancelOnDrop<'a> {
    call: u64,
    calls: &'a mpsc::UnboundedSender<Message>,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        // A closed channel means that the driver is gone, and with it the call.
        let _ = self.calls.send(Message::Cancel { call: self.call });
    }
}

fn object(command: &str, arguments: Value) -> Result<Map<String, Value>, QmpError> {
    match arguments {
        Value::Object(map) => Ok(map),
        Value::Null => Ok(Map::new()),
        other => Err(QmpError::Content {
            command: command.into(),
            why: format!("arguments must be an object, not {other}"),
        }),
    }
}

/// Connects to a unix socket, telling apart what an operator can do about a failure.
pub(crate) async fn connect(
    path: &Path,
    until: Instant,
    waited: Duration,
) -> Result<UnixStream, QmpError> {
    use std::io::ErrorKind;
    let owned = path.to_owned();
    let attempt = async {
        loop {
            match UnixStream::connect(path).await {
                // The backlog is full of clients that wait for the one being served.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    tokio::time::sleep(BACKLOG_RETRY).await;
                }
                other => return other,
            }
        }
    };
    match tokio::time::timeout_at(until, attempt).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => {
            Err(QmpError::NoSocket { path: owned })
        }
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => {
            Err(QmpError::NobodyListens { path: owned })
        }
        Ok(Err(error)) => Err(QmpError::Connect { path: owned, why: connect_advice(&error) }),
        Err(_) => Err(QmpError::NoGreeting { path: owned, waited }),
    }
}

fn connect_advice(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            format!("{error}: run Icecore as root or as QEMU's user")
        }
        _ => error.to_string(),
    }
}
