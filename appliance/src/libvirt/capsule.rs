//! What recreates a domain: its XML, its firmware's variables, the state of its TPM.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use icecore_repository::CapsulePart;
use serde_json::{Value, json};

use super::tpm::Tpm;
use super::xml::Description;
use super::{Domain, emulator};
use crate::failure::{Failure, Outcome};

/// The name of the part with the firmware's variables.
pub const NVRAM: &str = "nvram";
/// Variable stores have 64 KiB to 64 MiB, and the latter are padding of a flash image (ARM).
const NVRAM_BYTES_MAX: u64 = 8 << 20;

/// The description of a domain for the point. Passwords (of its display) are not in it.
pub fn of(
    domain: &Domain,
    description: &Description,
    version: Option<&emulator::Version>,
    tried: &str,
) -> Outcome<Value> {
    let live = domain.live_xml().map_err(|e| e.failure(tried))?;
    // A transient domain has none.
    let inactive = domain.inactive_xml().unwrap_or_else(|_| live.clone());
    Ok(json!({
        "source": "libvirt", "uri": domain.virsh.uri(),
        "name": domain.name, "uuid": domain.uuid,
        "xml": live, "xml_inactive": inactive,
        "nvram": description.nvram.as_ref().map(|path| path.to_string_lossy()),
        "tpm_state": match description.tpm {
            Tpm::None => "none",
            Tpm::Emulated(version) => version.part(),
            Tpm::Elsewhere => "not in the point",
        },
        "qemu_version": version.map(ToString::to_string),
    }))
}

/// The firmware's variables and the TPM's state, where the domain has any that can be read: as they
/// are now, which is soon after the instant.
pub fn parts(domain: &Domain, description: &Description) -> Vec<CapsulePart> {
    let mut parts = variables(description);
    match description.tpm.part(domain) {
        Ok(part) => parts.extend(part),
        Err(failure) => warn_of_tpm(domain, &failure.to_string()),
    }
    if description.tpm == Tpm::Elsewhere {
        warn_of_tpm(domain, "it is in a chip, or with another program");
    }
    parts
}

fn warn_of_tpm(domain: &Domain, why: &str) {
    tracing::warn!(
        domain = domain.name,
        "the state of its TPM is not in the point ({why}): what the guest has sealed with it stays \
         locked in a VM that is made from this point"
    );
}

fn variables(description: &Description) -> Vec<CapsulePart> {
    let Some(path) = &description.nvram else { return Vec::new() };
    match read_bounded(path) {
        Ok(bytes) => NVRAM.parse().map(|name| CapsulePart { name, bytes }).into_iter().collect(),
        Err(failure) => {
            tracing::warn!("the firmware's variables are not in the point: {failure}");
            Vec::new()
        }
    }
}

/// A small file of a domain, whole.
pub(super) fn read_bounded(path: &Path) -> Outcome<Vec<u8>> {
    let tried = format!("read {}", path.display());
    let failed = |e: std::io::Error| Failure::failed(&tried, e);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(NVRAM_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > NVRAM_BYTES_MAX {
        return Err(Failure::failed(&tried, "it has more than 8 MiB"));
    }
    Ok(bytes)
}
