//! Joins the NBD client to the data plane, which knows no NBD.

use std::path::Path;

use icecore_io_engine::{Lane, Op, Want, Wire, WireError, WireErrorKind};
use icecore_nbd_client::error::{ProtocolError, RequestError, SubmitError};
use icecore_nbd_client::transmission::{self, Transmission};
use icecore_nbd_client::{Blocking, Control, Endpoint, Options, Uri};

use crate::failure::{Failure, Outcome};

/// Connections to one export where the server allows several; more gains nothing (measured).
const LANES_MAX: usize = 4;

/// What an export can tell about its content.
pub const ALLOCATION: &str = "base:allocation";

/// The URI of an export on a unix socket.
pub fn unix_uri(socket: &Path, export: &str) -> Uri {
    Uri { endpoint: Endpoint::Unix(socket.to_owned()), export: export.to_owned() }
}

/// Connects once, for questions about the export. `bitmap` is required when given.
pub async fn control(uri: &Uri, bitmap: Option<&str>, tried: &str) -> Outcome<Control> {
    let options = Options {
        contexts: bitmap.map(|name| format!("qemu:dirty-bitmap:{name}")).into_iter().collect(),
        optional_contexts: vec![ALLOCATION.into()],
        ..Options::default()
    };
    Control::connect(uri, &options).await.map_err(|e| Failure::failed(tried, e))
}

/// Connects as often as the server allows, for data.
pub async fn lanes(uri: &Uri, tried: &str) -> Outcome<Vec<Lane>> {
    let failed = |e| Failure::failed(tried, e);
    let first = Control::connect(uri, &Options::default()).await.map_err(failed)?;
    let count = if first.export().multi_conn() { LANES_MAX } else { 1 };
    let mut lanes = vec![lane(first, tried)?];
    while lanes.len() < count {
        let more = Control::connect(uri, &Options::default()).await.map_err(failed)?;
        lanes.push(lane(more, tried)?);
    }
    Ok(lanes)
}

fn lane(control: Control, tried: &str) -> Outcome<Lane> {
    let (fd, transmission) =
        control.into_stream(Blocking::Yes).map_err(|e| Failure::failed(tried, e))?;
    Ok(Lane::Stream { fd, wire: Box::new(NbdWire(transmission)) })
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
