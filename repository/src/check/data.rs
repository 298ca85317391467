//! Maps and packs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{CheckOptions, Findings};
use crate::block::Unpacker;
use crate::content::{ContentHasher, TreeBuilder};
use crate::error::{Damage, DamageKind, Result};
use crate::geometry::BlockIndex;
use crate::ids::{BlockId, PackId};
use crate::map::{MapView, RunReader, scrub_run};
use crate::names;
use crate::pack::{FrameInfo, PackToc};
use crate::point::{Location, Point, PointDisk, RunRef};
use crate::reader::{DiskReader, open_runs};
use crate::repository::{Inner, random};

/// Frames are read in pieces of about this size.
const READ_BYTES: u64 = 1 << 20;
/// The level of the content tree whose children are regions: 0 has blocks, 1 has spans of 256.
const REGION_LEVEL: usize = 2;

/// Verifies each run once, and each disk's content root; returns the packs they refer to.
pub(super) fn check_maps(
    inner: &Arc<Inner>,
    points: &[Point],
    options: &CheckOptions,
    findings: &mut Findings<'_>,
) -> Result<BTreeSet<PackId>> {
    let mut packs = BTreeSet::new();
    let mut scrubbed = BTreeMap::new();
    let mut proven = BTreeSet::new();
    for point in points {
        for disk in &point.disks {
            let mut whole = true;
            for run in &disk.runs {
                let known = scrubbed.get(&run.run).copied();
                let good = match known {
                    Some(good) => good,
                    None => {
                        let object = names::run(run.run)?;
                        let scrubbed = scrub(inner, run, &mut packs);
                        findings.note(object.as_str(), scrubbed)?.is_some()
                    }
                };
                scrubbed.insert(run.run, good);
                whole &= good;
            }
            let key = (disk.content_root.0, disk.runs.first().map(|run| run.run));
            if whole && proven.insert(key) {
                let root = check_root(inner, point, disk, options.read_data);
                findings.note(names::manifest(&point.id)?.as_str(), root)?;
            }
        }
        findings.progress.points_done += 1;
        findings.progress.packs_total = packs.len() as u64;
        findings.tell();
    }
    Ok(packs)
}

/// Reads all of a run: every entry's pack is among those that gc is told of, and holds the block in
/// the slot that the entry names.
fn scrub(inner: &Arc<Inner>, reference: &RunRef, packs: &mut BTreeSet<PackId>) -> Result<()> {
    let run = Arc::new(RunReader::open(&inner.store, &inner.sealing, reference)?);
    let listed: BTreeSet<PackId> = run.packs()?.into_iter().collect();
    packs.extend(&listed);
    let object = names::run(reference.run)?;
    scrub_run(&run, &mut |id, location| {
        if !listed.contains(&location.pack) {
            let detail = format!("it refers to pack {} without listing it", location.pack);
            return Err(Damage::new(&object, DamageKind::Inconsistent, detail).into());
        }
        match slot_holds(inner, &id, location) {
            Some(false) => {
                let detail = format!("slot {} does not hold block {id}", location.slot);
                let pack = names::pack(location.pack)?;
                Err(Damage::new(pack, DamageKind::Inconsistent, detail).into())
            }
            // A pack that cannot be read is found when packs are checked.
            Some(true) | None => Ok(()),
        }
    })
}

fn slot_holds(inner: &Inner, id: &BlockId, location: Location) -> Option<bool> {
    let toc = inner.tocs.get(inner, location.pack).ok()?;
    Some(toc.frames.get(location.slot as usize).is_some_and(|frame| &frame.id == id))
}

/// The content root from the hashes in the runs, or with `deep` from every block id.
fn check_root(inner: &Arc<Inner>, point: &Point, disk: &PointDisk, deep: bool) -> Result<()> {
    let block_size = inner.config.block_size;
    let root = if deep {
        let reader = DiskReader::open(Arc::clone(inner), disk)?;
        let mut hasher = ContentHasher::new(disk.size_bytes, block_size);
        for entry in reader.entries(BlockIndex(0)) {
            let entry = entry?;
            hasher.push(entry.index, &entry.id);
        }
        hasher.finish()
    } else {
        let view = MapView::new(&open_runs(inner, &disk.runs)?);
        let mut tree = TreeBuilder::new();
        let mut from = 0;
        while let Some(region) = view.next_region(from) {
            tree.push(REGION_LEVEL, u64::from(region), &view.node(region));
            from = region + 1;
        }
        tree.finish(disk.size_bytes, block_size)
    };
    if root == disk.content_root {
        return Ok(());
    }
    let detail = format!("disk {} has content root {root}, not {}", disk.disk, disk.content_root);
    Err(Damage::new(names::manifest(&point.id)?, DamageKind::Content, detail).into())
}

/// Which frames are to be decoded.
enum Depth {
    None,
    /// Those whose id, salted, is below this.
    Below {
        salt: [u8; 32],
        limit: u64,
    },
    All,
}

impl Depth {
    fn of(options: &CheckOptions) -> Result<Self> {
        match options.sample {
            _ if options.read_data => Ok(Self::All),
            None => Ok(Self::None),
            // Percent of 2^64; a float cast saturates.
            Some(percent) => {
                let limit = (percent / 100.0 * u64::MAX as f64) as u64;
                Ok(Self::Below { salt: random()?, limit })
            }
        }
    }

    fn wants(&self, id: &BlockId) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Below { salt, limit } => {
                let hash = blake3::keyed_hash(salt, &id.0);
                let (first, _) = hash.as_bytes().split_at(8);
                first.try_into().is_ok_and(|first| u64::from_le_bytes(first) < *limit)
            }
        }
    }
}

/// Verifies the table of each pack, and the frames that the depth asks for.
pub(super) fn check_packs(
    inner: &Inner,
    packs: &BTreeSet<PackId>,
    options: &CheckOptions,
    findings: &mut Findings<'_>,
) -> Result<()> {
    let depth = Depth::of(options)?;
    let mut unpacker = Unpacker::new(inner.sealing.hasher())?;
    for pack in packs {
        let object = names::pack(*pack)?;
        // Not from the cache: it may be older than the damage.
        let toc = PackToc::read(&*inner.store, &inner.sealing, *pack);
        if let Some(toc) = findings.note(object.as_str(), toc)? {
            let mut scrubber = FrameScrubber { inner, pack: *pack, unpacker: &mut unpacker };
            scrubber.check(&toc, &depth, findings)?;
        }
        findings.progress.packs_done += 1;
        findings.tell();
    }
    Ok(())
}

struct FrameScrubber<'a> {
    inner: &'a Inner,
    pack: PackId,
    unpacker: &'a mut Unpacker,
}

impl FrameScrubber<'_> {
    fn check(&mut self, toc: &PackToc, depth: &Depth, findings: &mut Findings<'_>) -> Result<()> {
        let object = names::pack(self.pack)?;
        let wanted: Vec<(usize, &FrameInfo)> =
            toc.frames.iter().enumerate().filter(|(_, frame)| depth.wants(&frame.id)).collect();
        let mut rest = wanted.as_slice();
        let mut buffer = Vec::new();
        while let Some((_, first)) = rest.first() {
            let start = u64::from(first.offset);
            let near = |frame: &FrameInfo| end_of(frame) - start <= READ_BYTES;
            let count = rest.iter().take_while(|(_, frame)| near(frame)).count().max(1);
            let (group, later) = rest.split_at(count);
            rest = later;
            let stop = group.last().map_or(start, |(_, frame)| end_of(frame));
            // A frame lies within a pack of at most 64 MiB, whose table was verified.
            buffer.resize((stop - start) as usize, 0);
            let read = self.inner.store.read_exact(&object, start, &mut buffer);
            if findings.note(object.as_str(), read.map_err(Into::into))?.is_none() {
                continue;
            }
            findings.progress.bytes_read += stop - start;
            for (slot, frame) in group {
                let at = (u64::from(frame.offset) - start) as usize;
                let stored = &buffer[at..at + frame.stored_bytes as usize];
                let verified = self.verify(toc, *slot, frame, stored);
                findings.note(object.as_str(), verified)?;
                findings.progress.blocks_checked += 1;
            }
            findings.tell();
        }
        Ok(())
    }

    fn verify(
        &mut self,
        toc: &PackToc,
        slot: usize,
        frame: &FrameInfo,
        stored: &[u8],
    ) -> Result<()> {
        let damaged = |kind, detail: String| -> Result<()> {
            let detail = format!("slot {slot}, block {}: {detail}", frame.id);
            Err(Damage::new(names::pack(self.pack)?, kind, detail).into())
        };
        if crc32c::crc32c(stored) != frame.crc {
            return damaged(DamageKind::Checksum, "its stored bytes changed".to_owned());
        }
        if frame.raw_bytes > self.inner.config.block_size.bytes() {
            return damaged(DamageKind::Limit, "it claims to be larger than a block".to_owned());
        }
        let mut block = vec![0; frame.raw_bytes as usize];
        // A pack has at most 65,536 slots.
        match toc.unpack(slot as u32, stored, self.unpacker, &mut block) {
            Ok(()) => Ok(()),
            Err(detail) => damaged(DamageKind::Content, detail),
        }
    }
}

fn end_of(frame: &FrameInfo) -> u64 {
    u64::from(frame.offset) + u64::from(frame.stored_bytes)
}
