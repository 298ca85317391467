//! The plain path: points are written, read back and proven.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use icecore_repository::{
    ChainChoice, DiskStart, Encoded, Error, InitOptions, OpenOptions, Repository,
};
use support::*;

fn repository(folder: &tempfile::TempDir) -> Repository {
    let size = icecore_repository::BlockSize::new(4096).unwrap();
    let options = InitOptions { block_size: size, ..init_options() };
    Repository::init(folder.path().join("repo"), options).unwrap()
}

#[test]
fn a_chain_of_points_restores_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let repo = repository(&folder);
    let vda = disk("vda");
    let mut model = Model::of_blocks(repo.block_size(), 70_000);
    model.blocks.extend([(0, 1), (1, 2), (255, 3), (256, 4), (65_536, 5), (69_999, 7)]);
    let first = write_point(&repo, ChainChoice::New, &vda, None, &model, &all(&model));
    prove(&repo, &first, &vda, &model);
    assert_eq!(first.disks[0].summary.blocks_new, 6);

    let old = model.clone();
    model.blocks.insert(1, 9);
    model.blocks.remove(&255);
    let dirty = Dirty { blocks: [0, 1, 255].into(), zero_ranges: vec![] };
    let chain = ChainChoice::Existing(first.chain.clone());
    let second = write_point(&repo, chain, &vda, Some(&first.id), &model, &dirty);
    prove(&repo, &second, &vda, &model);
    prove(&repo, &first, &vda, &old);
    let summary = second.disks[0].summary;
    assert_eq!((summary.blocks_new, summary.blocks_same, summary.zero_bytes), (1, 1, 4096));
    assert_eq!(second.parent.as_ref(), Some(&first.id));
    assert!(second.id > first.id);

    let again = Repository::open(folder.path().join("repo"), open_options()).unwrap();
    assert_eq!(again.points().unwrap().len(), 2);
    let found = again.point(&second.id).unwrap();
    prove(&again, &found, &vda, &model);
    assert_eq!(again.resolve("latest", None).unwrap(), second.id);
    assert_eq!(again.resolve("latest~1", Some(&vm())).unwrap(), first.id);
    let info = again.info().unwrap();
    assert_eq!((info.points, info.chains, info.packs), (2, 1, 2));
    assert_eq!(info.logical_bytes, 2 * model.size_bytes);
}

#[test]
fn an_incremental_without_change_costs_a_manifest() {
    let folder = tempfile::tempdir().unwrap();
    let repo = repository(&folder);
    let vda = disk("vda");
    let mut model = Model::of_blocks(repo.block_size(), 1000);
    model.blocks.extend((0..500).map(|n| (n, n + 1)));
    let first = write_point(&repo, ChainChoice::New, &vda, None, &model, &all(&model));
    let chain = ChainChoice::Existing(first.chain.clone());
    let none = Dirty::default();
    let second = write_point(&repo, chain, &vda, Some(&first.id), &model, &none);
    assert_eq!((second.object_count, second.stored_bytes, second.new_bytes), (2, 0, 0));
    assert_eq!(second.disks[0].content_root, first.disks[0].content_root);
    prove(&repo, &second, &vda, &model);
}

#[test]
fn equal_blocks_are_stored_once() {
    let folder = tempfile::tempdir().unwrap();
    let repo = repository(&folder);
    let mut model = Model::of_blocks(repo.block_size(), 1000);
    model.blocks.extend((0..1000).map(|n| (n, 3 + n % 2)));
    let writer = begin(&repo, ChainChoice::New);
    write_disk(&writer, &repo, &disk("vda"), None, &model, &all(&model));
    write_disk(&writer, &repo, &disk("vdb"), None, &model, &all(&model));
    let point = writer.commit(meta(&[disk("vda"), disk("vdb")])).unwrap();
    assert_eq!(point.disks[0].summary.blocks_new, 2);
    assert_eq!(point.disks[1].summary.blocks_new, 0);
    assert_eq!(point.disks[1].summary.blocks_known, 1000);
    prove(&repo, &point, &disk("vdb"), &model);
}

#[test]
fn pushes_that_cannot_make_a_right_point_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let repo = repository(&folder);
    let writer = begin(&repo, ChainChoice::New);
    let start = DiskStart { disk: disk("vda"), size_bytes: 4096 * 3 + 5, parent: None };
    let mut disk_writer = writer.disk(start.clone()).unwrap();
    assert!(matches!(writer.disk(start), Err(Error::Refused { .. })), "begun twice");
    let whole = encode_one(&repo, &disk_writer, &block_bytes(1, 4096)).1;
    let short = encode_one(&repo, &disk_writer, &block_bytes(1, 5)).1;
    let sink = &mut disk_writer.sink;
    let at = icecore_repository::BlockIndex;
    let is_push = |result| matches!(result, Err(Error::Push { .. }));
    assert!(is_push(sink.push(at(0), Encoded::Same)), "nothing to inherit");
    sink.push(at(1), whole.clone()).unwrap();
    assert!(is_push(sink.push(at(1), whole.clone())), "not ascending");
    assert!(is_push(sink.push_zero_range(at(0), 1)), "not ascending");
    assert!(is_push(sink.push(at(3), whole.clone())), "the last block is short");
    let result = sink.push_zero_range(at(4), 1);
    assert!(is_push(result), "beyond the end");
    drop(short);
    let result = writer.commit(meta(&[disk("vda")]));
    assert!(matches!(result, Err(Error::Refused { .. })), "not finished");
    assert!(repo.points().unwrap().is_empty());
}

#[test]
fn what_is_no_repository_is_named_and_nothing_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("file"), b"x").unwrap();
    std::fs::create_dir(path("empty")).unwrap();
    for name in ["file", "empty", "missing"] {
        let error = Repository::open(path(name), open_options()).unwrap_err();
        assert!(matches!(error, Error::NotARepository { .. }), "{name}: {error}");
        assert!(error.to_string().contains("icecore repo init"), "{error}");
    }
    std::fs::create_dir(path("full")).unwrap();
    std::fs::write(path("full").join("letter.txt"), b"x").unwrap();
    let error = Repository::init(path("full"), init_options()).unwrap_err();
    assert!(matches!(error, Error::InitRefused { .. }) && error.to_string().contains("letter.txt"));
    Repository::init(path("empty"), init_options()).unwrap();
    let again = Repository::init(path("empty"), init_options());
    assert!(matches!(again, Err(Error::InitRefused { .. })));
}

#[test]
fn a_repository_opened_read_only_is_read_and_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let repo = repository(&folder);
    let model = Model::of_blocks(repo.block_size(), 5);
    let point = write_point(&repo, ChainChoice::New, &disk("vda"), None, &model, &all(&model));
    let options = OpenOptions { read_only: true, ..open_options() };
    let read = Repository::open(folder.path().join("repo"), options).unwrap();
    prove(&read, &point, &disk("vda"), &model);
    let begin = icecore_repository::BeginPoint { vm: vm(), chain: ChainChoice::New, now: now() };
    assert!(matches!(read.begin_point(begin), Err(Error::ReadOnly { .. })));
}
