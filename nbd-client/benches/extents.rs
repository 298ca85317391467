//! Extent algebra over a million extents: what an incremental of a fragmented disk goes through.
#![allow(missing_docs, reason = "benchmarks have no users")]

use divan::{Bencher, black_box};
use icecore_nbd_client::Extent;
use icecore_nbd_client::extents::{align, intersect, join_near, split, subtract, union};

const EXTENTS: u64 = 1 << 20;
const GRANULE: u64 = 64 << 10;

fn main() {
    divan::main();
}

/// Every other granule.
fn scattered() -> impl Iterator<Item = Extent> {
    (0..EXTENTS).map(|n| Extent::new(n * 2 * GRANULE, GRANULE))
}

/// Runs of 1 MiB with gaps of 1 MiB.
fn allocated() -> impl Iterator<Item = Extent> {
    (0..EXTENTS / 16).map(|n| Extent::new(n * (2 << 20), 1 << 20))
}

fn bytes(extents: impl Iterator<Item = Extent>) -> u64 {
    extents.map(|extent| black_box(extent).length).sum()
}

#[divan::bench(items_count = EXTENTS)]
fn union_of_two() -> u64 {
    bytes(union(scattered(), allocated()))
}

#[divan::bench(items_count = EXTENTS)]
fn intersection_of_two() -> u64 {
    bytes(intersect(scattered(), allocated()))
}

#[divan::bench(items_count = EXTENTS)]
fn difference_of_two() -> u64 {
    bytes(subtract(scattered(), allocated()))
}

#[divan::bench(items_count = EXTENTS, args = [4 << 10, 128 << 10])]
fn near_ones_joined(bencher: Bencher<'_, '_>, gap_max: u64) {
    bencher.bench(|| bytes(join_near(scattered(), gap_max)));
}

#[divan::bench(items_count = EXTENTS)]
fn aligned_and_split() -> u64 {
    bytes(split(align(scattered(), 128 << 10, u64::MAX), 1 << 20))
}
