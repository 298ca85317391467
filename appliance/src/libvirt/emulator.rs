//! The QEMU of a domain that runs: which program it is, which may not be the one that is installed
//! now.

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::Domain;
use super::virsh::output_of;

/// Printing a version takes no time.
const DEADLINE: Duration = Duration::from_secs(10);
/// Before it, any NBD client that leaves the export of a disk in an iothread may end QEMU.
const SAFE_WITH_IOTHREADS: Version = Version(9, 1, 0);

/// Major, minor, micro.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32, u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// The version of the QEMU that runs a domain; `None` where it cannot be seen from here.
pub fn of_running(domain: &Domain) -> Option<Version> {
    let process = process_of(&domain.uuid)?;
    // Reached this way, it is the program that runs, also after the file was replaced.
    let said = output_of(Command::new(process.join("exe")).arg("--version"), DEADLINE).ok()?;
    version(&said)
}

/// Why a disk in an iothread cannot be backed up.
pub fn refusal_of_iothread(version: Option<&Version>) -> Option<String> {
    match version {
        Some(version) if *version >= SAFE_WITH_IOTHREADS => None,
        Some(version) => Some(format!(
            "it is served by an iothread, and libvirt's backup would endanger the guest under QEMU \
             {version}: {SAFE_WITH_IOTHREADS} or later is needed"
        )),
        None => Some(
            "it is served by an iothread, and the version of its QEMU cannot be seen: before \
             9.1 libvirt's backup would endanger the guest"
                .into(),
        ),
    }
}

/// libvirt gives each QEMU its domain's UUID.
fn process_of(uuid: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let mut found = entries.filter(|path| {
        let Ok(line) = std::fs::read(path.join("cmdline")) else { return false };
        let mut words = line.split(|byte| *byte == 0);
        words.any(|word| word == b"-uuid") && words.next() == Some(uuid.as_bytes())
    });
    found.find(|path| path.as_os_str().as_bytes().iter().any(u8::is_ascii_digit))
}

/// Reads "QEMU emulator version 10.0.2 (Debian …)".
fn version(said: &str) -> Option<Version> {
    let word = said.split_whitespace().skip_while(|word| *word != "version").nth(1)?;
    let mut numbers = word.split('.').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(Version(next()?, next()?, next().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_unknown_versions_are_refused_for_iothreads() {
        let old = version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright").unwrap();
        let new = version("QEMU emulator version 10.0.2").unwrap();
        assert!(refusal_of_iothread(Some(&old)).unwrap().contains("7.2.22"));
        assert_eq!(refusal_of_iothread(Some(&new)), None);
        assert!(refusal_of_iothread(None).is_some());
        assert_eq!(version("something else"), None);
    }
}
