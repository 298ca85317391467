//! Packs: many frames in one immutable object, with a table of contents at the end.
//!
//! ```text
//! 0            60  stream header (kind PACK, the pack's id)
//! 60            …  frames, one after the other
//! t       45 × n   table of contents: id 32, stored u32, raw u32, codec u8, CRC-32C of the frame u32
//! t + 45n      44  n u32, BLAKE3 of header and table 32, "PEND" 4, CRC-32C of these 40 bytes u32
//! ```
//! Each frame can be scrubbed by its CRC without decompressing it. Of an encrypted repository:
//!
//! ```text
//! 60            …  frames, each sealed under its slot as number (+ tag 16)
//! t    45 n + 16   the table, sealed under the number 2^32; lengths and CRCs are those of sealed frames
//!             48   n u32, BLAKE3 of header and sealed table 32, CRC-32C of all sealed frames u32,
//!                  "PENS" 4, CRC-32C of these 44 bytes u32
//! ```
//! So whoever has no key can scrub a pack, and learns of it only how many frames it has.

use crate::block::Unpacker;
use crate::crypto::Part;
use crate::envelope::{Kind, STREAM_HEADER_BYTES};
use crate::error::{Damage, DamageKind, Result};
use crate::ids::{BlockId, PackId};
use crate::names;
use crate::point::{Codec, Frame};
use crate::sealing::{Sealing, Stream};
use crate::store::{ObjectName, ObjectWriter, Store};

/// A pack is closed when its frames reach this: few objects, yet soon durable.
pub(crate) const PACK_TARGET_BYTES: u64 = 32 << 20;
/// No pack is larger: target, one more block, and the largest table.
pub(crate) const PACK_BYTES_MAX: u64 = 64 << 20;
/// Frames of one pack: bounds the table of contents to 3 MiB.
pub(crate) const PACK_SLOTS_MAX: u32 = 1 << 16;
const TOC_ENTRY_BYTES: usize = 45;
const TRAILER_BYTES: usize = 44;
const TRAILER_MAGIC: &[u8; 4] = b"PEND";
const SEALED_TRAILER_BYTES: usize = 48;
const SEALED_TRAILER_MAGIC: &[u8; 4] = b"PENS";
/// The sealed table's number: frames have those of their slots.
const TABLE_PART: Part = Part(1 << 32);
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

/// A pack's table of contents, and what opens its frames.
pub(crate) struct PackToc {
    pub(crate) frames: Vec<FrameInfo>,
    stream: Stream,
}

impl PackToc {
    /// Reads and verifies the table of a pack.
    pub(crate) fn read(store: &dyn Store, sealing: &Sealing, pack: PackId) -> Result<Self> {
        let name = names::pack(pack)?;
        let length = store.len(&name)?;
        let damaged = |kind, detail: &str| Damage::new(&name, kind, detail);
        if length > PACK_BYTES_MAX {
            return Err(damaged(DamageKind::Limit, "it is larger than any pack").into());
        }
        let mut header = vec![0; STREAM_HEADER_BYTES];
        if length < header.len() as u64 {
            return Err(damaged(DamageKind::Length, "it is too short for a pack").into());
        }
        store.read_exact(&name, 0, &mut header)?;
        let stream = sealing.open_stream(Kind::PACK, pack.0, name.as_str(), &header)?;
        let end = PackEnd::read(store, &name, length, &header, stream.overhead())?;
        let PackEnd { mut toc, frames_end, .. } = end;
        let toc = stream.open(TABLE_PART, &mut toc).ok_or_else(|| {
            damaged(DamageKind::Foreign, "its table was not sealed with this repository's key")
        })?;
        let frames = parse_toc(toc, frames_end);
        let frames = frames.map_err(|detail| damaged(DamageKind::Inconsistent, detail))?;
        Ok(Self { frames, stream })
    }

    /// Bytes by which a frame is longer as it is stored.
    pub(crate) fn overhead(&self) -> usize {
        self.stream.overhead()
    }

    /// Opens, unpacks and verifies the frame of a slot, of which `stored` are the bytes.
    pub(crate) fn unpack(
        &self,
        slot: u32,
        stored: &[u8],
        unpacker: &mut Unpacker,
        block: &mut [u8],
    ) -> Result<(), String> {
        let frame = self.frames.get(slot as usize).ok_or("there is no such slot")?;
        let part = (&self.stream, Part(u64::from(slot)));
        unpacker.unpack_stored(part, frame.codec, stored, &frame.id, block)
    }
}

/// What lies behind a pack's frames, as it is stored, verified by its checksum.
pub(crate) struct PackEnd {
    pub(crate) toc: Vec<u8>,
    /// Where the table begins.
    pub(crate) frames_end: u64,
    /// CRC-32C of all frames, of an encrypted pack.
    pub(crate) frames_crc: Option<u32>,
}

impl PackEnd {
    /// Reads it; `overhead` is that of a sealed part, or 0.
    pub(crate) fn read(
        store: &dyn Store,
        name: &ObjectName,
        length: u64,
        header: &[u8],
        overhead: usize,
    ) -> Result<Self> {
        let damaged = |kind, detail: &str| Damage::new(name, kind, detail);
        let trailer_bytes = if overhead > 0 { SEALED_TRAILER_BYTES } else { TRAILER_BYTES };
        let short = || damaged(DamageKind::Length, "it is too short for a pack");
        let toc_end = length.checked_sub(trailer_bytes as u64).ok_or_else(short)?;
        let mut trailer = vec![0; trailer_bytes];
        store.read_exact(name, toc_end, &mut trailer)?;
        let (slots, frames_crc) =
            parse_trailer(&trailer).map_err(|detail| damaged(DamageKind::Checksum, detail))?;
        let toc_bytes = slots as usize * TOC_ENTRY_BYTES + overhead;
        let frames_end = toc_end
            .checked_sub(toc_bytes as u64)
            .filter(|end| *end >= STREAM_HEADER_BYTES as u64)
            .ok_or_else(|| damaged(DamageKind::Length, "its table does not fit into it"))?;
        let mut toc = vec![0; toc_bytes];
        store.read_exact(name, frames_end, &mut toc)?;
        if toc_checksum(header, &toc).as_slice() != &trailer[4..36] {
            return Err(damaged(DamageKind::Checksum, "its table does not match").into());
        }
        Ok(Self { toc, frames_end, frames_crc })
    }
}

fn toc_checksum(header: &[u8], toc: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(header).update(toc).finalize().as_bytes()
}

/// Slots of a pack, and of an encrypted one the CRC-32C of its frames, from its trailer.
pub(crate) fn parse_trailer(trailer: &[u8]) -> Result<(u32, Option<u32>), &'static str> {
    let magic = match trailer.len() {
        TRAILER_BYTES => TRAILER_MAGIC,
        SEALED_TRAILER_BYTES => SEALED_TRAILER_MAGIC,
        _ => return Err("its trailer has no length of a trailer"),
    };
    let (rest, crc) = trailer.split_at(trailer.len() - 4);
    if crc != crc32c::crc32c(rest).to_le_bytes() || !rest.ends_with(magic) {
        return Err("its trailer does not match");
    }
    let slots = u32_at(trailer, 0);
    if slots > PACK_SLOTS_MAX {
        return Err("it claims more frames than a pack has");
    }
    Ok((slots, (magic == SEALED_TRAILER_MAGIC).then(|| u32_at(trailer, 36))))
}

/// The frames that a table describes; they must fill the pack up to `frames_end` exactly.
pub(crate) fn parse_toc(toc: &[u8], frames_end: u64) -> Result<Vec<FrameInfo>, &'static str> {
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
    if whole { Ok(frames) } else { Err("its table does not cover its frames") }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// A pack being written.
pub(crate) struct PackWriter {
    id: PackId,
    name: ObjectName,
    object: Box<dyn ObjectWriter>,
    stream: Stream,
    toc: Vec<u8>,
    slots: u32,
    pending: Vec<u8>,
    frame_bytes: u64,
    /// CRC-32C of all frames, as they are stored, of an encrypted pack.
    frames_crc: u32,
}

impl PackWriter {
    /// `id` is drawn at random for this pack: of an encrypted one it decides the key.
    pub(crate) fn create(store: &dyn Store, sealing: &Sealing, id: PackId) -> Result<Self> {
        let name = names::pack(id)?;
        let object = store.create(&name)?;
        let stream = sealing.stream(Kind::PACK, id.0)?;
        let pending = stream.header().to_vec();
        let (toc, slots, frame_bytes, frames_crc) = Default::default();
        Ok(Self { id, name, object, stream, toc, slots, pending, frame_bytes, frames_crc })
    }

    pub(crate) fn id(&self) -> PackId {
        self.id
    }

    /// Appends a frame and returns its slot.
    pub(crate) fn push(&mut self, id: &BlockId, frame: &Frame) -> Result<u32> {
        let start = self.pending.len();
        self.pending.extend_from_slice(&frame.bytes);
        self.stream.seal(Part(u64::from(self.slots)), &mut self.pending, start)?;
        let stored = &self.pending[start..];
        self.toc.extend_from_slice(&id.0);
        // A frame is never larger than the largest block and a tag.
        self.toc.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        self.toc.extend_from_slice(&frame.raw_bytes.to_le_bytes());
        self.toc.push(match frame.codec {
            Codec::Raw => CODEC_RAW,
            Codec::Zstd => CODEC_ZSTD,
        });
        self.toc.extend_from_slice(&crc32c::crc32c(stored).to_le_bytes());
        if self.stream.is_encrypted() {
            self.frames_crc = crc32c::crc32c_append(self.frames_crc, stored);
        }
        self.frame_bytes += stored.len() as u64;
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
        self.stream.seal(TABLE_PART, &mut self.toc, 0)?;
        let mut trailer = Vec::with_capacity(SEALED_TRAILER_BYTES);
        trailer.extend_from_slice(&self.slots.to_le_bytes());
        trailer.extend_from_slice(&toc_checksum(self.stream.header(), &self.toc));
        if self.stream.is_encrypted() {
            trailer.extend_from_slice(&self.frames_crc.to_le_bytes());
            trailer.extend_from_slice(SEALED_TRAILER_MAGIC);
        } else {
            trailer.extend_from_slice(TRAILER_MAGIC);
        }
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
