//! Numbers of the protocol (nbd `doc/proto.md`), and the limits we put on a peer.
//!
//! All integers on the wire are big-endian.

/// First eight bytes that a server sends: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of a newstyle server, and the head of each option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second magic of an oldstyle server, which is refused.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Head of each option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Head of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Head of an extended request (64-bit length).
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Head of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Head of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Head of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag: fixed newstyle (server and client).
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag: no 124 zero bytes after EXPORT_NAME (server and client).
pub const FLAG_NO_ZEROES: u16 = 2;
/// Zero bytes that follow the answer to EXPORT_NAME unless NO_ZEROES was agreed.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Option codes.
pub mod option {
    /// Leave for transmission, oldest form: no way to report an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the connection in good order.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export without opening it.
    pub const INFO: u32 = 6;
    /// Describe an export and leave for transmission.
    pub const GO: u32 = 7;
    /// Ask for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose the metadata contexts of an export.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Ask for extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply codes; bit 31 marks an error.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information on an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error, known or not.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Option unknown.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Forbidden by policy.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Malformed, or not allowed now.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// Request or answer too long.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Extended headers are required.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Information types inside INFO and GO.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// No writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is offered.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is offered.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium rotates.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is offered.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES (and NO_HOLE) is offered.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is offered.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see each other's flushed writes.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// RESIZE is offered (never used here).
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// CACHE is offered.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is offered.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may carry a payload that picks contexts.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Command types.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Trim.
    pub const TRIM: u16 = 4;
    /// Cache.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Block status.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES must not punch holes.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ must come in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES must fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length of an extended request counts payload, not effect.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunk types of structured and extended replies; bit 15 marks an error.
pub mod chunk {
    /// The final chunk of a reply carries this flag.
    pub const FLAG_DONE: u16 = 1;
    /// Nothing but the flag.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error chunk, known or not.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error of the whole request.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// The metadata context that tells holes and zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// What QEMU puts before the name of an exported dirty bitmap.
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// `base:allocation` bit: not allocated. Without [`STATE_ZERO`] the content is undefined: read it.
pub const STATE_HOLE: u64 = 1;
/// `base:allocation` bit: reads as zeroes.
pub const STATE_ZERO: u64 = 2;
/// `qemu:dirty-bitmap:` bit: dirty.
pub const STATE_DIRTY: u64 = 1;

/// Longest string of the protocol, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// Longest answer to an option that we take: an info or context reply is a string and few numbers.
pub const OPTION_REPLY_BYTES_MAX: usize = 2 * STRING_BYTES_MAX + 64;
/// Most replies to one option: bounds a list that never ends. A host has thousands of exports at most.
pub const OPTION_REPLIES_MAX: usize = 65_536;
/// Largest payload of one request or reply; the protocol's own default.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Most extents in one block status chunk: the limit that libnbd and nbdkit use too.
pub const STATUS_EXTENTS_MAX: u64 = 1 << 20;
/// Most chunks in the reply to one request. A 32 MiB read in 512-byte pieces stays below it.
pub const CHUNKS_PER_REPLY_MAX: u32 = 65_536 + 64;
/// Alignment assumed where the server names none (proto.md, "Block size constraints").
pub const DEFAULT_BLOCK_BYTES: u32 = 512;

/// Reads a big-endian integer at the start of a slice and moves past it.
macro_rules! take_be {
    ($name:ident, $type:ty) => {
        /// Takes one big-endian integer off the front, `None` when the slice is too short.
        pub(crate) fn $name(bytes: &mut &[u8]) -> Option<$type> {
            let (head, rest) = bytes.split_first_chunk::<{ size_of::<$type>() }>()?;
            *bytes = rest;
            Some(<$type>::from_be_bytes(*head))
        }
    };
}
take_be!(take_u16, u16);
take_be!(take_u32, u32);
take_be!(take_u64, u64);

/// Takes a string with a 32-bit length in front of it; `None` when short, too long or not UTF-8.
pub(crate) fn take_string(bytes: &mut &[u8]) -> Option<String> {
    let len = take_u32(bytes)? as usize;
    if len > STRING_BYTES_MAX || len > bytes.len() {
        return None;
    }
    let (text, rest) = bytes.split_at(len);
    *bytes = rest;
    std::str::from_utf8(text).ok().map(str::to_owned)
}

/// Appends a string with a 32-bit length in front of it.
pub(crate) fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
