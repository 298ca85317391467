//! File systems of restored disks, mounted and judged on the host.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disk::Fs;
use crate::failure::Result;
use crate::image::filesystem_check;
use crate::place::{Scratch, workspace_root};
use crate::process::run;

/// A loop mount of a raw image, unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    /// Mounts writable, so that the file system replays its log.
    pub fn new(image: &Path, fs: Fs, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        // Two copies of one XFS carry one UUID.
        let options = if fs == Fs::Xfs { "loop,nouuid" } else { "loop" };
        let mut command = Command::new("mount");
        run(command.args(["-t", fs.name(), "-o", options]).arg(image).arg(dir))?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// The mount point.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg(&self.dir));
    }
}

/// Judges what the ordered writer left under these mount points (in its order of disks).
pub fn check_writer(dirs: &[&Path]) -> Result<()> {
    let script = workspace_root().join("images/guest/bin/check-writer");
    run(Command::new("sh").arg(script).args(dirs)).map(drop)
}

/// Mounts copies of raw images, judges the writer's work on them, and has each file system's
/// checker look over the copy. The images stay as they are.
pub fn check_writer_in_images(images: &[(PathBuf, Fs)]) -> Result<()> {
    if images.is_empty() {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut copies = Vec::new();
    let mut mounts = Vec::new();
    for (index, (image, fs)) in images.iter().enumerate() {
        let copy = scratch.join(format!("copy{index}"));
        let mut command = Command::new("cp");
        run(command.args(["--sparse=always", "--reflink=auto"]).arg(image).arg(&copy))?;
        mounts.push(Mounted::new(&copy, *fs, &scratch.join(format!("mount{index}")))?);
        copies.push((copy, *fs));
    }
    let dirs: Vec<&Path> = mounts.iter().map(Mounted::dir).collect();
    check_writer(&dirs)?;
    drop(mounts);
    copies.iter().try_for_each(|(copy, fs)| filesystem_check(copy, *fs))
}
