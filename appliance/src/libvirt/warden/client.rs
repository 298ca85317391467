//! The worker's side of its warden.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use icecore_qmp::guardian::leash::send_fds;

use super::{Ended, JobWatch, Order, SUBCOMMAND};
use crate::data::Activity;
use crate::failure::{Failure, Outcome};
use crate::libvirt::Domain;
use crate::nbd::Leash;
use crate::state::locks::Lock;

/// How often the warden is told that the worker lives. It acts after 2 s.
const PULSE_INTERVAL: Duration = Duration::from_millis(200);

/// A warden at work. Dropping the last clone tells it to undo what is left and to end.
#[derive(Debug, Clone)]
pub struct WardenClient(Arc<Link>);

#[derive(Debug)]
struct Link {
    stream: UnixStream,
    leash: UnixStream,
    why: Arc<Mutex<Option<String>>>,
}

impl Drop for Link {
    fn drop(&mut self) {
        // The thread that reads from it would keep it open.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl WardenClient {
    /// Starts a warden for a domain; `lock` stays held until it has ended.
    pub fn start(domain: &Domain, lock: Lock, tried: &str) -> Outcome<Self> {
        Self::spawn(domain, lock.into_fd()).map_err(|e| Failure::failed(tried, e))
    }

    fn spawn(domain: &Domain, lock: OwnedFd) -> std::io::Result<Self> {
        let (stream, theirs) = UnixStream::pair()?;
        let (leash, their_leash) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND).stdin(Stdio::from(OwnedFd::from(theirs)));
        command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let mut child = command.spawn()?;
        // It outlives us on purpose; while we live, somebody has to take its exit status.
        std::thread::Builder::new().name("warden-reaper".into()).spawn(move || child.wait())?;
        send_fds(stream.as_fd(), &[their_leash.as_fd(), lock.as_fd()])?;
        let why = Arc::default();
        listen(stream.try_clone()?, Arc::clone(&why))?;
        let client = Self(Arc::new(Link { stream, leash, why }));
        let (uri, uuid) = (domain.virsh.uri().to_owned(), domain.uuid.clone());
        client.try_tell(&Order::Domain { uri, uuid })?;
        Ok(client)
    }

    fn try_tell(&self, order: &Order) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        (&self.0.stream).write_all(&line)
    }

    fn tell(&self, order: &Order, tried: &str) -> Outcome<()> {
        self.try_tell(order).map_err(|e| {
            Failure::failed(tried, format!("the warden of this run is gone: {e}")).unclean()
        })
    }

    /// The guest is about to be frozen: from now on the warden thaws it if nobody else does.
    pub fn freezing(&self, limit: Duration, tried: &str) -> Outcome<()> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.tell(&Order::Freezing { limit_ms }, tried)
    }

    /// The guest is thawed.
    pub fn thawed(&self, tried: &str) -> Outcome<()> {
        self.tell(&Order::Thawed, tried)
    }

    /// A backup job is about to begin.
    pub fn job(
        &self,
        (socket, dir): (&Path, &Path),
        scratch: Vec<PathBuf>,
        limit_bytes: u64,
        reserve_bytes: u64,
        tried: &str,
    ) -> Outcome<()> {
        let (socket, dir) = (socket.to_owned(), dir.to_owned());
        let watch = JobWatch { socket, dir, scratch, limit_bytes, reserve_bytes };
        self.tell(&Order::Job(watch), tried)
    }

    /// The job has ended.
    pub fn ended(&self, tried: &str) -> Outcome<()> {
        self.tell(&Order::Ended, tried)
    }

    /// Why the warden ended the job, if it did.
    pub fn why(&self) -> Option<String> {
        self.0.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets the warden hear that this process lives until the task is aborted: the pulse of the data
    /// threads while data are moved, else the loop itself, since then nothing lies unread here.
    pub fn start_pulse(&self, activity: Activity) -> tokio::task::JoinHandle<()> {
        let link = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            let mut idle = 0;
            while let Some(link) = link.upgrade() {
                idle += u64::from(!activity.is_running());
                let counter = activity.pulse.load(Ordering::Relaxed) + idle;
                // A warden that is gone is noticed by the next order.
                let _ = Self(link).try_tell(&Order::Pulse(counter));
                tokio::time::sleep(PULSE_INTERVAL).await;
            }
        })
    }
}

impl Leash for WardenClient {
    fn hold(&self, connection: BorrowedFd<'_>) -> std::io::Result<()> {
        send_fds(self.0.leash.as_fd(), &[connection])
    }
}

fn listen(stream: UnixStream, why: Arc<Mutex<Option<String>>>) -> std::io::Result<()> {
    let read = move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if let Ok(ended) = serde_json::from_str::<Ended>(&line) {
                *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended.why);
            }
        }
    };
    std::thread::Builder::new().name("warden-words".into()).spawn(read).map(drop)
}
