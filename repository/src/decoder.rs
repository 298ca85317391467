//! Fetches blocks from packs, unpacks them and verifies them before anybody sees them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::block::{Unpacker, content_damage};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::geometry::{BlockIndex, BlockSize};
use crate::ids::{BlockId, PackId};
use crate::names;
use crate::pack::{FrameInfo, PackToc};
use crate::point::Entry;
use crate::repository::Inner;

/// Frames kept in tables of contents, all packs together: 4 MiB.
const CACHED_FRAMES_MAX: usize = 1 << 16;
/// Neighbouring frames are fetched together up to this size.
const FETCH_BYTES_MAX: u64 = 1 << 20;
/// Bytes between two frames that are rather read than skipped by another request.
const FETCH_GAP_BYTES_MAX: u64 = 64 << 10;

/// Ids of blocks that were read lately, to see which ones come again.
const RECENT_IDS: usize = 64;
/// Blocks that came again are kept, verified, up to so many bytes: a few of them make most of the
/// repetition of real disks (fill patterns, formatted but unused space).
const REPEATED_BYTES_MAX: usize = 1 << 20;

/// Verified blocks that are asked for again and again.
#[derive(Default)]
struct Repeated {
    recent: VecDeque<BlockId>,
    blocks: VecDeque<(BlockId, Vec<u8>)>,
}

impl Repeated {
    /// Copies the block of that id into `block`, if it is here with that length.
    fn copy_to(&self, id: &BlockId, block: &mut [u8]) -> bool {
        let found = self.blocks.iter().find(|(kept, data)| kept == id && data.len() == block.len());
        if let Some((_, data)) = found {
            block.copy_from_slice(data);
        }
        found.is_some()
    }

    /// Takes note of a verified block, and keeps it when it is not the first of its id.
    fn note(&mut self, id: &BlockId, block: &[u8]) {
        if !self.recent.contains(id) {
            self.recent.truncate(RECENT_IDS - 1);
            self.recent.push_front(*id);
        } else if block.len() <= REPEATED_BYTES_MAX && self.blocks.iter().all(|kept| kept.0 != *id)
        {
            let room = REPEATED_BYTES_MAX / block.len().max(1);
            self.blocks.truncate(room - 1);
            self.blocks.push_front((*id, block.to_vec()));
        }
    }
}

/// Tables of contents, the last used ones first.
#[derive(Default)]
pub(crate) struct TocCache(Mutex<VecDeque<(PackId, Arc<PackToc>)>>);

impl TocCache {
    pub(crate) fn get(&self, inner: &Inner, pack: PackId) -> Result<Arc<PackToc>> {
        if let Some(toc) = self.find(pack) {
            return Ok(toc);
        }
        // Not under the lock: others read meanwhile. Two may read one table; that costs little.
        let toc = Arc::new(PackToc::read(&*inner.store, &inner.sealing, pack)?);
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cached.push_front((pack, Arc::clone(&toc)));
        let mut frames = 0;
        cached.retain(|(_, toc)| {
            frames += toc.frames.len().max(1);
            frames <= CACHED_FRAMES_MAX
        });
        Ok(toc)
    }

    fn find(&self, pack: PackId) -> Option<Arc<PackToc>> {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cached.iter().position(|(cached, _)| *cached == pack)?;
        let found = cached.remove(at)?;
        let toc = Arc::clone(&found.1);
        cached.push_front(found);
        Some(toc)
    }
}

/// Reads blocks of one disk of a point; one per thread.
pub struct BlockDecoder {
    inner: Arc<Inner>,
    size_bytes: u64,
    unpacker: Unpacker,
    /// The last table used: neighbours lie in one pack.
    toc: Option<(PackId, Arc<PackToc>)>,
    fetched: Vec<u8>,
    repeated: Repeated,
}

impl BlockDecoder {
    pub(crate) fn new(inner: Arc<Inner>, size_bytes: u64) -> Result<Self> {
        let unpacker = Unpacker::new(inner.sealing.hasher())?;
        let (fetched, repeated) = (Vec::new(), Repeated::default());
        Ok(Self { inner, size_bytes, unpacker, toc: None, fetched, repeated })
    }

    /// Reads one block into `block`, which is exactly as long as the block.
    ///
    /// # Errors
    /// `Damaged` naming the pack; `block` holds nothing usable then.
    pub fn read(&mut self, entry: &Entry, block: &mut [u8]) -> Result<()> {
        self.check_length(entry, block.len())?;
        let frame = self.frame(entry)?;
        self.fetch(entry, frame.offset.into(), u64::from(frame.offset + frame.stored_bytes))?;
        self.unpack(entry, &frame, 0, block)
    }

    /// Reads the blocks from `first` on that `out` has room for: those in `entries` (ascending) from
    /// their packs, fetching neighbours at once, all others as zero. `out` ends at a block boundary
    /// or at the disk's end.
    ///
    /// # Errors
    /// `Damaged` naming the pack; `out` holds nothing usable then.
    pub fn read_many(
        &mut self,
        first: BlockIndex,
        entries: &[Entry],
        out: &mut [u8],
    ) -> Result<()> {
        let mut position = 0;
        let mut rest = entries;
        while let Some(entry) = rest.first() {
            let room = self.room(first, entry, position, out.len())?;
            if self.repeated.copy_to(&entry.id, &mut out[room.clone()]) {
                out[position..room.start].fill(0);
                position = room.end;
                rest = &rest[1..];
                continue;
            }
            let (together, start, stop) = self.neighbours(rest)?;
            self.fetch(entry, start, stop)?;
            for entry in &rest[..together] {
                let room = self.room(first, entry, position, out.len())?;
                out[position..room.start].fill(0);
                position = room.end;
                let frame = self.frame(entry)?;
                let at = u64::from(frame.offset) - start;
                self.unpack(entry, &frame, at as usize, &mut out[room])?;
            }
            rest = &rest[together..];
        }
        out[position..].fill(0);
        Ok(())
    }

    /// Bytes of the disk that these entries hold.
    pub(crate) fn raw_bytes(&self, entries: &[Entry]) -> u64 {
        let of_one = |entry: &Entry| self.block_size().block_bytes(self.size_bytes, entry.index);
        entries.iter().map(|entry| u64::from(of_one(entry))).sum()
    }

    /// Where a block belongs in a buffer of `length` that begins with block `first` and is filled
    /// up to `position`.
    fn room(
        &self,
        first: BlockIndex,
        entry: &Entry,
        position: usize,
        length: usize,
    ) -> Result<Range<usize>> {
        let size = self.block_size().bytes() as usize;
        let place = place(first, entry, size, length).ok_or_else(|| misplaced(entry))?;
        let end = place + self.block_size().block_bytes(self.size_bytes, entry.index) as usize;
        if place < position || end > length {
            return Err(misplaced(entry));
        }
        Ok(place..end)
    }

    fn block_size(&self) -> BlockSize {
        self.inner.config.block_size
    }

    fn check_length(&self, entry: &Entry, length: usize) -> Result<()> {
        let wanted = self.block_size().block_bytes(self.size_bytes, entry.index);
        if wanted as usize == length { Ok(()) } else { Err(misplaced(entry)) }
    }

    /// How many of the first entries lie so close together that one request fetches them, and the
    /// bytes of the pack to ask for.
    fn neighbours(&mut self, entries: &[Entry]) -> Result<(usize, u64, u64)> {
        let mut count = 0;
        let (mut start, mut stop) = (0, 0);
        for entry in entries {
            if count > 0 && entry.location.pack != entries[0].location.pack {
                break;
            }
            let frame = self.frame(entry)?;
            let offset = u64::from(frame.offset);
            let end = offset + u64::from(frame.stored_bytes);
            let far = offset < stop || offset - stop > FETCH_GAP_BYTES_MAX;
            if count > 0 && (far || end - start > FETCH_BYTES_MAX) {
                break;
            }
            if count == 0 {
                start = offset;
            }
            stop = end;
            count += 1;
        }
        Ok((count, start, stop))
    }

    /// The frame of an entry, checked against what the entry and the disk say of it.
    fn frame(&mut self, entry: &Entry) -> Result<FrameInfo> {
        let pack = entry.location.pack;
        let toc = match &self.toc {
            Some((last, toc)) if *last == pack => toc,
            _ => &self.toc.insert((pack, self.inner.tocs.get(&self.inner, pack)?)).1,
        };
        let inconsistent = |detail: String| -> Error {
            match names::pack(pack) {
                Ok(name) => Damage::new(name, DamageKind::Inconsistent, detail).into(),
                Err(error) => error,
            }
        };
        let slot = entry.location.slot;
        let Some(frame) = toc.frames.get(slot as usize) else {
            return Err(inconsistent(format!("it has no slot {slot}, of block {}", entry.id)));
        };
        let length = self.inner.config.block_size.block_bytes(self.size_bytes, entry.index);
        // A frame is never larger than its block (and a tag): so memory is bounded by the block size.
        let most = length as usize + toc.overhead();
        let is_longer = frame.stored_bytes as usize > most;
        if frame.id != entry.id || frame.raw_bytes != length || is_longer {
            return Err(inconsistent(format!("slot {slot} does not hold block {}", entry.id)));
        }
        Ok(*frame)
    }

    fn fetch(&mut self, entry: &Entry, start: u64, stop: u64) -> Result<()> {
        self.fetched.resize((stop - start) as usize, 0);
        let name = names::pack(entry.location.pack)?;
        Ok(self.inner.store.read_exact(&name, start, &mut self.fetched)?)
    }

    fn unpack(
        &mut self,
        entry: &Entry,
        frame: &FrameInfo,
        at: usize,
        block: &mut [u8],
    ) -> Result<()> {
        let stored = &self.fetched[at..at + frame.stored_bytes as usize];
        let slot = entry.location.slot;
        // `frame` has left the table of this pack here.
        let unpacked = match &self.toc {
            Some((pack, toc)) if *pack == entry.location.pack => {
                toc.unpack(slot, stored, &mut self.unpacker, block)
            }
            _ => Err("its table is not at hand".to_owned()),
        };
        unpacked.map_err(|detail| match names::pack(entry.location.pack) {
            Ok(name) => content_damage(name, format!("slot {}: {detail}", entry.location.slot)),
            Err(error) => error,
        })?;
        self.repeated.note(&entry.id, block);
        Ok(())
    }
}

/// Where a block belongs in a buffer that begins with block `first`.
fn place(first: BlockIndex, entry: &Entry, size: usize, room: usize) -> Option<usize> {
    let blocks = usize::try_from(entry.index.0.checked_sub(first.0)?).ok()?;
    blocks.checked_mul(size).filter(|place| *place < room)
}

fn misplaced(entry: &Entry) -> Error {
    Error::Refused {
        what: format!("{} does not fit the buffer that it was to be read into", entry.index),
        advice: "report this as a defect",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_again_is_kept_and_no_more_than_the_limit() {
        let mut repeated = Repeated::default();
        let id = |n: usize| BlockId([n as u8; 32]);
        let block = |n: usize| vec![n as u8; 64 << 10];
        let mut out = block(0);
        for round in 0..3 {
            for n in 1..=RECENT_IDS / 2 {
                assert!(round < 2 || n > RECENT_IDS / 4 || !repeated.copy_to(&id(n), &mut out));
                repeated.note(&id(n), &block(n));
            }
            let kept: usize = repeated.blocks.iter().map(|(_, data)| data.len()).sum();
            assert_eq!(kept > 0, round > 0);
            assert!(kept <= REPEATED_BYTES_MAX && repeated.recent.len() <= RECENT_IDS);
        }
        assert!(repeated.copy_to(&id(RECENT_IDS / 2), &mut out));
        assert_eq!(out, block(RECENT_IDS / 2));
        assert!(!repeated.copy_to(&id(RECENT_IDS / 2), &mut out[..100]), "another length");
    }
}
