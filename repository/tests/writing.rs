//! What a writer is told while it writes: durability, refusals, failures; and that its hands may be
//! in several threads.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use std::sync::Arc;

use icecore_repository::store::{Access, CallFault, DirectoryStore, SimFileSystem};
use icecore_repository::{
    BlockDecoder, BlockEncoder, BlockIndex, BlockSize, CapsulePart, ChainChoice, Compression,
    DiskSink, DiskStart, DiskWriter, Encoded, Entries, Error, InitOptions, ParentBlock,
    ParentCursor, PointWriter, Repository,
};
use support::*;

const BLOCK: usize = 65_536;

fn repository(fs: &Arc<SimFileSystem>, compression: Compression) -> Repository {
    let store = DirectoryStore::on(Arc::clone(fs) as _, "memory", Access::ReadWrite);
    let options = InitOptions { compression, ..init_options() };
    Repository::init_on(Arc::new(store), options, now()).unwrap()
}

fn start(blocks: u64) -> DiskStart {
    DiskStart { disk: disk("vda"), size_bytes: blocks * BLOCK as u64, parent: None }
}

#[test]
fn hands_may_go_to_threads() {
    fn is_send<T: Send>() {}
    is_send::<BlockEncoder>();
    is_send::<BlockDecoder>();
    is_send::<ParentCursor>();
    is_send::<DiskSink>();
    is_send::<Entries>();
    is_send::<PointWriter>();
    is_send::<Repository>();
}

#[test]
fn what_is_durable_follows_the_packs() {
    let repo = repository(&Arc::new(SimFileSystem::new()), Compression::None);
    let writer = begin(&repo, ChainChoice::New);
    let DiskWriter { encoders, mut sink, .. } = writer.disk(start(2000)).unwrap();
    let mut encoder = encoders.encoder().unwrap();
    let mut push = |sink: &mut DiskSink, at: u64, value: u64| {
        let block = encoder.encode(&block_bytes(value, BLOCK), ParentBlock::Absent);
        sink.push(BlockIndex(at), block).unwrap();
        sink.durable_below().0
    };
    sink.push_zero_range(BlockIndex(0), 10).unwrap();
    assert_eq!(sink.durable_below().0, 10, "zeroes need no pack");
    // 512 raw blocks fill a pack of 32 MiB.
    for n in 0..511 {
        assert_eq!(push(&mut sink, 10 + n, 2 * n + 1), 10);
    }
    push(&mut sink, 521, 2 * 511 + 1);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while sink.durable_below().0 != 522 {
        assert!(std::time::Instant::now() < until, "the full pack is made durable beside");
        std::thread::yield_now();
    }
    assert_eq!(push(&mut sink, 522, 1), 523, "known in a durable pack");
    assert_eq!(push(&mut sink, 523, 2001), 523, "new in an open pack");
    assert_eq!(push(&mut sink, 524, 1), 523);
    assert_eq!(push(&mut sink, 525, 2001), 523, "known in an open pack");
    sink.finish().unwrap();
    let point = writer.commit(meta(&[disk("vda")])).unwrap();
    let mut model = Model::of_blocks(BlockSize::DEFAULT, 2000);
    model.blocks.extend((0..512).map(|n| (10 + n, 2 * n + 1)));
    model.blocks.extend([(522, 1), (523, 2001), (524, 1), (525, 2001)]);
    prove(&repo, &point, &disk("vda"), &model);
}

#[test]
fn a_resized_last_block_must_be_pushed_again() {
    let repo = repository(&Arc::new(SimFileSystem::new()), Compression::Zstd(1));
    let mut model = Model { size_bytes: 3 * BLOCK as u64 + 5, ..Model::default() };
    model.blocks.insert(3, 9);
    let first = write_point(&repo, ChainChoice::New, &disk("vda"), None, &model, &all(&model));
    for size_bytes in [4 * BLOCK as u64, 3 * BLOCK as u64 + 1] {
        let writer = begin(&repo, ChainChoice::Existing(first.chain.clone()));
        let parent = Some(first.id.clone());
        let mut hands = writer.disk(DiskStart { size_bytes, parent, ..start(0) }).unwrap();
        let found = hands.cursor.parent_blocks(BlockIndex(2), 2).unwrap();
        assert_eq!(found, [ParentBlock::Zero, ParentBlock::Absent]);
        assert!(matches!(hands.sink.finish(), Err(Error::Push { index: BlockIndex(3), .. })));
        assert!(matches!(writer.commit(meta(&[])), Err(Error::Refused { .. })));
    }
}

#[test]
fn a_parent_of_another_chain_or_without_the_disk_is_refused() {
    let repo = repository(&Arc::new(SimFileSystem::new()), Compression::Zstd(1));
    let model = Model::of_blocks(BlockSize::DEFAULT, 3);
    let one = write_point(&repo, ChainChoice::New, &disk("vda"), None, &model, &all(&model));
    let two = write_point(&repo, ChainChoice::New, &disk("vdb"), None, &model, &all(&model));
    let writer = begin(&repo, ChainChoice::Existing(two.chain.clone()));
    let begin_on = |parent: &icecore_repository::PointId| {
        writer.disk(DiskStart { parent: Some(parent.clone()), ..start(3) }).err()
    };
    assert!(matches!(begin_on(&one.id), Some(Error::Refused { .. })));
    assert!(matches!(begin_on(&two.id), Some(Error::NotFound { .. })));
    assert!(matches!(begin_on(&"00000000000000".parse().unwrap()), Some(Error::NotFound { .. })));
}

#[test]
fn after_a_failed_write_nothing_of_the_point_is_trusted() {
    let fs = Arc::new(SimFileSystem::new());
    let repo = repository(&fs, Compression::None);
    let writer = begin(&repo, ChainChoice::New);
    let DiskWriter { encoders, mut sink, .. } = writer.disk(start(2000)).unwrap();
    let mut encoder = encoders.encoder().unwrap();
    let mut encode = |value| encoder.encode(&block_bytes(value, BLOCK), ParentBlock::Absent);
    sink.push(BlockIndex(0), encode(1)).unwrap();
    fs.inject(fs.calls(), CallFault::Fail(rustix::io::Errno::IO));
    let mut failed = None;
    for at in 1..600 {
        if let Err(error) = sink.push(BlockIndex(at), encode(2 * at + 1)) {
            failed = Some((at, error));
            break;
        }
    }
    let (at, error) = failed.unwrap();
    assert!(error.to_string().contains("packs/"), "{error}");
    let again = sink.push(BlockIndex(at + 1), Encoded::Zero);
    assert!(matches!(again, Err(Error::Poisoned { .. })), "{again:?}");
    drop(sink);
    let committed = writer.commit(meta(&[]));
    assert!(matches!(committed, Err(Error::Poisoned { .. })));
    assert!(repo.points().unwrap().is_empty());
    let model = Model::of_blocks(BlockSize::DEFAULT, 3);
    write_point(&repo, ChainChoice::New, &disk("vda"), None, &model, &all(&model));
}

#[test]
fn trimming_a_large_disk_costs_a_few_hundred_bytes_a_region() {
    let repo = repository(&Arc::new(SimFileSystem::new()), Compression::Zstd(1));
    let mut model = Model::of_blocks(BlockSize::DEFAULT, 1 << 24);
    model.blocks.extend((0..2000).map(|n| (n * 8191, 2 + 2 * (n % 3))));
    let vda = disk("vda");
    let first = write_point(&repo, ChainChoice::New, &vda, None, &model, &all(&model));
    let chain = || ChainChoice::Existing(first.chain.clone());
    model.blocks.clear();
    let dirty = Dirty { zero_ranges: vec![(0, 1 << 24)], ..Dirty::default() };
    let second = write_point(&repo, chain(), &vda, Some(&first.id), &model, &dirty);
    prove(&repo, &second, &vda, &model);
    assert!(second.stored_bytes < 256 * 64 + 500, "{}", second.stored_bytes);
    // And it is zero for its children.
    model.blocks.insert(77, 3);
    let dirty = Dirty { blocks: [77, 8191].into(), ..Dirty::default() };
    let third = write_point(&repo, chain(), &vda, Some(&second.id), &model, &dirty);
    prove(&repo, &third, &vda, &model);
    let third = repo.disk_reader(&third, &vda).unwrap();
    let first = repo.disk_reader(&first, &vda).unwrap();
    assert_eq!(third.diff(&first).count(), 2001);
}

#[test]
fn parts_of_the_capsule_come_back_whole() {
    let repo = repository(&Arc::new(SimFileSystem::new()), Compression::Zstd(1));
    let writer = begin(&repo, ChainChoice::New);
    let part = |name, bytes: &[u8]| CapsulePart { name: disk(name), bytes: bytes.to_vec() };
    let mut meta = meta(&[]);
    meta.parts =
        vec![part("nvram", &block_bytes(3, 540_672)), part("empty", b""), part("tpm", b"t")];
    let point = writer.commit(meta).unwrap();
    assert_eq!(repo.capsule_part(&point, "nvram").unwrap(), block_bytes(3, 540_672));
    assert_eq!(repo.capsule_part(&point, "empty").unwrap(), b"");
    assert_eq!(repo.capsule_part(&point, "tpm").unwrap(), b"t");
    assert!(matches!(repo.capsule_part(&point, "x"), Err(Error::NotFound { .. })));
}

#[test]
fn neighbours_are_read_together_and_gaps_are_zero() {
    let repo = repository(&Arc::new(SimFileSystem::new()), Compression::Zstd(1));
    let size = BlockSize::DEFAULT;
    let mut model = Model { size_bytes: 40 * BLOCK as u64 + 77, ..Model::default() };
    model.blocks.extend([(0, 1), (1, 3), (2, 2), (5, 5), (6, 1), (30, 7), (40, 9)]);
    let vda = disk("vda");
    let point = write_point(&repo, ChainChoice::New, &vda, None, &model, &all(&model));
    let reader = repo.disk_reader(&point, &vda).unwrap();
    let entries: Vec<_> = reader.entries(BlockIndex(0)).map(Result::unwrap).collect();
    let mut decoder = reader.decoder().unwrap();
    let whole: Vec<u8> = (0..=40).flat_map(|at| model.block(size, at)).collect();
    for (first, last) in [(0, 41), (1, 3), (3, 5), (5, 7), (40, 41), (29, 41)] {
        let here: Vec<_> = entries
            .iter()
            .filter(|entry| (first..last).contains(&entry.index.0))
            .copied()
            .collect();
        let range = first as usize * BLOCK..(last as usize * BLOCK).min(whole.len());
        let mut out = vec![0xee; range.len()];
        decoder.read_many(BlockIndex(first), &here, &mut out).unwrap();
        assert!(out == whole[range], "{first}..{last}");
    }
    let misplaced = decoder.read_many(BlockIndex(2), &entries[..1], &mut vec![0; BLOCK]);
    assert!(matches!(misplaced, Err(Error::Refused { .. })));
    let descending = [entries[1], entries[0]];
    let misplaced = decoder.read_many(BlockIndex(0), &descending, &mut vec![0; 2 * BLOCK]);
    assert!(matches!(misplaced, Err(Error::Refused { .. })));
}
