//! What the two sides agreed on: the export, the reply dialect, the metadata contexts.

use crate::error::ProtocolError;
use crate::proto::{DEFAULT_BLOCK_BYTES, PAYLOAD_BYTES_MAX, STATE_DIRTY, STATE_ZERO, export_flag};

/// How replies look on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dialect {
    /// One header per reply, all or nothing; no block status.
    Simple,
    /// Chunks with 32-bit lengths.
    Structured,
    /// Chunks and requests with 64-bit lengths.
    Extended,
}

/// The id of a metadata context, valid on the one connection that negotiated it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContextId(pub u32);

/// A negotiated metadata context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// Its name, for example `base:allocation`.
    pub name: String,
    /// Its id on this connection.
    pub id: ContextId,
}

/// Sizes in bytes that requests must honour (proto.md, "Block size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Alignment of every offset and length.
    pub minimum: u32,
    /// Alignment that avoids read-modify-write.
    pub preferred: u32,
    /// Most payload of one request, never above 32 MiB here.
    pub maximum: u32,
    /// Whether the server named them. If not, an export may end with a reachable short tail.
    pub announced: bool,
}

impl Default for BlockSizes {
    fn default() -> Self {
        BlockSizes {
            minimum: DEFAULT_BLOCK_BYTES,
            preferred: 4096,
            maximum: PAYLOAD_BYTES_MAX,
            announced: false,
        }
    }
}

impl BlockSizes {
    /// Checks what a server announced and caps the maximum at our payload limit.
    pub(crate) fn checked(min: u32, preferred: u32, max: u32) -> Result<Self, ProtocolError> {
        let powers = min.is_power_of_two() && preferred.is_power_of_two();
        if !powers || min > 65_536 || preferred < min.max(512) {
            return Err(ProtocolError::Export("block sizes are no powers of two, or not ordered"));
        }
        if max != u32::MAX && (max < preferred || !max.is_multiple_of(min)) {
            return Err(ProtocolError::Export("maximum block size does not fit the others"));
        }
        let maximum = max.min(PAYLOAD_BYTES_MAX);
        Ok(BlockSizes { minimum: min, preferred, maximum, announced: true })
    }
}

/// An export as the server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that was asked for.
    pub name: String,
    /// The name that the server calls canonical, if it told one.
    pub canonical_name: Option<String>,
    /// A text for people, if the server told one.
    pub description: Option<String>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Transmission flags, see [`export_flag`].
    pub flags: u16,
    /// Block sizes.
    pub block: BlockSizes,
}

impl ExportInfo {
    /// Whether a transmission flag (see [`export_flag`]) is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.has(export_flag::READ_ONLY)
    }

    /// Whether several connections may be used at once.
    pub fn multi_conn(&self) -> bool {
        self.has(export_flag::CAN_MULTI_CONN)
    }

    /// Bytes that aligned requests can reach: an unaligned tail behind an announced minimum cannot.
    pub fn reachable_bytes(&self) -> u64 {
        match self.block.announced {
            true => self.size_bytes - self.size_bytes % u64::from(self.block.minimum),
            false => self.size_bytes,
        }
    }
}

/// A finished negotiation: all that transmission has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The export.
    pub export: ExportInfo,
    /// The form of replies.
    pub dialect: Dialect,
    /// The metadata contexts, in the order in which the server named them.
    pub contexts: Vec<Context>,
}

impl Session {
    /// The id of a context by its name.
    pub fn context(&self, name: &str) -> Option<ContextId> {
        self.contexts.iter().find(|context| context.name == name).map(|context| context.id)
    }
}

/// Whether `base:allocation` flags promise zeroes. Unknown bits are ignored; a hole alone is not
/// zero, its content is undefined.
pub fn reads_as_zero(flags: u64) -> bool {
    flags & STATE_ZERO != 0
}

/// Whether `qemu:dirty-bitmap:` flags say dirty. Unknown bits count as dirty: doubt is copied.
pub fn is_dirty(flags: u64) -> bool {
    flags & STATE_DIRTY != 0 || flags & !STATE_DIRTY != 0
}
