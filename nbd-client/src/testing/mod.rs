//! For tests only (feature `testing`): a server that misbehaves on purpose, and fuzz entries.

pub mod fuzz;
mod scripted;

pub use crate::server::negotiation::put_reply as put_option_reply;
pub use crate::server::replies::{chunk_header, error_body, hole_body, simple, status_body};
pub use crate::server::requests::RequestHeader;
pub use scripted::{Act, Script, Scripted, greeting};
