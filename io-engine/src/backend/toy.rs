//! A toy protocol and its scripted server, for tests. Little endian.
//!
//! Request: op u8, tag u64, offset u64, len u32, then the payload of a write.
//! Reply: kind u8 (0 done, 1 error, 2 data, 3 hole, 4 unsupported), tag u64, at u32, len u32, then
//! the bytes of a data chunk.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::lane::Lane;
use crate::wire::{Op, Want, Wire, WireError, WireErrorKind};

const REQUEST: usize = 21;
const REPLY: usize = 17;

/// Client side.
pub(crate) struct Toy {
    depth: u32,
    max_request: u32,
    out: Vec<u8>,
    flying: HashMap<u64, (Op, u32, u32)>,
    payload: Option<(u64, u32, u32)>,
    zero: VecDeque<(u64, u32, u32)>,
    done: VecDeque<(u64, Result<(), WireError>)>,
}

impl Toy {
    pub(crate) fn new(depth: u32, max_request: u32) -> Self {
        Self {
            depth,
            max_request,
            out: Vec::new(),
            flying: HashMap::new(),
            payload: None,
            zero: VecDeque::new(),
            done: VecDeque::new(),
        }
    }

    fn cover(&mut self, tag: u64, at: u32, len: u32) -> Result<(), WireError> {
        let broken = || WireError::new(WireErrorKind::Protocol, "bad chunk");
        let (op, total, covered) = self.flying.get_mut(&tag).ok_or_else(broken)?;
        if *op != Op::Read || u64::from(at) + u64::from(len) > u64::from(*total) {
            return Err(broken());
        }
        *covered += len;
        Ok(())
    }
}

fn code(op: Op) -> u8 {
    match op {
        Op::Read => 0,
        Op::Write => 1,
        Op::WriteZeroes { .. } => 2,
        Op::Trim => 3,
        Op::Flush => 4,
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

fn long(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

impl Wire for Toy {
    fn max_in_flight(&self) -> u32 {
        self.depth
    }

    fn max_request(&self) -> u32 {
        self.max_request
    }

    fn submit(&mut self, tag: u64, op: Op, offset: u64, len: u32) -> Result<(), WireError> {
        assert!(self.flying.insert(tag, (op, len, 0)).is_none(), "tag in flight");
        self.out.push(code(op));
        self.out.extend_from_slice(&tag.to_le_bytes());
        self.out.extend_from_slice(&offset.to_le_bytes());
        self.out.extend_from_slice(&len.to_le_bytes());
        Ok(())
    }

    fn transmit(&self) -> &[u8] {
        &self.out
    }

    fn transmitted(&mut self, n: usize) {
        self.out.drain(..n);
    }

    fn want(&self) -> Want {
        match self.payload {
            Some((tag, at, len)) => Want::Payload { tag, at, len },
            None => Want::Header(REPLY),
        }
    }

    fn header(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        let (kind, tag) = (bytes[0], long(&bytes[1..]));
        let (at, len) = (word(&bytes[9..]), word(&bytes[13..]));
        match kind {
            2 => {
                self.cover(tag, at, len)?;
                self.payload = Some((tag, at, len));
            }
            3 => {
                self.cover(tag, at, len)?;
                self.zero.push_back((tag, at, len));
            }
            _ => {
                let (op, total, covered) = self.flying.remove(&tag).unwrap();
                let outcome = match kind {
                    0 if op == Op::Read && covered != total => {
                        return Err(WireError::new(WireErrorKind::Protocol, "short reply"));
                    }
                    0 => Ok(()),
                    4 => Err(WireError::new(WireErrorKind::Unsupported, "unsupported")),
                    _ => Err(WireError {
                        kind: WireErrorKind::Refused,
                        errno: Some(5),
                        message: "input/output error".into(),
                    }),
                };
                self.done.push_back((tag, outcome));
            }
        }
        Ok(())
    }

    fn payload_done(&mut self) -> Result<(), WireError> {
        self.payload = None;
        Ok(())
    }

    fn zero_fill(&mut self) -> Option<(u64, u32, u32)> {
        self.zero.pop_front()
    }

    fn completed(&mut self) -> Option<(u64, Result<(), WireError>)> {
        self.done.pop_front()
    }
}

/// What the server does wrong, or oddly.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script {
    /// Answers requests that touch this byte with an error.
    pub(crate) error_at: Option<u64>,
    /// Refuses such a write before it takes the payload.
    pub(crate) refuse_early: bool,
    /// Closes in the middle of the reply to the n-th read.
    pub(crate) die_at_read: Option<u64>,
    /// Claims that the n-th read is complete with half of its data.
    pub(crate) short_at_read: Option<u64>,
    /// Answers nothing from the n-th request on, without closing.
    pub(crate) stall_at: Option<u64>,
    /// Knows no write-zeroes, trim and flush.
    pub(crate) no_zeroes: bool,
    /// Answers requests in batches, the last first.
    pub(crate) reversed: bool,
    /// Trickles: sleeps before each reply.
    pub(crate) delay: Duration,
    /// Takes one request at a time on each connection.
    pub(crate) shallow: bool,
}

/// A disk that several connections of a toy server share.
#[derive(Clone, Default)]
pub(crate) struct ToyDisk {
    pub(crate) bytes: Arc<Mutex<Vec<u8>>>,
    pub(crate) flushes: Arc<Mutex<u64>>,
    pub(crate) zeroed: Arc<Mutex<u64>>,
}

impl ToyDisk {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes)), ..Self::default() }
    }

    /// `count` lanes to a server of this disk that follows `script`.
    pub(crate) fn lanes(&self, count: usize, script: &Script) -> Vec<Lane> {
        let depth = if script.shallow { 1 } else { 16 };
        (0..count)
            .map(|_| {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let (disk, script) = (self.clone(), script.clone());
                std::thread::spawn(move || Server::new(disk, script).run(theirs));
                Lane::Stream { fd: ours.into(), wire: Box::new(Toy::new(depth, 32 << 20)) }
            })
            .collect()
    }
}

pub(crate) struct Server {
    disk: ToyDisk,
    script: Script,
    seen: u64,
    reads: u64,
}

/// Bytes of requests and replies that are in neither hand.
#[derive(Default)]
pub(crate) struct Between {
    pub(crate) requests: VecDeque<u8>,
    pub(crate) replies: VecDeque<u8>,
}

impl Read for Between {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.requests.read(out)
    }
}

impl Write for Between {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.replies.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Between {
    /// Whether a whole request is there.
    fn has_request(&self) -> bool {
        let head: Vec<u8> = self.requests.iter().take(REQUEST).copied().collect();
        let payload = |head: &[u8]| if head[0] == 1 { word(&head[17..]) as usize } else { 0 };
        head.len() == REQUEST && self.requests.len() >= REQUEST + payload(&head)
    }
}

impl Server {
    pub(crate) fn new(disk: ToyDisk, script: Script) -> Self {
        Self { disk, script, seen: 0, reads: 0 }
    }

    /// Answers all whole requests.
    pub(crate) fn answer(&mut self, between: &mut Between) {
        while between.has_request() {
            let reply = self.serve(between).unwrap();
            between.replies.extend(reply);
        }
    }

    fn run(mut self, mut peer: UnixStream) {
        let mut batch: Vec<Vec<u8>> = Vec::new();
        loop {
            if !batch.is_empty() {
                peer.set_nonblocking(true).unwrap();
                let more = matches!(peer_peek(&peer), Some(n) if n > 0) && batch.len() < 5;
                peer.set_nonblocking(false).unwrap();
                if !more {
                    for reply in batch.drain(..).rev() {
                        if peer.write_all(&reply).is_err() {
                            return;
                        }
                    }
                }
            }
            let Some(reply) = self.serve(&mut peer) else { return };
            std::thread::sleep(self.script.delay);
            if self.script.reversed {
                batch.push(reply);
            } else if peer.write_all(&reply).is_err() {
                return;
            }
        }
    }

    /// Takes one request; the bytes of its reply, or `None` to close.
    fn serve(&mut self, peer: &mut (impl Read + Write)) -> Option<Vec<u8>> {
        let mut head = [0u8; REQUEST];
        peer.read_exact(&mut head).ok()?;
        let (op, tag, offset, len) =
            (head[0], long(&head[1..]), long(&head[9..]), word(&head[17..]));
        self.seen += 1;
        let range = offset..offset + u64::from(len);
        let bad = self.script.error_at.is_some_and(|at| range.contains(&at));
        if bad && self.script.refuse_early {
            peer.write_all(&reply(1, tag, 0, 0)).ok()?;
        }
        let mut payload = vec![0u8; if op == 1 { len as usize } else { 0 }];
        peer.read_exact(&mut payload).ok()?;
        if self.script.stall_at.is_some_and(|n| self.seen >= n) {
            let _ = peer.read_to_end(&mut Vec::new());
            return None;
        }
        if bad {
            return Some(if self.script.refuse_early { vec![] } else { reply(1, tag, 0, 0) });
        }
        let span = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        match op {
            0 => return self.read(peer, tag, span),
            1 => self.disk.bytes.lock().unwrap()[span].copy_from_slice(&payload),
            _ if self.script.no_zeroes => return Some(reply(4, tag, 0, 0)),
            2 => {
                *self.disk.zeroed.lock().unwrap() += u64::from(len);
                self.disk.bytes.lock().unwrap()[span].fill(0);
            }
            4 => *self.disk.flushes.lock().unwrap() += 1,
            _ => {}
        }
        Some(reply(0, tag, 0, 0))
    }

    /// Sends chunks of 96 KiB, holes for those that are zero.
    fn read(
        &mut self,
        peer: &mut impl Write,
        tag: u64,
        span: std::ops::Range<usize>,
    ) -> Option<Vec<u8>> {
        self.reads += 1;
        let bytes = self.disk.bytes.lock().unwrap()[span].to_vec();
        let short = self.script.short_at_read == Some(self.reads);
        let bytes = if short { &bytes[..bytes.len() / 2] } else { &bytes[..] };
        let mut out = Vec::with_capacity(bytes.len() + 200);
        if bytes.iter().all(|byte| *byte == 0) && !short {
            out.extend(reply(3, tag, 0, bytes.len()));
        } else {
            for (index, chunk) in bytes.chunks(96 << 10).enumerate() {
                let zero = chunk.iter().all(|byte| *byte == 0);
                let kind = if zero { 3 } else { 2 };
                out.extend(reply(kind, tag, index * (96 << 10), chunk.len()));
                out.extend_from_slice(if zero { &[] } else { chunk });
            }
        }
        out.extend(reply(0, tag, 0, 0));
        if self.script.die_at_read == Some(self.reads) {
            let _ = peer.write_all(&out[..out.len() / 2]);
            return None;
        }
        Some(out)
    }
}

fn reply(kind: u8, tag: u64, at: usize, len: usize) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend_from_slice(&tag.to_le_bytes());
    out.extend_from_slice(&u32::try_from(at).unwrap().to_le_bytes());
    out.extend_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
    out
}

fn peer_peek(peer: &UnixStream) -> Option<usize> {
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
    rustix::net::recv(peer, &mut [0u8; 1], flags).map(|(n, _)| n).ok()
}
