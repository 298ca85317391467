//! Points on their way from one repository to another.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use std::ops::ControlFlow;
use std::sync::Arc;

use icecore_repository::store::{Access, MemoryStore, ObjectName, Store};
use icecore_repository::{
    BlockSize, ChainChoice, CheckOptions, Compared, Copied, DiskMode, Error, InitOptions,
    KeyMaterial, OpenOptions, Point, Repository,
};
use proptest::prelude::*;
use support::*;

/// A repository in memory, and its objects.
fn repository(block_size: u64) -> (Repository, MemoryStore) {
    repository_with(block_size, init_options())
}

/// The same with a key.
fn encrypted(block_size: u64) -> (Repository, MemoryStore) {
    let keys = vec![KeyMaterial::from_key_file(vec![0x5a; 32].into()).unwrap()];
    repository_with(block_size, InitOptions { keys, ..init_options() })
}

fn repository_with(block_size: u64, options: InitOptions) -> (Repository, MemoryStore) {
    let store = MemoryStore::new();
    let options = InitOptions { block_size: BlockSize::new(block_size).unwrap(), ..options };
    let shared = Arc::new(store.clone());
    (Repository::init_on(shared, options, jiff::Timestamp::UNIX_EPOCH).unwrap(), store)
}

fn copy(from: &Repository, point: &Point, to: &Repository) -> Result<Copied, Error> {
    from.copy_point(point, to, &mut |_| ControlFlow::Continue(()))
}

fn sound(repository: &Repository) {
    let options = CheckOptions { read_data: true, ..CheckOptions::default() };
    let report = repository.check(&options, |_| {}).unwrap();
    assert!(report.ok, "{:?}", report.errors);
}

/// The model in blocks of another size: each block's bytes are those of the parts.
fn prove_bytes(to: &Repository, point: &Point, name: &str, model: &Model, model_size: BlockSize) {
    let reader = to.disk_reader(point, &disk(name)).unwrap();
    assert_eq!(reader.size_bytes(), model.size_bytes);
    let mut bytes = vec![0; model.size_bytes as usize];
    let mut decoder = reader.decoder().unwrap();
    for entry in reader.entries(icecore_repository::BlockIndex(0)) {
        let entry = entry.unwrap();
        let start = (entry.index.0 * u64::from(to.block_size().bytes())) as usize;
        let length = to.block_size().block_bytes(model.size_bytes, entry.index) as usize;
        decoder.read(&entry, &mut bytes[start..start + length]).unwrap();
    }
    for (index, part) in bytes.chunks(model_size.bytes() as usize).enumerate() {
        assert!(part == model.block(model_size, index as u64), "block {index}");
    }
}

/// A chain of points of one disk, each with its model.
fn chain_of_points(repository: &Repository, changes: &[(Vec<u64>, u64)]) -> Vec<(Point, Model)> {
    let vda = disk("vda");
    let size = repository.block_size();
    let mut model = Model::of_blocks(size, 300);
    model.blocks.extend((0..200).map(|n| (n, n + 1)));
    let first = write_point(repository, ChainChoice::New, &vda, None, &model, &all(&model));
    let chain = ChainChoice::Existing(first.chain.clone());
    let mut points = vec![(first, model.clone())];
    for (number, (changed, size_bytes)) in changes.iter().enumerate() {
        let old = model.blocks.clone();
        model.resize(size, *size_bytes);
        let blocks = size.blocks(*size_bytes).unwrap();
        let mut dirty = Dirty::default();
        for index in changed.iter().map(|index| index % blocks.max(1)).filter(|_| blocks > 0) {
            match index % 3 {
                0 => drop(model.blocks.remove(&index)),
                _ => drop(model.blocks.insert(index, 1000 * (number as u64 + 1) + index)),
            }
            dirty.blocks.insert(index);
        }
        // What was cut short or grew has to be read again.
        let ends =
            [points[number].1.size_bytes, *size_bytes].map(|end| end / u64::from(size.bytes()));
        dirty.blocks.extend(ends.into_iter().filter(|end| *end < blocks));
        drop(old);
        let parent = points[number].0.id.clone();
        let point = write_point(repository, chain.clone(), &vda, Some(&parent), &model, &dirty);
        points.push((point, model.clone()));
    }
    points
}

#[test]
fn a_chain_keeps_its_shape_and_only_differences_are_read() {
    let (from, _) = repository(4096);
    let (to, _) = repository(4096);
    let size = 300 * 4096;
    let points = chain_of_points(&from, &[(vec![1, 2, 250], size), (vec![4, 299], size)]);
    let mut parent = None;
    for (number, (point, model)) in points.iter().enumerate() {
        let copied = copy(&from, point, &to).unwrap();
        let copy = &copied.point;
        prove(&to, copy, &disk("vda"), model);
        assert_eq!(copied.compared, Compared::Roots);
        assert_eq!(copy.disks[0].content_root, point.disks[0].content_root);
        assert_eq!((copy.parent.clone(), copy.id.millis()), (parent, point.id.millis()));
        assert_ne!(copy.id, point.id, "ids are never used twice");
        let read = copied.disks[0].read_bytes / 4096;
        match number {
            0 => assert_eq!((copied.disks[0].mode, read), (DiskMode::Full, 200)),
            1 => assert_eq!((copied.disks[0].mode, read), (DiskMode::Incremental, 3)),
            _ => assert_eq!((copied.disks[0].mode, read), (DiskMode::Incremental, 2)),
        }
        let (mut meta, mut wanted) = (copy.meta.clone(), point.meta.clone());
        assert_eq!(meta.disks[0].bitmap.take(), None, "a bitmap belongs to one repository");
        (meta.disks[0].granularity, wanted.disks[0].granularity) = (None, None);
        wanted.disks[0].bitmap = None;
        assert_eq!(meta, wanted);
        parent = Some(copy.id.clone());
    }
    let chains: std::collections::BTreeSet<_> =
        to.points().unwrap().into_iter().map(|point| point.chain).collect();
    assert_eq!(chains.len(), 1);
    let found = to.resolve(points[1].0.id.as_str(), None).unwrap();
    assert_eq!(to.point(&found).unwrap().origin.unwrap().point, points[1].0.id);
    sound(&to);
}

#[test]
fn copies_are_recognised_and_so_are_originals_on_the_way_back() {
    let (one, _) = repository(4096);
    let (two, _) = repository(4096);
    let (three, _) = repository(4096);
    let points = chain_of_points(&one, &[(vec![7], 300 * 4096)]);
    let ids = |points: &[Point]| -> Vec<_> { points.iter().map(|p| Some(p.id.clone())).collect() };
    let originals = one.points().unwrap();
    for point in &originals {
        copy(&one, point, &two).unwrap();
    }
    let there = two.points().unwrap();
    assert_eq!(one.copies_in(&two, &originals).unwrap(), ids(&there));
    assert_eq!(two.copies_in(&one, &there).unwrap(), ids(&originals));
    // A copy's copy is the first one's, too.
    for point in &there {
        copy(&two, point, &three).unwrap();
    }
    let last = three.points().unwrap();
    assert_eq!(one.copies_in(&three, &originals).unwrap(), ids(&last));
    assert_eq!(three.copies_in(&one, &last).unwrap(), ids(&originals));
    // What was deleted comes back under another id, grown from what is left.
    one.delete_point(&originals[1].id).unwrap();
    assert_eq!(three.copies_in(&one, &last).unwrap()[1], None);
    let back = copy(&three, &last[1], &one).unwrap();
    assert_eq!(back.disks[0].mode, DiskMode::Incremental);
    assert_eq!(back.point.chain, originals[0].chain);
    assert_ne!(back.point.id, originals[1].id);
    prove(&one, &back.point, &disk("vda"), &points[1].1);
    assert!(matches!(copy(&one, &originals[0], &one), Err(Error::Refused { .. })));
}

#[test]
fn a_damaged_block_fails_its_points_and_no_others() {
    let (from, store) = repository(4096);
    let (to, _) = repository(4096);
    let size = 300 * 4096;
    let points = chain_of_points(&from, &[(vec![1, 2], size), (vec![1, 4], size)]);
    // The second point's pack: the blocks 1 and 2 of it.
    let packs = store.list("packs/").unwrap();
    let before = |name: &ObjectName| {
        let bytes = store.read(name, 1 << 30).unwrap();
        bytes.windows(32).any(|w| w == from.hasher().block_id(&block_bytes(1001, 4096)).0)
    };
    let pack = packs.iter().map(|entry| &entry.name).find(|name| before(name)).unwrap();
    let mut bytes = store.read(pack, 1 << 30).unwrap();
    bytes[61] ^= 1;
    store.overwrite(pack, &bytes);
    let from = Repository::open_on(
        Arc::new(store.reopened(Access::ReadOnly)),
        OpenOptions { read_only: true, ..open_options() },
    )
    .unwrap();
    let outcomes: Vec<bool> = points
        .iter()
        .map(|(point, model)| match copy(&from, point, &to) {
            Ok(copied) => {
                prove(&to, &copied.point, &disk("vda"), model);
                true
            }
            Err(error) => {
                assert!(error.damage().is_some(), "{error}");
                false
            }
        })
        .collect();
    assert_eq!(&outcomes[..2], [true, false]);
    assert_eq!(to.points().unwrap().len(), outcomes.iter().filter(|good| **good).count());
    sound(&to);
}

#[test]
fn an_interrupted_copy_leaves_no_point_and_the_next_one_sends_little_again() {
    let folder = tempfile::tempdir().unwrap();
    let (from, _) = repository(65_536);
    let store = MemoryStore::new();
    Repository::init_on(Arc::new(store.clone()), init_options(), now()).unwrap();
    let open = || {
        let cache_dir = Some(folder.path().to_owned());
        let options = OpenOptions { cache_dir, ..open_options() };
        Repository::open_on(Arc::new(store.clone()), options).unwrap()
    };
    let mut model = Model::of_blocks(from.block_size(), 5000);
    // Odd numbers do not compress: 187 MiB in six packs.
    model.blocks.extend((0..3000).map(|n| (n, 2 * n + 1)));
    let point = write_point(&from, ChainChoice::New, &disk("vda"), None, &model, &all(&model));
    let stop = |now: icecore_repository::CopyProgress| {
        let far = now.done_bytes > now.total_bytes * 19 / 20;
        if far { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let ended = from.copy_point(&point, &open(), &mut { stop }).unwrap_err();
    assert!(matches!(ended, Error::Cancelled { .. }), "{ended}");
    let to = open();
    assert!(to.points().unwrap().is_empty());
    let copied = copy(&from, &point, &to).unwrap();
    let read = copied.disks[0].read_bytes;
    assert!(read < 3000 * 65_536 / 2, "{read} bytes were read again");
    assert_eq!(copied.disks[0].summary.blocks_new * 65_536, read);
    prove(&to, &copied.point, &disk("vda"), &model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the block sizes and keys of the two, and however a disk changes and is resized between two
    /// points: each copy is byte for byte its origin, whichever of its ancestors are there.
    #[test]
    fn copies_are_equal_whatever_the_block_sizes_and_keys(
        from_size in 0u32..3, to_size in 0u32..3,
        changes in proptest::collection::vec(
            (proptest::collection::vec(0u64..300, 0..20), 1u64..1_300_000), 1..4),
        left_out in proptest::collection::vec(any::<bool>(), 4),
        keys in any::<[bool; 2]>(),
    ) {
        let make = |key, size: u32| {
            if key { encrypted(4096 << (2 * size)) } else { repository(4096 << (2 * size)) }
        };
        let ((from, _), (to, _)) = (make(keys[0], from_size), make(keys[1], to_size));
        let equal_ids = from_size == to_size && keys == [false; 2];
        let points = chain_of_points(&from, &changes);
        for (number, (point, model)) in points.iter().enumerate() {
            if left_out[number] {
                continue;
            }
            let copied = copy(&from, point, &to).unwrap();
            prop_assert_eq!(copied.compared == Compared::Roots, equal_ids);
            prove_bytes(&to, &copied.point, "vda", model, from.block_size());
        }
        sound(&to);
    }
}
