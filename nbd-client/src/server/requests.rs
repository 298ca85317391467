//! Requests of a client: parsing, and what is refused before an export sees it.

use super::export::{Access, Features};
use crate::error::{Errno, ProtocolError};
use crate::export_info::Dialect;
use crate::proto::{
    EXTENDED_REQUEST_MAGIC, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, command, command_flag, take_u16,
    take_u32, take_u64,
};

/// Most payload of a BLOCK_STATUS request: a length and some context ids.
const STATUS_PAYLOAD_BYTES_MAX: u64 = 8 + 4 * 256;

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Command type.
    pub command: u16,
    /// The client's cookie, echoed in the reply.
    pub cookie: u64,
    /// Offset, bytes.
    pub offset: u64,
    /// Effect or payload length, bytes.
    pub length: u64,
}

/// Bytes of a request's header.
pub fn header_bytes(dialect: Dialect) -> usize {
    if dialect == Dialect::Extended { 32 } else { 28 }
}

/// Parses a request's header of exactly [`header_bytes`].
pub fn parse(mut bytes: &[u8], dialect: Dialect) -> Result<RequestHeader, ProtocolError> {
    let extended = dialect == Dialect::Extended;
    let expected = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    let short = ProtocolError::Request("a short header");
    let magic = take_u32(&mut bytes).ok_or(short.clone())?;
    if magic != expected {
        return Err(ProtocolError::Magic { expected: "a request", found: u64::from(magic) });
    }
    let fields = (
        take_u16(&mut bytes),
        take_u16(&mut bytes),
        take_u64(&mut bytes),
        take_u64(&mut bytes),
        if extended { take_u64(&mut bytes) } else { take_u32(&mut bytes).map(u64::from) },
    );
    let (Some(flags), Some(command), Some(cookie), Some(offset), Some(length)) = fields else {
        return Err(short);
    };
    Ok(RequestHeader { flags, command, cookie, offset, length })
}

impl RequestHeader {
    /// Bytes that follow the header. A length that cannot be trusted ends the connection, as there
    /// is no way to find the next request.
    pub fn payload_bytes(&self, dialect: Dialect) -> Result<u32, ProtocolError> {
        let marked = dialect == Dialect::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        let max = match self.command {
            // QEMU 10.0 leaves PAYLOAD_LEN out of its writes; there is only one way to read them.
            command::WRITE => u64::from(PAYLOAD_BYTES_MAX),
            command::BLOCK_STATUS if marked => STATUS_PAYLOAD_BYTES_MAX,
            _ if marked => return Err(ProtocolError::Request("a payload where none belongs")),
            _ => return Ok(0),
        };
        match u32::try_from(self.length) {
            Ok(length) if u64::from(length) <= max => Ok(length),
            _ => Err(ProtocolError::Request("a payload above the limit")),
        }
    }

    /// Checks a request against what its export offers.
    pub(crate) fn check(&self, features: &Features, dialect: Dialect) -> Result<(), Errno> {
        self.check_flags(features, dialect)?;
        let modifies =
            matches!(self.command, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        if modifies && features.access == Access::ReadOnly {
            return Err(Errno::EPERM);
        }
        match self.command {
            command::FLUSH => return Ok(()),
            command::READ | command::WRITE if self.length > u64::from(features.maximum_block) => {
                return Err(Errno::EINVAL);
            }
            command::TRIM if !features.trim => return Err(Errno::EINVAL),
            command::BLOCK_STATUS if dialect == Dialect::Simple => return Err(Errno::EINVAL),
            command::READ
            | command::WRITE
            | command::WRITE_ZEROES
            | command::TRIM
            | command::BLOCK_STATUS => {}
            _ => return Err(Errno::EINVAL),
        }
        self.check_range(self.length, features)
    }

    /// A range of some bytes inside the export.
    pub(super) fn check_range(&self, length: u64, features: &Features) -> Result<(), Errno> {
        let marked_status =
            self.command == command::BLOCK_STATUS && self.flags & command_flag::PAYLOAD_LEN != 0;
        if marked_status && length == self.length {
            // The effect length lies in the payload and is checked when that is parsed.
            return Ok(());
        }
        let end = self.offset.checked_add(length);
        let inside = end.is_some_and(|end| end <= features.size_bytes);
        let aligned = |value: u64| value.is_multiple_of(u64::from(features.minimum_block.max(1)));
        match inside {
            false if self.command == command::WRITE => Err(Errno::ENOSPC),
            _ if !inside || length == 0 => Err(Errno::EINVAL),
            _ if aligned(self.offset) && aligned(length) => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    fn check_flags(&self, features: &Features, dialect: Dialect) -> Result<(), Errno> {
        let writable = features.access == Access::Writable;
        let fua = if writable { command_flag::FUA } else { 0 };
        let fast = if features.fast_zero { command_flag::FAST_ZERO } else { 0 };
        let allowed = match self.command {
            command::READ if dialect >= Dialect::Structured => command_flag::DF | fua,
            command::WRITE if dialect == Dialect::Extended => command_flag::PAYLOAD_LEN | fua,
            command::WRITE_ZEROES => command_flag::NO_HOLE | fast | fua,
            command::BLOCK_STATUS => command_flag::REQ_ONE | command_flag::PAYLOAD_LEN,
            _ => fua,
        };
        if self.flags & !allowed == 0 { Ok(()) } else { Err(Errno::EINVAL) }
    }
}
