//! Changes: scattered blocks of new content, the same for every tool.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::image::BLOCK;
use super::random::Random;
use super::text::Text;
use crate::step::Result;

/// Rewrites `percent` of the blocks of a disk of `size` bytes: half random bytes, half text. Each
/// is put into `file` and `write` is told where on the disk it goes.
pub fn scatter(
    size: u64,
    percent: u64,
    seed: u64,
    file: &Path,
    mut write: impl FnMut(u64, &Path) -> Result<()>,
) -> Result<()> {
    let (mut random, mut text) = (Random::new(seed * 1000 + 17), Text::new(seed * 1000 + 19));
    let mut block = vec![0; BLOCK as usize];
    let blocks = size / BLOCK;
    for index in random.sample(blocks * percent / 100, blocks) {
        if random.below(2) == 0 {
            random.fill(&mut block)
        } else {
            text.fill(&mut block)
        }
        std::fs::write(file, &block)?;
        write(index * BLOCK, file)?;
    }
    Ok(())
}

/// The same on a raw file.
pub fn scatter_raw(raw: &Path, size: u64, percent: u64, seed: u64, file: &Path) -> Result<()> {
    let disk = File::options().write(true).open(raw)?;
    scatter(size, percent, seed, file, |offset, content| {
        Ok(disk.write_all_at(&std::fs::read(content)?, offset)?)
    })
}
