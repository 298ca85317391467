//! A tokio driver for one connection: enough to inspect, to ask for extents, and to move small
//! amounts of data. Bulk data goes through a data plane that takes the connection over with
//! [`Control::into_stream`].
//!
//! A call that was cancelled or failed in mid-reply poisons the connection; later calls say so.

mod changed;
mod connect;
mod data;
mod status;
mod status_plan;
mod stream;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

pub use changed::{Changed, ChangedKind};
pub use status::Flow;

use crate::error::{Cause, Error};
use crate::export_info::{Dialect, ExportInfo, Session};
use crate::transmission::{Transmission, Want};
use stream::Stream;

/// How long connecting and the whole handshake may take.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long the server may go without finishing a request. A trickle is no progress.
pub const PROGRESS_DEADLINE: Duration = Duration::from_secs(30);

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// Metadata contexts without which the connection is of no use.
    pub contexts: Vec<String>,
    /// Metadata contexts that are taken where they exist.
    pub optional_contexts: Vec<String>,
    /// The newest form of replies to ask for.
    pub dialect_max: Dialect,
    /// Ask with EXPORT_NAME only, for servers that hang up on other options.
    pub legacy: bool,
    /// Bound for connecting and the handshake.
    pub connect_deadline: Duration,
    /// Bound for the time between two finished requests.
    pub progress_deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            contexts: Vec::new(),
            optional_contexts: Vec::new(),
            dialect_max: Dialect::Extended,
            legacy: false,
            connect_deadline: CONNECT_DEADLINE,
            progress_deadline: PROGRESS_DEADLINE,
        }
    }
}

/// Whether a file descriptor waits or says "would block".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// Reads and writes wait.
    Yes,
    /// Reads and writes return `EAGAIN`.
    No,
}

impl AsFd for Control {
    /// The socket: to be ended from outside, never to be read or written.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// An open export.
#[derive(Debug)]
pub struct Control {
    peer: String,
    stream: Stream,
    transmission: Transmission,
    progress_deadline: Duration,
    deadline: Instant,
    /// Set while a call runs: finding it set means that an earlier one did not end well.
    busy: bool,
    header: Vec<u8>,
}

impl Control {
    /// The export.
    pub fn export(&self) -> &ExportInfo {
        self.transmission.export()
    }

    /// Everything that was negotiated.
    pub fn session(&self) -> &Session {
        self.transmission.session()
    }

    /// The peer's address, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Hands the connection to a data plane: the socket, and the machine that speaks on it.
    pub fn into_stream(self, blocking: Blocking) -> Result<(OwnedFd, Transmission), Error> {
        let peer = self.peer;
        let failed = |cause| Error { peer: peer.clone(), doing: "hand over the socket", cause };
        if self.busy {
            return Err(failed(Cause::Poisoned));
        }
        let fd = self.stream.into_fd(blocking).map_err(|error| failed(error.into()))?;
        Ok((fd, self.transmission))
    }

    /// Says goodbye and closes. The server sends nothing back.
    pub async fn disconnect(mut self) -> Result<(), Error> {
        self.begin("disconnect")?;
        let result = self.say_goodbye().await;
        self.end("disconnect", result)
    }

    async fn say_goodbye(&mut self) -> Result<(), Cause> {
        self.transmission.disconnect()?;
        self.send_headers().await?;
        self.stream.shutdown().await.map_err(Cause::from)
    }

    /// Marks the connection as in use; fails when an earlier call left it in mid-reply.
    fn begin(&mut self, doing: &'static str) -> Result<(), Error> {
        if self.busy {
            return Err(self.error(doing, Cause::Poisoned));
        }
        self.busy = true;
        self.deadline = Instant::now() + self.progress_deadline;
        Ok(())
    }

    /// Ends a call. The connection stays usable unless it stopped in mid-reply.
    fn end<T>(&mut self, doing: &'static str, result: Result<T, Cause>) -> Result<T, Error> {
        let reusable = match &result {
            Ok(_) | Err(Cause::Request(_) | Cause::Submit(_)) => self.transmission.in_flight() == 0,
            Err(_) => false,
        };
        self.busy = !reusable;
        result.map_err(|cause| self.error(doing, cause))
    }

    fn error(&self, doing: &'static str, cause: Cause) -> Error {
        Error { peer: self.peer.clone(), doing, cause }
    }

    /// One request has ended: the server is making progress.
    fn progress(&mut self) {
        self.deadline = Instant::now() + self.progress_deadline;
    }

    async fn send_headers(&mut self) -> Result<(), Cause> {
        let sent = timeout_at(self.deadline, self.stream.write_all(self.transmission.transmit()));
        sent.await.map_err(|_| Cause::TimedOut(self.progress_deadline))??;
        let n = self.transmission.transmit().len();
        self.transmission.transmitted(n);
        Ok(())
    }

    /// Reads and handles the next piece of a reply. Tags are positions in `buffer`.
    async fn turn(&mut self, buffer: &mut [u8]) -> Result<(), Cause> {
        match self.transmission.want() {
            Want::Header(bytes) => {
                self.header.resize(bytes, 0);
                let read = timeout_at(self.deadline, self.stream.read_exact(&mut self.header));
                read.await.map_err(|_| Cause::TimedOut(self.progress_deadline))??;
                self.transmission.header(&self.header)?;
            }
            Want::Payload { tag, at, len } => {
                let start = tag as usize + at as usize;
                let part = &mut buffer[start..start + len as usize];
                let read = timeout_at(self.deadline, self.stream.read_exact(part));
                read.await.map_err(|_| Cause::TimedOut(self.progress_deadline))??;
                self.transmission.payload_done()?;
            }
            Want::Closed => return Err(Cause::Poisoned),
        }
        while let Some((tag, at, len)) = self.transmission.zero_fill() {
            let start = tag as usize + at as usize;
            buffer[start..start + len as usize].fill(0);
        }
        Ok(())
    }
}
