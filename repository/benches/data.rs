//! What each block costs on its way into a repository and out of it.
#![allow(missing_docs, reason = "benchmarks have no users")]
#![allow(clippy::unwrap_used)] // a benchmark that panics has failed

#[path = "../tests/support/mod.rs"]
mod support;

use std::fmt;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use icecore_repository::{
    BlockIndex, ChainChoice, DiskStart, Encoded, Entry, InitOptions, ParentBlock, Point, Repository,
};
use support::{begin, disk, meta};

const BLOCK: usize = 64 << 10;
/// Blocks of the disks here: 256 MiB, in 16 pages of a map.
const BLOCKS: u64 = 4096;

fn main() {
    divan::main();
}

/// What a block is filled with.
#[derive(Clone, Copy)]
enum Content {
    Zero,
    Text,
    Noise,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zero => "zeroes",
            Self::Text => "text",
            Self::Noise => "noise",
        })
    }
}

/// Blocks differ by their number.
fn block(content: Content, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    match content {
        Content::Zero => {}
        Content::Text => {
            let line =
                |n: u64| format!("{:x} GET /index.html?n={} 200\n", n.rotate_left(29), n % 97);
            let text = (number * 10_000..).flat_map(|n| line(n).into_bytes());
            bytes.iter_mut().zip(text).for_each(|(byte, letter)| *byte = letter);
        }
        Content::Noise => {
            blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
        }
    }
    bytes
}

struct Lab {
    _folder: tempfile::TempDir,
    repository: Repository,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let repository =
            Repository::init(folder.path().join("repository"), InitOptions::default()).unwrap();
        Self { _folder: folder, repository }
    }

    /// A point of one disk, all noise, which costs no compression.
    fn point(&self, blocks: u64) -> Point {
        let writer = begin(&self.repository, ChainChoice::New);
        let mut parts = writer.disk(start(blocks, None)).unwrap();
        let mut encoder = parts.encoders.encoder().unwrap();
        for number in 0..blocks {
            let encoded = encoder.encode(&block(Content::Noise, number), ParentBlock::Absent);
            parts.sink.push(BlockIndex(number), encoded).unwrap();
        }
        parts.sink.finish().unwrap();
        writer.commit(meta(&[disk("vda")])).unwrap()
    }
}

fn start(blocks: u64, parent: Option<&Point>) -> DiskStart {
    let parent = parent.map(|point| point.id.clone());
    DiskStart { disk: disk("vda"), size_bytes: blocks * BLOCK as u64, parent }
}

/// Zero test, id, compression.
#[divan::bench(args = [Content::Zero, Content::Text, Content::Noise])]
fn encode_a_new_block(bencher: Bencher<'_, '_>, content: Content) {
    let lab = Lab::new();
    let writer = begin(&lab.repository, ChainChoice::New);
    let parts = writer.disk(start(BLOCKS, None)).unwrap();
    let mut encoder = parts.encoders.encoder().unwrap();
    let bytes = block(content, 1);
    let count = BytesCount::new(BLOCK);
    bencher.counter(count).bench_local(|| encoder.encode(black_box(&bytes), ParentBlock::Absent));
}

/// Zero test and id alone: what a block costs that the parent has.
#[divan::bench]
fn encode_a_block_of_the_parent(bencher: Bencher<'_, '_>) {
    let lab = Lab::new();
    let hasher = lab.repository.hasher();
    let bytes = block(Content::Text, 1);
    let count = BytesCount::new(BLOCK);
    bencher.counter(count).bench_local(|| hasher.block_id(black_box(&bytes)));
}

/// Frames into packs, packs into the store with their syncs, map and content tree: 256 MiB.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn push_encoded_blocks(bencher: Bencher<'_, '_>) {
    let lab = Lab::new();
    let writer = begin(&lab.repository, ChainChoice::New);
    let parts = writer.disk(start(BLOCKS, None)).unwrap();
    let mut encoder = parts.encoders.encoder().unwrap();
    let encode = |n| encoder.encode(&block(Content::Noise, n), ParentBlock::Absent);
    let encoded: Vec<Encoded> = (0..BLOCKS).map(encode).collect();
    writer.abort();
    bencher
        .counter(BytesCount::new(BLOCKS * BLOCK as u64))
        .with_inputs(|| (begin(&lab.repository, ChainChoice::New), encoded.clone()))
        .bench_local_values(|(writer, encoded)| {
            let mut sink = writer.disk(start(BLOCKS, None)).unwrap().sink;
            for (number, block) in encoded.into_iter().enumerate() {
                sink.push(BlockIndex(number as u64), block).unwrap();
            }
            sink.finish().unwrap();
        });
}

/// What the parent holds, asked block after block.
#[divan::bench]
fn look_up_the_parent(bencher: Bencher<'_, '_>) {
    let lab = Lab::new();
    let point = lab.point(BLOCKS);
    let chain = || ChainChoice::Existing(point.chain.clone());
    bencher
        .counter(ItemsCount::new(BLOCKS))
        .with_inputs(|| begin(&lab.repository, chain()))
        .bench_local_values(|writer| {
            let mut parts = writer.disk(start(BLOCKS, Some(&point))).unwrap();
            (0..BLOCKS).step_by(16).for_each(|at| {
                black_box(parts.cursor.parent_blocks(BlockIndex(at), 16).unwrap());
            });
        });
}

/// The map in order, as a restore reads it.
#[divan::bench]
fn read_the_map(bencher: Bencher<'_, '_>) {
    let lab = Lab::new();
    let point = lab.point(BLOCKS);
    let reader = lab.repository.disk_reader(&point, &disk("vda")).unwrap();
    bencher.counter(ItemsCount::new(BLOCKS)).bench_local(|| {
        reader.entries(BlockIndex(0)).map(|entry| entry.unwrap().index.0).sum::<u64>()
    });
}

/// Fetch, decode and prove blocks: 16 MiB.
#[divan::bench]
fn fetch_blocks(bencher: Bencher<'_, '_>) {
    const FETCHED: usize = 256;
    let lab = Lab::new();
    let point = lab.point(BLOCKS);
    let reader = lab.repository.disk_reader(&point, &disk("vda")).unwrap();
    let entries: Vec<Entry> =
        reader.entries(BlockIndex(0)).take(FETCHED).map(Result::unwrap).collect();
    let mut decoder = reader.decoder().unwrap();
    let mut bytes = vec![0; BLOCK];
    bencher.counter(BytesCount::new(FETCHED * BLOCK)).bench_local(|| {
        for entry in &entries {
            decoder.read(entry, &mut bytes).unwrap();
        }
    });
}
