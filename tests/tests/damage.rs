//! A damaged repository: `check` names what is damaged, a restore of a damaged point fails.

use std::path::{Path, PathBuf};

use icecore_tests::{Icecore, MIB, Result, compare, text};

/// Positions of a file that are damaged one after the other: a prime stride reaches every field
/// of every object without running the binary for each byte (the repository's own tests do that).
const STRIDE: usize = 53;

struct Small {
    icecore: Icecore,
    image: PathBuf,
    point: String,
}

/// Data that compresses to little, so that the repository is small.
fn small_repository() -> Result<Small> {
    repository_of(|index| (index / 1000) as u8)
}

fn repository_of(byte_at: impl Fn(usize) -> u8) -> Result<Small> {
    let icecore = Icecore::new()?;
    let image = icecore.path("disk.raw");
    let mut bytes = vec![0; 2 * MIB as usize];
    for (index, byte) in bytes.iter_mut().enumerate().take(300_000).skip(70_000) {
        *byte = byte_at(index);
    }
    std::fs::write(&image, bytes)?;
    let backup = icecore.on_repository("backup").args(["--name", "vm", "--image"]);
    let report = backup.arg(format!("d0={}", image.display())).json()?;
    let point = text(&report, "point")?.to_owned();
    Ok(Small { icecore, image, point })
}

impl Small {
    /// The objects that the point consists of. How writers and gc coordinate says nothing about
    /// points.
    fn objects(&self) -> Result<Vec<PathBuf>> {
        let mut objects = Vec::new();
        collect(self.icecore.repository(), &mut objects)?;
        let coordination = self.icecore.repository().join("coordination");
        objects.retain(|object| !object.starts_with(&coordination));
        objects.sort();
        Ok(objects)
    }

    /// Whether damage done by `damage` is seen, and undoes it.
    fn survives_unnoticed(
        &self,
        object: &Path,
        damage: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<bool> {
        let whole = std::fs::read(object)?;
        damage(object)?;
        let checked = self.icecore.on_repository("check").arg("--read-data").outcome()?;
        assert!(!checked.stderr.contains("panicked"), "{}", checked.stderr);
        let target = self.icecore.path("target.raw");
        let restore = self.icecore.on_repository("restore").arg(&self.point).args(["--disk", "d0"]);
        let restored = restore.arg("--to").arg(&target).outcome()?;
        assert!(!restored.stderr.contains("panicked"), "{}", restored.stderr);
        // A restore may succeed beside the damage, but then it is right; a failed one leaves
        // nothing that looks like a disk.
        if restored.status == Some(0) {
            compare(&self.image, &target)?;
            std::fs::remove_file(&target)?;
        } else {
            assert!(!target.exists(), "{}: a failed restore left its target", object.display());
        }
        std::fs::write(object, whole)?;
        if checked.status == Some(0) && restored.status != Some(0) {
            eprintln!("{}: check is content, restore is not", object.display());
        }
        Ok(checked.status == Some(0))
    }
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { collect(&path, into)? } else { into.push(path) }
    }
    Ok(())
}

#[test]
fn flipped_bytes_are_named_and_never_restored() -> Result<()> {
    let small = small_repository()?;
    let mut unseen = Vec::new();
    for object in small.objects()? {
        let length = std::fs::read(&object)?.len();
        for position in (0..length).step_by(STRIDE).chain(length.checked_sub(1)) {
            let flip = |path: &Path| -> Result<()> {
                let mut bytes = std::fs::read(path)?;
                bytes[position] ^= 0x40;
                Ok(std::fs::write(path, bytes)?)
            };
            if small.survives_unnoticed(&object, flip)? {
                unseen.push(format!("{} byte {position}", object.display()));
            }
        }
    }
    assert!(unseen.is_empty(), "not seen: {unseen:#?}");
    small.icecore.check().map(drop)
}

#[test]
fn deleted_and_truncated_objects_are_named() -> Result<()> {
    let small = small_repository()?;
    let mut unseen = Vec::new();
    for object in small.objects()? {
        let deleted = small.survives_unnoticed(&object, |path| Ok(std::fs::remove_file(path)?))?;
        let emptied = small.survives_unnoticed(&object, |path| Ok(std::fs::write(path, b"")?))?;
        let halved = small.survives_unnoticed(&object, |path| {
            let bytes = std::fs::read(path)?;
            Ok(std::fs::write(path, &bytes[..bytes.len() / 2])?)
        })?;
        if deleted || emptied || halved {
            unseen.push(format!("{}: {deleted} {emptied} {halved}", object.display()));
        }
    }
    assert!(unseen.is_empty(), "not seen (deleted, emptied, halved): {unseen:#?}");
    Ok(())
}

#[test]
fn the_damaged_object_is_named_and_the_status_is_four() -> Result<()> {
    // Data that does not compress, so that the middle of the largest object is a block.
    let small = repository_of(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8)?;
    let objects = small.objects()?;
    let size = |path: &PathBuf| std::fs::metadata(path).map(|meta| meta.len()).unwrap_or(0);
    let largest = objects.iter().max_by_key(|path| size(path)).expect("a repository has objects");
    let mut bytes = std::fs::read(largest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(largest, bytes)?;
    let report = small.icecore.on_repository("check").arg("--read-data").expect(4)?.json()?;
    assert_eq!(report["ok"], false);
    let name = largest.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = name.split('.').next().unwrap_or(&name);
    assert!(report["errors"].to_string().contains(stem), "{stem} is not in {report}");
    let restore = small.icecore.on_repository("restore").arg(&small.point).args(["--disk", "d0"]);
    restore.arg("--to").arg(small.icecore.path("x.raw")).expect(4)?;
    Ok(())
}
