//! Repositories that earlier versions wrote stay readable, byte for byte.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use std::path::{Path, PathBuf};

use icecore_repository::{
    BlockSize, CapsulePart, ChainChoice, Compression, DiskId, Error, InitOptions, KeyMaterial,
    OpenOptions, Point, Repository,
};
use support::*;

fn fixture(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/fixtures").join(version)
}

/// The key of encrypted fixtures; no secret.
fn key() -> KeyMaterial {
    KeyMaterial::from_key_file(b"the key of fixtures is no secret".to_vec().into()).unwrap()
}

/// The disks of the three points of each fixture.
fn models() -> [(&'static str, Vec<(DiskId, Model)>); 3] {
    let size = BlockSize::new(4096).unwrap();
    let mut vda = Model::of_blocks(size, 70_000);
    vda.size_bytes += 1000;
    vda.blocks.extend((0..300).map(|n| (n * 7, 2 * n + 2)));
    vda.blocks.extend([(65_535, 3), (65_536, 5), (70_000, 7)]);
    let mut vdb = Model::of_blocks(size, 10);
    vdb.blocks.extend([(0, 11), (9, 12)]);
    let full = vec![(disk("vda"), vda.clone()), (disk("vdb"), vdb.clone())];
    vda.blocks.extend([(7, 13), (65_536, 2)]);
    vda.blocks.remove(&14);
    let incremental = vec![(disk("vda"), vda.clone())];
    vda.resize(size, 65_536 * 4096);
    vdb.resize(size, 20 * 4096);
    vdb.blocks.insert(19, 17);
    let resized = vec![(disk("vda"), vda), (disk("vdb"), vdb)];
    [("full", full), ("incremental", incremental), ("resized", resized)]
}

#[test]
fn version_1_is_read_byte_for_byte() {
    assert_reads("v1", false, Vec::new());
}

#[test]
fn version_1_encrypted_is_read_byte_for_byte() {
    assert_reads("v1-encrypted", true, vec![key()]);
    let without = Repository::open(fixture("v1-encrypted"), OpenOptions::default());
    assert!(matches!(without, Err(Error::KeyMissing { .. })));
}

fn assert_reads(version: &str, encrypted: bool, keys: Vec<KeyMaterial>) {
    let options = OpenOptions { read_only: true, keys, ..OpenOptions::default() };
    let repo = Repository::open(fixture(version), options).unwrap();
    let info = repo.info().unwrap();
    assert_eq!((info.version, info.points, info.chains), (1, 3, 1));
    assert_eq!(info.encrypted, encrypted);
    for (point, (label, disks)) in repo.points().unwrap().iter().zip(models()) {
        assert_eq!(point.meta.label.as_deref(), Some(label));
        assert_eq!(point.disks.len(), disks.len());
        disks.iter().for_each(|(name, model)| prove(&repo, point, name, model));
        let part = repo.capsule_part(point, "nvram").unwrap();
        assert_eq!(part, block_bytes(99, 200));
    }
    let report = repo
        .check(
            &icecore_repository::CheckOptions { read_data: true, ..Default::default() },
            &mut |_| (),
        )
        .unwrap();
    assert!(report.ok, "{report:?}");
}

/// Wrote the fixtures, with the program of their version:
/// `FIXTURE=/new/folder cargo test -p icecore-repository --test fixture -- --ignored`; an encrypted one
/// when the folder's name says so.
#[test]
#[ignore = "writes a fixture"]
fn write_a_fixture() {
    let folder = PathBuf::from(std::env::var_os("FIXTURE").unwrap());
    let block_size = BlockSize::new(4096).unwrap();
    let encrypted = folder.to_string_lossy().ends_with("-encrypted");
    let keys = encrypted.then(key).into_iter().collect();
    let options = InitOptions { block_size, compression: Compression::Zstd(1), keys, lock: None };
    let repo = Repository::init(&folder, options).unwrap();
    let mut last: Option<Point> = None;
    for (label, disks) in models() {
        let chain = last
            .as_ref()
            .map_or(ChainChoice::New, |point| ChainChoice::Existing(point.chain.clone()));
        let writer = begin(&repo, chain);
        let mut names = Vec::new();
        for (name, model) in &disks {
            let parent = repo.newest_with_disk(&vm(), Some(writer.chain()), name).unwrap();
            let mut dirty = all(model);
            if parent.is_some() {
                dirty.blocks.insert(14);
            }
            dirty.blocks.retain(|at| *at < block_size.blocks(model.size_bytes).unwrap());
            let parent = parent.map(|point| point.id);
            write_disk(&writer, &repo, name, parent.as_ref(), model, &dirty);
            names.push(name.clone());
        }
        let mut meta = meta(&names);
        meta.label = Some(label.to_owned());
        meta.parts = vec![CapsulePart { name: disk("nvram"), bytes: block_bytes(99, 200) }];
        last = Some(writer.commit(meta).unwrap());
    }
    // The space set aside for deletions is noise and no part of what is read.
    std::fs::remove_dir_all(folder.join("coordination")).unwrap();
}
