//! A domain with a vTPM, by a real swtpm that a real libvirt starts: its state is in the points, and
//! comes back with a rollback and in a new domain.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use icecore_tests::{
    AGENT_CHANNEL, Domain, Icecore, Libvirt, Result, Scratch, icecore_binary, text, wait_until,
};

const TPM: &str = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>";
/// What swtpm makes of a new TPM is there when the domain has started.
const MADE: Duration = Duration::from_secs(60);

/// Where libvirt keeps the TPM of a domain.
fn state(libvirt: &Libvirt, domain: &Domain<'_>) -> Result<PathBuf> {
    let uuid = domain.virsh("domuuid", &[])?;
    Ok(libvirt.path("lib/swtpm").join(uuid.trim()).join("tpm2/tpm2-00.permall"))
}

/// The state of libvirt's TPMs has its place in the file system, which here is that of the test's own
/// namespace: so icecore is run there.
fn within(libvirt: &Libvirt, scratch: &Scratch) -> Result<Icecore> {
    let wrapper = scratch.join("icecore");
    let script = format!(
        "#!/bin/sh\nexec nsenter --target {} --mount -- '{}' \"$@\"\n",
        libvirt.namespace(),
        icecore_binary()?.display()
    );
    std::fs::write(&wrapper, script)?;
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))?;
    Icecore::with_binary(wrapper)
}

#[test]
fn a_tpm_comes_back_with_its_disks() -> Result<()> {
    let libvirt = Libvirt::start()?;
    let scratch = Scratch::new()?;
    let icecore = within(&libvirt, &scratch)?;
    let domain = libvirt.define_with("sealed", &format!("{AGENT_CHANNEL}{TPM}"))?;
    domain.virsh("start", &[])?;
    let path = state(&libvirt, &domain)?;
    wait_until("the TPM's state", MADE, || Ok(path.exists()))?;
    let mut taken = Vec::new();
    for form in ["job", "direct"] {
        taken.push(taken_of(&icecore, &domain, form, &path)?);
    }
    domain.virsh("destroy", &[])?;
    taken.push(taken_of(&icecore, &domain, "job", &path)?);
    for Taken { point, held } in &taken {
        // A TPM that lost its memory: swtpm itself refuses this.
        std::fs::write(&path, "no state of a TPM")?;
        assert!(domain.virsh("start", &[]).is_err());
        domain.icecore(&icecore, "rollback").args(["--to", point]).json()?;
        assert!(held.contains(&std::fs::read(&path)?), "the state is not the one of {point}");
    }
    domain.virsh("start", &[])?;
    domain.virsh("destroy", &[])?;
    a_new_domain_has_it(&icecore, &libvirt, &taken[0])
}

/// A point, and what the TPM held just before and just after it.
struct Taken {
    point: String,
    held: [Vec<u8>; 2],
}

fn taken_of(icecore: &Icecore, domain: &Domain<'_>, form: &str, path: &Path) -> Result<Taken> {
    let before = std::fs::read(path)?;
    let report = domain.icecore(icecore, "backup").args(["--capture", form]).json()?;
    assert_eq!(report["unprotected"].as_array().map(Vec::len), Some(0), "{report}");
    let point = text(&report, "point")?.to_owned();
    Ok(Taken { point, held: [before, std::fs::read(path)?] })
}

fn a_new_domain_has_it(icecore: &Icecore, libvirt: &Libvirt, taken: &Taken) -> Result<()> {
    let create = icecore.command("vm").args(["create", "--name", "heir", "--from", &taken.point]);
    let create = create.arg("--repo").arg(icecore.repository());
    let create = create.arg("--libvirt").arg(libvirt.uri());
    create.arg("--dir").arg(libvirt.path("made")).succeed()?;
    let heir = libvirt.domain("heir");
    assert!(taken.held.contains(&std::fs::read(state(libvirt, &heir)?)?));
    heir.virsh("start", &[])?;
    heir.virsh("destroy", &[]).map(drop)
}
