//! A point being written, and its commit: packs, maps, manifest, read back, fence, receipt.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;

use crate::dedup::{DedupIndex, LazyDedup, SAVED_PACKS_MAX, SAVED_POINTS_MAX};
use crate::encoder::Encoders;
use crate::envelope::Kind;
use crate::error::{Damage, DamageKind, Error, Result};
use crate::extend::{Inherited, Own, lock_reached};
use crate::ids::{ChainId, DiskId, PackId, PointId, VmName, WriterId};
use crate::manifest::{self, Receipt};
use crate::map::{Below, MapView, RunDraft, RunReader, fold, merge_count};
use crate::names;
use crate::point::{DiskSummary, Location, Origin, Point, PointDisk, PointMeta};
use crate::reader::{open_run, open_stored_runs};
use crate::repository::{Inner, Repository, random};
use crate::session::{FinishedDisk, Session};
use crate::sink::{DiskSink, DiskStart, DiskWriter, Inheritance, Parent, ParentCursor};
use crate::store::{ObjectLock, StoreError, StoreErrorKind};
use crate::writers::{Announcement, Generation, Life, WriterRecord, accept_existing};

const DEDUP_FILE: &str = "dedup";

/// Which chain a new point belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChainChoice {
    /// It begins one.
    New,
    /// It goes on with this one.
    Existing(ChainId),
}

/// What is known of a point at its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BeginPoint {
    /// The VM.
    pub vm: VmName,
    /// Its chain.
    pub chain: ChainChoice,
    /// The wall clock.
    pub now: Timestamp,
}

/// What a new point is called, and where it comes from.
pub(crate) struct NewPoint {
    pub(crate) point: PointId,
    pub(crate) chain: ChainId,
    pub(crate) origin: Option<Origin>,
}

/// A point being written. Dropping it is [`abort`](Self::abort).
pub struct PointWriter {
    session: Arc<Session>,
    chain: ChainId,
    vm: VmName,
    origin: Option<Origin>,
    writer_id: WriterId,
    announcement: Option<Announcement>,
    /// When it began, by the clock of the store's locks.
    begun: Timestamp,
}

impl Repository {
    /// Begins a point: announces the writer, then looks at what there is.
    ///
    /// # Errors
    /// `NotFound` when the chain has no point of this VM; `ReadOnly`; the store's.
    pub fn begin_point(&self, begin: BeginPoint) -> Result<PointWriter> {
        let purpose = format!("a point of {}", begin.vm);
        self.announced(begin.vm.clone(), purpose, || self.name_point(&begin))
    }

    /// Begins a point of which `decide` says what it is called, once the writer is announced.
    pub(crate) fn announced(
        &self,
        vm: VmName,
        purpose: String,
        decide: impl FnOnce() -> Result<NewPoint>,
    ) -> Result<PointWriter> {
        self.inner.refuse_read_only("write a point")?;
        let writer_id = WriterId::from_random(u128::from_le_bytes(random()?));
        let record = WriterRecord {
            writer: writer_id.clone(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            purpose,
            life: Life::of_this_process(),
        };
        let announcement = self.inner.coordination.announce(&record)?;
        let begun = self.inner.store.lock().map_or(Timestamp::UNIX_EPOCH, ObjectLock::now);
        match decide().and_then(|new| Ok((self.session(&new.point, &announcement)?, new))) {
            Ok((session, NewPoint { chain, origin, .. })) => {
                let (session, announcement) = (Arc::new(session), Some(announcement));
                Ok(PointWriter { session, chain, vm, origin, writer_id, announcement, begun })
            }
            Err(error) => {
                end(announcement);
                Err(error)
            }
        }
    }

    /// The next id of the VM, and the chain.
    fn name_point(&self, begin: &BeginPoint) -> Result<NewPoint> {
        let newest = self.newest_of(&begin.vm, None)?;
        if let ChainChoice::Existing(chain) = &begin.chain
            && newest.as_ref().is_none_or(|newest| &newest.chain != chain)
            && self.newest_of(&begin.vm, Some(chain))?.is_none()
        {
            return Err(Error::NotFound { what: format!("chain {chain} of {}", begin.vm) });
        }
        let floor = newest.as_ref().map(|point| &point.id);
        let point = PointId::next(begin.now, floor, u32::from_le_bytes(random()?));
        let chain = match &begin.chain {
            ChainChoice::New => ChainId::from(&point),
            ChainChoice::Existing(chain) => chain.clone(),
        };
        Ok(NewPoint { point, chain, origin: None })
    }

    fn session(&self, point: &PointId, announcement: &Announcement) -> Result<Session> {
        let quarantined = self.inner.coordination.quarantined()?;
        let (inner, generation) = (Arc::clone(&self.inner), announcement.generation());
        let avoided = quarantined.clone();
        let dedup = LazyDedup::new(move || {
            let index = load_dedup(&inner, generation, &avoided).unwrap_or_else(|error| {
                tracing::warn!(%error, "the dedup cache is not used");
                DedupIndex::new()
            });
            let learnt = learn(&inner, &index, &avoided).unwrap_or_else(|error| {
                tracing::warn!(%error, "what others have stored lately is not made use of");
                false
            });
            (index, learnt)
        });
        Ok(Session::new(Arc::clone(&self.inner), point.clone(), dedup, quarantined))
    }
}

/// The dedup cache, if it is of this generation and as far as its packs are there.
fn load_dedup(
    inner: &Inner,
    generation: Generation,
    quarantined: &BTreeSet<PackId>,
) -> Result<DedupIndex> {
    let saved = inner.cache.as_ref().and_then(|cache| cache.read(Kind::DEDUP, DEDUP_FILE));
    let Some(saved) = saved else { return Ok(DedupIndex::new()) };
    let of_generation = saved
        .split_first_chunk::<8>()
        .filter(|(number, _)| Generation(u64::from_le_bytes(**number)) == generation);
    let Some((_, table)) = of_generation else { return Ok(DedupIndex::new()) };
    let loaded = DedupIndex::load(table, |pack| {
        Ok(!quarantined.contains(&pack) && inner.store.exists(&names::pack(pack)?)?)
    });
    match loaded {
        Err(Error::Damaged(_)) => Ok(DedupIndex::new()),
        other => other,
    }
}

/// Adds what the newest points have stored that this host does not know of, because others wrote them
/// or because it knows nothing; says whether there were any. The writer is announced, so what points that count refer to stays.
fn learn(inner: &Arc<Inner>, index: &DedupIndex, quarantined: &BTreeSet<PackId>) -> Result<bool> {
    let repository = Repository { inner: Arc::clone(inner) };
    let points = repository.news(SAVED_POINTS_MAX, |point| index.has_point(point))?;
    let mut packs = Vec::new();
    for point in points.iter().rev() {
        for run in point.disks.iter().filter_map(|disk| disk.runs.first()) {
            let run = open_run(inner, run);
            packs.extend(unless_damaged(run.and_then(|run| run.packs()))?.unwrap_or_default());
        }
    }
    let mut seen = BTreeSet::new();
    packs
        .retain(|pack| seen.insert(*pack) && !quarantined.contains(pack) && !index.has_pack(*pack));
    packs.truncate(SAVED_PACKS_MAX);
    // The newest last: it is forgotten last.
    for pack in packs.into_iter().rev() {
        // Its table may have been kept on this host, which says nothing of the pack.
        if !inner.store.exists(&names::pack(pack)?)? {
            continue;
        }
        let Some(toc) = unless_damaged(inner.tocs.get(inner, pack))? else { continue };
        for (slot, frame) in (0..).zip(&toc.frames) {
            index.insert(&frame.id, Location { pack, slot });
        }
    }
    points.iter().for_each(|point| index.note_point(&point.id));
    Ok(!points.is_empty())
}

/// What is damaged is of no use to a new point, and no reason not to take it.
fn unless_damaged<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Err(error) if error.damage().is_some() => Ok(None),
        other => other.map(Some),
    }
}

fn save_dedup(session: &Session, generation: Generation) {
    let Some(cache) = &session.inner.cache else { return };
    if let Some(table) = session.save_dedup() {
        let mut payload = generation.0.to_le_bytes().to_vec();
        payload.extend_from_slice(&table);
        cache.write(Kind::DEDUP, DEDUP_FILE, &payload);
    }
}

/// Takes an announcement back where no manifest can exist.
fn end(announcement: Announcement) {
    if let Err(error) = announcement.end() {
        // gc revokes a writer that is gone; nothing else is lost.
        tracing::warn!(%error, "the announcement of this writer stays until the next gc");
    }
}

impl PointWriter {
    /// The id that the point will have.
    #[must_use]
    pub fn id(&self) -> &PointId {
        &self.session.point
    }

    /// The chain that it belongs to.
    #[must_use]
    pub fn chain(&self) -> &ChainId {
        &self.chain
    }

    /// Lets the point store so many bytes of blocks; a push of more fails with `OverLimit`. Counts
    /// from the first block on, so it is said before the first disk.
    pub fn limit_stored(&self, bytes: u64) {
        self.session.allow(bytes);
    }

    /// Packs of this point that are durable.
    pub(crate) fn durable_packs(&self) -> u64 {
        self.session.durable_packs()
    }

    /// Saves what is known of durable packs, so that the writer after a death of this one need not
    /// store their blocks again, unless a gc comes between.
    pub(crate) fn remember(&self) {
        if let Some(announcement) = &self.announcement {
            save_dedup(&self.session, announcement.generation());
        }
    }

    /// Begins a disk. Several may be written at once, from several threads.
    ///
    /// # Errors
    /// `Refused` when the disk was begun before or the parent is of another chain; `NotFound` when
    /// the parent or its disk is gone; `Damaged` when the parent's map is.
    pub fn disk(&self, start: DiskStart) -> Result<DiskWriter> {
        let parent = match &start.parent {
            Some(parent) => Some(self.open_parent(parent, &start)?),
            None => None,
        };
        if !self.session.start(&start.disk) {
            return Err(Error::Refused {
                what: format!("disk {} was begun twice in point {}", start.disk, self.id()),
                advice: "name each disk once",
            });
        }
        Ok(DiskWriter {
            cursor: ParentCursor::new(Arc::clone(&self.session), parent.as_ref()),
            encoders: Encoders::new(Arc::clone(&self.session)),
            sink: DiskSink::new(Arc::clone(&self.session), start, parent)?,
        })
    }

    fn open_parent(&self, id: &PointId, start: &DiskStart) -> Result<Parent> {
        let inner = &self.session.inner;
        // Read after the announcement: gc keeps what this point refers to from now on.
        let parent = Repository { inner: Arc::clone(inner) }.point(id)?;
        if parent.chain != self.chain {
            return Err(Error::Refused {
                what: format!("point {id} is of chain {}, not of {}", parent.chain, self.chain),
                advice: "choose a parent of the same chain",
            });
        }
        let Some(held) = parent.disk(&start.disk) else {
            return Err(Error::NotFound { what: format!("disk {} in point {id}", start.disk) });
        };
        let block_size = inner.config.block_size;
        Ok(Parent {
            inheritance: Inheritance::new(block_size, start.size_bytes, held.size_bytes)?,
            references: held.runs.clone(),
            lock: parent.lock,
            runs: open_stored_runs(inner, &held.runs)?,
        })
    }

    /// Makes the point: every step is durable before the next.
    ///
    /// # Errors
    /// `CommitUnknown` when the manifest was on its way; with any other error there is no point.
    pub fn commit(mut self, meta: PointMeta) -> Result<Point> {
        let (point, manifest) = self.prepare_commit(meta)?;
        let name = names::manifest(&point.id)?;
        // From here on a drop must not take the announcement back: the manifest may be there.
        let announcement = self.announcement.take();
        if let Err(error) = self.session.inner.store.put(&name, &manifest) {
            if self.is_surely_absent(&error) {
                announcement.into_iter().for_each(end);
                return Err(error.into());
            }
            return Err(self.unknown(error.into()));
        }
        let sealed = self.seal(&point, &manifest, announcement.as_ref());
        sealed.map_err(|error| self.unknown(error))?;
        if let Some(announcement) = announcement {
            self.session.dedup.note_point(&point.id);
            save_dedup(&self.session, announcement.generation());
            end(announcement);
        }
        Ok(point)
    }

    /// Gives the point up; what was stored is garbage for gc.
    pub fn abort(self) {}

    /// Packs and maps, durable; then the manifest's bytes.
    fn prepare_commit(&self, meta: PointMeta) -> Result<(Point, Vec<u8>)> {
        self.session.check_sound()?;
        let finished = self.session.take_finished().map_err(|disk| Error::Refused {
            what: format!("disk {disk} of point {} is not finished", self.id()),
            advice: "finish or leave out every disk before the commit",
        })?;
        // Disks may have been begun in any order.
        let place = |id: &DiskId| meta.disks.iter().position(|disk| &disk.disk == id);
        let mut finished = finished;
        finished.sort_by_key(|disk| place(&disk.disk));
        let (packs, pack_bytes) = self.session.close_packs()?;
        let mut stored = Stored { objects: packs, bytes: pack_bytes };
        let parents = finished.iter().filter_map(|disk| disk.parent.as_ref());
        let inherited: Vec<Inherited> = parents
            .map(|parent| Inherited { runs: parent.references.clone(), lock: parent.lock })
            .collect();
        let disks: Result<Vec<PointDisk>> =
            finished.into_iter().map(|disk| self.store_map(disk, &mut stored)).collect();
        let disks = disks?;
        let inner = &self.session.inner;
        let own = Own { packs: self.session.own_packs(), begun: self.begun };
        let lock = lock_reached(inner, &disks, &inherited, own)?;
        let point = Point { lock, ..self.describe(meta, disks, stored) };
        let block_size = inner.config.block_size;
        let parts = &point.meta.parts;
        let manifest = manifest::encode(&inner.sealing, block_size, &point, parts)?;
        Ok((point, manifest))
    }

    fn describe(&self, meta: PointMeta, disks: Vec<PointDisk>, stored: Stored) -> Point {
        Point {
            id: self.id().clone(),
            vm: self.vm.clone(),
            chain: self.chain.clone(),
            parent: disks.iter().filter_map(|disk| disk.parent.clone()).max(),
            writer_id: self.writer_id.clone(),
            origin: self.origin.clone(),
            parts: manifest::describe_parts(&meta.parts),
            new_bytes: disks.iter().map(|disk| disk.summary.new_bytes).sum(),
            stored_bytes: stored.bytes,
            lock: None,
            // The manifest and its receipt.
            object_count: stored.objects + 2,
            meta,
            disks,
        }
    }

    /// Stores the map of one disk, folding small runs together.
    fn store_map(&self, finished: FinishedDisk, stored: &mut Stored) -> Result<PointDisk> {
        let FinishedDisk { disk, size_bytes, parent_id, parent, run, summary } = finished;
        let (references, readers) =
            parent.map_or_else(Default::default, |parent| (parent.references, parent.runs));
        let mut map_bytes = 0;
        let runs = if run.is_empty() {
            references
        } else {
            let mut write = |draft: &RunDraft| {
                stored.count(draft);
                map_bytes += draft.reference.bytes;
                draft.store(&*self.session.inner.store)
            };
            let draft = run.finish()?;
            let bytes: Vec<u64> = references.iter().map(|run| run.bytes).collect();
            let swallowed = merge_count(draft.reference.bytes, &bytes);
            let (folded, kept) = (&readers[..swallowed], &references[swallowed..]);
            let newest = if swallowed == 0 {
                write(&draft)?;
                Some(draft.reference)
            } else {
                let below = if kept.is_empty() { Below::Nothing } else { Below::Older };
                let folded = self.fold(&draft, folded, below)?;
                folded.iter().try_for_each(&mut write)?;
                draft.discard();
                folded.map(|folded| folded.reference)
            };
            newest.into_iter().chain(kept.iter().cloned()).collect()
        };
        let summary = DiskSummary { map_bytes, ..summary };
        let content_root = summary.content_root;
        Ok(PointDisk { disk, size_bytes, parent: parent_id, content_root, runs, summary })
    }

    /// One run that says what `draft` over `older` says; none when that is nothing.
    fn fold(
        &self,
        draft: &RunDraft,
        older: &[Arc<RunReader>],
        below: Below,
    ) -> Result<Option<RunDraft>> {
        let sealing = &self.session.inner.sealing;
        let newest = RunReader::of(draft.source.clone(), sealing, &draft.reference)?;
        let runs: Vec<_> = std::iter::once(Arc::new(newest)).chain(older.iter().cloned()).collect();
        let mut writer = self.session.run_writer()?;
        fold(&mut MapView::new(&runs), below, &mut writer)?;
        if writer.is_empty() { Ok(None) } else { writer.finish().map(Some) }
    }

    /// Reads the manifest back, looks for a fence, leaves the receipt.
    fn seal(&self, point: &Point, manifest: &[u8], standing: Option<&Announcement>) -> Result<()> {
        let inner = &self.session.inner;
        if inner.manifest_bytes(&point.id)? != manifest {
            let detail = "what was read back is not what was written";
            let name = names::manifest(&point.id)?;
            return Err(Damage::new(name, DamageKind::Checksum, detail).into());
        }
        if let Some(announcement) = standing {
            announcement.must_stand(&point.id)?;
        }
        let receipt = Receipt::of(point, manifest).encode(&inner.sealing)?;
        let stored = inner.store.put(&names::receipt(&point.id)?, &receipt);
        // A gc that gave this writer up since has left the same one.
        accept_existing(stored.map_err(Error::from))
    }

    /// Whether a failed manifest is known not to exist: the device itself refused it, for a reason
    /// that leaves nothing under way, and it is not there.
    fn is_surely_absent(&self, error: &StoreError) -> bool {
        let refused = matches!(
            error.kind(),
            StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly | StoreErrorKind::Permission
        );
        let store = &self.session.inner.store;
        refused
            && names::manifest(self.id())
                .is_ok_and(|name| store.exists(&name).is_ok_and(|exists| !exists))
    }

    fn unknown(&self, source: Error) -> Error {
        Error::CommitUnknown { point: self.id().clone(), source: Box::new(source) }
    }
}

impl Drop for PointWriter {
    fn drop(&mut self) {
        self.announcement.take().into_iter().for_each(end);
    }
}

/// Objects and bytes written for a point.
struct Stored {
    objects: u64,
    bytes: u64,
}

impl Stored {
    fn count(&mut self, draft: &RunDraft) {
        self.objects += 1;
        self.bytes += draft.reference.bytes;
    }
}
