//! The figures of docs/FORMAT.md, "Which shape: the arithmetic", as the code makes them.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use std::sync::Arc;

use icecore_repository::store::{Access, DirectoryStore, SimFileSystem};
use icecore_repository::{
    BlockIndex, BlockSize, ChainChoice, DiskStart, DiskWriter, Encoded, InitOptions, ParentBlock,
    Point, Repository,
};
use support::*;

/// 1 TiB in 64 KiB blocks.
const BLOCKS: u64 = 1 << 24;
/// 1 % of them.
const CHANGED: u64 = BLOCKS / 100;

fn repository() -> Repository {
    let fs = Arc::new(SimFileSystem::new());
    let store = DirectoryStore::on(fs, "memory", Access::ReadWrite);
    Repository::init_on(Arc::new(store), InitOptions::default(), now()).unwrap()
}

/// A point in which these blocks, ascending, hold one and the same data.
fn point_of(repo: &Repository, blocks: impl Iterator<Item = u64>) -> Point {
    let writer = begin(repo, ChainChoice::New);
    let size_bytes = BLOCKS * u64::from(BlockSize::DEFAULT.bytes());
    let start = DiskStart { disk: disk("vda"), size_bytes, parent: None };
    let DiskWriter { encoders, mut sink, .. } = writer.disk(start).unwrap();
    let mut encoder = encoders.encoder().unwrap();
    let data = block_bytes(3, 65_536);
    let mut known: Option<Encoded> = None;
    for block in blocks {
        let encoded = known.clone().unwrap_or_else(|| encoder.encode(&data, ParentBlock::Absent));
        known = known.or_else(|| matches!(encoded, Encoded::Known { .. }).then(|| encoded.clone()));
        sink.push(BlockIndex(block), encoded).unwrap();
    }
    sink.finish().unwrap();
    writer.commit(meta(&[disk("vda")])).unwrap()
}

#[test]
fn one_percent_scattered_costs_68_bytes_of_map_a_block() {
    // A fixed sequence without order: a linear congruence, of which the upper bits are used.
    let mut state = 88_172_645_463_325_252_u64;
    let scattered: std::collections::BTreeSet<u64> = (0..CHANGED)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) % BLOCKS
        })
        .collect();
    let count = scattered.len() as u64;
    let map_bytes = point_of(&repository(), scattered.into_iter()).disks[0].summary.map_bytes;
    assert!((66..=70).contains(&(map_bytes / count)), "{map_bytes} for {count}");
}

#[test]
fn one_percent_clustered_costs_40_bytes_of_map_a_block() {
    let map_bytes =
        point_of(&repository(), 5_000_000..5_000_000 + CHANGED).disks[0].summary.map_bytes;
    assert!((39..=40).contains(&(map_bytes / CHANGED)), "{map_bytes}");
}

#[test]
fn one_changed_block_costs_a_few_hundred_bytes_of_map() {
    let repo = repository();
    let mut model = Model::of_blocks(BlockSize::DEFAULT, BLOCKS);
    model.blocks.extend((0..5000).map(|n| (n * 3001, 2)));
    let vda = disk("vda");
    let first = write_point(&repo, ChainChoice::New, &vda, None, &model, &all(&model));
    model.blocks.insert(9, 4);
    let dirty = Dirty { blocks: [9].into(), ..Dirty::default() };
    let chain = ChainChoice::Existing(first.chain.clone());
    let second = write_point(&repo, chain, &vda, Some(&first.id), &model, &dirty);
    let map_bytes = second.disks[0].summary.map_bytes;
    assert_eq!(map_bytes, 60 + 4 + 16 + 39 + 61 + 64 + 16 + 64);
    prove(&repo, &second, &vda, &model);
}
