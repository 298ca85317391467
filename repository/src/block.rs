//! One block: is it zero, what is its id, how is it stored. No IO.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::crypto::Part;
use crate::error::{Damage, DamageKind, Error, Result};
use crate::ids::BlockId;
use crate::point::{Codec, Frame};
use crate::sealing::Stream;

/// The strongest zstd level: higher ones need windows far beyond a block.
const ZSTD_LEVEL_MAX: i32 = 19;
/// Bytes that are or-ed together before a branch; lets the compiler use wide registers.
const ZERO_TEST_CHUNK_BYTES: usize = 256;

/// How new blocks are compressed; a parameter of the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Compression {
    /// Stored as they are.
    None,
    /// zstd of this level, 1 to 19.
    Zstd(i32),
}

impl Default for Compression {
    fn default() -> Self {
        Self::Zstd(1)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A text that names no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no compression: use none, zstd or zstd:1 to zstd:19")]
pub struct CompressionError(String);

impl FromStr for Compression {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Self, CompressionError> {
        let level = match text {
            "none" => return Ok(Self::None),
            "zstd" => return Ok(Self::default()),
            _ => text.strip_prefix("zstd:").and_then(|level| level.parse().ok()),
        };
        match level {
            Some(level @ 1..=ZSTD_LEVEL_MAX) => Ok(Self::Zstd(level)),
            _ => Err(CompressionError(text.chars().take(40).collect())),
        }
    }
}

impl TryFrom<String> for Compression {
    type Error = CompressionError;

    fn try_from(text: String) -> Result<Self, CompressionError> {
        text.parse()
    }
}

impl From<Compression> for String {
    fn from(compression: Compression) -> Self {
        compression.to_string()
    }
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    data.chunks(ZERO_TEST_CHUNK_BYTES)
        .all(|chunk| chunk.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// Gives blocks their ids as one repository does; cheap to copy into every thread. Ask
/// [`Repository::hasher`](crate::Repository::hasher) for it: ids of an encrypted repository are keyed,
/// so that nobody without its key can tell whether a known content is in it.
#[derive(Clone, Copy)]
pub struct BlockHasher(Option<[u8; 32]>);

impl fmt::Debug for BlockHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "BlockHasher(keyed)" } else { "BlockHasher(plain)" })
    }
}

impl BlockHasher {
    pub(crate) fn plain() -> Self {
        Self(None)
    }

    pub(crate) fn keyed(key: &[u8; 32]) -> Self {
        Self(Some(*key))
    }

    /// The id of a block: BLAKE3 of its bytes, keyed where the repository is encrypted;
    /// [`BlockId::ZERO`] when they are all zero.
    #[must_use]
    pub fn block_id(&self, data: &[u8]) -> BlockId {
        if is_zero(data) { BlockId::ZERO } else { self.data_id(data) }
    }

    pub(crate) fn data_id(self, data: &[u8]) -> BlockId {
        let id = match &self.0 {
            None => blake3::hash(data),
            Some(key) => blake3::keyed_hash(key, data),
        };
        BlockId(*id.as_bytes())
    }
}

/// Places of a block that are looked at before it is compressed, and the bytes of each.
const SAMPLE_PLACES: usize = 16;
const SAMPLE_PLACE_BYTES: usize = 64;
/// Of that many bytes, drawn evenly, the squares of the counts of each value sum up to 5120 on
/// average with a deviation of 90. What comes within four deviations has 7.9 bits in each byte.
const SAMPLE_SQUARES_MAX: u32 = 5480;

/// Whether a block looks like noise: compressed already, or encrypted. zstd would only find the same
/// out at several times the cost of this. A block that repeats such bytes is taken for noise, too,
/// and then stored as it is: it costs room, at most the block's own size.
fn looks_random(data: &[u8]) -> bool {
    let stride = data.len() / SAMPLE_PLACES;
    // Not worth it: the sample would be much of the block.
    if stride < 4 * SAMPLE_PLACE_BYTES {
        return false;
    }
    let mut counts = [0u16; 256];
    for place in data.chunks_exact(stride) {
        for byte in &place[..SAMPLE_PLACE_BYTES] {
            counts[usize::from(*byte)] += 1;
        }
    }
    counts.iter().map(|count| u32::from(*count).pow(2)).sum::<u32>() <= SAMPLE_SQUARES_MAX
}

/// Turns blocks into frames; owns the zstd context.
pub(crate) struct Packer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Packer {
    pub(crate) fn new(compression: Compression) -> Result<Self> {
        let zstd = match compression {
            Compression::None => None,
            Compression::Zstd(level) => {
                Some(zstd::bulk::Compressor::new(level).map_err(no_context)?)
            }
        };
        Ok(Self { zstd })
    }

    /// Compresses a block, or keeps it as it is when that does not shrink it.
    pub(crate) fn pack(&mut self, data: &[u8]) -> Frame {
        // At most the largest block, which is a u32.
        let raw_bytes = data.len() as u32;
        let raw = || Frame { codec: Codec::Raw, raw_bytes, bytes: data.to_vec() };
        let Some(zstd) = self.zstd.as_mut().filter(|_| !looks_random(data)) else { return raw() };
        // One byte short of the block: zstd stops there, and what does not shrink stays raw.
        let mut bytes = Vec::with_capacity(data.len().saturating_sub(1));
        match zstd.compress_to_buffer(data, &mut bytes) {
            Ok(_) => {
                // Gives the rest back where it is, without a copy.
                bytes.shrink_to_fit();
                Frame { codec: Codec::Zstd, raw_bytes, bytes }
            }
            Err(_) => raw(),
        }
    }
}

/// Turns frames into blocks again; owns the zstd context.
pub(crate) struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
    hasher: BlockHasher,
    /// A sealed frame while it is being opened.
    sealed: Vec<u8>,
}

impl Unpacker {
    pub(crate) fn new(hasher: BlockHasher) -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new().map_err(no_context)?;
        Ok(Self { zstd, hasher, sealed: Vec::new() })
    }

    /// As [`unpack`](Self::unpack), of a frame as it is stored in a pack.
    pub(crate) fn unpack_stored(
        &mut self,
        (pack, part): (&Stream, Part),
        codec: Codec,
        stored: &[u8],
        id: &BlockId,
        block: &mut [u8],
    ) -> std::result::Result<(), String> {
        if !pack.is_encrypted() {
            return self.unpack(codec, stored, id, block);
        }
        let not_sealed = || format!("the bytes stored for block {id} are not what was sealed");
        if codec == Codec::Raw {
            let opened = pack.open_to(part, stored, block);
            return if opened { self.verify(id, block) } else { Err(not_sealed()) };
        }
        // A copy, since one frame may be asked for twice.
        let mut sealed = std::mem::take(&mut self.sealed);
        sealed.clear();
        sealed.extend_from_slice(stored);
        let frame = pack.open(part, &mut sealed).ok_or_else(not_sealed);
        let unpacked = frame.and_then(|frame| self.unpack(codec, frame, id, block));
        self.sealed = sealed;
        unpacked
    }

    /// Unpacks a frame into `block`, whose length is the only one accepted, and verifies the id.
    /// Never writes more than that length, whatever the frame claims.
    pub(crate) fn unpack(
        &mut self,
        codec: Codec,
        frame: &[u8],
        id: &BlockId,
        block: &mut [u8],
    ) -> std::result::Result<(), String> {
        let length = match codec {
            Codec::Raw if frame.len() == block.len() => {
                block.copy_from_slice(frame);
                frame.len()
            }
            Codec::Raw => frame.len(),
            Codec::Zstd => self
                .zstd
                .decompress_to_buffer(frame, block)
                .map_err(|error| format!("block {id} does not decompress: {error}"))?,
        };
        if length != block.len() {
            return Err(format!("block {id} has {length} bytes, not {}", block.len()));
        }
        self.verify(id, block)
    }

    fn verify(&self, id: &BlockId, block: &[u8]) -> std::result::Result<(), String> {
        let found = self.hasher.data_id(block);
        if &found == id {
            return Ok(());
        }
        Err(format!("the bytes stored for block {id} hash to {found}"))
    }
}

fn no_context(error: std::io::Error) -> Error {
    Error::Refused {
        what: format!("cannot set up a zstd context: {error}"),
        advice: "free some memory and try again",
    }
}

pub(crate) fn content_damage(object: impl fmt::Display, detail: String) -> Error {
    Damage::new(object, DamageKind::Content, detail).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn zero_is_found_wherever_a_byte_differs() {
        let mut data = vec![0; 4096 + 7];
        assert!(is_zero(&data) && is_zero(&[]));
        for at in [0, 1, 255, 256, 4095, 4096, 4102] {
            data[at] = 1;
            assert!(!is_zero(&data), "{at}");
            data[at] = 0;
        }
        assert_eq!(BlockHasher::plain().block_id(&data), BlockId::ZERO);
    }

    #[test]
    fn a_keyed_id_is_another_one_and_its_key_is_not_shown() {
        let (plain, keyed) = (BlockHasher::plain(), BlockHasher::keyed(&[0xab; 32]));
        assert_ne!(plain.block_id(b"x"), keyed.block_id(b"x"));
        assert_ne!(keyed.block_id(b"x"), BlockHasher::keyed(&[1; 32]).block_id(b"x"));
        assert_eq!(keyed.block_id(&[0; 9]), BlockId::ZERO);
        assert_eq!(format!("{keyed:?}"), "BlockHasher(keyed)");
    }

    #[test]
    fn frames_go_there_and_back_and_never_grow() {
        let mut text = b"ice ".repeat(16 << 10);
        let bound = text.len();
        for data in [&text[..], &noise(65_536), &noise(1), &[0; 3], &text[..4097]] {
            for compression in [Compression::None, Compression::Zstd(1), Compression::Zstd(19)] {
                let frame = Packer::new(compression).unwrap().pack(data);
                assert!(frame.bytes.len() <= data.len());
                let mut back = vec![0xff; data.len()];
                let id = BlockHasher::plain().data_id(data);
                let mut unpacker = Unpacker::new(BlockHasher::plain()).unwrap();
                unpacker.unpack(frame.codec, &frame.bytes, &id, &mut back).unwrap();
                assert_eq!(back, data);
            }
        }
        text.clear();
        assert_eq!(bound, 65_536);
    }

    #[test]
    fn noise_is_told_from_what_can_shrink() {
        let mut stream = blake3::Hasher::new().finalize_xof();
        let mut block = vec![0; 65_536];
        for _ in 0..200 {
            stream.fill(&mut block);
            assert!(looks_random(&block), "noise is recognised nearly always");
            // Six bits in each byte, as in base64.
            let letters: Vec<u8> = block.iter().map(|byte| b' ' + byte % 64).collect();
            assert!(!looks_random(&letters));
            // A quarter of it says nothing.
            block[..16_384].fill(7);
            assert!(!looks_random(&block));
        }
        assert!(!looks_random(&b"ice ".repeat(16 << 10)) && !looks_random(&noise(512)));
        assert!(!looks_random(&[]));
        let frame = Packer::new(Compression::Zstd(1)).unwrap().pack(&noise(65_536));
        assert_eq!((frame.codec, frame.bytes.len()), (Codec::Raw, 65_536));
        let frame = Packer::new(Compression::Zstd(1)).unwrap().pack(&b"ice ".repeat(16 << 10));
        assert!(frame.codec == Codec::Zstd && frame.bytes.capacity() < 4096);
    }

    #[test]
    fn a_bomb_stops_at_the_block() {
        let bomb = zstd::bulk::compress(&vec![1; 64 << 20], 1).unwrap();
        let mut block = vec![0; 4096];
        let mut unpacker = Unpacker::new(BlockHasher::plain()).unwrap();
        let error = unpacker.unpack(Codec::Zstd, &bomb, &BlockId([1; 32]), &mut block);
        assert!(error.is_err());
    }

    #[test]
    fn a_valid_frame_of_another_block_or_length_is_refused() {
        let data = noise(4096);
        let frame = Packer::new(Compression::Zstd(1)).unwrap().pack(&data);
        let id = BlockHasher::plain().data_id(&data);
        let mut unpacker = Unpacker::new(BlockHasher::plain()).unwrap();
        let mut check = |id: &BlockId, length: usize| {
            unpacker.unpack(frame.codec, &frame.bytes, id, &mut vec![0; length]).is_ok()
        };
        assert!(check(&id, 4096));
        assert!(!check(&BlockId([1; 32]), 4096));
        assert!(!check(&id, 4095));
        assert!(!check(&id, 4097));
    }

    #[test]
    fn compression_is_named_as_on_the_command_line() {
        assert_eq!("zstd:3".parse(), Ok(Compression::Zstd(3)));
        assert_eq!("zstd".parse(), Ok(Compression::Zstd(1)));
        assert_eq!("none".parse(), Ok(Compression::None));
        for bad in ["", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "gzip"] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
    }
}
