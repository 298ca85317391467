//! Replies, written in the dialect of a connection. Also the codec of the scripted server.

use crate::error::Errno;
use crate::export_info::{ContextId, Dialect};
use crate::extents::Extent;
use crate::proto::{EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};

/// A simple reply; read data follows it.
pub fn simple(cookie: u64, errno: Option<Errno>) -> Vec<u8> {
    let mut out = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&errno.map_or(0, Errno::code).to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out
}

/// The header of a structured or extended chunk whose body has `length` bytes. `offset` is the
/// request's and stands in extended chunks only.
pub fn chunk_header(
    dialect: Dialect,
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u64,
) -> Vec<u8> {
    let extended = dialect == Dialect::Extended;
    let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
    let mut out = magic.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    if extended {
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    } else {
        out.extend_from_slice(&(length as u32).to_be_bytes());
    }
    out
}

/// The body of an error chunk.
pub fn error_body(errno: Errno, message: &str) -> Vec<u8> {
    let mut out = errno.code().to_be_bytes().to_vec();
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    out
}

/// The body of a hole chunk.
pub fn hole_body(offset: u64, length: u32) -> Vec<u8> {
    let mut out = offset.to_be_bytes().to_vec();
    out.extend_from_slice(&length.to_be_bytes());
    out
}

/// The chunk type and body for extents of a context. In the structured dialect lengths have 32
/// bits: the list ends with the first extent that had to be cut.
pub fn status_body(dialect: Dialect, context: ContextId, extents: &[Extent]) -> (u16, Vec<u8>) {
    let mut out = context.0.to_be_bytes().to_vec();
    if dialect == Dialect::Extended {
        out.extend_from_slice(&(extents.len() as u32).to_be_bytes());
        for extent in extents {
            out.extend_from_slice(&extent.length.to_be_bytes());
            out.extend_from_slice(&extent.flags.to_be_bytes());
        }
        return (chunk::BLOCK_STATUS_EXT, out);
    }
    // The largest 32-bit length that keeps any legal alignment.
    const LONGEST: u64 = (u32::MAX - 65_535) as u64;
    for extent in extents {
        let length = extent.length.min(LONGEST);
        out.extend_from_slice(&(length as u32).to_be_bytes());
        out.extend_from_slice(&(extent.flags as u32).to_be_bytes());
        if length < extent.length {
            break;
        }
    }
    (chunk::BLOCK_STATUS, out)
}
