//! Other QEMUs than the installed one, cached under target.

use std::path::{Path, PathBuf};

use icecore_tests::Qemu;

use crate::apt;
use crate::step::{Failure, Result, captured, privileged, program, target};

/// Written last: a folder without it is from a run that broke off.
pub const COMPLETE: &str = "complete";
/// What is unpacked for Debian 12's own QEMU. Firmware comes with another version number.
const PACKAGES_7_2: [&str; 4] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
/// The Debian whose backports hold 11.1.
const SUITE_11_1: &str = "trixie";

/// Debian 12's own QEMU, downloaded and unpacked beside the installed one.
pub fn provision_7_2() -> Result<()> {
    let Some(dir) = begin("qemu-7.2")? else { return Ok(()) };
    if version_of("qemu-system-x86", "1:7.2").is_none() {
        // A machine that never updated its lists.
        apt::update()?;
    }
    for package in PACKAGES_7_2 {
        unpack_7_2(package, &dir)?;
    }
    unpack_absent_libraries(&dir)?;
    finish(&dir, Qemu::V7_2, "7.2.")
}

fn unpack_7_2(package: &str, dir: &Path) -> Result<()> {
    let prefix = if package == "seabios" { "" } else { "1:7.2" };
    let version = version_of(package, prefix).ok_or_else(|| {
        Failure::new(format!("the configured sources offer no {package} {prefix}"))
    })?;
    download(&format!("{package}={version}"), dir)
}

/// The newest version that a configured source offers (what is only installed is not listed).
fn version_of(package: &str, prefix: &str) -> Option<String> {
    let lines = captured(program("apt-cache").args(["madison", package])).ok()?;
    let mut versions = lines.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
    versions.find(|version| version.starts_with(prefix)).map(str::to_owned)
}

fn download(package: &str, dir: &Path) -> Result<()> {
    let fetched = dir.join("fetched");
    std::fs::create_dir_all(&fetched)?;
    let mut apt = program("apt-get");
    captured(apt.current_dir(&fetched).args(["-q", "download", package]))?;
    for entry in std::fs::read_dir(&fetched)? {
        let deb = entry?.path();
        captured(program("dpkg-deb").arg("-x").arg(&deb).arg(dir))?;
        let name = deb.file_name().unwrap_or_default();
        std::fs::rename(&deb, dir.join(name))?;
    }
    Ok(())
}

/// Libraries that no installed package has brought yet.
fn unpack_absent_libraries(dir: &Path) -> Result<()> {
    let mut debs = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let is_emulator = |path: &PathBuf| path.to_string_lossy().contains("/qemu-system-x86_");
    let deb = debs.find(is_emulator).ok_or_else(|| Failure::new("the emulator has gone"))?;
    let depends = captured(program("dpkg-deb").arg("-f").arg(deb).arg("Depends"))?;
    let names = depends.split(',').filter_map(|one| one.split_whitespace().next());
    for name in names.filter(|name| name.starts_with("lib") && apt::installed(name).is_none()) {
        download(name, dir)?;
    }
    Ok(())
}

/// QEMU 11.1 in a small Debian of its own.
pub fn provision_11_1() -> Result<()> {
    let Some(dir) = begin("qemu-11.1")? else { return Ok(()) };
    let mirror = apt::mirror()?;
    let mut bootstrap = privileged("debootstrap")?;
    bootstrap.args(["--variant=minbase", SUITE_11_1]).arg(&dir).arg(&mirror);
    captured(&mut bootstrap)?;
    let line = format!("deb {mirror} {SUITE_11_1}-backports main\n");
    let list = dir.join("etc/apt/sources.list.d/backports.list");
    std::fs::write(list, line)?;
    // This machine's way to its mirror (a proxy, say) is the chroot's too.
    let mut configuration = privileged("sh")?;
    configuration.args([
        "-c",
        "cp -n /etc/apt/apt.conf.d/*proxy* \"$1\" 2>/dev/null || true",
        "sh",
    ]);
    captured(configuration.arg(dir.join("etc/apt/apt.conf.d")))?;
    in_chroot(&dir, &["apt-get", "-q", "update"])?;
    let suite = format!("{SUITE_11_1}-backports");
    let install = ["apt-get", "-q", "install", "-y", "--no-install-recommends", "-t", &suite];
    in_chroot(&dir, &[&install[..], &["qemu-system-x86"]].concat())?;
    finish(&dir, Qemu::V11_1, "11.1")
}

fn in_chroot(dir: &Path, command: &[&str]) -> Result<()> {
    let mut chroot = privileged("env")?;
    chroot.args(["DEBIAN_FRONTEND=noninteractive", "chroot"]).arg(dir).args(command);
    captured(&mut chroot).map(drop)
}

/// An empty folder to fill, or nothing when it is complete.
pub fn begin(name: &str) -> Result<Option<PathBuf>> {
    let dir = target().join(name);
    if dir.join(COMPLETE).exists() {
        return Ok(None);
    }
    if dir.exists() {
        captured(privileged("rm")?.arg("-rf").arg(&dir))?;
    }
    std::fs::create_dir_all(&dir)?;
    Ok(Some(dir))
}

/// Complete is what runs and says that it is what it should be.
fn finish(dir: &Path, qemu: Qemu, version: &str) -> Result<()> {
    let said = captured(qemu.command()?.arg("--version"))?;
    if !said.contains(&format!("version {version}")) {
        return Err(Failure::new(format!("wanted QEMU {version}, got {said}")));
    }
    Ok(std::fs::write(dir.join(COMPLETE), said)?)
}
