//! Disk images on the host, through qemu-img and plain files.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use crate::disk::Fs;
use crate::failure::{During, Failure, Result};
use crate::process::run;

/// Read in pieces of this size when two images are compared.
const COMPARE_BYTES: usize = 1 << 20;

/// A blank qcow2 image.
pub fn create_qcow2(path: &Path, bytes: u64) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(bytes.to_string());
    run(&mut command).map(drop)
}

/// A blank, sparse raw image.
pub fn create_raw(path: &Path, bytes: u64) -> Result<()> {
    File::create(path).and_then(|file| file.set_len(bytes)).during(path.display())
}

/// A raw image of bytes that neither compress nor repeat, the same for the same seed.
pub fn create_noise(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    let file = File::create(path).during(path.display())?;
    let mut file = std::io::BufWriter::new(file);
    // xorshift64*: nobody has to be surprised by it but zstd.
    let mut state = seed | 1;
    for _ in 0..bytes / 8 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        file.write_all(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())?;
    }
    Ok(file.flush()?)
}

/// A copy, holes included.
pub(crate) fn copy_image(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").arg("--sparse=always").arg(from).arg(to)).map(drop)
}

/// A qcow2 image over a qcow2 backing file.
pub fn create_overlay(path: &Path, backing: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(backing).arg(path);
    run(&mut command).map(drop)
}

/// What a guest would read from an image, as a sparse raw file. The image may be in use: only
/// what its QEMU has written to the file is seen, so have it stopped (that flushes).
pub fn image_to_raw(image: &Path, format: &str, raw: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-U", "-f", format, "-O", "raw"]).arg(image).arg(raw);
    run(&mut command).map(drop)
}

/// Compares two raw images byte for byte; a failure names the first difference.
pub fn compare(expected: &Path, actual: &Path) -> Result<()> {
    let shown = format!("{} and {}", expected.display(), actual.display());
    let mut left = File::open(expected).during(expected.display())?;
    let mut right = File::open(actual).during(actual.display())?;
    let (left_bytes, right_bytes) = (left.metadata()?.len(), right.metadata()?.len());
    if left_bytes != right_bytes {
        return Err(Failure::new(format!("{shown}: {left_bytes} and {right_bytes} bytes")));
    }
    let mut buffers = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    let mut offset = 0;
    while offset < left_bytes {
        let want = usize::try_from(left_bytes - offset).unwrap_or(COMPARE_BYTES).min(COMPARE_BYTES);
        left.read_exact(&mut buffers.0[..want])?;
        right.read_exact(&mut buffers.1[..want])?;
        if buffers.0[..want] != buffers.1[..want] {
            let pairs = buffers.0.iter().zip(&buffers.1);
            let at = offset + pairs.take_while(|(one, other)| one == other).count() as u64;
            return Err(Failure::new(format!("{shown} differ first at byte {at}")));
        }
        offset += want as u64;
    }
    Ok(())
}

/// The SHA-256 of a file, in hex.
pub fn sha256_of(path: &Path) -> Result<String> {
    let output = run(Command::new("sha256sum").arg(path))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Runs the file system's own checker over an image; what it would repair is a failure. The log
/// must have been replayed before (mounting does that).
pub fn filesystem_check(image: &Path, fs: Fs) -> Result<()> {
    let mut command = match fs {
        Fs::Raw => return Ok(()),
        Fs::Ext4 => Command::new("e2fsck"),
        Fs::Xfs => Command::new("xfs_repair"),
    };
    command.args(if fs == Fs::Ext4 { &["-f", "-n"][..] } else { &["-n", "-f"][..] });
    run(command.arg(image)).map(drop)
}
