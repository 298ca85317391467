//! What a point of a domain is held against: its `vdb` byte for byte, its `vda` by its writer.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::disk::Fs;
use crate::failure::Result;
use crate::icecore::{Icecore, Run};
use crate::image::{compare, image_to_raw};
use crate::libvirt::Domain;
use crate::mount::check_writer_in_images;
use crate::proof::text;
use crate::shell::Shell;

/// Writes random content at a place of `vdb` and waits until it is in the image.
pub fn write_vdb(shell: &mut Shell, at_mib: u64, mib: u64) -> Result<()> {
    let command = format!(
        "dd if=/dev/urandom of=/dev/lab/vdb bs=1M seek={at_mib} count={mib} conv=notrunc,fsync 2>&1"
    );
    shell.run(&command).map(drop)
}

/// What `vdb` holds now; the guest leaves it alone between writes.
pub fn reference_vdb(domain: &Domain<'_>, raw: &Path) -> Result<()> {
    image_to_raw(&domain.image("vdb"), "qcow2", raw)
}

/// Restores a point and judges it: `vdb` byte for byte, `vda` by its writer's order.
pub fn prove_point(icecore: &Icecore, report: &Value, vdb: &Path) -> Result<()> {
    let point = text(report, "point")?;
    let folder = icecore.path(&format!("restored-{point}"));
    icecore.restore_all(point, &folder)?;
    compare(vdb, &folder.join("vdb.raw"))?;
    check_writer_in_images(&[(folder.join("vda.raw"), Fs::Ext4)])?;
    Ok(std::fs::remove_dir_all(folder)?)
}

/// Takes a point with this command and proves it; gives its report, and `vdb` as it was.
pub fn prove_backup(
    icecore: &Icecore,
    domain: &Domain<'_>,
    backup: Run,
) -> Result<(Value, PathBuf)> {
    let raw = icecore.path("reference.raw");
    reference_vdb(domain, &raw)?;
    let report = backup.json()?;
    let kept = icecore.path(&format!("{}.raw", text(&report, "point")?));
    std::fs::rename(raw, &kept)?;
    prove_point(icecore, &report, &kept)?;
    Ok((report, kept))
}
