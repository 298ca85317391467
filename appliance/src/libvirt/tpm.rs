//! The state of a domain's emulated TPM: where it is, and how it gets into a point and back.
//!
//! libvirt runs `swtpm` beside QEMU. What the TPM keeps for good is one file, which swtpm replaces
//! whole, so it can be read at any moment; what it forgets at a reset is in no file.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use icecore_repository::CapsulePart;

use super::capsule::read_bounded;
use super::{Domain, xml};
use crate::failure::{Failure, Outcome};
use crate::state::replace_file;

/// Where a `qemu:///system` keeps the TPMs of its domains.
const ROOT: &str = "/var/lib/libvirt/swtpm";

/// The TPM of a domain, as its XML says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tpm {
    None,
    /// By a swtpm that libvirt starts.
    Emulated(Version),
    /// Its state is in a chip, or with a program of somebody else.
    Elsewhere,
}

/// Of the TPM's specification: the files of the two have other names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1_2,
    V2,
}

impl Version {
    /// The name of its folder, of its lasting state, and of what it keeps over a suspension.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::V1_2 => ("tpm1.2", "tpm-00.permall", "tpm-00.volatilestate"),
            Self::V2 => ("tpm2", "tpm2-00.permall", "tpm2-00.volatilestate"),
        }
    }

    /// The name of the state in a point: that of its file.
    pub fn part(self) -> &'static str {
        self.names().1
    }
}

impl Tpm {
    /// The TPM whose state can be read and written.
    pub fn emulated(&self) -> Option<Version> {
        match self {
            Self::Emulated(version) => Some(*version),
            Self::None | Self::Elsewhere => None,
        }
    }

    /// Its state for the point: none of a TPM that was never started.
    pub fn part(&self, domain: &Domain) -> Outcome<Option<CapsulePart>> {
        let Some(version) = self.emulated() else { return Ok(None) };
        let path = folder(domain, version, "read the state of the TPM")?.join(version.part());
        if !path.exists() {
            return Ok(None);
        }
        let name = version.part().parse();
        let name = name.map_err(|e| Failure::failed("name the state of the TPM", e))?;
        Ok(Some(CapsulePart { name, bytes: read_bounded(&path)? }))
    }
}

/// Only the system's libvirt is known to keep it at one place.
fn folder(domain: &Domain, version: Version, tried: &str) -> Outcome<PathBuf> {
    let uri = domain.virsh.uri();
    if !uri.split('?').next().unwrap_or_default().ends_with("/system") {
        return Err(Failure::failed(tried, format!("nobody tells where {uri} keeps it")));
    }
    // It may be of a point that somebody else has written, and becomes a path.
    let uuid = xml::checked_uuid(&domain.uuid)
        .ok_or_else(|| Failure::failed(tried, "the domain's UUID is none"))?;
    Ok(Path::new(ROOT).join(uuid).join(version.names().0))
}

/// What is done where a TPM has state already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum There {
    Replace,
    Refuse,
}

/// Gives a domain that is off this state. libvirt hands it to swtpm's user when the domain starts.
pub fn restore(
    domain: &Domain,
    version: Version,
    bytes: &[u8],
    there: There,
    tried: &str,
) -> Outcome<()> {
    put(&folder(domain, version, tried)?, version, bytes, there, tried)
}

/// Takes back what [`restore`] made for a domain that did not come to be.
pub fn discard(domain: &Domain, version: Version) {
    if let Ok(folder) = folder(domain, version, "remove the state of a TPM")
        && let Err(e) = std::fs::remove_file(folder.join(version.names().1))
            .and_then(|()| std::fs::remove_dir(&folder))
    {
        tracing::warn!(path = %folder.display(), "not removed: {e}");
    }
}

fn put(folder: &Path, version: Version, bytes: &[u8], there: There, tried: &str) -> Outcome<()> {
    let (_, lasting, suspended) = version.names();
    let path = folder.join(lasting);
    let failed = |e: std::io::Error| Failure::failed(tried, format!("{}: {e}", path.display()));
    if there == There::Refuse && path.exists() {
        let why = format!("{} is there already", path.display());
        return Err(Failure::refused(tried, why).next("move the state of that TPM away"));
    }
    // As libvirt makes them: swtpm's user passes through to what is its own.
    let parent = folder.parent().unwrap_or(folder);
    DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(failed)?;
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    replace_file(&path, bytes).map_err(failed)?;
    match std::fs::remove_file(folder.join(suspended)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_replaced_whole_and_only_on_request() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("u-1/tpm2");
        put(&folder, Version::V2, b"one", There::Refuse, "t").unwrap();
        std::fs::write(folder.join("tpm2-00.volatilestate"), "stale").unwrap();
        assert!(put(&folder, Version::V2, b"two", There::Refuse, "t").is_err());
        put(&folder, Version::V2, b"two", There::Replace, "t").unwrap();
        assert_eq!(std::fs::read(folder.join("tpm2-00.permall")).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    }
}
