//! The worker's side of its guardian.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::leash::send_fds;
use super::protocol::{
    Connect, ErrorKind, Expose, Exposed, Greeted, GuardianError, Inspection, InstantPlan,
    InstantReport, LINE_BYTES_MAX, Prepare, Prepared, Push, PushState, Released, Request, Restart,
    SwapAway, ToGuardian, ToWorker, WritableDisk,
};
use super::spawn;
use crate::capture::guest_io::DeviceIo;
use crate::capture::names::DiskIndex;
use crate::capture::plan::Base;
use crate::features::Features;
use crate::place::Place;
use crate::recover::Intents;

/// Longest wait for an answer: a guardian that undoes a run on a QEMU that hangs gives up after
/// some twenty seconds, and a freeze has a deadline of seconds. One that says nothing for this long
/// is stopped itself.
const ANSWER_WAIT: Duration = Duration::from_secs(180);

/// `None` once the guardian is gone.
type Waiting = Arc<Mutex<Option<HashMap<u64, Answer>>>>;
type Answer = oneshot::Sender<Result<Value, GuardianError>>;

/// A guardian at work. Dropping the last clone (and each [`Pulse`]) tells it to undo what is left
/// and to end; it does the same when this process dies.
#[derive(Debug, Clone)]
pub struct GuardianClient {
    lines: mpsc::UnboundedSender<Vec<u8>>,
    waiting: Waiting,
    next_id: Arc<AtomicU64>,
    leash: Arc<StdUnixStream>,
}

/// Tells the guardian that the worker is alive.
#[derive(Debug, Clone)]
pub struct Pulse(mpsc::WeakUnboundedSender<Vec<u8>>);

impl Pulse {
    /// `counter` has to change at least every 2 s while anything is exposed: take it from what
    /// the data threads count, not from a timer. Never waits.
    pub fn beat(&self, counter: u64) {
        if let (Some(lines), Ok(line)) = (self.0.upgrade(), line(&ToGuardian::Pulse(counter))) {
            // A guardian that is gone is noticed by the next request.
            let _ = lines.send(line);
        }
    }
}

impl GuardianClient {
    /// Starts `exe args…`, whose body is [`super::main`]. `locks` stay held until the guardian
    /// ends: a new run that waits for them waits for it.
    pub fn spawn(exe: &Path, args: &[OsString], locks: &[OwnedFd]) -> Result<Self, GuardianError> {
        let failed = |error: std::io::Error| GuardianError {
            kind: ErrorKind::GuardianGone,
            message: format!("the guardian {} cannot be started: {error}", exe.display()),
        };
        let stream = spawn::spawn(exe, args).map_err(failed)?;
        Self::connect_to(stream, locks).map_err(failed)
    }

    /// Talks to a guardian that runs [`super::serve`] at the other end of `stream`.
    pub fn connect_to(stream: StdUnixStream, locks: &[OwnedFd]) -> std::io::Result<Self> {
        let leash = Arc::new(spawn::hand_over(&stream, locks)?);
        stream.set_nonblocking(true)?;
        let (read, write) = UnixStream::from_std(stream)?.into_split();
        let (lines, outbox) = mpsc::unbounded_channel();
        let waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        tokio::spawn(send_lines(write, outbox));
        tokio::spawn(receive_lines(read, Arc::clone(&waiting)));
        Ok(Self { lines, waiting, next_id: Arc::default(), leash })
    }

    /// Hands a data connection over: each NBD connection of ours to QEMU, and each of QEMU's to
    /// a server of ours, right after it is made. The guardian ends it with the exports, and when
    /// we stall; while it lives, closing it here is not enough for QEMU to notice.
    pub fn leash(&self, connection: BorrowedFd<'_>) -> std::io::Result<()> {
        send_fds(self.leash.as_fd(), &[connection])
    }

    /// A handle for [`Pulse::beat`].
    pub fn pulse(&self) -> Pulse {
        Pulse(self.lines.downgrade())
    }

    async fn request<T: DeserializeOwned>(&self, request: Request) -> Result<T, GuardianError> {
        let gone = || GuardianError {
            kind: ErrorKind::GuardianGone,
            message: "the guardian of this run is gone; the next start looks after its leftovers"
                .into(),
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let line = line(&ToGuardian::Request(id, request))?;
        let (answer, answered) = oneshot::channel();
        locked(&self.waiting).as_mut().ok_or_else(gone)?.insert(id, answer);
        self.lines.send(line).map_err(|_| gone())?;
        let Ok(answer) = tokio::time::timeout(ANSWER_WAIT, answered).await else {
            return Err(GuardianError {
                kind: ErrorKind::GuardianGone,
                message: format!(
                    "the guardian of this run has not answered for {} s; the next start looks \
                     after what it leaves",
                    ANSWER_WAIT.as_secs()
                ),
            });
        };
        let value = answer.map_err(|_| gone())??;
        serde_json::from_value(value).map_err(|error| GuardianError {
            kind: ErrorKind::OutOfOrder,
            message: format!("the guardian speaks another version: {error}"),
        })
    }

    /// Connects to the monitor and remembers where the agent is.
    pub async fn connect<P: Into<Place>>(
        &self,
        monitor: P,
        agent: Option<P>,
    ) -> Result<Greeted, GuardianError> {
        let (monitor, agent) = (monitor.into(), agent.map(Into::into));
        self.request(Request::Connect(Connect { monitor, agent })).await
    }

    /// What the connected QEMU can do, asked of it unless it is known already.
    pub async fn features(&self) -> Result<Features, GuardianError> {
        self.request(Request::Features).await
    }

    /// Spares the connected QEMU the question: this very process has answered it before.
    pub async fn know(&self, features: Features) -> Result<(), GuardianError> {
        self.request(Request::Know(features)).await
    }

    /// Looks at the QEMU without changing it.
    pub async fn inspect(&self) -> Result<Inspection, GuardianError> {
        self.request(Request::Inspect).await
    }

    /// Makes scratch, filters and new bitmaps; the guest notices nothing.
    pub async fn prepare(&self, prepare: Prepare) -> Result<Prepared, GuardianError> {
        self.request(Request::Prepare(prepare)).await
    }

    /// Takes the instant: freeze, stop where needed, insert, continue, thaw. With no disks
    /// prepared and [`super::protocol::Then::Hold`] it only holds the guest.
    pub async fn instant(&self, plan: InstantPlan) -> Result<InstantReport, GuardianError> {
        self.request(Request::Instant(plan)).await
    }

    /// Makes data and changes readable. From here on [`Pulse::beat`] is a duty.
    pub async fn expose(&self, expose: Expose) -> Result<Exposed, GuardianError> {
        self.request(Request::Expose(expose)).await
    }

    /// Starts to push a disk; the export of its map, read by now, ends. An error leaves the run as it was: abort it.
    pub async fn push(&self, push: Push) -> Result<(), GuardianError> {
        self.request(Request::Push(push)).await
    }

    /// How the push of a disk stands.
    pub async fn push_status(&self, disk: DiskIndex) -> Result<PushState, GuardianError> {
        self.request(Request::PushStatus(disk)).await
    }

    /// The sizes of the run's disks; a change undoes the run and is an error.
    pub async fn sizes(&self) -> Result<Vec<u64>, GuardianError> {
        self.request(Request::Sizes).await
    }

    /// How long the guest's own requests have taken so far. Cheap, never waits for a drain, and
    /// no sign of life: only [`Pulse::beat`] is.
    pub async fn guest_io(&self) -> Result<Vec<DeviceIo>, GuardianError> {
        self.request(Request::GuestIo).await
    }

    /// Ends exports and takes the graph out; close the NBD connections first. All bitmaps stay
    /// until [`Self::retire`] or [`Self::drop_new`].
    pub async fn release(&self) -> Result<Released, GuardianError> {
        self.request(Request::Release).await
    }

    /// The point is committed and was read back: removes these older bitmaps.
    pub async fn retire(&self, old: Vec<String>) -> Result<Released, GuardianError> {
        self.request(Request::Retire(old)).await
    }

    /// The point is known not to be committed: removes the bitmaps that the run added.
    pub async fn drop_new(&self) -> Result<Released, GuardianError> {
        self.request(Request::DropNew).await
    }

    /// Rollback: gives the held guest's devices stand-ins.
    pub async fn swap_away(&self, swap: SwapAway) -> Result<(), GuardianError> {
        self.request(Request::SwapAway(swap)).await
    }

    /// Rollback: exports the disks for writing, with their changes since each base.
    pub async fn expose_writable(
        &self,
        bases: Vec<Option<Base>>,
    ) -> Result<Vec<WritableDisk>, GuardianError> {
        self.request(Request::ExposeWritable(bases)).await
    }

    /// Rollback: to be answered before the first byte is written.
    pub async fn begin_writing(&self) -> Result<(), GuardianError> {
        self.request(Request::BeginWriting).await
    }

    /// Rollback: gives the devices their disks back; the guest still stands.
    pub async fn swap_back(&self) -> Result<Released, GuardianError> {
        self.request(Request::SwapBack).await
    }

    /// Rollback: ends the hold.
    pub async fn restart(&self, how: Restart) -> Result<(), GuardianError> {
        self.request(Request::Restart(how)).await
    }

    /// Undoes everything now.
    pub async fn abort(&self) -> Result<Released, GuardianError> {
        self.request(Request::Abort).await
    }

    /// Undoes another run from its journal; see [`crate::recover`].
    pub async fn recover(
        &self,
        intents: Intents,
        server_socket: Option<PathBuf>,
    ) -> Result<Released, GuardianError> {
        self.request(Request::Recover(Box::new(intents), server_socket)).await
    }

    /// Removes bitmaps of ours by name.
    pub async fn forget(&self, bitmaps: Vec<String>) -> Result<Released, GuardianError> {
        self.request(Request::Forget(bitmaps)).await
    }
}

/// One line for the guardian. A path that is not UTF-8 has no place in it, nor in QMP.
fn line(message: &ToGuardian) -> Result<Vec<u8>, GuardianError> {
    let refused = |why: String| GuardianError {
        kind: ErrorKind::Refused,
        message: format!("the guardian cannot be asked for this: {why}"),
    };
    let mut bytes = serde_json::to_vec(message).map_err(|error| refused(error.to_string()))?;
    bytes.push(b'\n');
    if bytes.len() > LINE_BYTES_MAX {
        return Err(refused(format!("the request has more than {LINE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

async fn send_lines(mut write: OwnedWriteHalf, mut outbox: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(line) = outbox.recv().await {
        if write.write_all(&line).await.is_err() {
            return;
        }
    }
}

async fn receive_lines(read: OwnedReadHalf, waiting: Waiting) {
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(reply) = serde_json::from_str::<ToWorker>(&line) else { break };
        let caller = locked(&waiting).as_mut().and_then(|callers| callers.remove(&reply.id));
        if let Some(caller) = caller {
            // A caller that gave up waiting does not matter to the others.
            let _ = caller.send(reply.answer);
        }
    }
    locked(&waiting).take();
}

fn locked(waiting: &Waiting) -> MutexGuard<'_, Option<HashMap<u64, Answer>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[tokio::test]
    async fn what_cannot_be_said_is_an_error_and_not_a_wait() {
        let (ours, _theirs) = StdUnixStream::pair().expect("a pair");
        let client = GuardianClient::connect_to(ours, &[]).expect("a client");
        let monitor = PathBuf::from(OsString::from_vec(b"/run/\xff.sock".to_vec()));
        let error = client.connect(monitor, None).await.expect_err("no such path in JSON");
        assert_eq!(error.kind, ErrorKind::Refused);
        assert!(error.message.contains("UTF-8"), "{error}");
        let many = vec!["icecore:".repeat(1 << 16); 16];
        let error = client.forget(many).await.expect_err("longer than any line");
        assert_eq!(error.kind, ErrorKind::Refused);
    }
}
