//! Joins the NBD client to the data plane, which knows no NBD.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use icecore_io_engine::{Lane, Op, Want, Wire, WireError, WireErrorKind};
use icecore_nbd_client::error::{ProtocolError, RequestError, SubmitError};
use icecore_nbd_client::transmission::{self, Transmission};
use icecore_nbd_client::{Blocking, Control, Endpoint, Options, Uri};
use icecore_qmp::guardian::GuardianClient;

use crate::failure::{Failure, Outcome};

/// Connections to one export where the server allows several; more gains nothing (measured).
const LANES_MAX: usize = 4;

/// What an export can tell about its content.
pub const ALLOCATION: &str = "base:allocation";

/// An export, and who has to be able to end our connections to it.
#[derive(Debug, Clone)]
pub struct Peer {
    pub uri: Uri,
    /// The guardian of the QEMU that serves it: an unread reply of ours would make that QEMU wait.
    guardian: Option<GuardianClient>,
}

impl Peer {
    /// An export of a server that serves no guest.
    pub fn plain(uri: Uri) -> Self {
        Self { uri, guardian: None }
    }

    /// An export on a unix socket of a server that serves no guest.
    pub fn on_socket(socket: &Path, export: &str) -> Self {
        Self::plain(unix_uri(socket, export))
    }

    /// An export of a QEMU with a guest.
    pub fn of_qemu(socket: &Path, export: &str, guardian: &GuardianClient) -> Self {
        Self { uri: unix_uri(socket, export), guardian: Some(guardian.clone()) }
    }

    async fn connect(&self, options: &Options, tried: &str) -> Outcome<(Control, HangUp)> {
        let control = Control::connect(&self.uri, options).await;
        let control = control.map_err(|e| Failure::failed(tried, e))?;
        let failed = |e: std::io::Error| Failure::failed(tried, e);
        if let Some(guardian) = &self.guardian {
            guardian.leash(control.as_fd()).map_err(failed)?;
        }
        let hang_up = HangUp(control.as_fd().try_clone_to_owned().map_err(failed)?);
        Ok((control, hang_up))
    }
}

fn unix_uri(socket: &Path, export: &str) -> Uri {
    Uri { endpoint: Endpoint::Unix(socket.to_owned()), export: export.to_owned() }
}

/// Ends a connection when it is dropped: the guardian holds the socket, too, so closing it here
/// would not be noticed at the other end.
#[derive(Debug)]
pub struct HangUp(OwnedFd);

impl Drop for HangUp {
    fn drop(&mut self) {
        // A peer that is gone has hung up already.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

/// A connection for questions.
#[derive(Debug)]
pub struct Questions {
    control: Control,
    _hang_up: HangUp,
}

impl Questions {
    /// Says goodbye.
    pub async fn disconnect(self) -> Result<(), icecore_nbd_client::Error> {
        self.control.disconnect().await
    }
}

impl Deref for Questions {
    type Target = Control;

    fn deref(&self) -> &Control {
        &self.control
    }
}

impl DerefMut for Questions {
    fn deref_mut(&mut self) -> &mut Control {
        &mut self.control
    }
}

/// Connections for data, to be kept as long as the lanes are used.
#[derive(Debug)]
pub struct Lanes {
    pub set: Vec<Lane>,
    pub hang_up: Vec<HangUp>,
}

/// Connects once, for questions about the export. `bitmap` is required when given.
pub async fn control(peer: &Peer, bitmap: Option<&str>, tried: &str) -> Outcome<Questions> {
    let options = Options {
        contexts: bitmap.map(|name| format!("qemu:dirty-bitmap:{name}")).into_iter().collect(),
        optional_contexts: vec![ALLOCATION.into()],
        ..Options::default()
    };
    let (control, hang_up) = peer.connect(&options, tried).await?;
    Ok(Questions { control, _hang_up: hang_up })
}

/// Connects as often as the server allows, for data.
pub async fn lanes(peer: &Peer, tried: &str) -> Outcome<Lanes> {
    let options = Options::default();
    let mut lanes = Lanes { set: Vec::new(), hang_up: Vec::new() };
    let mut wanted = 1;
    while lanes.set.len() < wanted {
        let (control, hang_up) = peer.connect(&options, tried).await?;
        if control.export().multi_conn() {
            wanted = LANES_MAX;
        }
        let (fd, transmission) =
            control.into_stream(Blocking::Yes).map_err(|e| Failure::failed(tried, e))?;
        lanes.set.push(Lane::Stream { fd, wire: Box::new(NbdWire(transmission)) });
        lanes.hang_up.push(hang_up);
    }
    Ok(lanes)
}

/// NBD's transmission phase as the data plane wants it.
struct NbdWire(Transmission);

impl Wire for NbdWire {
    fn max_in_flight(&self) -> u32 {
        self.0.max_in_flight()
    }

    fn max_request(&self) -> u32 {
        self.0.max_request()
    }

    fn submit(&mut self, tag: u64, op: Op, offset: u64, len: u32) -> Result<(), WireError> {
        let op = match op {
            Op::Read => transmission::Op::Read,
            Op::Write => transmission::Op::Write,
            Op::WriteZeroes { may_trim } => transmission::Op::WriteZeroes { may_trim },
            Op::Trim => transmission::Op::Trim,
            Op::Flush => transmission::Op::Flush,
        };
        self.0.submit(tag, op, offset, len).map_err(|e| not_sent(&e))
    }

    fn transmit(&self) -> &[u8] {
        self.0.transmit()
    }

    fn transmitted(&mut self, n: usize) {
        self.0.transmitted(n);
    }

    fn want(&self) -> Want {
        match self.0.want() {
            transmission::Want::Header(bytes) => Want::Header(bytes),
            transmission::Want::Payload { tag, at, len } => Want::Payload { tag, at, len },
            transmission::Want::Closed => Want::Closed,
        }
    }

    fn header(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.0.header(bytes).map_err(|e| broken(&e))
    }

    fn payload_done(&mut self) -> Result<(), WireError> {
        self.0.payload_done().map_err(|e| broken(&e))
    }

    fn zero_fill(&mut self) -> Option<(u64, u32, u32)> {
        self.0.zero_fill()
    }

    fn completed(&mut self) -> Option<(u64, Result<(), WireError>)> {
        self.0.completed().map(|(tag, result)| (tag, result.map_err(|e| refused(&e))))
    }
}

fn not_sent(error: &SubmitError) -> WireError {
    let kind = match error {
        SubmitError::NotOffered(_) => WireErrorKind::Unsupported,
        SubmitError::Closed => WireErrorKind::Closed,
        _ => WireErrorKind::Refused,
    };
    WireError::new(kind, error.to_string())
}

fn broken(error: &ProtocolError) -> WireError {
    WireError::new(WireErrorKind::Protocol, error.to_string())
}

fn refused(error: &RequestError) -> WireError {
    let errno = i32::try_from(error.errno.code()).ok();
    WireError { kind: WireErrorKind::Refused, errno, message: error.to_string() }
}
