//! Locks of a store against those who delete: on a store that keeps what is locked, with a clock of
//! its own. What a real server does is in the tests of object stores.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed

mod world;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use icecore_repository::store::{
    ObjectEntry, ObjectLock, ObjectName, ObjectWriter, SimFileSystem, Store, StoreError,
    StoreErrorKind,
};
use icecore_repository::{
    BlockSize, Error, InitOptions, LockMode, LockPolicy, Point, PointId, Repository,
};
use jiff::Timestamp;
use world::{
    BLOCK, assert_points_are_right, assert_sound, backup, gc, init_options, open, open_options,
};

const PERIOD: Duration = Duration::from_secs(1000);

/// What the store knows beside its objects.
#[derive(Debug, Default)]
struct Locks {
    now: Timestamp,
    policy: Option<LockPolicy>,
    until: BTreeMap<ObjectName, Timestamp>,
    extensions: usize,
}

#[derive(Debug, Clone)]
struct LockingStore {
    inner: Arc<dyn Store>,
    locks: Arc<Mutex<Locks>>,
}

impl LockingStore {
    fn on(fs: &SimFileSystem) -> Self {
        Self { inner: world::store(fs), locks: Arc::default() }
    }

    fn open(&self) -> Repository {
        Repository::open_on(Arc::new(self.clone()), open_options()).unwrap()
    }

    fn pass(&self, seconds: i64) {
        let mut locks = self.locks.lock().unwrap();
        locks.now = Timestamp::from_second(locks.now.as_second() + seconds).unwrap();
    }

    fn extensions(&self) -> usize {
        std::mem::take(&mut self.locks.lock().unwrap().extensions)
    }

    fn is_locked(&self, name: &ObjectName) -> bool {
        let locks = self.locks.lock().unwrap();
        locks.until.get(name).is_some_and(|until| *until > locks.now)
    }
}

struct LockingWriter(LockingStore, ObjectName, Box<dyn ObjectWriter>);

impl ObjectWriter for LockingWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.2.write(bytes)
    }
    fn finish(self: Box<Self>) -> Result<u64, StoreError> {
        let bytes = self.2.finish()?;
        let mut locks = self.0.locks.lock().unwrap();
        if let Some(policy) = locks.policy.filter(|_| LockPolicy::applies_to(self.1.as_str())) {
            let until = policy.horizon(locks.now).objects;
            locks.until.insert(self.1, until);
        }
        Ok(bytes)
    }
}

impl Store for LockingStore {
    fn location(&self) -> &str {
        "locks"
    }
    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        Ok(Box::new(LockingWriter(self.clone(), name.clone(), self.inner.create(name)?)))
    }
    fn read_exact(&self, name: &ObjectName, at: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.inner.read_exact(name, at, buffer)
    }
    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.inner.len(name)
    }
    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.inner.list(prefix)
    }
    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        if let Some(name) = names.iter().find(|name| self.is_locked(name)) {
            let kind = StoreErrorKind::Locked;
            return Err(StoreError::new(kind, "delete", name.as_str(), "locks", "locked"));
        }
        self.inner.delete(names)
    }
    fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.inner.settle(prefix)
    }
    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        self.inner.leftovers()
    }
    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        self.inner.remove_leftovers(leftovers)
    }
    fn lock(&self) -> Option<&dyn ObjectLock> {
        Some(self)
    }
}

impl ObjectLock for LockingStore {
    fn require(&self) -> Result<(), StoreError> {
        Ok(())
    }
    fn engage(&self, policy: LockPolicy) {
        self.locks.lock().unwrap().policy = Some(policy);
    }
    fn now(&self) -> Timestamp {
        self.locks.lock().unwrap().now
    }
    fn locked_until(&self, name: &ObjectName) -> Result<Option<Timestamp>, StoreError> {
        Ok(self.locks.lock().unwrap().until.get(name).copied())
    }
    fn extend(&self, names: &[ObjectName], until: Timestamp) -> Result<(), StoreError> {
        let mut locks = self.locks.lock().unwrap();
        for name in names {
            assert!(self.inner.exists(name)?, "{name} is extended and not there");
            let locked = locks.until.entry(name.clone()).or_insert(until);
            *locked = until.max(*locked);
            locks.extensions += 1;
        }
        Ok(())
    }
    fn delete_unlocked(&self, names: &[ObjectName]) -> Result<Vec<ObjectName>, StoreError> {
        let (kept, free): (Vec<_>, Vec<_>) =
            names.iter().cloned().partition(|name| self.is_locked(name));
        self.inner.delete(&free).map(|()| kept)
    }
}

fn initialised() -> (SimFileSystem, LockingStore) {
    let fs = SimFileSystem::new();
    let store = LockingStore::on(&fs);
    let block_size = BlockSize::new(BLOCK as u64).unwrap();
    let policy = LockPolicy::new(LockMode::Compliance, PERIOD).unwrap();
    let options = InitOptions { block_size, lock: Some(policy), ..init_options() };
    Repository::init_on(Arc::new(store.clone()), options, Timestamp::UNIX_EPOCH).unwrap();
    (fs, store)
}

/// Each object of the repository that is no coordination is locked as long as the newest point.
fn assert_reached_is_locked(store: &LockingStore, point: &Point) {
    let until = point.lock.unwrap().until;
    for entry in store.inner.list("").unwrap() {
        let name = entry.name.as_str();
        let is_shared = ["packs/", "keys/", "config"].iter().any(|kind| name.starts_with(kind));
        let locked = store.locked_until(&entry.name).unwrap();
        assert!(!is_shared || locked >= Some(until), "{name} only until {locked:?}, {until}");
        assert!(!name.starts_with("coordination/") || locked.is_none(), "{name} is locked");
    }
}

fn assert_refused(result: Result<(), Error>) {
    let Err(Error::Refused { what, .. }) = result else { panic!("{result:?}") };
    assert!(what.contains("locked until 1970-01-01T00:16:40Z"), "{what}");
}

#[test]
fn a_locked_point_is_not_deleted_and_its_objects_are_extended_for_those_that_need_them() {
    let (_, store) = initialised();
    let repository = store.open();
    let first = backup(&repository, 0).unwrap();
    assert_refused(repository.delete_point(&first.id));
    assert_refused(repository.delete_with_descendants(&first.id).map(drop));
    assert_refused(repository.delete_chain(&first.chain).map(drop));
    // Within the reserve only what makes a repository one is extended.
    store.extensions();
    store.pass(200);
    let second = backup(&repository, 1).unwrap();
    let few = store.extensions();
    assert_reached_is_locked(&store, &second);
    store.pass(300);
    let third = backup(&repository, 2).unwrap();
    assert!(store.extensions() > few, "what the third took over was not extended");
    assert_reached_is_locked(&store, &third);
    store.pass(600);
    repository.delete_point(&first.id).unwrap();
    gc(&repository).unwrap();
    assert_eq!(assert_points_are_right(&store.open()), [1, 2]);
    assert_sound(&repository, "after the first lock");
}

#[test]
fn a_tombstone_by_somebody_else_takes_nothing_before_the_lock_has_run_out() {
    let (fs, store) = initialised();
    let points: Vec<PointId> =
        (0..3).map(|instant| backup(&store.open(), instant).unwrap().id).collect();
    // Another program with the same keys, which knows of no locks.
    let stranger = open(&fs);
    points.iter().for_each(|point| stranger.delete_point(point).unwrap());
    let (before, report) = (fs.paths(), gc(&store.open()).unwrap());
    assert_eq!((report.points_locked, report.packs_deleted), (3, 0), "{report:?}");
    let data = |paths: &[String]| {
        paths.iter().filter(|path| !path.starts_with("coordination/")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(data(&fs.paths()), data(&before));
    store.pass(2000);
    let report = gc(&store.open()).unwrap();
    assert!(report.points_locked == 0 && report.packs_deleted > 0, "{report:?}");
}

#[test]
fn what_nothing_reaches_stays_as_long_as_its_lock() {
    let (fs, store) = initialised();
    let repository = store.open();
    backup(&repository, 0).unwrap();
    let packs = || fs.paths().iter().filter(|path| path.starts_with("packs/")).count();
    let used = packs();
    // What a writer that died has left.
    let garbage = ObjectName::new(format!("packs/ab/{}", "ab".repeat(16))).unwrap();
    store.put(&garbage, b"of no point").unwrap();
    let report = gc(&repository).unwrap();
    assert!(report.objects_locked > 0 && report.bytes_freed == 0, "{report:?}");
    store.pass(1251);
    let report = gc(&repository).unwrap();
    assert!(report.objects_locked == 0 && report.packs_deleted > 0, "{report:?}");
    assert_eq!(packs(), used);
    assert_eq!(assert_points_are_right(&store.open()), [0]);
}

#[test]
fn a_copy_at_a_place_without_locks_is_read_and_not_written() {
    let (fs, store) = initialised();
    backup(&store.open(), 0).unwrap();
    let copy = open(&fs);
    assert_eq!(assert_points_are_right(&copy), [0]);
    let error = backup(&copy, 1).unwrap_err();
    assert!(error.to_string().contains("cannot do that"), "{error}");
}
