//! A server whose every answer is written by the test. It runs on a plain thread, so that it serves
//! clients of any kind.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::export_info::{Context, Dialect};
use crate::proto::{INIT_MAGIC, OPTION_MAGIC, PAYLOAD_BYTES_MAX, chunk, command, take_u32};
use crate::server::negotiation::{Negotiation, OPTION_BYTES_MAX, Offer, Reaction};
use crate::server::requests::{RequestHeader, header_bytes, parse};
use crate::server::{Access, Features, replies};

/// One thing that the server does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Sends these bytes.
    Send(Vec<u8>),
    /// Sends these bytes again and again until the client closes.
    Flood(Vec<u8>),
    /// Sends these bytes one by one with a pause before each.
    Trickle(Vec<u8>, Duration),
    /// Does nothing for a while.
    Pause(Duration),
    /// Closes the connection.
    Close,
}

/// What the honest part of the connection looks like.
#[derive(Clone, Debug)]
pub struct Script {
    /// The export, named `disk`.
    pub features: Features,
    /// Its metadata contexts; ids count from 1 in this order.
    pub contexts: Vec<String>,
    /// The newest form of replies that is offered.
    pub dialect_max: Dialect,
}

impl Script {
    /// A writable export of this size, without contexts, with extended headers.
    pub fn new(size_bytes: u64) -> Script {
        let features = Features::new(size_bytes, Access::Writable);
        Script { features, contexts: Vec::new(), dialect_max: Dialect::Extended }
    }

    /// The same with this dialect.
    pub fn dialect(mut self, dialect_max: Dialect) -> Script {
        self.dialect_max = dialect_max;
        self
    }

    /// The same with these contexts.
    pub fn contexts(mut self, names: &[&str]) -> Script {
        self.contexts = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }
}

/// A running scripted server.
#[derive(Debug)]
pub struct Scripted {
    client: Option<UnixStream>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Scripted {
    /// Shakes hands honestly, then lets `answer` decide on each request. It gets the connection's
    /// dialect, the request and its payload.
    pub fn start(
        script: Script,
        answer: impl FnMut(Dialect, &RequestHeader, &[u8]) -> Vec<Act> + Send + 'static,
    ) -> io::Result<Scripted> {
        Scripted::raw(move |mut socket| {
            let Some((dialect, _contexts)) = shake_hands(&mut socket, &script)? else {
                return Ok(());
            };
            answer_requests(&mut socket, dialect, answer)
        })
    }

    /// Runs any code on the server's end of the connection.
    pub fn raw(
        body: impl FnOnce(UnixStream) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Scripted> {
        let (client, server) = UnixStream::pair()?;
        let thread = std::thread::Builder::new()
            .name("scripted-nbd".to_owned())
            .spawn(move || body(server))?;
        Ok(Scripted { client: Some(client), thread: Some(thread) })
    }

    /// The client's end, once.
    pub fn client(&mut self) -> Option<UnixStream> {
        self.client.take()
    }

    /// Waits for the end of the server; a client that closed early is no failure.
    pub fn join(mut self) -> io::Result<()> {
        drop(self.client.take());
        let ended = self.thread.take().map(JoinHandle::join);
        match ended {
            Some(Err(_panicked)) => Err(io::Error::other("the scripted server panicked")),
            Some(Ok(Err(error))) if !gone(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

fn gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// The greeting of a newstyle server with these handshake flags.
pub fn greeting(flags: u16) -> Vec<u8> {
    let mut out = INIT_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out
}

fn shake_hands(
    socket: &mut UnixStream,
    script: &Script,
) -> io::Result<Option<(Dialect, Vec<Context>)>> {
    socket.write_all(&greeting(3))?;
    socket.read_exact(&mut [0; 4])?;
    let offer = Offer {
        name: "disk".to_owned(),
        features: script.features.clone(),
        contexts: script.contexts.clone(),
    };
    let mut negotiation = Negotiation::new(vec![offer], script.dialect_max, true);
    loop {
        let mut header = [0; 16];
        socket.read_exact(&mut header)?;
        let mut fields = &header[8..];
        let code = take_u32(&mut fields).unwrap_or_default();
        let length = take_u32(&mut fields).unwrap_or_default().min(OPTION_BYTES_MAX);
        let mut data = vec![0; length as usize];
        socket.read_exact(&mut data)?;
        let reaction = negotiation.option(code, &data).map_err(io::Error::other)?;
        socket.write_all(&negotiation.take_replies())?;
        match reaction {
            Reaction::Continue => {}
            Reaction::Close => return Ok(None),
            Reaction::Transmit { contexts, .. } => {
                return Ok(Some((negotiation.dialect(), contexts)));
            }
        }
    }
}

fn answer_requests(
    socket: &mut UnixStream,
    dialect: Dialect,
    mut answer: impl FnMut(Dialect, &RequestHeader, &[u8]) -> Vec<Act>,
) -> io::Result<()> {
    loop {
        let mut header = vec![0; header_bytes(dialect)];
        socket.read_exact(&mut header)?;
        let request = parse(&header, dialect).map_err(io::Error::other)?;
        if request.command == command::DISC {
            return Ok(());
        }
        let length = request.payload_bytes(dialect).map_err(io::Error::other)?;
        let mut payload = vec![0; length.min(PAYLOAD_BYTES_MAX) as usize];
        socket.read_exact(&mut payload)?;
        for act in answer(dialect, &request, &payload) {
            if !perform(socket, act)? {
                return Ok(());
            }
        }
    }
}

/// Does one thing; false ends the connection.
fn perform(socket: &mut UnixStream, act: Act) -> io::Result<bool> {
    match act {
        Act::Send(bytes) => socket.write_all(&bytes)?,
        Act::Flood(bytes) => loop {
            socket.write_all(&bytes)?;
        },
        Act::Trickle(bytes, pause) => {
            for byte in bytes {
                std::thread::sleep(pause);
                socket.write_all(&[byte])?;
            }
        }
        Act::Pause(time) => std::thread::sleep(time),
        Act::Close => return Ok(false),
    }
    Ok(true)
}

impl RequestHeader {
    /// A chunk in answer to this request: header and body.
    pub fn chunk(&self, dialect: Dialect, flags: u16, kind: u16, body: &[u8]) -> Vec<u8> {
        let length = body.len() as u64;
        let mut out = replies::chunk_header(dialect, flags, kind, self.cookie, self.offset, length);
        out.extend_from_slice(body);
        out
    }

    /// A data chunk in answer to this request.
    pub fn data(&self, dialect: Dialect, flags: u16, offset: u64, data: &[u8]) -> Vec<u8> {
        let mut body = offset.to_be_bytes().to_vec();
        body.extend_from_slice(data);
        self.chunk(dialect, flags, chunk::OFFSET_DATA, &body)
    }

    /// A hole chunk in answer to this request.
    pub fn hole(&self, dialect: Dialect, flags: u16, offset: u64, length: u32) -> Vec<u8> {
        self.chunk(dialect, flags, chunk::OFFSET_HOLE, &replies::hole_body(offset, length))
    }

    /// The end of a reply.
    pub fn done(&self, dialect: Dialect) -> Vec<u8> {
        self.chunk(dialect, chunk::FLAG_DONE, chunk::NONE, &[])
    }
}
