//! The task behind a monitor: moves bytes between the socket and the session.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{Answer, CallError, Message};
use crate::errors::QmpError;
use crate::features::QemuVersion;
use crate::session::{CommandId, Event, Output, Session, SessionError};

/// Bytes taken from the socket at once.
const READ_BYTES: usize = 64 << 10;

/// Owns the socket; callers reach it by messages.
pub(super) struct Driver {
    session: Session,
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
    buffer: Vec<u8>,
    events: broadcast::Sender<Event>,
    callers: HashMap<CommandId, (u64, oneshot::Sender<Answer>)>,
    /// Why it ended, once it has.
    pub(super) ended: Arc<OnceLock<String>>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ending {
    #[error(transparent)]
    Protocol(SessionError),
    #[error("{0}")]
    Socket(String),
}

impl Ending {
    /// The error of a connection that did not get as far as taking commands.
    pub(super) fn while_connecting(self, path: &Path) -> QmpError {
        let path = path.to_owned();
        match self {
            Self::Protocol(SessionError::NotQmp(why)) => QmpError::NotQmp { path, why },
            other => {
                QmpError::Closed { command: "connecting".into(), path, why: other.to_string() }
            }
        }
    }
}

enum Wake {
    Message(Option<Message>),
    Read(std::io::Result<usize>),
    Wrote(std::io::Result<usize>),
}

impl Driver {
    pub(super) fn new(
        read: OwnedReadHalf,
        write: OwnedWriteHalf,
        events: broadcast::Sender<Event>,
    ) -> Self {
        // Uniqueness among the clients of one monitor is all that is asked of the nonce.
        let nonce = getrandom::u32().unwrap_or_else(|_| std::process::id());
        Self {
            session: Session::new(nonce),
            read,
            write,
            buffer: vec![0; READ_BYTES],
            events,
            callers: HashMap::new(),
            ended: Arc::default(),
        }
    }

    pub(super) async fn until_ready(&mut self) -> Result<QemuVersion, Ending> {
        loop {
            let wake = self.io().await;
            for output in self.outputs(wake)? {
                if let Output::Ready(version) = output {
                    return Ok(version);
                }
                self.deliver(output);
            }
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        let why = loop {
            let wake = tokio::select! {
                message = inbox.recv() => Wake::Message(message),
                wake = self.io() => wake,
            };
            let step = match wake {
                Wake::Message(None) => break "it was closed by us".to_owned(),
                Wake::Message(Some(message)) => {
                    self.message(message);
                    continue;
                }
                wake => self.outputs(wake),
            };
            match step {
                Ok(outputs) => outputs.into_iter().for_each(|output| self.deliver(output)),
                Err(ending) => break ending.to_string(),
            }
        };
        tracing::debug!(%why, "QMP connection ended");
        // Said before the callers are dropped, so that each of them finds the reason.
        let _ = self.ended.set(why);
    }

    async fn io(&mut self) -> Wake {
        let unsent = self.session.transmit();
        tokio::select! {
            read = self.read.read(&mut self.buffer) => Wake::Read(read),
            wrote = self.write.write(unsent), if !unsent.is_empty() => Wake::Wrote(wrote),
        }
    }

    fn outputs(&mut self, wake: Wake) -> Result<Vec<Output>, Ending> {
        match wake {
            Wake::Message(_) => Ok(Vec::new()),
            Wake::Read(Ok(0)) => Err(Ending::Protocol(self.session.eof())),
            Wake::Read(Ok(count)) => {
                self.session.feed(&self.buffer[..count]).map_err(Ending::Protocol)
            }
            Wake::Wrote(Ok(count)) => {
                self.session.transmitted(count);
                Ok(Vec::new())
            }
            Wake::Read(Err(error)) | Wake::Wrote(Err(error)) => {
                Err(Ending::Socket(error.to_string()))
            }
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Call { call, name, arguments, answer } => {
                match self.session.execute(&name, arguments) {
                    Ok(id) => drop(self.callers.insert(id, (call, answer))),
                    Err(_) => drop(answer.send(Err(CallError::Busy(self.session.pending())))),
                }
            }
            Message::Cancel { call } => {
                let id =
                    self.callers.iter().find(|(_, caller)| caller.0 == call).map(|(id, _)| *id);
                if let Some(id) = id {
                    self.callers.remove(&id);
                    self.session.cancel(id);
                }
            }
        }
    }

    fn deliver(&mut self, output: Output) {
        match output {
            Output::Ready(_) => {}
            Output::Late(id, result) => {
                tracing::warn!(?id, ok = result.is_ok(), "reply to a QMP command given up before");
            }
            Output::Reply(id, result) => {
                if let Some((_, answer)) = self.callers.remove(&id) {
                    drop(answer.send(result.map_err(CallError::Refused)));
                }
            }
            // No subscriber is no fault.
            Output::Event(event) => drop(self.events.send(event)),
        }
    }
}
