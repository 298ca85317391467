//! A proxy that stands in front of an object store and does to chosen requests what networks and
//! servers do.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::failure::{Failure, Result};
use crate::icecore::Site;
use crate::object_store::{SECRET_KEY, object_store_environment};

/// Heads of requests and answers are far smaller.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mischief {
    /// It is not passed on; the answer is this status with this code.
    Refuse(u16, &'static str),
    /// It is not passed on; the answer is 200 with an error as its body.
    RefuseKindly(&'static str),
    /// The connection breaks in the middle of its body.
    Reset,
    /// It is carried out, and the connection ends without an answer.
    LoseReply,
    /// The answer ends in the middle of its body.
    Truncate,
    /// The answer has the tag of something else.
    WrongTag,
    /// The answer is a listing that lacks all keys that contain this: it is late.
    Omit(&'static str),
}

/// Which requests it happens to.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The method.
    pub method: &'static str,
    /// What the path with its query contains.
    pub contains: &'static str,
    /// So many of them are left alone first.
    pub after: usize,
    /// So many are hit then.
    pub times: usize,
    /// What happens.
    pub mischief: Mischief,
}

#[derive(Debug, Default)]
struct Script {
    rules: Vec<Rule>,
    hits: usize,
    requests: usize,
    journey: Duration,
}

impl Script {
    fn next(&mut self, method: &str, target: &str) -> Option<Mischief> {
        self.requests += 1;
        for rule in &mut self.rules {
            if rule.method != method || !target.contains(rule.contains) || rule.times == 0 {
                continue;
            }
            if rule.after > 0 {
                rule.after -= 1;
                continue;
            }
            rule.times -= 1;
            self.hits += 1;
            return Some(rule.mischief);
        }
        None
    }
}

/// A proxy in the background; its connections end with the process.
#[derive(Debug)]
pub struct FaultProxy {
    port: u16,
    script: Arc<Mutex<Script>>,
}

impl FaultProxy {
    /// Stands in front of what listens on `upstream` of this machine.
    pub fn start(upstream: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let script = Arc::<Mutex<Script>>::default();
        let shared = Arc::clone(&script);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let script = Arc::clone(&shared);
                // A connection that breaks is what this is for.
                std::thread::spawn(move || drop(serve(client, upstream, &script)));
            }
        });
        Ok(Self { port, script })
    }

    /// A repository in the server behind this.
    pub fn site(&self, address: &str) -> Site {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let environment = object_store_environment(&endpoint, SECRET_KEY);
        Site { address: address.to_owned(), environment, ..Site::default() }
    }

    /// From now on these rules hold, and no others.
    pub fn play(&self, rules: Vec<Rule>) {
        *self.script.lock().unwrap_or_else(PoisonError::into_inner) =
            Script { rules, ..Script::default() };
    }

    /// From now on nothing is done to requests, but each takes so long, as to a server far away.
    pub fn be_far(&self, journey: Duration) {
        *self.script.lock().unwrap_or_else(PoisonError::into_inner) =
            Script { journey, ..Script::default() };
    }

    /// How many requests there were since the last [`play`](Self::play) or [`be_far`](Self::be_far).
    pub fn requests(&self) -> usize {
        self.script.lock().unwrap_or_else(PoisonError::into_inner).requests
    }

    /// How many requests were hit since the last [`play`](Self::play).
    pub fn hits(&self) -> usize {
        self.script.lock().unwrap_or_else(PoisonError::into_inner).hits
    }
}

/// One request on one connection.
fn serve(mut client: TcpStream, upstream: u16, script: &Mutex<Script>) -> Result<()> {
    let (head, mut body) = read_head(&mut client)?;
    let line = head.lines().next().unwrap_or_default();
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let length = header(&head, "content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    let (mischief, journey) = {
        let mut script = script.lock().unwrap_or_else(PoisonError::into_inner);
        (script.next(method, target), script.journey)
    };
    std::thread::sleep(journey);
    if mischief == Some(Mischief::Reset) {
        body.resize(length / 2, 0);
        return Ok(());
    }
    let had = body.len();
    body.resize(length, 0);
    client.read_exact(&mut body[had..])?;
    match mischief {
        Some(Mischief::Refuse(status, code)) => return refuse(&mut client, status, code),
        Some(Mischief::RefuseKindly(code)) => return refuse(&mut client, 200, code),
        _ => {}
    }
    let mut server = TcpStream::connect(("127.0.0.1", upstream))?;
    let (first, rest) = head.split_once("\r\n").unwrap_or((&head, ""));
    server.write_all(format!("{first}\r\nConnection: close\r\n{rest}").as_bytes())?;
    server.write_all(&body)?;
    let (answer, mut content) = read_head(&mut server)?;
    server.read_to_end(&mut content)?;
    match mischief {
        Some(Mischief::LoseReply) => Ok(()),
        Some(Mischief::Truncate) => {
            client.write_all(answer.as_bytes())?;
            Ok(client.write_all(&content[..content.len() / 2])?)
        }
        Some(Mischief::WrongTag) => {
            let wrong = "00000000000000000000000000000000";
            let tag = header(&answer, "etag").unwrap_or_default().trim_matches('"').to_owned();
            client.write_all(answer.replace(&tag, wrong).as_bytes())?;
            Ok(client.write_all(&content)?)
        }
        Some(Mischief::Omit(part)) => {
            let content = omit(&String::from_utf8_lossy(&content), part);
            let length = header(&answer, "content-length").unwrap_or_default();
            let (old, new) = (format!(": {length}\r\n"), format!(": {}\r\n", content.len()));
            client.write_all(answer.replacen(&old, &new, 1).as_bytes())?;
            Ok(client.write_all(content.as_bytes())?)
        }
        _ => {
            client.write_all(answer.as_bytes())?;
            Ok(client.write_all(&content)?)
        }
    }
}

/// A listing without the entries whose keys contain `part`.
fn omit(listing: &str, part: &str) -> String {
    let mut entries = listing.split("<Contents>");
    let mut kept = entries.next().unwrap_or_default().to_owned();
    for entry in entries {
        let (key, rest) = entry.split_once("</Contents>").unwrap_or((entry, ""));
        let is_omitted = key.split_once("</Key>").is_some_and(|(key, _)| key.contains(part));
        if is_omitted {
            kept += rest;
        } else {
            kept += &format!("<Contents>{entry}");
        }
    }
    kept
}

fn refuse(client: &mut TcpStream, status: u16, code: &str) -> Result<()> {
    let body = format!("<Error><Code>{code}</Code><Message>as the script says</Message></Error>");
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status} Scripted\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    Ok(client.write_all(answer.as_bytes())?)
}

/// The head with the empty line at its end, and what came behind it. Answers are told to be the last
/// ones of their connections.
fn read_head(stream: &mut TcpStream) -> Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer)?;
        bytes.extend_from_slice(&buffer[..count]);
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let body = bytes.split_off(at + 4);
            let head = String::from_utf8_lossy(&bytes).into_owned();
            return Ok((head, body));
        }
        if count == 0 || bytes.len() > HEAD_BYTES_MAX {
            return Err(Failure::new("no head of a request"));
        }
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}
