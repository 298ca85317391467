//! The bytes of a run. Pure.
//!
//! ```text
//! 0        60  stream header (kind MRUN, the run's id)
//! per region (65,536 blocks), ascending:
//!           …  its pages
//!      n × 61  its index: page u8, offset u64, length u32 (0: all 256 blocks are zero),
//!              checksum 16, leaf hash 32 (content tree, as of the point that wrote the run)
//! t    r × 64  table of regions: region u32, offset u64, length u32 (0: all zero, no index),
//!              checksum 16, node hash 32
//!      p × 16  packs that the run refers to, sorted
//!          64  r u32, p u32, t u64, entries u64, checksum of header and table 16, of packs 16,
//!              "MEND" 4, CRC-32C of these 60 bytes u32
//!
//! page: entries u16 (1 to 256), packs u16, packs × 16, then per entry, ascending:
//!       block u8, 0 (ZERO)  |  block u8, 1 (DATA), pack u8, slot u32, block id 32
//! ```
//! Checksums are the first half of a BLAKE3. A manifest holds the BLAKE3 of the trailer, which
//! covers the table, which covers the indexes, which cover the pages.
//!
//! In an encrypted repository every page, index, the table, the packs and the trailer are sealed one by
//! one (+ tag 16), each under its offset as number. Lengths and checksums are those of sealed parts.
//! Behind the trailer: CRC-32C of all bytes before u32, "MENS" 4; the manifest's BLAKE3 covers the
//! sealed trailer and these.

use crate::content::{FANOUT, NodeHash};
use crate::crypto::TAG_BYTES;
use crate::envelope::STREAM_HEADER_BYTES;
use crate::geometry::DISK_BLOCKS_MAX;
use crate::ids::{BlockId, PackId};
use crate::point::Location;

use super::{PageSlots, REGION_BLOCKS, Slot};

pub(crate) const INDEX_RECORD_BYTES: usize = 61;
pub(crate) const REGION_RECORD_BYTES: usize = 64;
pub(crate) const TRAILER_BYTES: usize = 64;
pub(crate) const PACK_ID_BYTES: usize = 16;
/// A page of 256 entries in 256 packs.
pub(crate) const PAGE_BYTES_MAX: usize = 4 + FANOUT * (PACK_ID_BYTES + DATA_ENTRY_BYTES);
/// Regions of the largest disk.
pub(crate) const REGIONS_MAX: u64 = DISK_BLOCKS_MAX / REGION_BLOCKS;
/// Packs that one run may refer to: 32 TiB of stored data, 16 MiB of ids.
pub(crate) const RUN_PACKS_MAX: usize = 1 << 20;

const TRAILER_MAGIC: &[u8; 4] = b"MEND";
/// Behind the trailer of a sealed run: what whoever has no key can scrub it by.
pub(crate) const FOOTER_BYTES: usize = 8;
const FOOTER_MAGIC: &[u8; 4] = b"MENS";
const ZERO_ENTRY: u8 = 0;
const DATA_ENTRY: u8 = 1;
const DATA_ENTRY_BYTES: usize = 2 + 1 + 4 + 32;

/// What is wrong with some bytes, in words.
pub(crate) type Flaw = &'static str;

/// First half of a BLAKE3: against accidents, and second preimages of 128 bits.
pub(crate) type ShortSum = [u8; 16];

pub(crate) fn short_sum(parts: &[&[u8]]) -> ShortSum {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut sum = [0; 16];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    sum
}

/// A piece of a run, with what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    /// As it is stored; 0 means that nothing is stored: all zero.
    pub(crate) bytes: u32,
    pub(crate) sum: ShortSum,
}

impl Piece {
    pub(crate) const ALL_ZERO: Self = Self { offset: 0, bytes: 0, sum: [0; 16] };

    pub(crate) fn is_all_zero(&self) -> bool {
        self.bytes == 0
    }
}

/// A page in a region's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexRecord {
    pub(crate) page: u8,
    pub(crate) piece: Piece,
    pub(crate) leaf: NodeHash,
}

/// A region in a run's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionRecord {
    pub(crate) region: u32,
    pub(crate) piece: Piece,
    pub(crate) node: NodeHash,
}

/// The end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) regions: u32,
    pub(crate) packs: u32,
    pub(crate) table_offset: u64,
    pub(crate) entries: u64,
    pub(crate) table_sum: ShortSum,
    pub(crate) packs_sum: ShortSum,
}

impl Trailer {
    pub(crate) fn encode(&self) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        bytes[..4].copy_from_slice(&self.regions.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.packs.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.table_offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.entries.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.table_sum);
        bytes[40..56].copy_from_slice(&self.packs_sum);
        bytes[56..60].copy_from_slice(TRAILER_MAGIC);
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Parses the trailer of a run of `run_bytes` whose parts are each stored with `overhead` bytes
    /// more; the parts it names fill the run exactly.
    pub(crate) fn parse(
        bytes: &[u8; TRAILER_BYTES],
        run_bytes: u64,
        overhead: usize,
    ) -> Result<Self, Flaw> {
        let crc = crc32c::crc32c(&bytes[..60]);
        if bytes[60..] != crc.to_le_bytes() || &bytes[56..60] != TRAILER_MAGIC {
            return Err("its trailer does not match");
        }
        let mut fields = Fields(bytes);
        let trailer = Self {
            regions: fields.u32()?,
            packs: fields.u32()?,
            table_offset: fields.u64()?,
            entries: fields.u64()?,
            table_sum: fields.array()?,
            packs_sum: fields.array()?,
        };
        let over = u64::from(trailer.regions) > REGIONS_MAX;
        if over || trailer.packs as usize > RUN_PACKS_MAX {
            return Err("it claims more regions or packs than a run can have");
        }
        let overheads = 2 * overhead as u64;
        let parts = trailer.table_bytes() + trailer.packs_bytes() + overheads;
        let end = parts + tail_bytes(overhead) as u64;
        let fills = trailer.table_offset.checked_add(end) == Some(run_bytes);
        if fills && trailer.table_offset >= STREAM_HEADER_BYTES as u64 {
            Ok(trailer)
        } else {
            Err("its parts do not fill it")
        }
    }

    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.regions) * REGION_RECORD_BYTES as u64
    }

    pub(crate) fn packs_bytes(&self) -> u64 {
        u64::from(self.packs) * PACK_ID_BYTES as u64
    }
}

/// Bytes behind a run's packs: the trailer and, of a sealed run, the footer.
pub(crate) fn tail_bytes(overhead: usize) -> usize {
    TRAILER_BYTES + if overhead > 0 { overhead + FOOTER_BYTES } else { 0 }
}

/// The end of a sealed run of which `crc` is the CRC-32C.
pub(crate) fn footer(crc: u32) -> [u8; FOOTER_BYTES] {
    let mut bytes = [0; FOOTER_BYTES];
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes[4..].copy_from_slice(FOOTER_MAGIC);
    bytes
}

pub(crate) fn encode_region(record: &RegionRecord, into: &mut Vec<u8>) {
    into.extend_from_slice(&record.region.to_le_bytes());
    encode_piece(&record.piece, into);
    into.extend_from_slice(&record.node);
}

pub(crate) fn encode_index(record: &IndexRecord, into: &mut Vec<u8>) {
    into.push(record.page);
    encode_piece(&record.piece, into);
    into.extend_from_slice(&record.leaf);
}

fn encode_piece(piece: &Piece, into: &mut Vec<u8>) {
    into.extend_from_slice(&piece.offset.to_le_bytes());
    into.extend_from_slice(&piece.bytes.to_le_bytes());
    into.extend_from_slice(&piece.sum);
}

/// Parses a table of regions; every index it names lies below `end`.
pub(crate) fn parse_table(bytes: &[u8], end: u64) -> Result<Vec<RegionRecord>, Flaw> {
    let mut fields = Fields(bytes);
    let mut records: Vec<RegionRecord> = Vec::with_capacity(bytes.len() / REGION_RECORD_BYTES);
    while !fields.0.is_empty() {
        let region = fields.u32()?;
        let piece = parse_piece(&mut fields, end, FANOUT * INDEX_RECORD_BYTES)?;
        let record = RegionRecord { region, piece, node: fields.array()? };
        let ascends = records.last().is_none_or(|last| last.region < region);
        if !ascends || u64::from(region) >= REGIONS_MAX {
            return Err("its table is not in order");
        }
        records.push(record);
    }
    Ok(records)
}

/// Parses a region's index; every page it names lies below `end`.
pub(crate) fn parse_index(bytes: &[u8], end: u64) -> Result<Vec<IndexRecord>, Flaw> {
    let mut fields = Fields(bytes);
    let mut records: Vec<IndexRecord> = Vec::with_capacity(FANOUT);
    while !fields.0.is_empty() {
        let page = fields.u8()?;
        let piece = parse_piece(&mut fields, end, PAGE_BYTES_MAX)?;
        let record = IndexRecord { page, piece, leaf: fields.array()? };
        if records.last().is_some_and(|last| last.page >= page) {
            return Err("an index is not in order");
        }
        records.push(record);
    }
    if records.is_empty() { Err("an index is empty") } else { Ok(records) }
}

fn parse_piece(fields: &mut Fields<'_>, end: u64, bytes_max: usize) -> Result<Piece, Flaw> {
    let piece = Piece { offset: fields.u64()?, bytes: fields.u32()?, sum: fields.array()? };
    if piece.is_all_zero() {
        return Ok(piece);
    }
    let inside = piece.offset >= STREAM_HEADER_BYTES as u64
        && piece.offset.checked_add(u64::from(piece.bytes)).is_some_and(|stop| stop <= end);
    if inside && piece.bytes as usize <= bytes_max + TAG_BYTES {
        Ok(piece)
    } else {
        Err("it refers to bytes outside of it")
    }
}

/// Appends a page; `slots` holds at least one block.
pub(crate) fn encode_page(slots: &PageSlots, into: &mut Vec<u8>) {
    let mut packs: Vec<PackId> = Vec::new();
    let mut entries = Vec::new();
    let mut count = 0_u16;
    for (block, slot) in slots.iter().enumerate() {
        let Some(slot) = slot else { continue };
        count += 1;
        // A page has 256 blocks, in at most as many packs: both fit a byte.
        entries.push(block as u8);
        let Slot::Data(id, location) = slot else {
            entries.push(ZERO_ENTRY);
            continue;
        };
        let pack = packs.iter().position(|pack| pack == &location.pack).unwrap_or_else(|| {
            packs.push(location.pack);
            packs.len() - 1
        });
        entries.extend_from_slice(&[DATA_ENTRY, pack as u8]);
        entries.extend_from_slice(&location.slot.to_le_bytes());
        entries.extend_from_slice(&id.0);
    }
    into.extend_from_slice(&count.to_le_bytes());
    into.extend_from_slice(&(packs.len() as u16).to_le_bytes());
    packs.iter().for_each(|pack| into.extend_from_slice(&pack.0));
    into.extend_from_slice(&entries);
}

/// Lays a page under `slots`: only blocks that are still open are filled.
pub(crate) fn parse_page(bytes: &[u8], slots: &mut PageSlots) -> Result<(), Flaw> {
    let mut fields = Fields(bytes);
    let (count, pack_count) = (fields.u16()?, fields.u16()?);
    if count == 0 || count as usize > FANOUT || pack_count > count {
        return Err("a page claims more than it can hold");
    }
    let packs_bytes = fields.take(pack_count as usize * PACK_ID_BYTES)?;
    let (packs, _) = packs_bytes.as_chunks::<PACK_ID_BYTES>();
    let mut last = None;
    for _ in 0..count {
        let block = fields.u8()?;
        if last.is_some_and(|last| last >= block) {
            return Err("a page is not in order");
        }
        last = Some(block);
        let slot = match fields.u8()? {
            ZERO_ENTRY => Slot::Zero,
            DATA_ENTRY => parse_data(&mut fields, packs)?,
            _ => return Err("a page holds an unknown entry"),
        };
        slots[block as usize].get_or_insert(slot);
    }
    if fields.0.is_empty() { Ok(()) } else { Err("a page is longer than its entries") }
}

fn parse_data(fields: &mut Fields<'_>, packs: &[[u8; PACK_ID_BYTES]]) -> Result<Slot, Flaw> {
    let pack =
        packs.get(fields.u8()? as usize).ok_or("a page refers to a pack it does not list")?;
    let slot = fields.u32()?;
    let id = BlockId(fields.array()?);
    if id == BlockId::ZERO {
        return Err("a page stores a zero block as data");
    }
    Ok(Slot::Data(id, Location { pack: PackId(*pack), slot }))
}

/// Takes little-endian fields off the front of some bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Flaw> {
        let (front, rest) = self.0.split_at_checked(bytes).ok_or("it ends within a record")?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Flaw> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, Flaw> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, Flaw> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, Flaw> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Flaw> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::empty_page;
    use super::*;
    use proptest::prelude::*;

    fn slot() -> impl Strategy<Value = Option<Slot>> {
        prop_oneof![
            3 => Just(None),
            1 => Just(Some(Slot::Zero)),
            2 => (1..=255_u8, any::<u8>(), any::<u32>()).prop_map(|(id, pack, slot)| {
                let location = Location { pack: PackId([pack; 16]), slot };
                Some(Slot::Data(BlockId([id; 32]), location))
            }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn pages_go_there_and_back(slots in prop::collection::vec(slot(), 256)) {
            let mut page = empty_page();
            page.copy_from_slice(&slots);
            prop_assume!(page.iter().any(Option::is_some));
            let mut bytes = Vec::new();
            encode_page(&page, &mut bytes);
            prop_assert!(bytes.len() <= PAGE_BYTES_MAX);
            let mut back = empty_page();
            prop_assert_eq!(parse_page(&bytes, &mut back), Ok(()));
            prop_assert_eq!(&back, &page);
            for cut in 0..bytes.len() {
                prop_assert!(parse_page(&bytes[..cut], &mut empty_page()).is_err());
            }
        }

        #[test]
        fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_page(&bytes, &mut empty_page());
            let _ = parse_index(&bytes, 1 << 20);
            let _ = parse_table(&bytes, 1 << 20);
        }
    }

    #[test]
    fn a_full_page_in_as_many_packs_fits_the_limit() {
        let mut page = empty_page();
        for (n, slot) in page.iter_mut().enumerate() {
            let location = Location { pack: PackId([n as u8; 16]), slot: u32::MAX };
            *slot = Some(Slot::Data(BlockId([9; 32]), location));
        }
        let mut bytes = Vec::new();
        encode_page(&page, &mut bytes);
        assert_eq!(bytes.len(), PAGE_BYTES_MAX);
        assert_eq!(parse_page(&bytes, &mut empty_page()), Ok(()));
    }

    #[test]
    fn the_newer_layer_wins() {
        let mut newer = empty_page();
        newer[3] = Some(Slot::Zero);
        let mut older = empty_page();
        let location = Location { pack: PackId([1; 16]), slot: 1 };
        older[3] = Some(Slot::Data(BlockId([1; 32]), location));
        older[4] = older[3];
        let mut bytes = Vec::new();
        encode_page(&older, &mut bytes);
        parse_page(&bytes, &mut newer).unwrap();
        assert_eq!(newer[3], Some(Slot::Zero));
        assert_eq!(newer[4], older[4]);
    }

    #[test]
    fn a_trailer_whose_parts_overlap_or_overflow_is_refused() {
        let good = Trailer {
            regions: 1,
            packs: 2,
            table_offset: 100,
            entries: 5,
            table_sum: [1; 16],
            packs_sum: [2; 16],
        };
        let length = 100 + 64 + 32 + 64;
        assert_eq!(Trailer::parse(&good.encode(), length, 0), Ok(good));
        let sealed = length + 3 * TAG_BYTES as u64 + FOOTER_BYTES as u64;
        assert_eq!(Trailer::parse(&good.encode(), sealed, TAG_BYTES), Ok(good));
        assert!(Trailer::parse(&good.encode(), length, TAG_BYTES).is_err());
        assert!(Trailer::parse(&good.encode(), length + 1, 0).is_err());
        let overflow = Trailer { table_offset: u64::MAX - 3, ..good };
        assert!(Trailer::parse(&overflow.encode(), length, 0).is_err());
        let huge = Trailer { regions: u32::MAX, ..good };
        assert!(Trailer::parse(&huge.encode(), u64::MAX, 0).is_err());
        let early = Trailer { table_offset: 8, ..good };
        assert!(Trailer::parse(&early.encode(), length - 92, 0).is_err());
    }
}
