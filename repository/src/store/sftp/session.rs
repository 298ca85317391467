//! One conversation with an SFTP server over two pipes: many requests in flight, each answer handed
//! to whoever waits for it.
//!
//! A thread reads all answers, so nobody's slowness keeps another from his. A conversation that
//! breaks, or in which nothing is heard for [`STALL_MAX`], is over for everyone.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::wire::{self, Hello, MESSAGE_BYTES_MAX, Message, Reply, Request, RequestId};

/// A server from which nothing is heard for so long, while something is asked of it, is given up.
/// An fsync of a pack on a slow disk stays well below.
pub(super) const STALL_MAX: Duration = Duration::from_secs(120);
/// The same for its first message: a person who has to touch a security key is waited for.
const HELLO_WAIT: Duration = Duration::from_secs(60);

/// The client's side.
#[derive(Debug)]
pub(super) struct Session {
    output: Mutex<Output>,
    shared: Arc<Shared>,
}

/// The pipe to the server. It does not block: a server that reads no more is noticed.
struct Output {
    pipe: Box<dyn Pipe>,
    next: u32,
}

/// A pipe that can be waited for.
pub(super) trait Pipe: Write + AsFd + Send {}
impl<T: Write + AsFd + Send> Pipe for T {}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("next", &self.next).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    waiting: HashMap<RequestId, SyncSender<Reply>>,
    greeted: Option<SyncSender<Hello>>,
    heard: Instant,
    /// Why the conversation is over.
    ended: Option<String>,
}

/// A request that was sent. Whoever drops it does not care for the answer.
#[derive(Debug)]
pub(super) struct Pending {
    answer: Receiver<Reply>,
    shared: Arc<Shared>,
}

impl Session {
    /// Greets the server at the other end of two pipes.
    pub(super) fn start(
        input: impl Read + Send + 'static,
        output: impl Pipe + 'static,
    ) -> io::Result<(Self, Hello)> {
        rustix::fs::fcntl_setfl(&output, OFlags::NONBLOCK)?;
        let (greeted, hello) = sync_channel(1);
        let (waiting, heard) = (HashMap::new(), Instant::now());
        let state = State { waiting, greeted: Some(greeted), heard, ended: None };
        let shared = Arc::new(Shared { state: Mutex::new(state) });
        let listener = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("icecore-sftp".into())
            .spawn(move || listener.listen(input))?;
        let output = Mutex::new(Output { pipe: Box::new(output), next: 0 });
        let session = Self { output, shared };
        session.send(&mut session.output(), &wire::greeting())?;
        match hello.recv_timeout(HELLO_WAIT) {
            Ok(hello) => Ok((session, hello)),
            Err(RecvTimeoutError::Disconnected) => Err(session.shared.lost()),
            Err(RecvTimeoutError::Timeout) => {
                session.shared.end(format!("no answer within {} s", HELLO_WAIT.as_secs()));
                Err(session.shared.lost())
            }
        }
    }

    /// Whether nothing more can be asked.
    pub(super) fn has_ended(&self) -> bool {
        self.shared.state().ended.is_some()
    }

    /// Sends a request; the answer is waited for elsewhere.
    pub(super) fn submit(&self, request: &Request<'_>) -> io::Result<Pending> {
        let (answered, answer) = sync_channel(1);
        let mut output = self.output();
        let id = RequestId(output.next);
        output.next = output.next.wrapping_add(1);
        {
            let mut state = self.shared.state();
            if state.ended.is_some() {
                drop(state);
                return Err(self.shared.lost());
            }
            if state.waiting.is_empty() {
                state.heard = Instant::now();
            }
            state.waiting.insert(id, answered);
        }
        self.send(&mut output, &request.encode(id))?;
        Ok(Pending { answer, shared: Arc::clone(&self.shared) })
    }

    /// Sends a request and waits for the answer.
    pub(super) fn ask(&self, request: &Request<'_>) -> io::Result<Reply> {
        self.submit(request)?.wait()
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Half a request cannot be taken back, so a failure ends the conversation.
    fn send(&self, output: &mut Output, message: &[u8]) -> io::Result<()> {
        write_patiently(output.pipe.as_mut(), message).map_err(|error| {
            self.shared.end(format!("a request could not be sent: {error}"));
            self.shared.lost()
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.end("it was closed".to_owned());
    }
}

fn write_patiently(pipe: &mut dyn Pipe, mut rest: &[u8]) -> io::Result<()> {
    let wait = Timespec { tv_sec: STALL_MAX.as_secs().cast_signed(), tv_nsec: 0 };
    while !rest.is_empty() {
        match pipe.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut polled = [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::OUT)];
                match poll(&mut polled, Some(&wait)) {
                    Ok(0) => return Err(io::Error::other("the server reads no more")),
                    Ok(_) | Err(rustix::io::Errno::INTR) => (),
                    Err(errno) => return Err(errno.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Pending {
    /// Waits for the answer.
    pub(super) fn wait(self) -> io::Result<Reply> {
        let mut patience = STALL_MAX;
        loop {
            match self.answer.recv_timeout(patience) {
                Ok(reply) => return Ok(reply),
                Err(RecvTimeoutError::Disconnected) => return Err(self.shared.lost()),
                Err(RecvTimeoutError::Timeout) => {
                    // Others may have been answered meanwhile: then the server is at work.
                    let silence = self.shared.state().heard.elapsed();
                    match STALL_MAX.checked_sub(silence) {
                        Some(rest) if !rest.is_zero() => patience = rest,
                        _ => self.shared.end(format!("silent for {} s", silence.as_secs())),
                    }
                }
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the conversation for everyone; the first reason stays.
    fn end(&self, why: String) {
        let mut state = self.state();
        state.ended.get_or_insert(why);
        state.waiting.clear();
        state.greeted = None;
    }

    /// Never `NotFound`: what a server did not say of an object is not known of it.
    fn lost(&self) -> io::Error {
        let why = self.state().ended.clone().unwrap_or_default();
        io::Error::other(format!("the connection to the server is lost: {why}"))
    }

    fn listen(&self, input: impl Read) {
        let mut input = BufReader::new(input);
        let why = loop {
            match read_message(&mut input).and_then(|message| self.hand_out(message)) {
                Ok(()) => (),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    break "it was closed at the other end".to_owned();
                }
                Err(error) => break error.to_string(),
            }
        };
        self.end(why);
    }

    fn hand_out(&self, message: Bytes) -> io::Result<()> {
        let mut state = self.state();
        state.heard = Instant::now();
        match Message::parse(message).map_err(io::Error::other)? {
            Message::Hello(hello) => match state.greeted.take() {
                // Nobody listening any more is as good as delivered, here and below.
                Some(greeted) => drop(greeted.try_send(hello)),
                None => return Err(io::Error::other("it greets twice")),
            },
            Message::Reply(id, reply) => match state.waiting.remove(&id) {
                Some(answered) => drop(answered.try_send(reply)),
                None => return Err(io::Error::other("it answers what nobody asked")),
            },
        }
        Ok(())
    }
}

fn read_message(input: &mut impl Read) -> io::Result<Bytes> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let bytes = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if !(1..=MESSAGE_BYTES_MAX).contains(&bytes) {
        let start: String = String::from_utf8_lossy(&length).escape_debug().collect();
        return Err(io::Error::other(format!(
            "its answer is no SFTP (it begins with {start:?}); does the shell of that user print \
             something when it starts?"
        )));
    }
    let mut message = vec![0; bytes];
    input.read_exact(&mut message)?;
    Ok(message.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::wire::Code;
    use super::*;

    const HELLO: [u8; 9] = [0, 0, 0, 5, 2, 0, 0, 0, 3];

    /// The server's ends of the two pipes.
    struct Server {
        output: UnixStream,
        _input: UnixStream,
    }

    /// A session with a server that has greeted.
    fn greeted() -> (Session, Server) {
        let (ours_in, mut output) = UnixStream::pair().unwrap();
        let (ours_out, mut input) = UnixStream::pair().unwrap();
        output.write_all(&HELLO).unwrap();
        let (session, _) = Session::start(ours_in, ours_out).unwrap();
        let mut greeting = [0; 9];
        input.read_exact(&mut greeting).unwrap();
        (session, Server { output, _input: input })
    }

    fn done(id: u8) -> [u8; 13] {
        [0, 0, 0, 9, 101, 0, 0, 0, id, 0, 0, 0, 0]
    }

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let (session, mut server) = greeted();
        let first = session.submit(&Request::Limits).unwrap();
        let unwanted = session.submit(&Request::Limits).unwrap();
        let second = session.submit(&Request::Limits).unwrap();
        drop(unwanted);
        for id in [2, 1, 0] {
            server.output.write_all(&done(id)).unwrap();
        }
        let expected = Reply::Status { code: Code::Done, text: String::new() };
        assert_eq!(first.wait().unwrap(), expected);
        assert_eq!(second.wait().unwrap(), expected);
        assert!(!session.has_ended());
    }

    #[test]
    fn whoever_waits_when_the_server_goes_is_told() {
        let (session, server) = greeted();
        let waiting = session.submit(&Request::Limits).unwrap();
        drop(server);
        let error = waiting.wait().unwrap_err();
        assert!(error.to_string().contains("lost"), "{error}");
        assert_ne!(error.kind(), io::ErrorKind::NotFound);
        assert!(session.has_ended());
        assert!(session.ask(&Request::Limits).is_err());
    }

    #[test]
    fn what_breaks_the_protocol_ends_the_conversation() {
        let mut long = [0; 9];
        long[..4].copy_from_slice(&(1u32 << 30).to_be_bytes());
        for garbage in [&b"Welcome!\n"[..], &done(77), &HELLO, &long, &[0, 0, 0, 0]] {
            let (session, mut server) = greeted();
            let waiting = session.submit(&Request::Limits).unwrap();
            server.output.write_all(garbage).unwrap();
            assert!(waiting.wait().is_err(), "{garbage:?}");
            assert!(session.has_ended());
        }
    }
}
