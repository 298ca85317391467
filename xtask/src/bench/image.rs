//! The reference image: a disk with a realistic mix of content, the same for the same seed.
//!
//! A quarter of the data is an ext4 file system with a real tree, a quarter is incompressible, a
//! quarter is like text, an eighth is explicit zeroes, an eighth repeats earlier data (half of it
//! in single blocks, half in runs of megabytes). All but the file system is cut into extents of
//! 64 KiB to 16 MiB, shuffled, and spread with holes between.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::files;
use super::random::Random;
use super::text::Text;
use crate::step::{Failure, Result};

/// What dedup and duplicates are aligned to.
pub const BLOCK: u64 = 64 << 10;
const MIB: u64 = 1 << 20;
/// Lengths of extents in blocks, by how often each is wanted.
const LENGTHS: [u64; 8] = [1, 2, 4, 16, 16, 64, 64, 256];
const LONG_COPIES: [u64; 3] = [MIB, 2 * MIB, 4 * MIB];
const SEED: u64 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Random,
    Text,
    Zero,
    CopyBlock,
    CopyRun,
}

/// Makes the image as a sparse raw file of `size` bytes with about `data` bytes in it.
pub fn build(path: &Path, size: u64, data: u64) -> Result<()> {
    let out = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    out.set_len(size)?;
    let quarter = data / 4 / BLOCK * BLOCK;
    let start = MIB + files::write(&out, path, MIB, quarter)?;
    let extents = cut(quarter);
    let used: u64 = extents.iter().map(|(_, len)| len).sum();
    let holes = size.checked_sub(start + used).ok_or_else(|| {
        Failure::new("the image is too small for its data: give it twice the --data")
    })?;
    Writer::new(out).write(&extents, start, holes / BLOCK)
}

/// The extents in the order in which they lie.
fn cut(quarter: u64) -> Vec<(Kind, u64)> {
    let mut random = Random::new(SEED * 1000 + 7);
    let half = quarter / 2;
    let parts = [
        (Kind::Random, quarter),
        (Kind::Text, quarter),
        (Kind::Zero, half),
        (Kind::CopyBlock, half / 2),
        (Kind::CopyRun, half / 2),
    ];
    let mut extents = Vec::new();
    for (kind, mut left) in parts {
        while left >= BLOCK {
            let wanted = match kind {
                Kind::CopyBlock => BLOCK,
                Kind::CopyRun => random.pick(&LONG_COPIES),
                _ => random.pick(&LENGTHS) * BLOCK,
            };
            let len = wanted.min(left) / BLOCK * BLOCK;
            extents.push((kind, len));
            left -= len;
        }
    }
    random.shuffle(&mut extents);
    extents
}

struct Writer {
    out: File,
    random: Random,
    text: Text,
    /// Offset and length of what duplicates may repeat.
    originals: Vec<(u64, u64)>,
    piece: Vec<u8>,
}

impl Writer {
    fn new(out: File) -> Self {
        let (random, text) = (Random::new(SEED * 1000 + 11), Text::new(SEED * 1000 + 13));
        Self { out, random, text, originals: Vec::new(), piece: vec![0; MIB as usize] }
    }

    /// Writes the extents from `at` on; before every fourth lies a hole.
    fn write(&mut self, extents: &[(Kind, u64)], mut at: u64, hole_blocks: u64) -> Result<()> {
        let count = extents.len().div_ceil(4);
        let mut cuts: Vec<u64> = (0..count).map(|_| self.random.below(hole_blocks + 1)).collect();
        cuts.sort_unstable();
        let mut before = 0;
        for (nth, (kind, len)) in extents.iter().enumerate() {
            if nth % 4 == 0 {
                at += (cuts[nth / 4] - before) * BLOCK;
                before = cuts[nth / 4];
            }
            let kind = if self.originals.is_empty() { Kind::Random } else { *kind };
            self.extent(kind, at, *len)?;
            at += len;
        }
        Ok(())
    }

    fn extent(&mut self, kind: Kind, start: u64, len: u64) -> Result<()> {
        let (mut at, end) = (start, start + len);
        while at < end {
            let mut piece = std::mem::take(&mut self.piece);
            let filled = self.fill(kind, &mut piece[..(end - at).min(MIB) as usize])?;
            self.out.write_all_at(&piece[..filled], at)?;
            self.piece = piece;
            at += filled as u64;
        }
        if matches!(kind, Kind::Random | Kind::Text) {
            self.originals.push((start, len));
        }
        Ok(())
    }

    /// Fills the beginning of `piece` and says how much of it.
    fn fill(&mut self, kind: Kind, piece: &mut [u8]) -> Result<usize> {
        match kind {
            Kind::Random => self.random.fill(piece),
            Kind::Text => self.text.fill(piece),
            Kind::Zero => piece.fill(0),
            Kind::CopyBlock | Kind::CopyRun => {
                let (from, has) = self.random.pick(&self.originals);
                let len = has.min(piece.len() as u64);
                let shift = self.random.below((has - len) / BLOCK + 1) * BLOCK;
                self.out.read_exact_at(&mut piece[..len as usize], from + shift)?;
                return Ok(len as usize);
            }
        }
        Ok(piece.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_as_described() {
        let quarter = 64 * MIB;
        let extents = cut(quarter);
        let of = |kind| extents.iter().filter(|(is, _)| *is == kind).map(|(_, len)| len).sum();
        let sums: [u64; 5] =
            [Kind::Random, Kind::Text, Kind::Zero, Kind::CopyBlock, Kind::CopyRun].map(of);
        assert_eq!(sums, [quarter, quarter, quarter / 2, quarter / 4, quarter / 4]);
        assert!(extents.iter().all(|(_, len)| len % BLOCK == 0 && *len <= 16 * MIB));
    }
}
