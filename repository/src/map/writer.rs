//! Writes one run, page by page; small runs stay in memory until it is known whether they are kept.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::content::{NodeHash, ZERO_NODE};
use crate::crypto::Part;
use crate::envelope::Kind;
use crate::error::{Error, Result};
use crate::ids::{Checksum, PackId, RunId};
use crate::names;
use crate::point::RunRef;
use crate::sealing::{Sealing, Stream};
use crate::store::{ObjectWriter, Store};

use super::layout::{
    self, IndexRecord, Piece, RUN_PACKS_MAX, RegionRecord, Trailer, encode_index, encode_region,
};
use super::reader::RunSource;
use super::{PageSlots, REGION_BLOCKS, Slot};

/// A run up to this size is held back; folding it into another one then costs no object.
const RUN_MEMORY_BYTES: usize = 1 << 20;

/// A run being written. Pages come region by region, ascending, and each region is ended.
pub(crate) struct RunWriter {
    store: Arc<dyn Store>,
    id: RunId,
    object: Option<Box<dyn ObjectWriter>>,
    stream: Stream,
    pending: Vec<u8>,
    /// CRC-32C of all bytes so far, of a sealed run.
    crc: u32,
    /// Bytes that have left `pending`.
    written_bytes: u64,
    index: Vec<u8>,
    table: Vec<u8>,
    packs: BTreeSet<PackId>,
    entries: u64,
}

/// A finished run: a stored object, or bytes that are still to be stored.
pub(crate) struct RunDraft {
    pub(crate) reference: RunRef,
    pub(crate) source: RunSource,
}

impl RunWriter {
    /// `id` is drawn at random for this run: of a sealed one it decides the key.
    pub(crate) fn new(store: Arc<dyn Store>, sealing: &Sealing, id: RunId) -> Result<Self> {
        let stream = sealing.stream(Kind::RUN, id.0)?;
        Ok(Self {
            store,
            id,
            object: None,
            pending: stream.header().to_vec(),
            crc: crc32c::crc32c(stream.header()),
            stream,
            written_bytes: 0,
            index: Vec::new(),
            table: Vec::new(),
            packs: BTreeSet::new(),
            entries: 0,
        })
    }

    /// True when nothing was written: such a run is left out of the map.
    pub(crate) fn is_empty(&self) -> bool {
        self.table.is_empty() && self.index.is_empty()
    }

    /// Adds a page of the current region. `leaf` covers all blocks of the span, inherited too.
    pub(crate) fn page(&mut self, page: u8, slots: &PageSlots, leaf: NodeHash) -> Result<()> {
        self.entries += slots.iter().flatten().count() as u64;
        let piece = if slots.iter().all(|slot| *slot == Some(Slot::Zero)) {
            Piece::ALL_ZERO
        } else {
            self.note_packs(slots)?;
            let mut bytes = Vec::new();
            layout::encode_page(slots, &mut bytes);
            self.append(bytes)?
        };
        encode_index(&IndexRecord { page, piece, leaf }, &mut self.index);
        Ok(())
    }

    /// True when the current region has a page.
    pub(crate) fn has_pages(&self) -> bool {
        !self.index.is_empty()
    }

    /// Ends a region; `node` covers all its blocks, inherited ones too.
    pub(crate) fn end_region(&mut self, region: u32, node: NodeHash) -> Result<()> {
        let index = std::mem::take(&mut self.index);
        let piece = self.append(index)?;
        encode_region(&RegionRecord { region, piece, node }, &mut self.table);
        Ok(())
    }

    /// Says that a whole region is zero.
    pub(crate) fn zero_region(&mut self, region: u32) {
        self.entries += REGION_BLOCKS;
        let record = RegionRecord { region, piece: Piece::ALL_ZERO, node: ZERO_NODE };
        encode_region(&record, &mut self.table);
    }

    /// Ends the run. A large one is durable then, a small one is still in memory.
    pub(crate) fn finish(mut self) -> Result<RunDraft> {
        let packs: Vec<u8> = self.packs.iter().flat_map(|pack| pack.0).collect();
        // Bounded by the regions of a disk and by RUN_PACKS_MAX.
        let regions = (self.table.len() / layout::REGION_RECORD_BYTES) as u32;
        let table_offset = self.offset();
        let table = std::mem::take(&mut self.table);
        let table = self.sealed(table)?;
        let table_sum = layout::short_sum(&[self.stream.header(), &table]);
        self.put(&table)?;
        let packs = self.sealed(packs)?;
        let packs_sum = layout::short_sum(&[&packs]);
        self.put(&packs)?;
        let (entries, packs) = (self.entries, self.packs.len() as u32);
        let trailer = Trailer { regions, packs, table_offset, entries, table_sum, packs_sum };
        let mut tail = self.sealed(trailer.encode().to_vec())?;
        if self.stream.is_encrypted() {
            tail.extend_from_slice(&layout::footer(crc32c::crc32c_append(self.crc, &tail)));
        }
        self.put(&tail)?;
        let reference = RunRef {
            run: self.id,
            bytes: self.offset(),
            entries: self.entries,
            trailer: Checksum(*blake3::hash(&tail).as_bytes()),
        };
        let source = match self.object.take() {
            None => RunSource::Memory(Arc::new(self.pending)),
            Some(mut object) => {
                object.write(&self.pending)?;
                object.finish()?;
                RunSource::Object(self.store, names::run(self.id)?)
            }
        };
        Ok(RunDraft { reference, source })
    }

    fn note_packs(&mut self, slots: &PageSlots) -> Result<()> {
        for slot in slots.iter().flatten() {
            if let Slot::Data(_, location) = slot {
                self.packs.insert(location.pack);
            }
        }
        if self.packs.len() <= RUN_PACKS_MAX {
            return Ok(());
        }
        Err(Error::Refused {
            what: format!("a map would refer to more than {RUN_PACKS_MAX} packs"),
            advice: "back this disk up into a repository of its own, with larger blocks",
        })
    }

    /// Bytes of the run so far: where the next part begins.
    fn offset(&self) -> u64 {
        self.written_bytes + self.pending.len() as u64
    }

    /// The next part as it is stored.
    fn sealed(&self, mut part: Vec<u8>) -> Result<Vec<u8>> {
        self.stream.seal(Part(self.offset()), &mut part, 0)?;
        Ok(part)
    }

    fn append(&mut self, part: Vec<u8>) -> Result<Piece> {
        let offset = self.offset();
        let part = self.sealed(part)?;
        self.put(&part)?;
        // Pages and indexes are small.
        Ok(Piece { offset, bytes: part.len() as u32, sum: layout::short_sum(&[&part]) })
    }

    fn put(&mut self, part: &[u8]) -> Result<()> {
        if self.stream.is_encrypted() {
            self.crc = crc32c::crc32c_append(self.crc, part);
        }
        self.pending.extend_from_slice(part);
        if self.pending.len() > RUN_MEMORY_BYTES { self.spill() } else { Ok(()) }
    }

    fn spill(&mut self) -> Result<()> {
        let object = match &mut self.object {
            Some(object) => object,
            None => self.object.insert(self.store.create(&names::run(self.id)?)?),
        };
        object.write(&self.pending)?;
        self.written_bytes += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }
}

impl RunDraft {
    /// Makes the run durable if it is not yet.
    pub(crate) fn store(&self, store: &dyn Store) -> Result<()> {
        match &self.source {
            RunSource::Memory(bytes) => Ok(store.put(&names::run(self.reference.run)?, bytes)?),
            RunSource::Object(..) => Ok(()),
        }
    }

    /// Drops a run that was folded into another one; nothing has referred to it yet. What cannot be
    /// deleted (an object lock, say) is garbage for gc.
    pub(crate) fn discard(self) {
        if let RunSource::Object(store, name) = self.source
            && let Err(error) = store.delete(&[name])
        {
            tracing::debug!(%error, "a folded map run stays behind");
        }
    }
}
