//! The fuzz entries on the stable toolchain: over the checked-in corpus, and over mutations of it
//! whose seed is printed on failure and may be given in `ICECORE_FUZZ_SEED`.
#![allow(clippy::panic, reason = "test code outside of #[test] functions")]

use std::path::{Path, PathBuf};

use icecore_nbd_client::testing::fuzz::ENTRIES;

/// Mutations of each corpus file: a second or two in all.
const MUTATIONS: u64 = 10_000;

fn corpus(entry: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(entry);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|file| file.expect("directory entry").path())
        .collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("file"))).collect()
}

/// SplitMix64: all that a mutation needs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Flips, sets, removes, doubles or appends a few bytes.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(6) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => drop(bytes.drain(at.min(end)..end)),
            3 => bytes.extend_from_within(at.min(end)..end),
            4 => bytes.truncate(at),
            _ => bytes.push(random.next() as u8),
        }
    }
}

/// Names the input when an entry panics.
struct Blame<'a>(&'a Path, u64, &'a [u8]);

impl Drop for Blame<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} with ICECORE_FUZZ_SEED={}: {:02x?}", self.0.display(), self.1, self.2);
        }
    }
}

#[test]
fn the_corpus_and_its_mutations_break_nothing() {
    let seed = std::env::var("ICECORE_FUZZ_SEED").ok().map(|text| text.parse().expect("a number"));
    for (name, entry) in ENTRIES {
        let files = corpus(name);
        assert!(!files.is_empty(), "no corpus for {name}");
        for (path, bytes) in files {
            let (from, to) = seed.map_or((0, MUTATIONS), |seed| (seed, seed + 1));
            for seed in from..to {
                let mut input = bytes.clone();
                if seed > 0 {
                    mutate(&mut input, &mut Random(seed));
                }
                let _blame = Blame(&path, seed, &input);
                entry(&input);
            }
        }
    }
}
