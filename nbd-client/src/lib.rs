//! The NBD protocol for a backup system, both ends.
//!
//! What this crate does *not* do: no TLS (use unix sockets), no oldstyle handshake, no resize, no
//! reconnecting (a snapshot that was lost is a failed backup, and only its owner can know whether it
//! is still the same), no bulk data plane (see [`Control::into_stream`]), no caching, no policy on
//! what a dirty bitmap means.
//!
//! Layers, from pure to driven:
//! - [`handshake`] and [`transmission`]: the client's two phases without IO. Bytes in, bytes out,
//!   results to take; payload goes straight between the socket and the caller's own buffer.
//! - [`extents`]: algebra of runs, streaming. [`uri`]: NBD URIs.
//! - [`control`]: a tokio client for inspection and block status.
//! - [`server`]: a small tokio server over the trait [`server::Export`].
//!
//! Architecture invariants: no length from a peer is used before it was checked against a named
//! limit; a protocol error kills the connection for good; a missing metadata context is an error and
//! never "nothing is dirty"; block status is held in bounded memory for any peer.

pub mod control;
pub mod error;
mod export_info;
pub mod extents;
pub mod handshake;
pub mod proto;
pub mod server;
#[cfg(feature = "testing")]
pub mod testing;
pub mod transmission;
pub mod uri;

pub use control::{Blocking, Changed, ChangedKind, Control, Flow, Options};
pub use error::{Cause, Errno, Error, HandshakeError, ProtocolError, RequestError, SubmitError};
pub use export_info::{
    BlockSizes, Context, ContextId, Dialect, ExportInfo, Session, is_dirty, reads_as_zero,
};
pub use extents::Extent;
pub use transmission::{Op, StatusRun, Transmission, Want};
pub use uri::{Endpoint, Uri};
