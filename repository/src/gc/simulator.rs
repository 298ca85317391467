//! A seeded simulator: writers, deletions, readers and two gcs, interleaved at every store call by a
//! scheduler that also suspends them for long. The coordination and the gc are the real ones; points
//! are models (a run is the list of its packs). It asserts I8.
//!
//! `ICECORE_SIM_SEED=n` runs one seed, `ICECORE_SIM_SEEDS=n` that many.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::driver::{Collector, Contents, ManifestFacts, Pace};
use super::plan::DataObject;
use super::{GcOptions, GcReport};
use crate::error::{Error, Result};
use crate::ids::{Checksum, PackId, PointId, RepositoryId, RunId, WriterId};
use crate::names;
use crate::point::RunRef;
use crate::sealing::Sealing;
use crate::store::{
    Access, DirectoryStore, ObjectEntry, ObjectName, ObjectWriter, SimFileSystem, Store, StoreError,
};
use crate::writers::{Coordination, Generation, Wish, WriterRecord};

const SEEDS: u64 = 150;
const PATIENCE: Duration = Duration::from_secs(6);

#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed ^ (mixed >> 33)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap()
    }

    fn bytes(&mut self) -> [u8; 16] {
        (u128::from(self.next()) << 64 | u128::from(self.next())).to_le_bytes()
    }
}

/// Lets exactly one actor run between two store calls, chosen by the seed.
struct Turnstile {
    state: Mutex<Turns>,
    changed: Condvar,
}

struct Turns {
    live: BTreeSet<usize>,
    waiting: BTreeSet<usize>,
    granted: Option<usize>,
    // Actor and the number of turns for which it is not chosen, as if its host were stopped.
    suspended: Option<(usize, usize)>,
    random: Random,
}

impl Turns {
    fn choose(&mut self) {
        if self.granted.is_some() || self.waiting.is_empty() || self.waiting.len() < self.live.len()
        {
            return;
        }
        if self.suspended.is_none() && self.random.below(30) == 0 {
            let waiting: Vec<_> = self.waiting.iter().copied().collect();
            let victim = waiting[self.random.below(waiting.len())];
            self.suspended = Some((victim, 20 + self.random.below(400)));
        }
        let able: Vec<_> = self
            .waiting
            .iter()
            .copied()
            .filter(|actor| self.suspended.is_none_or(|(victim, _)| victim != *actor))
            .collect();
        self.suspended = match self.suspended {
            Some((victim, turns)) if turns > 0 && !able.is_empty() => Some((victim, turns - 1)),
            _ => None,
        };
        let able = if able.is_empty() { self.waiting.iter().copied().collect() } else { able };
        self.granted = Some(able[self.random.below(able.len())]);
    }
}

impl Turnstile {
    fn new(actors: usize, seed: u64) -> Self {
        let state = Turns {
            live: (0..actors).collect(),
            waiting: BTreeSet::new(),
            granted: None,
            suspended: None,
            random: Random(seed),
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn pass(&self, actor: usize) {
        let mut turns = self.state.lock().unwrap();
        turns.waiting.insert(actor);
        turns.choose();
        self.changed.notify_all();
        while turns.granted != Some(actor) {
            turns = self.changed.wait(turns).unwrap();
        }
        turns.granted = None;
        turns.waiting.remove(&actor);
    }

    fn leave(&self, actor: usize) {
        let mut turns = self.state.lock().unwrap();
        turns.live.remove(&actor);
        turns.choose();
        self.changed.notify_all();
    }
}

/// A store whose every call waits for the actor's turn.
#[derive(Clone)]
struct Turned {
    inner: Arc<DirectoryStore>,
    turnstile: Arc<Turnstile>,
    actor: usize,
}

impl std::fmt::Debug for Turned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "actor {}", self.actor)
    }
}

impl Turned {
    fn turn(&self) -> &DirectoryStore {
        self.turnstile.pass(self.actor);
        &self.inner
    }
}

struct TurnedWriter(Turned, Box<dyn ObjectWriter>);

impl ObjectWriter for TurnedWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.1.write(bytes)
    }

    fn finish(self: Box<Self>) -> Result<u64, StoreError> {
        self.0.turn();
        self.1.finish()
    }
}

impl Store for Turned {
    fn location(&self) -> &str {
        self.inner.location()
    }
    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        Ok(Box::new(TurnedWriter(self.clone(), self.turn().create(name)?)))
    }
    fn read_exact(&self, name: &ObjectName, at: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.turn().read_exact(name, at, buffer)
    }
    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.turn().len(name)
    }
    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.turn().list(prefix)
    }
    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        // One by one, so that others run in between.
        names.iter().try_for_each(|name| self.turn().delete(std::slice::from_ref(name)))
    }
    fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.inner.settle(prefix)
    }
    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        self.turn().leftovers()
    }
    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        self.turn().remove_leftovers(leftovers)
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Manifest {
    writer: WriterId,
    runs: Vec<RunId>,
}

/// One host's view of the model repository.
struct Host {
    store: Arc<dyn Store>,
    coordination: Coordination,
    random: Random,
}

impl Host {
    fn new(store: Arc<dyn Store>, seed: u64) -> Self {
        let sealing = Sealing::plain(RepositoryId::from_random(1));
        let coordination = Coordination::new(Arc::clone(&store), sealing);
        Self { store, coordination, random: Random(seed) }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &ObjectName) -> Result<T> {
        Ok(serde_json::from_slice(&self.store.read(name, 1 << 20)?).unwrap())
    }

    fn put(&self, name: &ObjectName, value: &impl serde::Serialize) -> Result<()> {
        Ok(self.store.put(name, &serde_json::to_vec(value).unwrap())?)
    }

    /// Visible points, as every reader and writer finds them: manifests first, standing after.
    fn visible(&self) -> Result<BTreeMap<PointId, Manifest>> {
        let mut manifests = BTreeMap::new();
        for entry in self.store.list(names::POINTS)? {
            match self.json(&entry.name) {
                Ok(manifest) => {
                    manifests.insert(entry.name.last_part().parse().unwrap(), manifest);
                }
                Err(Error::Store(error)) if error.is_not_found() => (),
                Err(error) => return Err(error),
            }
        }
        let standing = self.coordination.standing()?;
        manifests.retain(|point, manifest: &mut Manifest| standing.sees(point, &manifest.writer));
        Ok(manifests)
    }

    fn missing(&self, manifest: &Manifest) -> Result<Option<DataObject>> {
        for &run in &manifest.runs {
            let object = DataObject::Run(run);
            let packs = match self.json::<Vec<PackId>>(&object.name()?) {
                Ok(packs) => packs,
                Err(_) => return Ok(Some(object)),
            };
            for object in packs.into_iter().map(DataObject::Pack) {
                if !self.store.exists(&object.name()?)? {
                    return Ok(Some(object));
                }
            }
        }
        Ok(None)
    }

    /// I8 for a reader: what is missing of a visible point is so because the point was deleted since.
    fn read_one(&mut self) -> Result<()> {
        let visible = self.visible()?;
        let Some((point, manifest)) = self.pick(visible) else { return Ok(()) };
        if let Some(object) = self.missing(&manifest)? {
            assert!(!self.visible()?.contains_key(&point), "{point} lacks {object:?}");
        }
        Ok(())
    }

    fn packs_of(&self, run: RunId) -> Result<Vec<PackId>> {
        self.json(&names::run(run)?)
    }

    fn pick<K: Ord, V>(&mut self, map: BTreeMap<K, V>) -> Option<(K, V)> {
        let chosen = self.random.below(map.len());
        map.into_iter().nth(chosen)
    }
}

impl Contents for Host {
    fn locked_until(&self, _point: &PointId) -> Result<Option<jiff::Timestamp>> {
        Ok(None)
    }

    fn manifest(&self, point: &PointId) -> Result<ManifestFacts> {
        let manifest: Manifest = self.json(&names::manifest(point)?)?;
        let refer = |run| RunRef { run, bytes: 0, entries: 0, trailer: Checksum([0; 32]) };
        let runs = manifest.runs.into_iter().map(refer).collect();
        Ok(ManifestFacts { writer: manifest.writer, runs })
    }

    fn packs(&self, run: &RunRef) -> Result<Vec<PackId>> {
        self.packs_of(run.run)
    }

    fn complete_receipt(&self, point: &PointId) -> Result<()> {
        self.put(&names::receipt(point)?, point)
    }
}

/// What a host remembers between its writers: packs, and the generation in which it learned them.
#[derive(Default)]
struct Cache {
    generation: Generation,
    packs: BTreeSet<PackId>,
}

/// Takes one point, or dies somewhere in it. `Ok(Some)` is a reported success.
fn write_point(host: &mut Host, cache: &mut Cache) -> Result<Option<PointId>> {
    let writer = WriterId::from_random(u128::from_le_bytes(host.random.bytes()));
    let record =
        WriterRecord { writer: writer.clone(), host: "h".into(), purpose: "p".into(), life: None };
    let announced = host.coordination.announce(&record)?;
    let mut beat = 0;
    let mut alive = |host: &mut Host| -> Result<bool> {
        host.coordination.beat(&writer, beat)?;
        beat += 1;
        Ok(host.random.below(40) > 0)
    };
    if cache.generation != announced.generation() {
        *cache = Cache { generation: announced.generation(), ..Cache::default() };
    }
    let present: BTreeSet<_> =
        host.store.list(names::PACKS)?.iter().map(|e| e.name.last_part().to_owned()).collect();
    let visible = host.visible()?;
    let mut runs = Vec::new();
    if let Some((_, parent)) = host.pick(visible) {
        for &run in &parent.runs {
            cache.packs.extend(host.packs_of(run)?);
        }
        runs.extend(parent.runs.into_iter().take(2));
    }
    if !alive(host)? {
        return Ok(None);
    }
    let reusable: Vec<_> =
        cache.packs.iter().copied().filter(|id| present.contains(&id.to_string())).collect();
    let mut packs: Vec<PackId> =
        reusable.into_iter().filter(|_| host.random.below(2) == 0).collect();
    for _ in 0..1 + host.random.below(2) {
        let pack = PackId(host.random.bytes());
        host.store.put(&names::pack(pack)?, b"blocks")?;
        packs.push(pack);
        if !alive(host)? {
            return Ok(None);
        }
    }
    let run = RunId(host.random.bytes());
    host.put(&names::run(run)?, &packs)?;
    runs.insert(0, run);
    let number = u32::try_from(host.random.below(1 << 25)).unwrap();
    let millis = i64::try_from(host.random.below(1 << 20)).unwrap();
    let now = jiff::Timestamp::from_millisecond(millis).unwrap();
    let point = PointId::next(now, None, number);
    if !alive(host)? {
        return Ok(None);
    }
    host.put(&names::manifest(&point)?, &Manifest { writer, runs })?;
    cache.packs.extend(packs);
    match announced.must_stand(&point) {
        Err(Error::Revoked { .. }) => return Ok(None),
        other => other?,
    }
    if host.random.below(10) > 0 {
        match host.put(&names::receipt(&point)?, &point) {
            Err(Error::Store(error)) if error.already_exists() => (),
            other => other?,
        }
        announced.end()?;
    }
    Ok(Some(point))
}

/// Virtual time: it passes only while a gc lies still.
struct TurnedPace(Turned, Duration);

impl Pace for TurnedPace {
    fn elapsed(&self) -> Duration {
        self.1
    }

    fn pause(&mut self, duration: Duration) {
        self.1 += duration;
        // Long enough for others to beat in between.
        for _ in 0..20 {
            self.0.turnstile.pass(self.0.actor);
        }
    }
}

fn collect(host: &Host, pace: &mut dyn Pace) -> Result<GcReport> {
    let wait_max = Duration::from_secs(3600);
    let options = GcOptions { dry_run: false, patience: PATIENCE, wait_max };
    let (store, coordination) = (host.store.as_ref(), &host.coordination);
    Collector { store, coordination, contents: host, pace, options: &options }.run()
}

#[derive(Default)]
struct Outcomes {
    committed: BTreeSet<PointId>,
    deleted: BTreeSet<PointId>,
    protected: BTreeSet<PointId>,
    revoked: u64,
    freed: u64,
}

fn act(actor: usize, mut host: Host, store: &Turned, outcomes: &Mutex<Outcomes>) -> Result<()> {
    match actor {
        0..3 => {
            let mut cache = Cache::default();
            for _ in 0..6 {
                // Without the object of a revoked or deleted parent the backup just fails.
                if let Ok(Some(point)) = write_point(&mut host, &mut cache) {
                    outcomes.lock().unwrap().committed.insert(point);
                }
            }
        }
        3..5 => {
            for _ in 0..3 {
                let report = collect(&host, &mut TurnedPace(store.clone(), Duration::ZERO))?;
                let mut outcomes = outcomes.lock().unwrap();
                outcomes.revoked += report.writers_revoked;
                outcomes.freed += report.packs_deleted;
            }
        }
        5 => {
            for _ in 0..16 {
                let visible = host.visible()?;
                let Some((point, _)) = host.pick(visible) else { continue };
                if host.random.below(8) == 0 {
                    if host.coordination.wish(&point, Wish::Protect).is_ok() {
                        outcomes.lock().unwrap().protected.insert(point);
                    }
                } else if host.coordination.wish(&point, Wish::Delete).is_ok() {
                    outcomes.lock().unwrap().deleted.insert(point);
                }
            }
        }
        _ => (0..12).try_for_each(|_| host.read_one())?,
    }
    Ok(())
}

struct InstantPace(Duration);

impl Pace for InstantPace {
    fn elapsed(&self) -> Duration {
        self.0
    }
    fn pause(&mut self, duration: Duration) {
        self.0 += duration;
    }
}

const ACTORS: usize = 7;

fn simulate(seed: u64) -> Outcomes {
    let fs = Arc::new(SimFileSystem::new());
    let inner = Arc::new(DirectoryStore::on(fs, "sim", Access::ReadWrite));
    let turnstile = Arc::new(Turnstile::new(ACTORS, seed));
    let outcomes = Mutex::new(Outcomes::default());
    std::thread::scope(|scope| {
        for actor in 0..ACTORS {
            let (inner, turnstile, outcomes) = (inner.clone(), turnstile.clone(), &outcomes);
            scope.spawn(move || {
                let store = Turned { inner, turnstile: turnstile.clone(), actor };
                let leaving = Leaving(&turnstile, actor);
                let host = Host::new(Arc::new(store.clone()), seed ^ (actor as u64 + 1) << 40);
                act(actor, host, &store, outcomes).unwrap();
                drop(leaving);
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    assert_quiescent(&Host::new(inner, seed), &outcomes);
    outcomes
}

/// Lets the others go on when an actor ends or panics.
struct Leaving<'a>(&'a Turnstile, usize);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

/// When all is over: what was reported is there, what is visible is whole, and gc leaves no rest.
fn assert_quiescent(host: &Host, outcomes: &Outcomes) {
    let visible = host.visible().unwrap();
    for (point, manifest) in &visible {
        assert_eq!(host.missing(manifest).unwrap(), None, "{point}");
        assert!(!outcomes.deleted.contains(point), "{point} came back");
    }
    for point in outcomes.committed.difference(&outcomes.deleted) {
        assert!(visible.contains_key(point), "{point} was reported and is gone");
    }
    assert!(outcomes.protected.is_disjoint(&outcomes.deleted));
    for _ in 0..3 {
        collect(host, &mut InstantPace(Duration::ZERO)).unwrap();
    }
    let mut expected = BTreeSet::new();
    for point in host.visible().unwrap().keys() {
        assert!(host.store.exists(&names::receipt(point).unwrap()).unwrap(), "{point}");
        for run in host.manifest(point).unwrap().runs {
            expected.insert(DataObject::Run(run.run));
            expected.extend(host.packs(&run).unwrap().into_iter().map(DataObject::Pack));
        }
    }
    let all = host.store.list("").unwrap();
    let left: BTreeSet<_> = all.iter().filter_map(|e| DataObject::from_name(&e.name)).collect();
    assert_eq!(left, expected);
    assert!(host.store.list(crate::writers::WRITERS).unwrap().is_empty());
    assert_eq!(host.store.list(names::POINTS).unwrap().len(), visible.len());
    assert_eq!(host.store.list(names::RECEIPTS).unwrap().len(), visible.len());
}

/// A writer killed on this host is given up at once; of one elsewhere gc waits out the patience.
#[test]
fn a_writer_killed_on_this_host_is_not_waited_for() {
    use crate::writers::Life;
    let fs = Arc::new(SimFileSystem::new());
    let inner = Arc::new(DirectoryStore::on(fs, "sim", Access::ReadWrite));
    let host = Host::new(inner, 1);
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let announce = |number, life| {
        let writer = WriterId::from_random(number);
        let record = WriterRecord { writer, host: "h".into(), purpose: "p".into(), life };
        drop(host.coordination.announce(&record).unwrap());
    };
    let waited = || {
        let mut pace = InstantPace(Duration::ZERO);
        assert_eq!(collect(&host, &mut pace).unwrap().writers_revoked, 1);
        pace.0
    };
    announce(1, Life::of(child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(waited(), Duration::ZERO);
    announce(2, Life::of_this_process());
    assert_eq!(waited(), PATIENCE);
    announce(3, None);
    assert_eq!(waited(), PATIENCE);
}

#[test]
fn nothing_reachable_is_ever_deleted() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("ICECORE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("ICECORE_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let (mut committed, mut deleted, mut revoked, mut freed) = (0, 0, 0, 0);
    let many = seeds.clone().count() > 1;
    for seed in seeds {
        eprintln!("ICECORE_SIM_SEED={seed}");
        let outcomes = simulate(seed);
        committed += outcomes.committed.len();
        deleted += outcomes.deleted.len();
        revoked += outcomes.revoked;
        freed += outcomes.freed;
    }
    eprintln!("{committed} committed, {deleted} deleted, {revoked} revoked, {freed} packs freed");
    assert!(!many || (committed > 0 && deleted > 0 && revoked > 0 && freed > 0));
}
