//! The command lines of what a user would otherwise take, with its defaults or better.

use std::path::Path;
use std::process::Command;

use super::lab::{Lab, require};
use crate::step::{Result, captured, program};

/// The shape of requests that reads fastest (measured).
const SHAPE: [&str; 4] =
    ["--connections=4", "--threads=2", "--requests=16", "--request-size=1048576"];

/// Reads all of an export and throws it away.
pub fn read_all(uri: &str) -> Command {
    let mut command = program("nbdcopy");
    command.args(SHAPE).args([uri, "null:"]);
    command
}

/// Copies a raw file into an export, flushed.
pub fn write_all(raw: &Path, uri: &str) -> Command {
    let mut command = program("nbdcopy");
    command.args(SHAPE).args(["--flush", "--"]).arg(raw).arg(uri);
    command
}

/// `nbdcopy | zstd`, made durable as the others are.
pub fn piped_to_zstd(uri: &str, out: &Path) -> Result<Command> {
    require("zstd")?;
    let script = "set -o pipefail; nbdcopy \"${@:3}\" \"$1\" - | zstd -1 -T2 -q -f -o \"$2\" && \
                  sync \"$2\"";
    let mut command = program("bash");
    command.args(["-c", script, "bash", uri]).arg(out).args(SHAPE);
    Ok(command)
}

/// A compressed qcow2, read from the file itself.
pub fn convert(image: &Path, out: &Path) -> Command {
    let mut command = program("qemu-img");
    command.args(["convert", "-f", "qcow2", "-O", "qcow2", "-c", "-W", "-m", "16"]);
    command.args(["-o", "compression_type=zstd"]).arg(image).arg(out);
    command
}

/// borg and its repository.
pub fn borg(lab: &Lab, subcommand: &str) -> Command {
    let mut command = program("borg");
    command.env("BORG_BASE_DIR", lab.path("borg-base"));
    command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes").arg(subcommand);
    command
}

/// A fresh repository of borg.
pub fn borg_init(lab: &Lab) -> Result<()> {
    require("borg")?;
    lab.fresh("borg-base")?;
    let repository = lab.fresh("borg")?;
    captured(borg(lab, "init").args(["-e", "none"]).arg(repository)).map(drop)
}

/// One more archive of a raw file.
pub fn borg_create(lab: &Lab, raw: &Path, archive: &str) -> Command {
    let mut command = borg(lab, "create");
    command.args(["--compression", "zstd,1", "--chunker-params", "fixed,4194304"]);
    command.arg(format!("{}::{archive}", lab.path("borg").display())).arg(raw);
    command
}

/// restic and its repository.
pub fn restic(lab: &Lab, subcommand: &str) -> Command {
    let mut command = program("restic");
    command.env("RESTIC_PASSWORD", "bench").env("RESTIC_CACHE_DIR", lab.path("restic-cache"));
    command.arg("-r").arg(lab.path("restic")).arg(subcommand);
    command
}

/// A fresh repository of restic.
pub fn restic_init(lab: &Lab) -> Result<()> {
    require("restic")?;
    lab.fresh("restic-cache")?;
    lab.fresh("restic")?;
    captured(&mut restic(lab, "init")).map(drop)
}

/// One more snapshot of a raw file.
pub fn restic_backup(lab: &Lab, raw: &Path) -> Command {
    let mut command = restic(lab, "backup");
    command.arg(raw);
    command
}
