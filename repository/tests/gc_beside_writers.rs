//! gc beside writers, on the real write path. FAULTS rows 32, 33, 54.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed

mod world;

use std::sync::{Arc, Mutex};

use icecore_repository::store::{
    ObjectEntry, ObjectName, ObjectWriter, SimFileSystem, Store, StoreError,
};
use icecore_repository::{Error, GcOptions, Point, Repository};
use world::{
    VM, VirtualPace, assert_points_are_right, assert_sound, backup, disks_at, gc, initialised,
    open, open_options, prepare, prepare_disks,
};

fn packs(fs: &SimFileSystem) -> usize {
    fs.paths().iter().filter(|path| path.starts_with("packs/")).count()
}

#[test]
fn gc_frees_what_deleted_points_alone_used() {
    let fs = initialised();
    let repository = open(&fs);
    // The last one has a block that no other has.
    for instant in [0, 1, 2, 4] {
        backup(&repository, instant).unwrap();
    }
    assert_eq!(gc(&repository).unwrap().packs_deleted, 0);
    let newest = repository.resolve("latest", None).unwrap();
    repository.delete_point(&newest).unwrap();
    assert!(repository.point(&newest).is_err());
    let dry = GcOptions { dry_run: true, ..GcOptions::default() };
    let (before, promised) = (fs.paths(), repository.gc(&dry).unwrap());
    assert_eq!(fs.paths(), before, "a dry run changed something");
    let (used, report) = (fs.used_bytes(), gc(&repository).unwrap());
    assert!(report.packs_deleted > 0 && report.points_removed == 1, "{report:?}");
    assert_eq!(report.bytes_freed, promised.bytes_freed);
    assert!(used - fs.used_bytes() >= report.bytes_freed);
    assert_eq!(assert_points_are_right(&repository), [0, 1, 2]);
    assert_sound(&repository, "after gc");
}

#[test]
fn any_point_can_be_deleted_and_the_others_stay_right() {
    for victim in 0..4_u64 {
        let fs = initialised();
        let repository = open(&fs);
        for instant in 0..4 {
            backup(&repository, instant).unwrap();
        }
        let id = repository.resolve(&format!("latest~{}", 3 - victim), None).unwrap();
        repository.delete_point(&id).unwrap();
        gc(&repository).unwrap();
        backup(&repository, 4).unwrap();
        let expected: Vec<u64> = (0..5).filter(|instant| *instant != victim).collect();
        assert_eq!(assert_points_are_right(&open(&fs)), expected);
        assert_sound(&repository, "after deleting one point");
    }
}

#[test]
fn descendants_and_chains_go_together_unless_one_is_protected() {
    let fs = initialised();
    let repository = open(&fs);
    let points: Vec<_> = (0..4).map(|instant| backup(&repository, instant).unwrap()).collect();
    repository.protect(&points[3].id).unwrap();
    let refused = [
        repository.delete_point(&points[3].id),
        repository.delete_with_descendants(&points[1].id).map(drop),
        repository.delete_chain(&points[0].chain).map(drop),
    ];
    assert!(refused.iter().all(|result| matches!(result, Err(Error::Refused { .. }))));
    assert_eq!(repository.points().unwrap().len(), 4, "a refusal deletes nothing");
    assert_eq!(repository.protected().unwrap().len(), 1);
    repository.unprotect(&points[3].id).unwrap();
    let gone = repository.delete_with_descendants(&points[1].id).unwrap();
    assert_eq!(gone, points[1..].iter().map(|point| point.id.clone()).collect::<Vec<_>>());
    assert_eq!(assert_points_are_right(&repository), [0]);
    assert_eq!(repository.delete_chain(&points[0].chain).unwrap(), [points[0].id.clone()]);
    assert!(matches!(repository.delete_chain(&points[0].chain), Err(Error::NotFound { .. })));
    assert!(matches!(repository.delete_point(&points[0].id), Err(Error::NotFound { .. })));
    gc(&repository).unwrap();
    gc(&repository).unwrap();
    assert_eq!(packs(&fs), 0);
    assert!(fs.paths().iter().all(|path| !path.starts_with("coordination/fates/")));
}

#[test]
fn a_parent_deleted_and_collected_while_its_child_is_written_is_kept_for_the_child() {
    let fs = initialised();
    let repository = open(&fs);
    let parent = backup(&repository, 0).unwrap();
    let child = prepare(&repository, 1).unwrap();
    repository.delete_point(&parent.id).unwrap();
    let outcome = Mutex::new(None);
    let commit = || *outcome.lock().unwrap() = Some(child.commit());
    let mut pace = VirtualPace::default();
    pace.at_first_pause = Some(Box::new(commit));
    open(&fs).gc_at_pace(&GcOptions::default(), &mut pace).unwrap();
    drop(pace);
    outcome.into_inner().unwrap().unwrap().unwrap();
    assert_eq!(assert_points_are_right(&open(&fs)), [1]);
    assert_sound(&repository, "after the parent went");
}

/// A store on which something happens just before the first call on a name with this prefix.
#[derive(Clone)]
struct Interrupted {
    inner: Arc<dyn Store>,
    prefix: &'static str,
    happening: Happening,
}

type Happening = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted at {}", self.prefix)
    }
}

impl Interrupted {
    fn at(&self, name: &ObjectName) -> &dyn Store {
        if name.as_str().starts_with(self.prefix)
            && let Some(happening) = self.happening.lock().unwrap().take()
        {
            happening();
        }
        self.inner.as_ref()
    }
}

impl Store for Interrupted {
    fn location(&self) -> &str {
        self.inner.location()
    }
    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        self.at(name).create(name)
    }
    fn read_exact(&self, name: &ObjectName, at: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.inner.read_exact(name, at, buffer)
    }
    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.at(name).len(name)
    }
    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.inner.list(prefix)
    }
    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
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
}

/// Takes point 1 on a writer that is suspended, at its first call on `prefix`, for as long as a
/// deletion of its parent and a whole gc take.
fn suspended_at(fs: &SimFileSystem, prefix: &'static str) -> Result<Point, Error> {
    let parent = backup(&open(fs), 0).unwrap();
    let happening = Happening::default();
    let inner = world::store(fs);
    let store = Interrupted { inner, prefix, happening: Arc::clone(&happening) };
    let repository = Repository::open_on(Arc::new(store), open_options()).unwrap();
    let pending = prepare(&repository, 1).unwrap();
    let elsewhere = fs.clone();
    let collect = move || {
        let repository = open(&elsewhere);
        repository.delete_point(&parent.id).unwrap();
        // The writer does not beat in virtual time, so gc gives it up.
        assert_eq!(gc(&repository).unwrap().writers_revoked, 1);
    };
    *happening.lock().unwrap() = Some(Box::new(collect));
    pending.commit()
}

fn assert_goes_on(fs: &SimFileSystem, expected: &[u64]) {
    let repository = open(fs);
    assert_eq!(assert_points_are_right(&repository), expected);
    assert_sound(&repository, "after a revocation");
    backup(&repository, 2).unwrap();
    gc(&repository).unwrap();
    let expected = [expected, &[2]].concat();
    assert_eq!(assert_points_are_right(&repository), expected);
    assert_sound(&repository, "after the next gc");
    let manifests = fs.paths().into_iter().filter(|path| path.starts_with("points/"));
    assert_eq!(manifests.count(), expected.len());
}

#[test]
fn a_writer_suspended_in_mid_copy_past_gc_fails() {
    let fs = initialised();
    let repository = open(&fs);
    let pending = prepare(&repository, 1).unwrap();
    let report = gc(&open(&fs)).unwrap();
    assert_eq!((report.writers_revoked, report.leftovers_removed), (1, 1));
    let error = pending.commit().unwrap_err();
    assert!(error.to_string().contains("gc"), "{error}");
    assert_goes_on(&fs, &[]);
}

#[test]
fn a_writer_suspended_before_its_manifest_past_gc_has_no_point() {
    let fs = initialised();
    let Error::CommitUnknown { source, .. } = suspended_at(&fs, "points/").unwrap_err() else {
        panic!("another error")
    };
    assert!(matches!(*source, Error::Revoked { .. }), "{source}");
    // The manifest is there, what it refers to is not, and nobody sees it.
    assert!(fs.paths().iter().any(|path| path.starts_with("points/")));
    assert_goes_on(&fs, &[]);
}

#[test]
fn a_writer_suspended_after_its_manifest_past_gc_has_its_point_and_is_not_sure() {
    let fs = initialised();
    let error = suspended_at(&fs, "coordination/revoked/").unwrap_err();
    assert!(matches!(error, Error::CommitUnknown { .. }), "{error}");
    assert_goes_on(&fs, &[1]);
}

#[test]
fn gc_waits_for_living_writers_and_gives_up_without_deleting() {
    let fs = initialised();
    let repository = open(&fs);
    backup(&repository, 0).unwrap();
    let doomed = backup(&repository, 1).unwrap();
    repository.delete_point(&doomed.id).unwrap();
    let living = prepare(&repository, 2).unwrap();
    let before = packs(&fs);
    let wait_max = std::time::Duration::from_secs(5);
    let options = GcOptions { wait_max, ..GcOptions::default() };
    let refused =
        repository.gc_at_pace(&options, &mut VirtualPace::default()).unwrap_err().to_string();
    assert!(refused.contains("a point of model"), "{refused}");
    assert_eq!(packs(&fs), before);
    living.commit().unwrap();
    gc(&repository).unwrap();
    assert_eq!(assert_points_are_right(&repository), [0, 2]);
}

#[test]
fn gc_deletes_nothing_when_a_point_cannot_be_read() {
    let fs = initialised();
    let repository = open(&fs);
    let first = backup(&repository, 0).unwrap();
    let second = backup(&repository, 1).unwrap();
    repository.delete_point(&second.id).unwrap();
    let path = format!("points/{}", first.id);
    let mut manifest = fs.content(&path).unwrap();
    manifest[100] ^= 1;
    fs.overwrite(&path, manifest);
    let before = packs(&fs);
    let error = gc(&repository).unwrap_err();
    assert!(error.damage().is_some_and(|damage| damage.object == path), "{error}");
    assert_eq!(packs(&fs), before);
    // The way out: a damaged point can be deleted.
    repository.delete_point(&first.id).unwrap();
    gc(&repository).unwrap();
    assert_eq!(packs(&fs), 0);
}

/// Row 32: two hosts, each with its own handle, back up and collect at once.
#[test]
fn several_hosts_write_and_collect_at_once() {
    let fs = initialised();
    backup(&open(&fs), 0).unwrap();
    std::thread::scope(|scope| {
        for host in 0..3_u64 {
            let fs = &fs;
            scope.spawn(move || {
                let repository: Repository = open(fs);
                for instant in 0..4 {
                    let instant = 1 + host * 4 + instant;
                    let vm = format!("{VM}-{host}");
                    let disks = disks_at(instant);
                    prepare_disks(&repository, &vm, instant, &disks).unwrap().commit().unwrap();
                }
            });
        }
        scope.spawn(|| {
            let repository = open(&fs);
            // Writers are alive here: gc waits for them by real time, briefly.
            for _ in 0..10 {
                repository.gc(&GcOptions::default()).unwrap();
            }
        });
    });
    let mut found = assert_points_are_right(&open(&fs));
    found.sort_unstable();
    assert_eq!(found, (0..13).collect::<Vec<_>>());
    assert_sound(&open(&fs), "after the crowd");
}
