//! Fetches blocks from packs, unpacks them and verifies them before anybody sees them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::block::{Unpacker, content_damage};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::geometry::{BlockIndex, BlockSize};
use crate::ids::{BlockId, PackId};
use crate::names;
use crate::pack::{FrameInfo, PackToc};
use crate::point::Entry;
use crate::repository::Inner;
use crate::store::Store;

/// Frames kept in tables of contents, all packs together: 4 MiB.
const CACHED_FRAMES_MAX: usize = 1 << 16;
/// Neighbouring frames are fetched together up to this size, where that costs no journey.
const FETCH_BYTES_MAX: u64 = 1 << 20;
/// The same of whoever knows what he will need: so large that the journey is a small part of it.
pub(crate) const JOURNEY_BYTES_MAX: u64 = 4 << 20;
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
pub(crate) struct TocCache {
    known: Mutex<VecDeque<(PackId, Arc<PackToc>)>>,
    /// Those that are being read.
    asked: Mutex<Vec<PackId>>,
    told: Condvar,
}

/// Says that a table is being read no more, however that ended.
struct Asked<'a>(&'a TocCache, PackId);

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.asked().retain(|pack| *pack != self.1);
        self.0.told.notify_all();
    }
}

impl TocCache {
    pub(crate) fn get(&self, inner: &Inner, pack: PackId) -> Result<Arc<PackToc>> {
        if let Some(toc) = self.find(pack) {
            return Ok(toc);
        }
        // Others read other tables meanwhile, and wait for this one.
        let _asked = self.ask(pack);
        if let Some(toc) = self.find(pack) {
            return Ok(toc);
        }
        let read = |store: &Arc<dyn Store>| PackToc::read(&**store, &inner.sealing, pack);
        let toc = Arc::new(inner.open_kept(&names::pack(pack)?, read, |_| true)?);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.push_front((pack, Arc::clone(&toc)));
        let mut frames = 0;
        known.retain(|(_, toc)| {
            frames += toc.frames.len().max(1);
            frames <= CACHED_FRAMES_MAX
        });
        Ok(toc)
    }

    fn ask(&self, pack: PackId) -> Asked<'_> {
        let asked = self.told.wait_while(self.asked(), |asked| asked.contains(&pack));
        asked.unwrap_or_else(PoisonError::into_inner).push(pack);
        Asked(self, pack)
    }

    fn asked(&self) -> MutexGuard<'_, Vec<PackId>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, pack: PackId) -> Option<Arc<PackToc>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let at = known.iter().position(|(known, _)| *known == pack)?;
        let found = known.remove(at)?;
        let toc = Arc::clone(&found.1);
        known.push_front(found);
        Some(toc)
    }
}

/// A stretch of a disk that is to be read.
pub struct Part<'a> {
    /// The block at the beginning of `out`.
    pub first: BlockIndex,
    /// Its DATA blocks, ascending; all others are zero.
    pub entries: &'a [Entry],
    /// Where to; it ends at a block boundary or at the disk's end.
    pub out: &'a mut [u8],
}

/// A block that has to be fetched.
struct Want<'a> {
    entry: &'a Entry,
    frame: FrameInfo,
    /// Which part it belongs to, and where there.
    part: usize,
    room: Range<usize>,
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
    manner: Manner,
}

/// How the bytes of packs are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// As they are needed; the store may guess what comes next.
    Stepwise,
    /// Whoever reads knows what he needs and asks for it in time: nothing is guessed.
    Planned,
}

impl BlockDecoder {
    pub(crate) fn new(inner: Arc<Inner>, size_bytes: u64, manner: Manner) -> Result<Self> {
        let unpacker = Unpacker::new(inner.sealing.hasher())?;
        let (fetched, repeated) = (Vec::new(), Repeated::default());
        Ok(Self { inner, size_bytes, unpacker, toc: None, fetched, repeated, manner })
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
        self.read_parts(&mut [Part { first, entries, out }])
    }

    /// As [`read_many`](Self::read_many) for several stretches: what lies together in a pack is
    /// fetched at once, whichever of them needs it.
    ///
    /// # Errors
    /// `Damaged` naming the pack; no part holds anything usable then.
    pub fn read_parts(&mut self, parts: &mut [Part<'_>]) -> Result<()> {
        let mut wants = Vec::new();
        for (number, part) in parts.iter_mut().enumerate() {
            self.lay_out(number, part, &mut wants)?;
        }
        wants.sort_unstable_by_key(|want| (want.entry.location.pack, want.frame.offset));
        let mut rest = &wants[..];
        while let Some(want) = rest.first() {
            let (together, start, stop) = neighbours(rest, self.fetch_bytes_max());
            self.fetch(want.entry, start, stop)?;
            for Want { entry, frame, part, room } in &rest[..together] {
                let out = &mut parts[*part].out[room.clone()];
                if !self.repeated.copy_to(&entry.id, out) {
                    let at = u64::from(frame.offset) - start;
                    self.frame(entry)?;
                    self.unpack(entry, frame, at as usize, out)?;
                }
            }
            rest = &rest[together..];
        }
        Ok(())
    }

    /// Fills the zeroes of a part and what is at hand; adds what has to be fetched.
    fn lay_out<'a>(
        &mut self,
        number: usize,
        part: &mut Part<'a>,
        wants: &mut Vec<Want<'a>>,
    ) -> Result<()> {
        let mut position = 0;
        for entry in part.entries {
            let room = self.room(part.first, entry, position, part.out.len())?;
            part.out[position..room.start].fill(0);
            position = room.end;
            if !self.repeated.copy_to(&entry.id, &mut part.out[room.clone()]) {
                wants.push(Want { entry, frame: self.frame(entry)?, part: number, room });
            }
        }
        part.out[position..].fill(0);
        Ok(())
    }

    fn fetch_bytes_max(&self) -> u64 {
        match self.manner {
            Manner::Stepwise => FETCH_BYTES_MAX,
            Manner::Planned => JOURNEY_BYTES_MAX,
        }
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
        match self.manner {
            Manner::Stepwise => self.inner.store.read_exact(&name, start, &mut self.fetched)?,
            Manner::Planned => self.inner.store.read_planned(&name, start, &mut self.fetched)?,
        }
        Ok(())
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

/// How many of the first of these, sorted by place, lie so close together that one request fetches
/// them, and the bytes of the pack to ask for.
fn neighbours(wants: &[Want<'_>], bytes_max: u64) -> (usize, u64, u64) {
    let Some(first) = wants.first() else { return (0, 0, 0) };
    let start = u64::from(first.frame.offset);
    let (mut count, mut stop) = (0, start);
    for Want { entry, frame, .. } in wants {
        let offset = u64::from(frame.offset);
        let end = stop.max(offset + u64::from(frame.stored_bytes));
        let is_near = offset <= stop + FETCH_GAP_BYTES_MAX && end - start <= bytes_max;
        if count > 0 && (entry.location.pack != first.entry.location.pack || !is_near) {
            break;
        }
        stop = end;
        count += 1;
    }
    (count, start, stop)
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
