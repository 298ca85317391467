//! A store whose listings are late: what is there is not always shown. No point is lost by it.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed

mod world;

use std::sync::{Arc, Mutex};

use icecore_repository::store::{
    ObjectEntry, ObjectName, ObjectWriter, SimFileSystem, Store, StoreError,
};
use icecore_repository::{Error, GcOptions, Repository};
use world::{
    VirtualPace, assert_points_are_right, assert_sound, backup, check, gc, initialised, open,
    open_options,
};

/// Hides from listings what begins with one of these; all else is as it is.
#[derive(Debug, Clone)]
struct Late {
    inner: Arc<dyn Store>,
    hidden: Arc<Mutex<Vec<String>>>,
}

impl Late {
    fn on(fs: &SimFileSystem) -> Self {
        Self { inner: world::store(fs), hidden: Arc::default() }
    }

    fn hide(&self, prefixes: &[&str]) {
        *self.hidden.lock().unwrap() = prefixes.iter().map(|name| (*name).to_owned()).collect();
    }

    fn open(&self) -> Repository {
        Repository::open_on(Arc::new(self.clone()), open_options()).unwrap()
    }
}

impl Store for Late {
    fn location(&self) -> &str {
        "late"
    }
    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        self.inner.create(name)
    }
    fn read_exact(&self, name: &ObjectName, at: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.inner.read_exact(name, at, buffer)
    }
    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.inner.len(name)
    }
    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        let hidden = self.hidden.lock().unwrap();
        let shows = |entry: &ObjectEntry| {
            !hidden.iter().any(|prefix| entry.name.as_str().starts_with(prefix))
        };
        Ok(self.inner.list(prefix)?.into_iter().filter(shows).collect())
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

fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>) {
    let Err(Error::Refused { what, .. }) = result else { panic!("{result:?}") };
    assert!(what.contains("list"), "{what}");
}

#[test]
fn gc_deletes_nothing_of_a_point_that_it_is_not_shown() {
    let fs = initialised();
    let store = Late::on(&fs);
    let repository = store.open();
    let points: Vec<_> = (0..4).map(|instant| backup(&repository, instant).unwrap().id).collect();
    let before = fs.paths();
    for point in &points {
        store.hide(&[&format!("points/{point}")]);
        assert_refused(gc(&repository));
    }
    store.hide(&["points/"]);
    assert_refused(gc(&repository));
    assert_eq!(fs.paths(), before, "something was deleted or added");
    store.hide(&[]);
    gc(&repository).unwrap();
    assert_eq!(assert_points_are_right(&open(&fs)), [0, 1, 2, 3]);
}

#[test]
fn whoever_does_not_see_his_own_word_draws_no_conclusion_from_that_of_others() {
    let fs = initialised();
    let store = Late::on(&fs);
    let repository = store.open();
    backup(&repository, 0).unwrap();
    // It has a block that no other has.
    let newest = backup(&repository, 4).unwrap().id;
    repository.delete_point(&newest).unwrap();
    store.hide(&["coordination/writers/"]);
    assert_refused(backup(&repository, 1));
    store.hide(&["coordination/generations/"]);
    let packs = || fs.paths().iter().filter(|path| path.starts_with("packs/")).count();
    let before = packs();
    assert_refused(gc(&repository));
    assert_eq!(packs(), before);
    store.hide(&[]);
    assert!(gc(&repository).unwrap().packs_deleted > 0);
    assert_eq!(assert_points_are_right(&open(&fs)), [0]);
    assert_sound(&repository, "after the listings have caught up");
}

#[test]
fn a_point_that_is_not_shown_is_grown_from_what_is_and_both_are_right() {
    let fs = initialised();
    let store = Late::on(&fs);
    let repository = store.open();
    for instant in 0..3 {
        backup(&repository, instant).unwrap();
    }
    let newest = repository.resolve("latest", None).unwrap();
    store.hide(&[&format!("points/{newest}"), &format!("receipts/{newest}")]);
    backup(&store.open(), 3).unwrap();
    store.hide(&[]);
    assert_eq!(assert_points_are_right(&open(&fs)), [0, 1, 2, 3]);
    assert!(check(&repository).ok);
}

#[test]
fn the_verdict_on_a_dead_writer_counts_the_point_that_a_listing_is_late_with() {
    let fs = initialised();
    let store = Late::on(&fs);
    let repository = store.open();
    let point = backup(&repository, 0).unwrap();
    // As if it had died between its receipt and taking its announcement back.
    let name = ObjectName::new(format!("coordination/writers/{}", point.writer_id)).unwrap();
    let other = world::prepare(&repository, 1).unwrap();
    let announced = world::store(&fs).names("coordination/writers/").unwrap();
    let record = world::store(&fs).read(&announced[0], 4096).unwrap();
    other.commit().unwrap();
    world::store(&fs).put(&name, &record).unwrap();
    let hidden = format!("points/{}", point.id);
    let hide = || store.hide(&[&hidden]);
    let mut pace = VirtualPace::default();
    pace.at_first_pause = Some(Box::new(hide));
    assert_refused(repository.gc_at_pace(&GcOptions::default(), &mut pace));
    let verdict = format!("coordination/revoked/{}.verdict", point.writer_id);
    assert!(fs.paths().contains(&verdict), "it was not judged while the listing was late");
    store.hide(&[]);
    gc(&repository).unwrap();
    assert_eq!(assert_points_are_right(&open(&fs)), [0, 1]);
}
