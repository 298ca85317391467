//! What is known to be in the repository already: a bounded, disposable cache.
//!
//! It may forget anything at any time. It must never know what is not so: it is discarded when gc
//! has begun another generation, and of what was saved only packs are kept that are seen to be
//! there after the writer announced itself.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Damage, DamageKind, Result};
use crate::ids::{BlockId, PackId, PointId};
use crate::point::Location;

/// Known blocks: 128 Ki of 40 bytes make 5 MiB and cover 8 GiB of data in 64 KiB blocks.
const KNOWN_MAX: usize = 1 << 17;
/// A block may lie in one of these many places of its set; the least recently used one goes.
const WAYS: usize = 4;
/// Packs that are saved for the next writer, newest first to go in: each costs one request when it
/// is proven present, and so many hold about as many blocks as the table does.
pub(crate) const SAVED_PACKS_MAX: usize = 64;
/// Points whose packs were looked at and that are remembered: the newest ones.
pub(crate) const SAVED_POINTS_MAX: usize = 16;
const SAVED_ENTRY_BYTES: usize = 40;
/// Length of a point's id.
const POINT_BYTES: usize = 14;
const OBJECT: &str = "the dedup cache";

#[derive(Clone, Copy)]
struct Known {
    id: BlockId,
    pack: u32,
    slot: u32,
}

/// No block has the id of a zero block.
const NOTHING: Known = Known { id: BlockId::ZERO, pack: 0, slot: 0 };

struct Table {
    known: Vec<Known>,
    packs: Vec<PackId>,
    numbers: HashMap<PackId, u32>,
    /// What these have stored is in here, as far as there was room.
    points: BTreeSet<PointId>,
}

/// The index; shared by encoders and the sink of one point.
pub(crate) struct DedupIndex(Mutex<Table>);

impl DedupIndex {
    pub(crate) fn new() -> Self {
        let known = vec![NOTHING; KNOWN_MAX];
        let (packs, numbers, points) = Default::default();
        Self(Mutex::new(Table { known, packs, numbers, points }))
    }

    /// Notes that what a point has stored is in here.
    pub(crate) fn note_point(&self, point: &PointId) {
        let mut table = self.lock();
        table.points.insert(point.clone());
        while table.points.len() > SAVED_POINTS_MAX {
            table.points.pop_first();
        }
    }

    pub(crate) fn has_point(&self, point: &PointId) -> bool {
        self.lock().points.contains(point)
    }

    pub(crate) fn has_pack(&self, pack: PackId) -> bool {
        self.lock().numbers.contains_key(&pack)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn find(&self, id: &BlockId) -> Option<Location> {
        let mut table = self.lock();
        let set = table.set(id);
        let at = set.iter().position(|known| &known.id == id)?;
        set[..=at].rotate_right(1);
        let Known { pack, slot, .. } = set[0];
        Some(Location { pack: *table.packs.get(pack as usize)?, slot })
    }

    pub(crate) fn insert(&self, id: &BlockId, location: Location) {
        let mut table = self.lock();
        let pack = table.number(location.pack);
        let set = table.set(id);
        let at = set.iter().position(|known| &known.id == id).unwrap_or(WAYS - 1);
        set[..=at].rotate_right(1);
        set[0] = Known { id: *id, pack, slot: location.slot };
    }

    /// The newest packs with their blocks, to be saved; of packs that `keep` says no to, none.
    pub(crate) fn save(&self, keep: impl Fn(PackId) -> bool) -> Vec<u8> {
        let table = self.lock();
        let first = table.packs.len().saturating_sub(SAVED_PACKS_MAX);
        let packs = &table.packs[first..];
        // At most 16.
        let mut bytes = (table.points.len() as u32).to_le_bytes().to_vec();
        table.points.iter().for_each(|point| bytes.extend_from_slice(point.as_str().as_bytes()));
        // At most 64.
        bytes.extend_from_slice(&(packs.len() as u32).to_le_bytes());
        packs.iter().for_each(|pack| bytes.extend_from_slice(&pack.0));
        let kept: Vec<bool> = packs.iter().map(|pack| keep(*pack)).collect();
        for known in &table.known {
            let place = (known.pack as usize).checked_sub(first);
            let kept = place.is_some_and(|place| kept.get(place) == Some(&true));
            if kept && known.id != BlockId::ZERO {
                bytes.extend_from_slice(&known.id.0);
                bytes.extend_from_slice(&(known.pack - first as u32).to_le_bytes());
                bytes.extend_from_slice(&known.slot.to_le_bytes());
            }
        }
        bytes
    }

    /// What was saved, less the packs of which `is_there` says no.
    pub(crate) fn load(
        bytes: &[u8],
        mut is_there: impl FnMut(PackId) -> Result<bool>,
    ) -> Result<Self> {
        let Saved { points, packs, entries } = parse(bytes)
            .ok_or_else(|| Damage::new(OBJECT, DamageKind::Inconsistent, "it is malformed"))?;
        let mut present = Vec::with_capacity(packs.len());
        for pack in packs {
            let pack = PackId(*pack);
            present.push(is_there(pack)?.then_some(pack));
        }
        let index = Self::new();
        points.iter().for_each(|point| index.note_point(point));
        for entry in entries {
            let mut id = [0; 32];
            id.copy_from_slice(&entry[..32]);
            let pack = u32::from_le_bytes([entry[32], entry[33], entry[34], entry[35]]);
            let slot = u32::from_le_bytes([entry[36], entry[37], entry[38], entry[39]]);
            if let Some(Some(pack)) = present.get(pack as usize) {
                index.insert(&BlockId(id), Location { pack: *pack, slot });
            }
        }
        Ok(index)
    }
}

/// An index that is loaded when it is first asked: a point without a new block needs none.
pub(crate) struct LazyDedup {
    index: OnceLock<DedupIndex>,
    load: Mutex<Option<Loader>>,
    /// Something was learnt that a saved table does not hold.
    more: AtomicBool,
}

/// The index, and whether it holds more than what was saved.
type Loader = Box<dyn FnOnce() -> (DedupIndex, bool) + Send>;

impl LazyDedup {
    pub(crate) fn new(load: impl FnOnce() -> (DedupIndex, bool) + Send + 'static) -> Self {
        let load: Loader = Box::new(load);
        let (index, more) = (OnceLock::new(), AtomicBool::new(false));
        Self { index, load: Mutex::new(Some(load)), more }
    }

    pub(crate) fn find(&self, id: &BlockId) -> Option<Location> {
        self.index().find(id)
    }

    pub(crate) fn insert(&self, id: &BlockId, location: Location) {
        self.more.store(true, Ordering::Relaxed);
        self.index().insert(id, location);
    }

    /// Notes the point that is being written, where something was learnt for it.
    pub(crate) fn note_point(&self, point: &PointId) {
        if self.more.load(Ordering::Relaxed) {
            self.index().note_point(point);
        }
    }

    /// As [`DedupIndex::save`], where there is something new to save.
    pub(crate) fn save_if_more(&self, keep: impl Fn(PackId) -> bool) -> Option<Vec<u8>> {
        self.more.load(Ordering::Relaxed).then(|| self.index().save(keep))
    }

    fn index(&self) -> &DedupIndex {
        self.index.get_or_init(|| {
            let load = self.load.lock().unwrap_or_else(PoisonError::into_inner).take();
            let (index, more) = load.map_or_else(|| (DedupIndex::new(), false), |load| load());
            self.more.fetch_or(more, Ordering::Relaxed);
            index
        })
    }
}

struct Saved<'a> {
    points: Vec<PointId>,
    packs: &'a [[u8; 16]],
    entries: &'a [[u8; SAVED_ENTRY_BYTES]],
}

fn parse(bytes: &[u8]) -> Option<Saved<'_>> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    if count > SAVED_POINTS_MAX {
        return None;
    }
    let (points, rest) = rest.split_at_checked(count * POINT_BYTES)?;
    let point = |id: &[u8]| std::str::from_utf8(id).ok()?.parse().ok();
    let points: Option<Vec<PointId>> = points.chunks(POINT_BYTES).map(point).collect();
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    if count > SAVED_PACKS_MAX {
        return None;
    }
    let (packs, rest) = rest.split_at_checked(count * 16)?;
    let (entries, odd) = rest.as_chunks();
    let packs = packs.as_chunks().0;
    let fits = odd.is_empty() && entries.len() <= KNOWN_MAX;
    Some(Saved { points: points?, packs, entries }).filter(|_| fits)
}

impl Table {
    fn set(&mut self, id: &BlockId) -> &mut [Known] {
        let hash = u32::from_le_bytes([id.0[0], id.0[1], id.0[2], id.0[3]]) as usize;
        let first = hash % (KNOWN_MAX / WAYS) * WAYS;
        &mut self.known[first..first + WAYS]
    }

    fn number(&mut self, pack: PackId) -> u32 {
        let packs = &mut self.packs;
        *self.numbers.entry(pack).or_insert_with(|| {
            packs.push(pack);
            // A point writes far fewer packs than 2^32.
            (packs.len() - 1) as u32
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> BlockId {
        BlockId(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    fn at(pack: u8, slot: u32) -> Location {
        Location { pack: PackId([pack; 16]), slot }
    }

    #[test]
    fn finds_what_was_put_in_and_forgets_when_full() {
        let index = DedupIndex::new();
        let many = KNOWN_MAX as u32 * 2;
        for n in 0..many {
            index.insert(&id(n), at(1, n));
        }
        let known = (0..many).filter(|n| index.find(&id(*n)).is_some()).count();
        assert!(known <= KNOWN_MAX && known > KNOWN_MAX / 2, "{known}");
        assert!((0..many).all(|n| index.find(&id(n)).is_none_or(|found| found == at(1, n))));
    }

    #[test]
    fn saved_packs_that_are_gone_are_forgotten() {
        let index = DedupIndex::new();
        for n in 0..100 {
            index.insert(&id(n), at((n % 2) as u8, n));
        }
        let saved = index.save(|_| true);
        let loaded = DedupIndex::load(&saved, |pack| Ok(pack == PackId([1; 16]))).unwrap();
        for n in 0..100 {
            assert_eq!(loaded.find(&id(n)), (n % 2 == 1).then(|| at(1, n)), "{n}");
        }
        for cut in 0..saved.len().min(200) {
            assert!(
                DedupIndex::load(&saved[..cut], |_| Ok(true)).is_err() || cut % 40 == 0,
                "{cut}"
            );
        }
    }

    #[test]
    fn points_that_were_looked_at_are_saved_the_newest_ones() {
        let index = DedupIndex::new();
        let point = |n: u32| PointId::next(jiff::Timestamp::UNIX_EPOCH, None, n);
        (0..40).for_each(|n| index.note_point(&point(n)));
        let loaded = DedupIndex::load(&index.save(|_| true), |_| Ok(true)).unwrap();
        let kept = (0..40).filter(|n| loaded.has_point(&point(*n))).collect::<Vec<_>>();
        assert_eq!(kept, (24..40).collect::<Vec<_>>());
    }

    #[test]
    fn only_the_newest_packs_are_saved() {
        let index = DedupIndex::new();
        for n in 0..200 {
            index.insert(&id(n), at(n as u8, n));
        }
        let mut proven = 0;
        let loaded = DedupIndex::load(&index.save(|_| true), |_| {
            proven += 1;
            Ok(true)
        });
        assert_eq!(proven, SAVED_PACKS_MAX);
        assert_eq!(loaded.unwrap().find(&id(199)), Some(at(199, 199)));
    }
}
