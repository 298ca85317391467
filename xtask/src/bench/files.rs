//! The quarter of the reference image that is a file system with real files.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::random::Random;
use crate::step::{Result, captured, program};

const TREE: &str = "/usr";
const JOURNAL_MIB: u64 = 16;
/// A file's share of directories and inodes, beside its blocks.
const FILE_COST: u64 = 1024;
const MIB: u64 = 1 << 20;
/// Fixed, so that the file system's own structures are the same each time.
const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";
const TIME: &str = "1700000000";

/// Puts an ext4 filled with about `bytes` of files into `out` at `offset`; gives its length.
pub fn write(out: &File, beside: &Path, offset: u64, bytes: u64) -> Result<u64> {
    let (tree, image) = (beside.with_extension("tree"), beside.with_extension("ext4"));
    let count = copy_files(&tree, (bytes / 100 * 97).saturating_sub(JOURNAL_MIB * MIB))?;
    let total = bytes / 100 * 106 / MIB * MIB;
    File::create(&image)?.set_len(total)?;
    let mut make = program("mke2fs");
    make.env("E2FSPROGS_FAKE_TIME", TIME).env("SOURCE_DATE_EPOCH", TIME);
    make.args(["-q", "-F", "-t", "ext4", "-m", "0", "-U", UUID]);
    make.arg("-J").arg(format!("size={JOURNAL_MIB}"));
    make.arg("-E").arg(format!("hash_seed={UUID},lazy_itable_init=1"));
    make.arg("-N").arg((count * 2 + 4000).to_string()).arg("-d").arg(&tree).arg(&image);
    captured(&mut make)?;
    copy_data(&File::open(&image)?, out, offset)?;
    std::fs::remove_file(&image)?;
    std::fs::remove_dir_all(&tree)?;
    Ok(total)
}

/// Copies files of the system, in a seeded order, until `room` is full; gives how many.
fn copy_files(to: &Path, room: u64) -> Result<usize> {
    let mut files = Vec::new();
    list(Path::new(TREE), &mut files);
    files.sort();
    Random::new(1).shuffle(&mut files);
    let (mut left, mut count) = (room, 0);
    for (path, bytes) in files {
        let needs = bytes.div_ceil(4096) * 4096 + FILE_COST;
        if needs > left {
            continue;
        }
        let target = to.join(path.strip_prefix("/").unwrap_or(&path));
        target.parent().map(std::fs::create_dir_all).transpose()?;
        // A file that may not be read is left out.
        if std::fs::copy(&path, &target).is_ok() {
            (left, count) = (left - needs, count + 1);
        }
        if left < MIB {
            break;
        }
    }
    Ok(count)
}

/// Regular files below `dir`; what cannot be listed is left out.
fn list(dir: &Path, found: &mut Vec<(PathBuf, u64)>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => list(&entry.path(), found),
            Ok(kind) if kind.is_file() => {
                found.push((entry.path(), entry.metadata().map_or(0, |meta| meta.len())));
            }
            _ => {}
        }
    }
}

/// Copies what is not zero, so that holes stay holes.
fn copy_data(from: &File, to: &File, offset: u64) -> Result<()> {
    let (len, mut piece, mut at) = (from.metadata()?.len(), vec![0; 64 << 10], 0);
    while at < len {
        let part = &mut piece[..(len - at).min(64 << 10) as usize];
        from.read_exact_at(part, at)?;
        if part.iter().any(|byte| *byte != 0) {
            to.write_all_at(part, offset + at)?;
        }
        at += part.len() as u64;
    }
    Ok(())
}
