//! The guest agent, seen from the test: is it there, and what is it asked.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::failure::{During, Result};

/// An idle agent answers in milliseconds; emulated, within a second.
const PING_DEADLINE: Duration = Duration::from_secs(2);

/// Whether the agent behind this socket answers now. The socket is free again afterwards.
pub fn agent_answers(socket: &Path) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PING_DEADLINE))?;
        stream.write_all(b"\xff{\"execute\":\"guest-sync\",\"arguments\":{\"id\":424242}}\n")?;
        let mut lines = BufReader::new(stream);
        // An error about the 0xFF, or an answer to somebody else, may come first.
        for _ in 0..4 {
            let mut line = Vec::new();
            lines.read_until(b'\n', &mut line)?;
            if String::from_utf8_lossy(&line).contains("424242") {
                return Ok(true);
            }
        }
        Ok(false)
    };
    ask().unwrap_or(false)
}

type AtThaw = Arc<Mutex<dyn FnMut() + Send>>;

/// What a client of the proxy gets to see of the agent's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// All of them.
    All,
    /// Not the one to a freeze: the guest is frozen and nobody says so.
    NoneToFreeze,
}

/// Passes everything on between a client and an agent, and does something before the first thaw
/// after each freeze.
#[derive(Debug)]
pub struct AgentProxy {
    socket: PathBuf,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl AgentProxy {
    /// Listens on `socket` for one client after the other.
    pub fn start(
        socket: &Path,
        agent: &Path,
        answers: Answers,
        at_thaw: impl FnMut() + Send + 'static,
    ) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).during(socket.display())?;
        let over = Arc::new(AtomicBool::new(false));
        let (stop, agent) = (Arc::clone(&over), agent.to_path_buf());
        let at_thaw: AtThaw = Arc::new(Mutex::new(at_thaw));
        let thread = std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                serve(client, &agent, answers, &at_thaw);
            }
        });
        Ok(Self { socket: socket.to_path_buf(), over, thread: Some(thread) })
    }

    /// The socket it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for AgentProxy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // Wakes the listener, which then sees that it is over.
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(client: UnixStream, agent: &Path, answers: Answers, at_thaw: &AtThaw) {
    let Ok(agent) = UnixStream::connect(agent) else { return };
    let (Ok(from_agent), Ok(to_client)) = (agent.try_clone(), client.try_clone()) else { return };
    // Set while the next answer is the one to a freeze.
    let swallow = Arc::new(AtomicBool::new(false));
    let mute = Arc::clone(&swallow);
    let back = std::thread::spawn(move || pass_back(from_agent, to_client, &mute));
    pass_on(&client, &agent, at_thaw, || {
        swallow.store(answers == Answers::NoneToFreeze, Ordering::Release);
    });
    let _ = agent.shutdown(Shutdown::Both);
    let _ = back.join();
}

fn pass_back(from_agent: UnixStream, mut to_client: UnixStream, swallow: &AtomicBool) {
    let mut answers = BufReader::new(from_agent);
    let mut line = Vec::new();
    while matches!(answers.read_until(b'\n', &mut line), Ok(1..)) {
        if !swallow.swap(false, Ordering::AcqRel) && to_client.write_all(&line).is_err() {
            return;
        }
        line.clear();
    }
    let _ = to_client.shutdown(Shutdown::Both);
}

fn pass_on(client: &UnixStream, mut agent: &UnixStream, at_thaw: &AtThaw, at_freeze: impl Fn()) {
    let mut requests = BufReader::new(client);
    let mut frozen = false;
    let mut line = Vec::new();
    while matches!(requests.read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line);
        if text.contains("guest-fsfreeze-freeze") {
            frozen = true;
            at_freeze();
        } else if text.contains("guest-fsfreeze-thaw") && std::mem::take(&mut frozen) {
            at_thaw.lock().unwrap_or_else(PoisonError::into_inner)();
        }
        if agent.write_all(&line).is_err() {
            return;
        }
        line.clear();
    }
}
