//! Packs: many frames in one immutable object, with a table of contents at the end.
//!
//! ```text
//! 0            60  stream header (kind PACK, the pack's id)
//! 60            …  frames, one after the other
//! t       45 × n   table of contents: id 32, stored u32, raw u32, codec u8, CRC-32C of the frame u32
//! t + 45n      44  n u32, BLAKE3 of header and table 32, "PEND" 4, CRC-32C of these 40 bytes u32
//! ```
//! Each frame can be scrubbed by its CRC without decompressing it.

use crate::envelope::{self, Kind, STREAM_HEADER_BYTES};
use crate::error::{Damage, DamageKind, Result};
use crate::ids::{BlockId, PackId, RepositoryId};
use crate::names;
use crate::point::{Codec, Frame};
use crate::store::{ObjectName, ObjectWriter, Store};

/// A pack is closed when its frames reach this: few objects, yet soon durable.
pub(crate) const PACK_TARGET_BYTES: u64 = 32 << 20;
/// No pack is larger: target, one more block, and the largest table.
const PACK_BYTES_MAX: u64 = 64 << 20;
/// Frames of one pack: bounds the table of contents to 3 MiB.
pub(crate) const PACK_SLOTS_MAX: u32 = 1 << 16;
const TOC_ENTRY_BYTES: usize = 45;
const TRAILER_BYTES: usize = 44;
const TRAILER_MAGIC: &[u8; 4] = b"PEND";
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;
/// Frames are gathered to writes of this size.
const WRITE_BYTES: usize = 1 << 20;

/// One frame as the table of contents describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameInfo {
    pub(crate) id: BlockId,
    /// Where it begins in the pack.
    pub(crate) offset: u32,
    pub(crate) stored_bytes: u32,
    pub(crate) raw_bytes: u32,
    pub(crate) codec: Codec,
    pub(crate) crc: u32,
}

/// A pack's table of contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PackToc {
    pub(crate) frames: Vec<FrameInfo>,
}

impl PackToc {
    /// Reads and verifies the table of a pack.
    pub(crate) fn read(store: &dyn Store, repository: &RepositoryId, pack: PackId) -> Result<Self> {
        let name = names::pack(pack)?;
        let length = store.len(&name)?;
        let damaged = |kind, detail: &str| Damage::new(&name, kind, detail);
        if length > PACK_BYTES_MAX {
            return Err(damaged(DamageKind::Limit, "it is larger than any pack").into());
        }
        let least = (STREAM_HEADER_BYTES + TRAILER_BYTES) as u64;
        if length < least {
            return Err(damaged(DamageKind::Length, "it is too short for a pack").into());
        }
        let mut header = vec![0; STREAM_HEADER_BYTES];
        store.read_exact(&name, 0, &mut header)?;
        envelope::check_stream_header(Kind::PACK, repository, pack.0, name.as_str(), &header)?;
        let mut trailer = [0; TRAILER_BYTES];
        store.read_exact(&name, length - TRAILER_BYTES as u64, &mut trailer)?;
        let slots =
            parse_trailer(&trailer).map_err(|detail| damaged(DamageKind::Checksum, detail))?;
        let toc_bytes = slots as usize * TOC_ENTRY_BYTES;
        let start = (length - TRAILER_BYTES as u64)
            .checked_sub(toc_bytes as u64)
            .filter(|start| *start >= STREAM_HEADER_BYTES as u64)
            .ok_or_else(|| damaged(DamageKind::Length, "its table does not fit into it"))?;
        let mut toc = vec![0; toc_bytes];
        store.read_exact(&name, start, &mut toc)?;
        if toc_checksum(&header, &toc).as_slice() != &trailer[4..36] {
            return Err(damaged(DamageKind::Checksum, "its table does not match").into());
        }
        parse_toc(&toc, start).map_err(|detail| damaged(DamageKind::Inconsistent, detail).into())
    }
}

fn toc_checksum(header: &[u8], toc: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(header).update(toc).finalize().as_bytes()
}

/// Slots of a pack, from its trailer.
pub(crate) fn parse_trailer(trailer: &[u8; TRAILER_BYTES]) -> Result<u32, &'static str> {
    let crc = crc32c::crc32c(&trailer[..40]);
    if trailer[40..] != crc.to_le_bytes() || &trailer[36..40] != TRAILER_MAGIC {
        return Err("its trailer does not match");
    }
    let slots = u32_at(trailer, 0);
    if slots > PACK_SLOTS_MAX { Err("it claims more frames than a pack has") } else { Ok(slots) }
}

/// The frames that a table describes; they must fill the pack up to `frames_end` exactly.
pub(crate) fn parse_toc(toc: &[u8], frames_end: u64) -> Result<PackToc, &'static str> {
    let mut offset = STREAM_HEADER_BYTES as u64;
    let mut frames = Vec::with_capacity(toc.len() / TOC_ENTRY_BYTES);
    for entry in toc.chunks_exact(TOC_ENTRY_BYTES) {
        let mut id = [0; 32];
        id.copy_from_slice(&entry[..32]);
        let stored_bytes = u32_at(entry, 32);
        let codec = match entry[40] {
            CODEC_RAW => Codec::Raw,
            CODEC_ZSTD => Codec::Zstd,
            _ => return Err("its table names an unknown codec"),
        };
        let start = u32::try_from(offset).map_err(|_| "its table reaches beyond it")?;
        let (raw_bytes, crc) = (u32_at(entry, 36), u32_at(entry, 41));
        frames.push(FrameInfo {
            id: BlockId(id),
            offset: start,
            stored_bytes,
            raw_bytes,
            codec,
            crc,
        });
        offset += u64::from(stored_bytes);
    }
    let whole = toc.len().is_multiple_of(TOC_ENTRY_BYTES) && offset == frames_end;
    if whole { Ok(PackToc { frames }) } else { Err("its table does not cover its frames") }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// A pack being written.
pub(crate) struct PackWriter {
    id: PackId,
    name: ObjectName,
    object: Box<dyn ObjectWriter>,
    header: Vec<u8>,
    toc: Vec<u8>,
    slots: u32,
    pending: Vec<u8>,
    frame_bytes: u64,
}

impl PackWriter {
    pub(crate) fn create(store: &dyn Store, repository: &RepositoryId, id: PackId) -> Result<Self> {
        let name = names::pack(id)?;
        let object = store.create(&name)?;
        let header = envelope::stream_header(Kind::PACK, repository, id.0);
        let pending = header.clone();
        Ok(Self { id, name, object, header, toc: Vec::new(), slots: 0, pending, frame_bytes: 0 })
    }

    pub(crate) fn id(&self) -> PackId {
        self.id
    }

    /// Appends a frame and returns its slot.
    pub(crate) fn push(&mut self, id: &BlockId, frame: &Frame) -> Result<u32> {
        self.toc.extend_from_slice(&id.0);
        // A frame is never larger than the largest block.
        self.toc.extend_from_slice(&(frame.bytes.len() as u32).to_le_bytes());
        self.toc.extend_from_slice(&frame.raw_bytes.to_le_bytes());
        self.toc.push(match frame.codec {
            Codec::Raw => CODEC_RAW,
            Codec::Zstd => CODEC_ZSTD,
        });
        self.toc.extend_from_slice(&crc32c::crc32c(&frame.bytes).to_le_bytes());
        self.pending.extend_from_slice(&frame.bytes);
        self.frame_bytes += frame.bytes.len() as u64;
        self.slots += 1;
        if self.pending.len() >= WRITE_BYTES {
            self.write_pending()?;
        }
        Ok(self.slots - 1)
    }

    /// Whether it should be closed before the next frame.
    pub(crate) fn is_full(&self) -> bool {
        self.frame_bytes >= PACK_TARGET_BYTES || self.slots >= PACK_SLOTS_MAX
    }

    /// Ends the pack and makes it durable; returns its length.
    pub(crate) fn finish(mut self) -> Result<u64> {
        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.extend_from_slice(&self.slots.to_le_bytes());
        trailer.extend_from_slice(&toc_checksum(&self.header, &self.toc));
        trailer.extend_from_slice(TRAILER_MAGIC);
        let crc = crc32c::crc32c(&trailer);
        trailer.extend_from_slice(&crc.to_le_bytes());
        self.pending.extend_from_slice(&self.toc);
        self.pending.extend_from_slice(&trailer);
        self.write_pending()?;
        tracing::debug!(pack = %self.name, frames = self.slots, "pack closed");
        Ok(self.object.finish()?)
    }

    fn write_pending(&mut self) -> Result<()> {
        self.object.write(&self.pending)?;
        self.pending.clear();
        Ok(())
    }
}
