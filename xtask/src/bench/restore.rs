//! Restores of the reference image to a qcow2, beside copying the raw image to the same.

use std::path::{Path, PathBuf};

use super::lab::{Lab, blank_qcow2, forget_bitmaps};
use super::measure::{Children, Sample};
use super::server::NbdServer;
use super::{Bench, RESTORE, RESTORE_COPY, RESTORE_FILE, RESTORE_UNPROVEN, peers};
use crate::step::{Result, captured, program};

/// What is measured here.
pub const ROWS: [&str; 4] = [RESTORE_COPY, RESTORE, RESTORE_UNPROVEN, RESTORE_FILE];

/// A repository with one point.
pub fn prepare(bench: &mut Bench) -> Option<PathBuf> {
    bench.prepare("restore", |lab| {
        let repository = lab.repository("restore")?;
        captured(&mut lab.backup_image(&lab.qcow2, &repository))?;
        forget_bitmaps(&lab.qcow2)?;
        Ok(repository)
    })
}

/// All rows, once.
pub fn round(bench: &mut Bench, repository: &Path) {
    bench.row(RESTORE_COPY, |lab| to_server(lab, |uri| peers::write_all(&lab.raw, uri)));
    for (name, verify) in [(RESTORE, "root"), (RESTORE_UNPROVEN, "none")] {
        bench.row(name, |lab| {
            to_server(lab, |uri| {
                let mut command = lab.icecore(&["restore", "latest", "--disk", "vda"]);
                command.args(["--verify", verify, "--to", uri]).arg("--repo").arg(repository);
                command
            })
        });
    }
    bench.row(RESTORE_FILE, |lab| {
        let out = lab.fresh("restored")?.join("disk.qcow2");
        let mut command = lab.icecore(&["restore", "latest", "--disk", "vda", "--to"]);
        command.arg(&out).arg("--repo").arg(repository);
        let sample = lab.measure(command, Children::Server, None, None)?;
        let mut compare = program("qemu-img");
        captured(compare.args(["compare", "-q"]).arg(&lab.qcow2).arg(&out))?;
        Ok(sample)
    });
}

/// A fresh qcow2 behind a server each time.
fn to_server(lab: &Lab, client: impl FnOnce(&str) -> std::process::Command) -> Result<Sample> {
    let image = lab.fresh("restored")?.join("disk.qcow2");
    blank_qcow2(&image, lab.size)?;
    let server = NbdServer::start(&image, lab.path("nbd.sock"), true)?;
    let sample = lab.measure(client(&server.uri()), Children::Client, Some(server.pid()), None)?;
    server.stop()?;
    Ok(sample)
}
