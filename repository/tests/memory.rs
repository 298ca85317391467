//! A terabyte with a million scattered blocks, written and read within a small, fixed memory.
//!
//! The test runs itself again as a child, so that the peak it measures is that of this work alone.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use std::process::Command;

use icecore_repository::{
    BlockIndex, BlockSize, ChainChoice, ContentHasher, DiskStart, DiskWriter, Encoded, InitOptions,
    Point, PointId, Repository,
};
use support::*;

const CHILD: &str = "ICECORE_MEMORY_TEST_CHILD";
/// 1 TiB in 64 KiB blocks.
const BLOCKS: u64 = 1 << 24;
/// Every sixteenth block: each of the 65,536 spans is touched.
const STRIDE: u64 = 16;
/// What the work may take beyond an idle process: indexes, windows, one open pack's table, dedup.
const PEAK_KIB_MAX: u64 = 32 << 10;

#[test]
fn a_million_scattered_blocks_of_a_terabyte_fit_a_small_memory() {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    let this = std::env::current_exe().unwrap();
    let name = "a_million_scattered_blocks_of_a_terabyte_fit_a_small_memory";
    let status = Command::new(this).args([name, "--exact", "--nocapture"]).env(CHILD, "1").status();
    assert!(status.unwrap().success());
}

fn child() {
    let folder = tempfile::tempdir().unwrap();
    let repo = Repository::init(folder.path().join("repo"), InitOptions::default()).unwrap();
    let idle = peak_kib();
    let first = scattered(&repo, ChainChoice::New, None, 3);
    let chain = || ChainChoice::Existing(first.chain.clone());
    let second = scattered(&repo, chain(), Some(&first.id), 5);
    let again = scattered(&repo, chain(), Some(&second.id), 5);
    assert_eq!(again.disks[0].content_root, second.disks[0].content_root);
    assert_eq!(again.stored_bytes, 0, "nothing changed, nothing is stored");
    restore(&repo, &second);
    let readers = [&first, &second].map(|p| repo.disk_reader(p, &disk("vda")).unwrap());
    assert_eq!(readers[0].diff(&readers[1]).count() as u64, BLOCKS / STRIDE);
    let used = peak_kib() - idle;
    println!("peak beyond an idle process: {used} KiB");
    assert!(used <= PEAK_KIB_MAX, "{used} KiB");
}

/// A million blocks of a few contents, the parent asked for each.
fn scattered(repo: &Repository, chain: ChainChoice, parent: Option<&PointId>, salt: u64) -> Point {
    let writer = begin(repo, chain);
    let size_bytes = BLOCKS * u64::from(BlockSize::DEFAULT.bytes());
    let start = DiskStart { disk: disk("vda"), size_bytes, parent: parent.cloned() };
    let DiskWriter { mut cursor, encoders, mut sink } = writer.disk(start).unwrap();
    let mut encoder = encoders.encoder().unwrap();
    let contents: Vec<Vec<u8>> = (0..4).map(|n| block_bytes(salt + 2 * n, 65_536)).collect();
    // Encoding a million blocks takes long unoptimised: each content and each parent's state once.
    let mut seen: Vec<(icecore_repository::ParentBlock, usize, Encoded)> = Vec::new();
    for number in 0..BLOCKS / STRIDE {
        let at = BlockIndex(number * STRIDE + number % STRIDE);
        let parent = cursor.parent_blocks(at, 1).unwrap()[0];
        let content = (number % 4) as usize;
        let known = seen.iter().find(|(p, c, _)| *p == parent && *c == content);
        let encoded = match known {
            Some((_, _, encoded)) => encoded.clone(),
            None => {
                let encoded = encoder.encode(&contents[content], parent);
                if !matches!(encoded, Encoded::New { .. }) {
                    seen.push((parent, content, encoded.clone()));
                }
                encoded
            }
        };
        sink.push(at, encoded).unwrap();
    }
    sink.finish().unwrap();
    writer.commit(meta(&[disk("vda")])).unwrap()
}

fn restore(repo: &Repository, point: &Point) {
    let reader = repo.disk_reader(point, &disk("vda")).unwrap();
    let mut decoder = reader.decoder().unwrap();
    let mut root = ContentHasher::new(reader.size_bytes(), reader.block_size());
    let mut block = vec![0; 65_536];
    let mut count = 0_u64;
    for entry in reader.entries(BlockIndex(0)) {
        let entry = entry.unwrap();
        root.push(entry.index, &entry.id);
        if count.is_multiple_of(1024) {
            decoder.read(&entry, &mut block).unwrap();
        }
        count += 1;
    }
    assert_eq!(count, BLOCKS / STRIDE);
    assert_eq!(root.finish(), point.disks[0].content_root);
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
