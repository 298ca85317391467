//! Reads one run: its table at once, everything else piece by piece, each piece verified.

use std::sync::Arc;

use crate::content::NodeHash;
use crate::crypto::Part;
use crate::envelope::{Kind, STREAM_HEADER_BYTES};
use crate::error::{Damage, DamageKind, Result};
use crate::ids::PackId;
use crate::names;
use crate::point::RunRef;
use crate::sealing::{Sealing, Stream};
use crate::store::{ObjectName, Store};

use super::layout::{
    self, Flaw, INDEX_RECORD_BYTES, IndexRecord, PACK_ID_BYTES, Piece, RegionRecord, ShortSum,
    TRAILER_BYTES, Trailer,
};
use super::{PageSlots, Slot};

/// Pages are read ahead by this much: restores and merges go through a run in order.
const WINDOW_BYTES: u64 = 128 << 10;

/// Where a run's bytes are.
#[derive(Clone)]
pub(crate) enum RunSource {
    /// Not stored yet.
    Memory(Arc<Vec<u8>>),
    /// An object.
    Object(Arc<dyn Store>, ObjectName),
}

impl RunSource {
    fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        match self {
            Self::Object(store, name) => Ok(store.read_exact(name, offset, buffer)?),
            Self::Memory(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = bytes.get(start..).and_then(|rest| rest.get(..buffer.len()));
                let short = || Damage::new("a run in memory", DamageKind::Length, "it ends early");
                buffer.copy_from_slice(part.ok_or_else(short)?);
                Ok(())
            }
        }
    }

    fn bytes(&self) -> Result<u64> {
        match self {
            Self::Object(store, name) => Ok(store.len(name)?),
            Self::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }
}

/// One run with its table in memory; shared by the cursors on it.
pub(crate) struct RunReader {
    source: RunSource,
    object: String,
    stream: Stream,
    trailer: Trailer,
    table: Vec<RegionRecord>,
}

impl RunReader {
    /// Opens a stored run, verified against what the manifest says of it.
    pub(crate) fn open(
        store: &Arc<dyn Store>,
        sealing: &Sealing,
        reference: &RunRef,
    ) -> Result<Self> {
        let source = RunSource::Object(Arc::clone(store), names::run(reference.run)?);
        Self::of(source, sealing, reference)
    }

    /// Opens a run wherever its bytes are.
    pub(crate) fn of(source: RunSource, sealing: &Sealing, reference: &RunRef) -> Result<Self> {
        let object = names::run(reference.run)?.to_string();
        let damaged = |kind, detail: Flaw| Damage::new(&object, kind, detail);
        let not_sealed = || {
            let flaw = "a part of it was not sealed with this repository's key";
            damaged(DamageKind::Foreign, flaw)
        };
        let least = (STREAM_HEADER_BYTES + TRAILER_BYTES) as u64;
        let bytes = source.bytes()?;
        if bytes != reference.bytes || bytes < least {
            return Err(damaged(DamageKind::Length, "it has not the length of the manifest").into());
        }
        let mut header = [0; STREAM_HEADER_BYTES];
        source.read_exact(0, &mut header)?;
        let stream = sealing.open_stream(Kind::RUN, reference.run.0, &object, &header)?;
        let overhead = stream.overhead();
        let mut tail = vec![0; layout::tail_bytes(overhead)];
        let tail_offset = bytes
            .checked_sub(tail.len() as u64)
            .ok_or_else(|| damaged(DamageKind::Length, "it is too short for a run"))?;
        source.read_exact(tail_offset, &mut tail)?;
        if blake3::hash(&tail) != reference.trailer.0 {
            return Err(damaged(DamageKind::Checksum, "its trailer is not the manifest's").into());
        }
        let sealed = &mut tail[..TRAILER_BYTES + overhead];
        let trailer = stream.open(Part(tail_offset), sealed).ok_or_else(not_sealed)?;
        let trailer: &[u8; TRAILER_BYTES] = trailer.try_into().map_err(|_| not_sealed())?;
        let trailer = Trailer::parse(trailer, bytes, overhead)
            .map_err(|flaw| damaged(DamageKind::Inconsistent, flaw))?;
        // Checked above: at most 65,536 regions.
        let mut table = vec![0; trailer.table_bytes() as usize + overhead];
        source.read_exact(trailer.table_offset, &mut table)?;
        if layout::short_sum(&[&header, &table]) != trailer.table_sum {
            return Err(damaged(DamageKind::Checksum, "its table does not match").into());
        }
        let part = Part(trailer.table_offset);
        let table = stream.open(part, &mut table).ok_or_else(not_sealed)?;
        let table = layout::parse_table(table, trailer.table_offset)
            .map_err(|flaw| damaged(DamageKind::Inconsistent, flaw))?;
        Ok(Self { source, object, stream, trailer, table })
    }

    /// The packs that the run refers to, sorted.
    pub(crate) fn packs(&self) -> Result<Vec<PackId>> {
        // At most RUN_PACKS_MAX ids, checked when the trailer was parsed.
        let overhead = self.stream.overhead();
        let mut bytes = vec![0; self.trailer.packs_bytes() as usize + overhead];
        let offset = self.trailer.table_offset + self.trailer.table_bytes() + overhead as u64;
        self.source.read_exact(offset, &mut bytes)?;
        let packs = self.opened(offset, &mut bytes, self.trailer.packs_sum)?;
        let (ids, _) = packs.as_chunks::<PACK_ID_BYTES>();
        Ok(ids.iter().copied().map(PackId).collect())
    }

    /// The first region at or after `from` that the run mentions.
    pub(crate) fn next_region(&self, from: u32) -> Option<u32> {
        let at = self.table.partition_point(|record| record.region < from);
        self.table.get(at).map(|record| record.region)
    }

    pub(crate) fn region(&self, region: u32) -> Option<&RegionRecord> {
        let at = self.table.binary_search_by_key(&region, |record| record.region).ok()?;
        self.table.get(at)
    }

    /// Content hash of a region as of the point that wrote the run.
    pub(crate) fn node(&self, region: u32) -> Option<NodeHash> {
        self.region(region).map(|record| record.node)
    }

    /// The index of a region that is not all zero.
    pub(crate) fn index(&self, record: &RegionRecord) -> Result<Vec<IndexRecord>> {
        // At most 256 records, checked when the table was parsed.
        let mut bytes = vec![0; record.piece.bytes as usize];
        self.source.read_exact(record.piece.offset, &mut bytes)?;
        let index = self.opened(record.piece.offset, &mut bytes, record.piece.sum)?;
        if !index.len().is_multiple_of(INDEX_RECORD_BYTES) {
            return Err(self.flawed("an index is cut off"));
        }
        layout::parse_index(index, record.piece.offset).map_err(|flaw| self.flawed(flaw))
    }

    /// What a part holds, verified and opened where it lies.
    fn opened<'a>(&self, offset: u64, stored: &'a mut [u8], sum: ShortSum) -> Result<&'a [u8]> {
        if layout::short_sum(&[stored]) != sum {
            let detail = "a part of it does not match its checksum";
            return Err(Damage::new(&self.object, DamageKind::Checksum, detail).into());
        }
        self.stream.open(Part(offset), stored).ok_or_else(|| {
            let detail = "a part of it was not sealed with this repository's key";
            Damage::new(&self.object, DamageKind::Foreign, detail).into()
        })
    }

    fn flawed(&self, flaw: Flaw) -> crate::error::Error {
        Damage::new(&self.object, DamageKind::Inconsistent, flaw).into()
    }
}

/// Reads a run's pages in ascending order, ahead of need.
pub(crate) struct RunCursor {
    pub(crate) run: Arc<RunReader>,
    window: Vec<u8>,
    window_offset: u64,
    /// A page while it is being opened: the window may be asked for it again.
    page: Vec<u8>,
}

impl RunCursor {
    pub(crate) fn new(run: Arc<RunReader>) -> Self {
        Self { run, window: Vec::new(), window_offset: 0, page: Vec::new() }
    }

    /// Lays a page under `slots`.
    pub(crate) fn page(&mut self, piece: &Piece, slots: &mut PageSlots) -> Result<()> {
        if piece.is_all_zero() {
            slots.iter_mut().for_each(|slot| {
                slot.get_or_insert(Slot::Zero);
            });
            return Ok(());
        }
        self.fill(piece)?;
        let start = (piece.offset - self.window_offset) as usize;
        self.page.clear();
        self.page.extend_from_slice(&self.window[start..start + piece.bytes as usize]);
        let page = self.run.opened(piece.offset, &mut self.page, piece.sum)?;
        layout::parse_page(page, slots).map_err(|flaw| self.run.flawed(flaw))
    }

    /// Moves the window so that it covers `piece`, which lies below the table.
    fn fill(&mut self, piece: &Piece) -> Result<()> {
        let stop = piece.offset + u64::from(piece.bytes);
        let window_stop = self.window_offset + self.window.len() as u64;
        if piece.offset >= self.window_offset && stop <= window_stop {
            return Ok(());
        }
        let ahead = (piece.offset + WINDOW_BYTES).min(self.run.trailer.table_offset).max(stop);
        self.window.resize((ahead - piece.offset) as usize, 0);
        self.window_offset = piece.offset;
        let read = self.run.source.read_exact(piece.offset, &mut self.window);
        if read.is_err() {
            self.window.clear();
        }
        read
    }
}
