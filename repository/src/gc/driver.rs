//! The steps of one gc, in the order that makes it safe beside writers, deletions and other gcs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::plan::{Condemned, DataObject, FirstLook, is_doomed};
use super::{GcOptions, GcReport};
use crate::error::{Error, Result};
use crate::ids::{PackId, PointId, WriterId};
use crate::names;
use crate::point::RunRef;
use crate::store::{ObjectName, Store};
use crate::writers::{Coordination, Life, PointStanding, Standing, Watch, accept_existing};

/// How long gc lies still between two looks at the heartbeats.
const WATCH_PERIOD: Duration = Duration::from_secs(1);

/// What gc must know of a manifest.
#[derive(Debug, Clone)]
pub(crate) struct ManifestFacts {
    pub(crate) writer: WriterId,
    pub(crate) runs: Vec<RunRef>,
}

/// Reading the objects that gc follows. What is not there is an error; what is damaged too: gc
/// deletes nothing as long as it cannot tell what is reachable.
pub(crate) trait Contents {
    fn manifest(&self, point: &PointId) -> Result<ManifestFacts>;
    fn packs(&self, run: &RunRef) -> Result<Vec<PackId>>;
    /// Until when a point is locked, if it still is.
    fn locked_until(&self, point: &PointId) -> Result<Option<Timestamp>>;
    /// Writes the receipt of a committed point whose writer died before it did; one that is there
    /// already is as good.
    fn complete_receipt(&self, point: &PointId) -> Result<()>;
}

/// Time as gc needs it: how long it has been running, and a way to let time pass.
pub trait Pace {
    /// Time since the beginning, by a clock that never jumps.
    fn elapsed(&self) -> Duration;
    /// Lies still for a while.
    fn pause(&mut self, duration: Duration);
}

/// The machine's monotonic clock.
#[derive(Debug)]
pub struct RealPace(Instant);

impl RealPace {
    /// Begins now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Pace for RealPace {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    fn pause(&mut self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// What there is of points. The fields were read in the order in which they stand here.
struct Seen {
    receipts: BTreeSet<PointId>,
    /// Manifests that are there, and how each counts.
    manifests: BTreeMap<PointId, PointStanding>,
    standing: Standing,
}

/// One gc under way.
pub(crate) struct Collector<'a> {
    pub(crate) store: &'a dyn Store,
    pub(crate) coordination: &'a Coordination,
    pub(crate) contents: &'a dyn Contents,
    pub(crate) pace: &'a mut dyn Pace,
    pub(crate) options: &'a GcOptions,
}

impl Collector<'_> {
    pub(crate) fn run(mut self) -> Result<GcReport> {
        let leftovers = self.store.leftovers()?;
        let first = self.first_look()?;
        let reachable = self.reached_by(first.roots())?;
        let mut condemned = first.condemn(&reachable);
        if self.options.dry_run {
            return Ok(report(&first, &condemned));
        }
        if !condemned.is_empty() {
            self.coordination.with_room(|| self.coordination.next_generation())?;
        }
        let revoked = self.await_writers(&condemned)?;
        let verdicts_on_record = self.judge_all()?;
        let now = self.look_at_points()?.manifests;
        let newcomers: Vec<_> = Condemned::newcomers(&first, &now).collect();
        let reached_since = self.reached_by(newcomers.into_iter())?;
        condemned.acquit(&reached_since);
        let receipts_completed = self.complete_receipts(&verdicts_on_record)?;
        let kept = self.delete(&condemned)?;
        let objects_locked = condemned.spare(&kept)?;
        self.store.remove_leftovers(&leftovers)?;
        self.forget_revoked()?;
        self.forget_damaged(&[reachable, reached_since])?;
        self.coordination.forget_services()?;
        self.coordination.refill_reserve()?;
        let counted = report(&first, &condemned);
        let (writers_revoked, leftovers_removed) = (revoked, leftovers.len() as u64);
        Ok(GcReport {
            writers_revoked,
            leftovers_removed,
            receipts_completed,
            objects_locked,
            ..counted
        })
    }

    /// The order of these listings matters: an object whose manifest is not in the listing of
    /// manifests is not condemned unless its writer was announced before.
    fn first_look(&self) -> Result<FirstLook> {
        let buried_before = self.coordination.standing()?.deleted().clone();
        let mut objects = BTreeMap::new();
        for prefix in [names::PACKS, names::RUNS] {
            for entry in self.store.list(prefix)? {
                if let Some(object) = DataObject::from_name(&entry.name) {
                    objects.insert(object, entry.bytes);
                }
            }
        }
        let Seen { receipts, manifests, standing } = self.look_at_points()?;
        let deleted = standing.deleted().clone();
        let locked = self.locked(&manifests)?;
        Ok(FirstLook { buried_before, objects, receipts, manifests, locked, deleted })
    }

    /// Of points that would go, those that may not yet.
    fn locked(&self, manifests: &BTreeMap<PointId, PointStanding>) -> Result<BTreeSet<PointId>> {
        let mut locked = BTreeSet::new();
        for (point, _) in manifests.iter().filter(|(_, standing)| is_doomed(**standing)) {
            if self.contents.locked_until(point)?.is_some() {
                locked.insert(point.clone());
            }
        }
        Ok(locked)
    }

    fn look_at_points(&self) -> Result<Seen> {
        // A receipt is later than its manifest and is listed earlier.
        let receipts: BTreeSet<_> = self.points_in(names::RECEIPTS)?.into_iter().collect();
        let points = self.points_in(names::POINTS)?;
        // Conclusions are drawn from what others wrote, so it must not be lost to a power cut.
        self.store.settle(names::POINTS)?;
        self.coordination.settle()?;
        let standing = self.coordination.standing()?;
        let listed: BTreeSet<&PointId> = points.iter().collect();
        let unlisted = receipts.iter().filter(|point| !listed.contains(point));
        for point in unlisted.filter(|point| !standing.is_deleted(point)) {
            self.must_be_absent(point)?;
        }
        let mut manifests = BTreeMap::new();
        for point in points {
            if let Some(counts) = self.standing_of(&point, &standing)? {
                manifests.insert(point, counts);
            }
        }
        Ok(Seen { receipts, manifests, standing })
    }

    /// A point that is not listed and is there would be taken for none, and its packs for garbage.
    fn must_be_absent(&self, point: &PointId) -> Result<()> {
        if !self.store.exists(&names::manifest(point)?)? {
            return Ok(());
        }
        Err(Error::Refused {
            what: format!(
                "{} does not list point {point}, which is there: its listings are old; nothing deleted",
                self.store.location()
            ),
            advice: "run gc again later; if it stays, this store is not fit for a repository",
        })
    }

    /// None when another gc has removed the manifest meanwhile.
    fn standing_of(&self, point: &PointId, all: &Standing) -> Result<Option<PointStanding>> {
        if all.is_deleted(point) {
            // A deleted point may well be a damaged one; its manifest is not needed any more.
            return Ok(Some(PointStanding::Deleted));
        }
        let facts = self.unless_removed(point, self.contents.manifest(point))?;
        Ok(facts.map(|facts| all.of(point, &facts.writer)))
    }

    /// Lets a manifest be missing if it really is.
    fn unless_removed<T>(&self, point: &PointId, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(facts) => Ok(Some(facts)),
            Err(error) => {
                let gone = !self.store.exists(&names::manifest(point)?)?;
                if gone { Ok(None) } else { Err(error) }
            }
        }
    }

    fn points_in(&self, prefix: &str) -> Result<Vec<PointId>> {
        let entries = self.store.list(prefix)?;
        Ok(entries.iter().filter_map(|entry| entry.name.last_part().parse().ok()).collect())
    }

    fn reached_by<'p>(
        &self,
        points: impl Iterator<Item = &'p PointId>,
    ) -> Result<BTreeSet<DataObject>> {
        let mut reached = BTreeSet::new();
        for point in points {
            let followed = self.follow(point, &mut reached);
            self.unless_removed(point, followed)?;
        }
        Ok(reached)
    }

    fn follow(&self, point: &PointId, reached: &mut BTreeSet<DataObject>) -> Result<()> {
        for run in self.contents.manifest(point)?.runs {
            if reached.contains(&DataObject::Run(run.run)) {
                continue;
            }
            reached.extend(self.contents.packs(&run)?.into_iter().map(DataObject::Pack));
            // Last, so that a run whose packs could not be read does not count as followed.
            reached.insert(DataObject::Run(run.run));
        }
        Ok(())
    }

    /// Waits until every writer announced by now has ended or is revoked; tells how many were.
    fn await_writers(&mut self, condemned: &Condemned) -> Result<u64> {
        let begun = self.pace.elapsed();
        let mut watch = Watch::new(self.coordination.writers()?, self.options.patience);
        let mut revoked = 0;
        loop {
            let waited = self.pace.elapsed().saturating_sub(begun);
            let announced = self.coordination.writers()?;
            let seen = watch.observe(waited, &announced, &self.coordination.beats()?);
            let killed = seen.alive.iter().filter(|writer| self.was_killed_here(writer));
            for writer in seen.silent.iter().chain(killed) {
                self.coordination.fence(writer)?;
                watch.forget(writer);
                revoked += 1;
            }
            // With nothing condemned the wait only serves to find the dead.
            let enough = condemned.is_empty() && waited >= self.options.patience;
            if watch.is_done() || enough {
                return Ok(revoked);
            }
            if waited >= self.options.wait_max {
                return Err(self.busy(&seen.alive, waited));
            }
            self.pace.pause(WATCH_PERIOD);
        }
    }

    fn was_killed_here(&self, writer: &WriterId) -> bool {
        let record = self.coordination.writer_record(writer);
        let life = record.ok().and_then(|record| record.life);
        life.zip(Life::of_this_process()).is_some_and(|(life, here)| life.has_ended(&here))
    }

    fn busy(&self, alive: &[WriterId], waited: Duration) -> Error {
        let describe = |writer: &WriterId| match self.coordination.writer_record(writer) {
            Ok(record) => format!("{} on {:?} ({writer})", record.purpose, record.host),
            Err(_) => writer.to_string(),
        };
        let writers: Vec<_> = alive.iter().map(describe).collect();
        let (seconds, writers) = (waited.as_secs(), writers.join(", "));
        Error::Refused {
            what: format!("after {seconds} s of waiting still at work: {writers}; nothing deleted"),
            advice: "run gc again when they are done",
        }
    }

    /// Gives every fenced writer its verdict, also those that a gc which died had fenced, and
    /// returns what these verdicts keep.
    fn judge_all(&self) -> Result<BTreeSet<PointId>> {
        let announced: BTreeSet<_> = self.coordination.writers()?.into_iter().collect();
        let mut kept = BTreeSet::new();
        let undecided = self.coordination.standing()?;
        // One that ended between its last look for a fence and the fence is announced no more, and
        // its point was reported.
        let fenced: Vec<_> = undecided
            .revoked_writers()
            .filter(|writer| announced.contains(*writer) || !undecided.is_judged(writer))
            .collect();
        if fenced.is_empty() {
            return Ok(kept);
        }
        // Listed after the fences were durable, as a verdict must be.
        let mut found: BTreeMap<WriterId, BTreeSet<PointId>> = BTreeMap::new();
        let mut points: BTreeSet<_> = self.points_in(names::POINTS)?.into_iter().collect();
        // A verdict is final: it must not miss a point that a listing is late with.
        points.extend(self.points_in(names::RECEIPTS)?);
        for point in points {
            if !undecided.is_deleted(&point)
                && let Some(facts) = self.unless_removed(&point, self.contents.manifest(&point))?
            {
                found.entry(facts.writer).or_default().insert(point);
            }
        }
        self.store.settle(names::POINTS)?;
        for writer in fenced {
            let theirs = found.remove(writer).unwrap_or_default();
            kept.extend(self.coordination.judge(writer, &theirs)?);
        }
        Ok(kept)
    }

    fn complete_receipts(&self, points: &BTreeSet<PointId>) -> Result<u64> {
        let standing = self.coordination.standing()?;
        let mut completed = 0;
        for point in points.iter().filter(|point| !standing.is_deleted(point)) {
            if self.store.exists(&names::receipt(point)?)? {
                continue;
            }
            accept_existing(self.coordination.with_room(|| self.contents.complete_receipt(point)))?;
            completed += 1;
        }
        Ok(completed)
    }

    /// Each line is durable before the next: a manifest is gone before anything it reaches is, a
    /// receipt never without its tombstone or its manifest. Returns what the store did not delete,
    /// since locks keep it.
    fn delete(&self, condemned: &Condemned) -> Result<BTreeSet<ObjectName>> {
        let mut kept = BTreeSet::new();
        for names in [
            all_names(&condemned.manifests, names::manifest)?,
            all_names(&condemned.receipts, names::receipt)?,
            all_names(&condemned.objects, |object| object.name())?,
        ] {
            match self.store.lock() {
                Some(lock) => kept.extend(lock.delete_unlocked(&names)?),
                None => self.store.delete(&names)?,
            }
        }
        self.coordination.forget_points(&condemned.husks)?;
        Ok(kept)
    }

    /// Takes the announcements of judged writers away; fence and verdict stay, for a suspended
    /// writer may come back in a year.
    fn forget_revoked(&self) -> Result<()> {
        let standing = self.coordination.standing()?;
        for writer in self.coordination.writers()? {
            if standing.is_judged(&writer) {
                self.coordination.forget_writer(&writer)?;
            }
        }
        Ok(())
    }

    /// Damaged packs that nothing reaches are as good as gone. One that is missing stays marked as
    /// long as a point needs it: a backup must not take its blocks for stored.
    fn forget_damaged(&self, reached: &[BTreeSet<DataObject>]) -> Result<()> {
        let is_needed = |pack: &PackId| {
            reached.iter().any(|reached| reached.contains(&DataObject::Pack(*pack)))
        };
        let marked = self.coordination.quarantined()?;
        self.coordination.release(marked.into_iter().filter(|pack| !is_needed(pack)))
    }
}

fn all_names<T>(
    items: &BTreeSet<T>,
    name: impl Fn(&T) -> Result<ObjectName>,
) -> Result<Vec<ObjectName>> {
    items.iter().map(name).collect()
}

fn report(first: &FirstLook, condemned: &Condemned) -> GcReport {
    let of_kind = |pack| {
        let kind = condemned.objects.iter().filter(|o| matches!(o, DataObject::Pack(_)) == pack);
        kind.count() as u64
    };
    GcReport {
        points_removed: condemned.receipts.len() as u64,
        points_locked: first.locked.len() as u64,
        packs_deleted: of_kind(true),
        runs_deleted: of_kind(false),
        bytes_freed: condemned.objects.iter().filter_map(|o| first.objects.get(o)).sum(),
        ..GcReport::default()
    }
}
