//! Joins the NBD client to the data plane, which knows no NBD.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use std::time::Duration;

use icecore_io_engine::{
    DataMap, Lane, Op, PlanItem, TargetState, Want, Wire, WireError, WireErrorKind, whole_disk,
};
use icecore_nbd_client::error::{ProtocolError, RequestError, SubmitError};
use icecore_nbd_client::transmission::{self, Transmission};
use icecore_nbd_client::{
    Blocking, Cause, Control, Endpoint, ExportInfo, Extent, Flow, Options, Uri, reads_as_zero,
};
use icecore_qmp::guardian::GuardianClient;
use tokio::runtime::Handle;

use crate::capture::changes::{self, Scope};
use crate::failure::{Failure, Outcome};

/// Connections to one export where the server allows several; more gains nothing (measured).
const LANES_MAX: usize = 4;

/// A server that takes no more connections than the lanes is not waited for any longer: the map
/// that it does not give costs reading, nothing else.
const MAP_DEADLINE: Duration = Duration::from_secs(2);

/// What an export can tell about its content.
pub const ALLOCATION: &str = "base:allocation";

/// An export, and who has to be able to end our connections to it.
#[derive(Debug, Clone)]
pub struct Peer {
    pub uri: Uri,
    /// For a QEMU with a guest: an unread reply of ours would make that QEMU wait.
    leash: Option<Arc<dyn Leash>>,
}

/// Somebody who can end a connection of ours when we cannot.
pub trait Leash: std::fmt::Debug + Send + Sync {
    /// Hands over a copy of the connection.
    fn hold(&self, connection: BorrowedFd<'_>) -> std::io::Result<()>;
}

impl Leash for GuardianClient {
    fn hold(&self, connection: BorrowedFd<'_>) -> std::io::Result<()> {
        self.leash(connection)
    }
}

impl Peer {
    /// An export of a server that serves no guest.
    pub fn plain(uri: Uri) -> Self {
        Self { uri, leash: None }
    }

    /// An export on a unix socket of a server that serves no guest.
    pub fn on_socket(socket: &Path, export: &str) -> Self {
        Self::plain(unix_uri(socket, export))
    }

    /// An export of a QEMU with a guest.
    pub fn of_qemu(socket: &Path, export: &str, leash: &(impl Leash + Clone + 'static)) -> Self {
        Self { uri: unix_uri(socket, export), leash: Some(Arc::new(leash.clone())) }
    }

    async fn connect(&self, options: &Options, tried: &str) -> Outcome<(Control, HangUp)> {
        let control = Control::connect(&self.uri, options).await;
        let control = control.map_err(|e| Failure::failed(tried, e))?;
        let failed = |e: std::io::Error| Failure::failed(tried, e);
        if let Some(leash) = &self.leash {
            leash.hold(control.as_fd()).map_err(failed)?;
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
        // A peer that is gone has hung up already. One that is stuck in sending is woken only by
        // room in the socket: what lies in it is read and thrown away.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
        let mut rubbish = [0u8; 64 << 10];
        while let Ok((1.., _)) =
            rustix::net::recv(&self.0, &mut rubbish[..], rustix::net::RecvFlags::DONTWAIT)
        {}
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
    Ok(target_lanes(peer, |_| Ok(0), tried).await?.lanes)
}

/// As [`lanes`], where the export has `size` bytes.
pub async fn lanes_of_size(peer: &Peer, size: u64, tried: &str) -> Outcome<Lanes> {
    let accept = |export: &ExportInfo| match export.size_bytes {
        found if found == size => Ok(0),
        found => {
            Err(Failure::failed(tried, format!("the disk has {found} bytes, the point's {size}")))
        }
    };
    Ok(target_lanes(peer, accept, tried).await?.lanes)
}

/// Whoever serves `peer` is asked where its first `size` bytes may hold data, when that is needed. A
/// server that does not answer has data everywhere.
pub fn data_map(peer: &Peer, size: u64, tried: &str) -> DataMap {
    let (runtime, peer, tried) = (Handle::current(), peer.clone(), tried.to_owned());
    Box::new(move || {
        let options = Options {
            optional_contexts: vec![ALLOCATION.into()],
            connect_deadline: MAP_DEADLINE,
            ..Options::default()
        };
        runtime.block_on(async {
            match peer.connect(&options, &tried).await {
                Ok((control, hang_up)) => {
                    let questions = Questions { control, _hang_up: hang_up };
                    Box::new(changes::stream(questions, Scope::Whole, size))
                }
                Err(failure) => {
                    tracing::info!(why = failure.why, "the whole target is read back");
                    Box::new(whole_disk(size)) as Box<dyn Iterator<Item = PlanItem> + Send>
                }
            }
        })
    })
}

/// Connections to an export that is written to as a whole.
#[derive(Debug)]
pub struct TargetLanes {
    pub lanes: Lanes,
    /// The server takes several connections, now and later.
    pub several: bool,
    /// What the server says that it holds.
    pub state: TargetState,
    /// Set when a request to change the export may have been sent.
    pub wrote: Arc<AtomicBool>,
}

/// As [`lanes`], where the export is one that `accept` takes, and says how many bytes of it will be
/// used. A server may serve a single connection in its life: the first one, over which it is
/// described, is a lane already.
pub async fn target_lanes(
    peer: &Peer,
    accept: impl Fn(&ExportInfo) -> Outcome<u64>,
    tried: &str,
) -> Outcome<TargetLanes> {
    let mut options = Options { optional_contexts: vec![ALLOCATION.into()], ..Options::default() };
    let mut state = None;
    let mut lanes = Lanes { set: Vec::new(), hang_up: Vec::new() };
    let wrote = Arc::new(AtomicBool::new(false));
    let (mut several, mut wanted) = (false, 1);
    while lanes.set.len() < wanted {
        let (mut control, hang_up) = peer.connect(&options, tried).await?;
        let size = accept(control.export())?;
        if state.is_none() {
            state = Some(present_state(&mut control, size, tried).await?);
            options.optional_contexts.clear();
        }
        if control.export().multi_conn() {
            (several, wanted) = (true, LANES_MAX);
        }
        let (fd, transmission) =
            control.into_stream(Blocking::Yes).map_err(|e| Failure::failed(tried, e))?;
        let wire = Box::new(NbdWire { transmission, wrote: Arc::clone(&wrote) });
        lanes.set.push(Lane::Stream { fd, wire });
        lanes.hang_up.push(hang_up);
    }
    let state = state.unwrap_or(TargetState::Unknown);
    Ok(TargetLanes { lanes, several, state, wrote })
}

/// Blank where the server says that the first `size` bytes read as zeroes.
async fn present_state(control: &mut Control, size: u64, tried: &str) -> Outcome<TargetState> {
    let Some(allocation) = control.context(ALLOCATION).filter(|_| size > 0) else {
        return Ok(TargetState::Unknown);
    };
    let mut blank = true;
    let asked = control.extents(allocation, [Extent::new(0, size)], |extent| {
        blank &= reads_as_zero(extent.flags);
        if blank { Flow::Continue(()) } else { Flow::Break(()) }
    });
    match asked.await {
        Ok(()) if blank => Ok(TargetState::Blank),
        Ok(()) => Ok(TargetState::Unknown),
        // It cannot tell, and says so: nothing is known then.
        Err(error) if matches!(error.cause, Cause::Request(_)) => Ok(TargetState::Unknown),
        Err(error) => Err(Failure::failed(tried, error)),
    }
}

/// NBD's transmission phase as the data plane wants it.
struct NbdWire {
    transmission: Transmission,
    wrote: Arc<AtomicBool>,
}

impl Wire for NbdWire {
    fn max_in_flight(&self) -> u32 {
        self.transmission.max_in_flight()
    }

    fn max_request(&self) -> u32 {
        self.transmission.max_request()
    }

    fn submit(&mut self, tag: u64, op: Op, offset: u64, len: u32) -> Result<(), WireError> {
        if matches!(op, Op::Write | Op::WriteZeroes { .. } | Op::Trim) {
            self.wrote.store(true, Ordering::Relaxed);
        }
        let op = match op {
            Op::Read => transmission::Op::Read,
            Op::Write => transmission::Op::Write,
            Op::WriteZeroes { may_trim } => transmission::Op::WriteZeroes { may_trim },
            Op::Trim => transmission::Op::Trim,
            Op::Flush => transmission::Op::Flush,
        };
        self.transmission.submit(tag, op, offset, len).map_err(|e| not_sent(&e))
    }

    fn transmit(&self) -> &[u8] {
        self.transmission.transmit()
    }

    fn transmitted(&mut self, n: usize) {
        self.transmission.transmitted(n);
    }

    fn want(&self) -> Want {
        match self.transmission.want() {
            transmission::Want::Header(bytes) => Want::Header(bytes),
            transmission::Want::Payload { tag, at, len } => Want::Payload { tag, at, len },
            transmission::Want::Closed => Want::Closed,
        }
    }

    fn header(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.transmission.header(bytes).map_err(|e| broken(&e))
    }

    fn payload_done(&mut self) -> Result<(), WireError> {
        self.transmission.payload_done().map_err(|e| broken(&e))
    }

    fn zero_fill(&mut self) -> Option<(u64, u32, u32)> {
        self.transmission.zero_fill()
    }

    fn completed(&mut self) -> Option<(u64, Result<(), WireError>)> {
        self.transmission.completed().map(|(tag, result)| (tag, result.map_err(|e| refused(&e))))
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
