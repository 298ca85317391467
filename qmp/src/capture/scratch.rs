//! An empty qcow2 image, written by us.
//!
//! QEMU could format it (`blockdev-create`), but that runs beside other commands, and a 7.2 that
//! is asked for its nodes meanwhile, by us or by any other manager, aborts
//! (`qcow2_get_specific_info: Assertion 'false' failed`). QEMU docs/interop/qcow2.txt.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// 64 KiB: the copy-before-write filter copies in such pieces.
const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;

/// Guest bytes that one L1 entry stands for: a cluster of 8-byte L2 entries.
const L1_ENTRY_BYTES: u64 = CLUSTER_BYTES / 8 * CLUSTER_BYTES;

/// Longest header of version 3 that needs no further fields.
const HEADER_BYTES: u32 = 104;

/// Largest L1 table that QEMU opens (block/qcow2.h, `QCOW_MAX_L1_SIZE`, 32 MiB): 2 EiB of disk.
const L1_ENTRIES_MAX: u64 = 32 << 20 >> 3;

/// Metadata of an image without data.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    l1_entries: u32,
    /// Header, refcount table, refcount block, L1 table.
    clusters: u64,
}

fn layout(size_bytes: u64) -> io::Result<Layout> {
    let l1_entries = size_bytes.div_ceil(L1_ENTRY_BYTES).max(1);
    if l1_entries > L1_ENTRIES_MAX {
        let message = format!("a disk of {size_bytes} bytes is too large for a scratch image");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let clusters = 3 + (l1_entries * 8).div_ceil(CLUSTER_BYTES);
    let l1_entries = u32::try_from(l1_entries).unwrap_or(u32::MAX);
    Ok(Layout { l1_entries, clusters })
}

fn header(size_bytes: u64, layout: &Layout) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(*b"QFI\xfb");
    bytes.extend(3u32.to_be_bytes());
    bytes.extend([0; 12]); // no backing file
    bytes.extend(CLUSTER_BITS.to_be_bytes());
    bytes.extend(size_bytes.to_be_bytes());
    bytes.extend(0u32.to_be_bytes()); // not encrypted
    bytes.extend(layout.l1_entries.to_be_bytes());
    bytes.extend((3 * CLUSTER_BYTES).to_be_bytes()); // L1 table
    bytes.extend(CLUSTER_BYTES.to_be_bytes()); // refcount table
    bytes.extend(1u32.to_be_bytes()); // of one cluster
    bytes.extend([0; 12]); // no snapshots
    bytes.extend([0; 24]); // no feature bits
    bytes.extend(4u32.to_be_bytes()); // refcounts of 16 bits
    bytes.extend(HEADER_BYTES.to_be_bytes());
    bytes.extend([0; 8]); // the end of the header's extensions
    bytes
}

/// Makes `file`, which holds nothing but zeroes, an empty image for a disk of `size_bytes`. It
/// may be longer than the image needs: that room is the cap on the scratch.
pub fn format(file: &File, size_bytes: u64) -> io::Result<()> {
    let layout = layout(size_bytes)?;
    let refcounts: Vec<u8> = (0..layout.clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    file.write_all_at(&refcounts, 2 * CLUSTER_BYTES)?;
    file.write_all_at(&(2 * CLUSTER_BYTES).to_be_bytes(), CLUSTER_BYTES)?;
    if file.metadata()?.len() < layout.clusters * CLUSTER_BYTES {
        file.set_len(layout.clusters * CLUSTER_BYTES)?;
    }
    // Last, so that a half-made image is none.
    file.write_all_at(&header(size_bytes, &layout), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn qemu_finds_an_empty_image_of_that_size() {
        let folder = tempfile::tempdir().expect("a folder");
        for size in [512, 1 << 20, (1 << 29) + 512, 1 << 40, 64 << 40] {
            let path = folder.path().join(size.to_string());
            let file = File::create(&path).expect("a file");
            file.set_len(2 << 20).expect("its cap");
            format(&file, size).expect("formatted");
            let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output();
            let check = check.expect("qemu-img");
            assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
            let info = Command::new("qemu-img").args(["info", "--output=json"]).arg(&path).output();
            let info: serde_json::Value =
                serde_json::from_slice(&info.expect("qemu-img").stdout).expect("in JSON");
            assert_eq!(info["virtual-size"], serde_json::json!(size));
        }
    }

    #[test]
    fn a_disk_beyond_the_format_is_refused() {
        assert!(layout(u64::MAX).is_err());
        assert_eq!(layout(0).expect("empty").l1_entries, 1);
    }
}
