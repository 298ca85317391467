//! Which format an image has, decided here and told to QEMU: QEMU itself never guesses.
//!
//! A guest can write a qcow2 header into the raw disk that it owns, and whoever probes such an image
//! opens what the header names. So a block device and a file called `*.raw` or `*.img` are raw
//! whatever they hold; only other files are looked at.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use serde::Serialize;

/// The formats that are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Raw,
    Qcow2,
}

const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

impl Format {
    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// The format of the image at `path`.
pub fn of_file(path: &Path) -> std::io::Result<Format> {
    let named_raw = path.extension().is_some_and(|e| e == "raw" || e == "img");
    if named_raw || std::fs::metadata(path)?.file_type().is_block_device() {
        return Ok(Format::Raw);
    }
    let mut magic = Vec::new();
    File::open(path)?.take(QCOW2_MAGIC.len() as u64).read_to_end(&mut magic)?;
    Ok(if magic == QCOW2_MAGIC { Format::Qcow2 } else { Format::Raw })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_image_stays_raw_whatever_its_guest_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            of_file(&path).unwrap()
        };
        assert_eq!(write("a.raw", b"QFI\xfb...."), Format::Raw);
        assert_eq!(write("a.qcow2", b"QFI\xfb...."), Format::Qcow2);
        assert_eq!(write("b", b""), Format::Raw);
    }
}
