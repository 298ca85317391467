//! Writes one run, page by page; small runs stay in memory until it is known whether they are kept.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::content::{NodeHash, ZERO_NODE};
use crate::envelope::{self, Kind};
use crate::error::{Error, Result};
use crate::ids::{Checksum, PackId, RepositoryId, RunId};
use crate::names;
use crate::point::RunRef;
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
    header: Vec<u8>,
    pending: Vec<u8>,
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
    pub(crate) fn new(store: Arc<dyn Store>, repository: &RepositoryId, id: RunId) -> Self {
        let header = envelope::stream_header(Kind::RUN, repository, id.0);
        Self {
            store,
            id,
            object: None,
            pending: header.clone(),
            header,
            written_bytes: 0,
            index: Vec::new(),
            table: Vec::new(),
            packs: BTreeSet::new(),
            entries: 0,
        }
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
            self.append(&bytes)?
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
        let piece = self.append(&index)?;
        encode_region(&RegionRecord { region, piece, node }, &mut self.table);
        self.index = index;
        self.index.clear();
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
        let trailer = Trailer {
            // Bounded by the regions of a disk and by RUN_PACKS_MAX.
            regions: (self.table.len() / layout::REGION_RECORD_BYTES) as u32,
            packs: self.packs.len() as u32,
            table_offset: self.written_bytes + self.pending.len() as u64,
            entries: self.entries,
            table_sum: layout::short_sum(&[&self.header, &self.table]),
            packs_sum: layout::short_sum(&[&packs]),
        };
        let trailer = trailer.encode();
        for part in [&std::mem::take(&mut self.table)[..], &packs, &trailer] {
            self.append(part)?;
        }
        let reference = RunRef {
            run: self.id,
            bytes: self.written_bytes + self.pending.len() as u64,
            entries: self.entries,
            trailer: Checksum(*blake3::hash(&trailer).as_bytes()),
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

    fn append(&mut self, bytes: &[u8]) -> Result<Piece> {
        let offset = self.written_bytes + self.pending.len() as u64;
        self.pending.extend_from_slice(bytes);
        if self.pending.len() > RUN_MEMORY_BYTES {
            self.spill()?;
        }
        // Pages and indexes are small; of larger parts the piece is not used.
        Ok(Piece { offset, bytes: bytes.len() as u32, sum: layout::short_sum(&[bytes]) })
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
