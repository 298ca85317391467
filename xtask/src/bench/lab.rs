//! The folder of a run: the reference image, Icecore's and the peers' repositories.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::measure::{Children, Job, Sample, disk_usage};
use super::server::NbdServer;
use super::{image, server};
use crate::step::{Failure, Result, captured, cargo_target, program, target, timed};

/// Icecore's state, in the folder of a run.
const STATE: &str = "state";

/// What a run needs beside a tenth of the file system, which Icecore's scratch leaves free, in times
/// of the data: images and the peers' first points, and what borg and restic add in a round.
const ROOM_ONCE: u64 = 6;
const ROOM_A_ROUND: u64 = 2;

/// Where everything is.
pub struct Lab {
    pub size: u64,
    /// The reference image, not to be written to.
    pub raw: PathBuf,
    /// The same as a qcow2, not to be written to.
    pub qcow2: PathBuf,
    dir: PathBuf,
    icecore: PathBuf,
}

impl Lab {
    /// Makes the reference image where it is not there from a run before.
    pub fn new(size: u64, data: u64) -> Result<Self> {
        let base = target().join("bench");
        let dir = base.join("run");
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        let name = format!("reference-{}M-{}M", size >> 20, data >> 20);
        let (raw, qcow2) = (base.join(&name).with_extension("raw"), base.join(name + ".qcow2"));
        let icecore = cargo_target().join("release/icecore");
        let lab = Self { size, raw, qcow2, dir, icecore };
        if !lab.qcow2.exists() {
            timed("reference image", || lab.make_image(data))?;
        }
        Ok(lab)
    }

    fn make_image(&self, data: u64) -> Result<()> {
        image::build(&self.raw, self.size, data)?;
        let partial = self.dir.join("partial.qcow2");
        blank_qcow2(&partial, self.size)?;
        let server = NbdServer::start(&partial, self.path("nbd.sock"), true)?;
        // In order, and explicit zeroes stay data.
        let mut copy = program("nbdcopy");
        copy.args(["--sparse=0", "--synchronous", "--destination-is-zero", "--flush", "--"]);
        captured(copy.arg(&self.raw).arg(server.uri()))?;
        server.stop()?;
        Ok(std::fs::rename(&partial, &self.qcow2)?)
    }

    /// A path in the run's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A fresh, empty folder.
    pub fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        if path.exists() {
            std::fs::remove_dir_all(&path)?;
        }
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Removes what a group of rows has left; some 20 GiB each, where others want room.
    pub fn sweep(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            match path.is_dir() {
                _ if path.ends_with(STATE) => {}
                true => std::fs::remove_dir_all(path)?,
                false => std::fs::remove_file(path)?,
            }
        }
        Ok(())
    }

    /// A subcommand of Icecore with the state of this run.
    pub fn icecore(&self, subcommand: &[&str]) -> Command {
        let mut command = Command::new(&self.icecore);
        command.arg("--state-dir").arg(self.path(STATE)).args(["--json", "--quiet"]);
        command.args(subcommand).env_remove("ICECORE_REPO").env_remove("ICECORE_CACHE_DIR");
        command
    }

    /// A fresh repository of Icecore.
    pub fn repository(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        if path.exists() {
            std::fs::remove_dir_all(&path)?;
        }
        captured(self.icecore(&["repo", "init"]).arg(&path))?;
        Ok(path)
    }

    /// `icecore backup` of a powered-off image.
    pub fn backup_image(&self, image: &Path, repository: &Path) -> Command {
        let mut command = self.icecore(&["backup", "--name", "bench", "--image"]);
        command.arg(format!("vda={}", image.display())).arg("--repo").arg(repository);
        command
    }

    /// `icecore backup` of a live QEMU.
    pub fn backup_live(&self, vm: &server::Vm, repository: &Path) -> Command {
        let mut command = self.icecore(&["backup", "--name", "bench", "--qmp"]);
        command.arg(vm.qmp()).arg("--repo").arg(repository);
        command
    }

    /// Measures a client and by how much `grows` grew.
    pub fn measure(
        &self,
        command: Command,
        children: Children,
        server: Option<u32>,
        grows: Option<&Path>,
    ) -> Result<Sample> {
        let before = grows.filter(|path| path.exists()).map_or(Ok(0.0), disk_usage)?;
        let mut sample = Job { command, children, server, log: &self.path("log") }.run()?;
        if let Some(path) = grows {
            sample.stored_mib = Some(disk_usage(path)? - before);
        }
        Ok(sample)
    }
}

/// A blank qcow2 image.
pub fn blank_qcow2(path: &Path, size: u64) -> Result<()> {
    let mut command = program("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size.to_string());
    captured(&mut command).map(drop)
}

/// A blank qcow2 image over another one, which is thus not written to.
pub fn overlay(path: &Path, backing: &Path) -> Result<()> {
    let _ = std::fs::remove_file(path);
    let mut command = program("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(backing).arg(path);
    captured(&mut command).map(drop)
}

/// Removes all bitmaps of an image, which runs with other repositories have left.
pub fn forget_bitmaps(image: &Path) -> Result<()> {
    let said = captured(program("qemu-img").args(["info", "--output=json"]).arg(image))?;
    let info: Value = serde_json::from_str(&said)?;
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array();
    for bitmap in bitmaps.into_iter().flatten() {
        let name = bitmap["name"].as_str().unwrap_or_default();
        captured(program("qemu-img").args(["bitmap", "--remove"]).arg(image).arg(name))?;
    }
    Ok(())
}

/// Whether a program can be found.
pub fn has(name: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let sbin = [PathBuf::from("/usr/sbin")];
    std::env::split_paths(&paths).chain(sbin).any(|dir| dir.join(name).is_file())
}

/// Fails with a word when a program is not there.
pub fn require(name: &str) -> Result<()> {
    if has(name) { Ok(()) } else { Err(Failure::new(format!("{name} is not installed"))) }
}

/// Whether all rows have room: those that fail for want of it after half an hour are of no use.
pub fn require_room(data: u64, rounds: u32) -> Result<()> {
    let dir = &target();
    let needed = data.saturating_mul(ROOM_ONCE + ROOM_A_ROUND * u64::from(rounds));
    std::fs::create_dir_all(dir)?;
    let fs = rustix::fs::statvfs(dir).map_err(|error| Failure::new(error.to_string()))?;
    let free = fs.f_bavail.saturating_sub(fs.f_blocks / 10).saturating_mul(fs.f_frsize);
    if free >= needed {
        return Ok(());
    }
    Err(Failure::new(format!(
        "this takes {} GiB below {} beside a tenth of the file system, and there are {}: measure \
         fewer --rounds, or less --data",
        needed >> 30,
        dir.display(),
        free >> 30
    )))
}
