//! A peer that answers as its script says, for the monitor's and the agent's protocol.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::frame::{Framer, MAX_MESSAGE_BYTES};

/// A greeting as QEMU 10.0.2 sends it.
pub const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "#,
    r#""capabilities": ["oob"]}}"#,
    "\r\n"
);

/// A request that the fake received.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command.
    pub name: String,
    /// Its arguments, `Null` without.
    pub arguments: Value,
    /// Its id, where it has one.
    pub id: Option<Value>,
}

/// One thing that the fake does, in the order of the script.
#[derive(Debug, Clone)]
pub enum Act {
    /// Answers with success and the request's id.
    Return(Value),
    /// Answers with an error and the request's id.
    Error(&'static str, String),
    /// Sends bytes as they are.
    Raw(Vec<u8>),
    /// Sends an event.
    Event(&'static str, Value),
    /// Does nothing for a while; later requests wait, as with the real ones.
    Wait(Duration),
    /// Closes the connection.
    Close,
}

/// A fake on a unix socket that serves one client at a time. It ends when dropped.
#[derive(Debug)]
pub struct Fake {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    /// A monitor that sends `greeting` and then follows the script. Where the script says `None`,
    /// capabilities are negotiated and all other commands unknown.
    pub fn monitor(
        path: &Path,
        greeting: impl Into<Vec<u8>>,
        script: impl FnMut(&Request) -> Option<Vec<Act>> + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::listen(path, greeting.into(), script)
    }

    /// A guest agent that follows the script. Where it says `None`, synchronisations are answered
    /// and all other commands unknown.
    pub fn agent(
        path: &Path,
        script: impl FnMut(&Request) -> Option<Vec<Act>> + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::listen(path, Vec::new(), script)
    }

    fn listen(
        path: &Path,
        greeting: Vec<u8>,
        mut script: impl FnMut(&Request) -> Option<Vec<Act>> + Send + 'static,
    ) -> std::io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that went away is no fault of the fake.
                let _ = serve(stream, &greeting, &mut script).await;
            }
        });
        Ok(Self { path: path.to_owned(), task })
    }

    /// Its socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

async fn serve(
    mut stream: UnixStream,
    greeting: &[u8],
    script: &mut (impl FnMut(&Request) -> Option<Vec<Act>> + Send),
) -> std::io::Result<()> {
    stream.write_all(greeting).await?;
    let mut framer = Framer::new(MAX_MESSAGE_BYTES);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        for request in requests(&mut framer, &buffer[..count]) {
            let acts = script(&request).unwrap_or_else(|| usual(&request));
            for act in acts {
                if let Act::Close = act {
                    return Ok(());
                }
                perform(&mut stream, &request, act).await?;
            }
        }
    }
}

fn requests(framer: &mut Framer, bytes: &[u8]) -> Vec<Request> {
    let mut found = Vec::new();
    for mut piece in bytes.split(|byte| *byte == 0xFF) {
        while let Ok((used, message)) = framer.push(piece) {
            piece = &piece[used..];
            found.extend(message.map(request));
            if piece.is_empty() {
                break;
            }
        }
    }
    found
}

fn request(mut message: Value) -> Request {
    let name = message["execute"].as_str().unwrap_or_default().to_owned();
    let id = message.get("id").cloned();
    Request { name, arguments: message["arguments"].take(), id }
}

fn usual(request: &Request) -> Vec<Act> {
    match request.name.as_str() {
        "qmp_capabilities" => vec![Act::Return(json!({}))],
        "guest-sync-delimited" => {
            vec![Act::Raw(vec![0xFF]), Act::Return(request.arguments["id"].clone())]
        }
        name => vec![Act::Error("CommandNotFound", format!("The command {name} is not known"))],
    }
}

async fn perform(stream: &mut UnixStream, request: &Request, act: Act) -> std::io::Result<()> {
    let mut message = match act {
        Act::Wait(time) => {
            tokio::time::sleep(time).await;
            return Ok(());
        }
        Act::Close => return Ok(()),
        Act::Raw(bytes) => return stream.write_all(&bytes).await,
        Act::Event(name, data) => json!({"event": name, "data": data}),
        Act::Return(value) => json!({"return": value}),
        Act::Error(class, desc) => json!({"error": {"class": class, "desc": desc}}),
    };
    if let (Some(id), None) = (&request.id, message.get("event")) {
        message["id"] = id.clone();
    }
    stream.write_all(format!("{message}\r\n").as_bytes()).await
}
