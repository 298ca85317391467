//! Caches may be deleted, grow old or be damaged at any time: that costs time and bytes, never a
//! point.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use std::path::{Path, PathBuf};

use icecore_repository::{
    BlockSize, ChainChoice, GcOptions, InitOptions, OpenOptions, Point, Repository,
};
use support::*;

struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let rig = Self { folder: tempfile::tempdir().unwrap() };
        let block_size = BlockSize::new(4096).unwrap();
        let options = InitOptions { block_size, ..init_options() };
        Repository::init(rig.folder.path().join("repo"), options).unwrap();
        rig
    }

    /// As another process would: nothing in memory.
    fn open(&self) -> Repository {
        let cache_dir = Some(self.folder.path().join("cache"));
        let options = OpenOptions { cache_dir, ..open_options() };
        Repository::open(self.folder.path().join("repo"), options).unwrap()
    }

    fn cache_file(&self, name: &str) -> PathBuf {
        self.folder.path().join("cache").join(self.open().id().as_str()).join(name)
    }
}

fn model(salt: u64) -> Model {
    let mut model = Model::of_blocks(BlockSize::new(4096).unwrap(), 300);
    model.blocks.extend((0..100).map(|n| (n * 3, salt + n)));
    model
}

/// A whole point of its own chain, by a process of its own.
fn whole(rig: &Rig, model: &Model) -> Point {
    write_point(&rig.open(), ChainChoice::New, &disk("vda"), None, model, &all(model))
}

fn new_blocks(point: &Point) -> u64 {
    point.disks[0].summary.blocks_new
}

#[test]
fn the_next_process_knows_what_the_last_one_stored() {
    let rig = Rig::new();
    assert_eq!(new_blocks(&whole(&rig, &model(1))), 100);
    let second = whole(&rig, &model(1));
    assert_eq!(new_blocks(&second), 0);
    prove(&rig.open(), &second, &disk("vda"), &model(1));
}

#[test]
fn a_dedup_cache_that_is_gone_or_damaged_is_learnt_again_from_the_newest_points() {
    let rig = Rig::new();
    whole(&rig, &model(1));
    let path = rig.cache_file("dedup");
    let good = std::fs::read(&path).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let spoil: [&dyn Fn(&Path); 4] = [
        &|path| std::fs::remove_file(path).unwrap(),
        &|path| std::fs::write(path, &flipped).unwrap(),
        &|path| std::fs::write(path, &good[..good.len() - 1]).unwrap(),
        &|path| std::fs::write(path, b"").unwrap(),
    ];
    for spoil in spoil {
        spoil(&path);
        let point = whole(&rig, &model(1));
        assert_eq!(new_blocks(&point), 0);
        prove(&rig.open(), &point, &disk("vda"), &model(1));
    }
}

/// Two hosts, each with a cache of its own.
#[test]
fn what_another_host_has_stored_since_is_known_without_its_cache() {
    let rig = Rig::new();
    let other = || {
        let cache_dir = Some(rig.folder.path().join("cache of the other host"));
        let options = OpenOptions { cache_dir, ..open_options() };
        Repository::open(rig.folder.path().join("repo"), options).unwrap()
    };
    let vda = disk("vda");
    let write = |repo: &Repository, model: &Model| {
        write_point(repo, ChainChoice::New, &vda, None, model, &all(model))
    };
    assert_eq!(new_blocks(&whole(&rig, &model(1))), 100);
    assert_eq!(new_blocks(&write(&other(), &model(1))), 0);
    // In turns, each with something of its own.
    assert_eq!(new_blocks(&write(&other(), &model(5000))), 100);
    assert_eq!(new_blocks(&whole(&rig, &model(5000))), 0);
    // What was deleted is not learnt from.
    let last = write(&other(), &model(9000));
    other().delete_point(&last.id).unwrap();
    let again = whole(&rig, &model(9000));
    assert_eq!(new_blocks(&again), 100);
    prove(&rig.open(), &again, &vda, &model(9000));
}

#[test]
fn a_dedup_cache_from_before_a_gc_is_not_believed() {
    let rig = Rig::new();
    let first = whole(&rig, &model(1));
    let old = std::fs::read(rig.cache_file("dedup")).unwrap();
    rig.open().delete_point(&first.id).unwrap();
    rig.open().gc(&GcOptions::default()).unwrap();
    std::fs::write(rig.cache_file("dedup"), old).unwrap();
    let second = whole(&rig, &model(1));
    assert_eq!(new_blocks(&second), 100);
    prove(&rig.open(), &second, &disk("vda"), &model(1));
}

#[test]
fn packs_that_vanished_are_not_built_upon() {
    let rig = Rig::new();
    let first = whole(&rig, &model(1));
    // Lost by other means than a gc: the generation is the same.
    let packs = rig.folder.path().join("repo/packs");
    std::fs::remove_dir_all(&packs).unwrap();
    let second = whole(&rig, &model(1));
    assert_eq!(new_blocks(&second), 100);
    prove(&rig.open(), &second, &disk("vda"), &model(1));
    assert!(first.id < second.id);
}

#[test]
fn the_catalog_is_rebuilt_whatever_became_of_it() {
    let rig = Rig::new();
    let points: Vec<Point> = (0..3).map(|n| whole(&rig, &model(n))).collect();
    let ids = |points: &[Point]| points.iter().map(|p| p.id.clone()).collect::<Vec<_>>();
    assert_eq!(rig.open().points().unwrap(), points);
    let path = rig.cache_file("catalog");
    let old = std::fs::read(&path).unwrap();
    for spoiled in [&b""[..], &old[..old.len() / 2], b"ICECORE\nnonsense"] {
        std::fs::write(&path, spoiled).unwrap();
        assert_eq!(ids(&rig.open().points().unwrap()), ids(&points));
    }
    std::fs::remove_file(&path).unwrap();
    assert_eq!(ids(&rig.open().points().unwrap()), ids(&points));
    assert_eq!(rig.open().rebuild_catalog().unwrap(), 3);
    // One that knows a point which is gone, and does not know one that came.
    rig.open().delete_point(&points[1].id).unwrap();
    let newer = whole(&rig, &model(9));
    std::fs::write(&path, &old).unwrap();
    let found = ids(&rig.open().points().unwrap());
    assert_eq!(found, [&points[0].id, &points[2].id, &newer.id].map(Clone::clone));
}

#[test]
fn an_unwritable_cache_folder_harms_nothing() {
    let rig = Rig::new();
    std::fs::write(rig.folder.path().join("cache"), b"a file").unwrap();
    let point = whole(&rig, &model(1));
    prove(&rig.open(), &point, &disk("vda"), &model(1));
}
