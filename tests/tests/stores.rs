//! The acceptance on every kind of repository.

use std::os::unix::fs::PermissionsExt as _;

use icecore_tests::{Icecore, MIB, Result, Site, acceptance, compare, count, create_noise, text};

#[test]
fn a_directory_is_accepted() -> Result<()> {
    let nowhere = Icecore::without_repository()?;
    let address = nowhere.repository().display().to_string();
    acceptance(&Site { address, ..Site::default() })
}

#[test]
fn an_encrypted_directory_is_accepted() -> Result<()> {
    let nowhere = Icecore::without_repository()?;
    let key = nowhere.path("key");
    create_noise(&key, 32, 11)?;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
    acceptance(&Site {
        address: nowhere.repository().display().to_string(),
        environment: vec![("ICECORE_KEY_FILE".into(), key.into())],
        init: vec!["--encrypt".into()],
    })
}

/// Two hosts and two VMs of one content, one after the other: the second one stores next to nothing.
#[test]
fn what_one_host_has_stored_another_does_not_store_again() -> Result<()> {
    let one = Icecore::new()?;
    let other = one.another_host()?;
    let noise = one.path("noise.raw");
    create_noise(&noise, 48 * MIB, 7)?;
    let mut stored = Vec::new();
    for (icecore, name) in [(&one, "first"), (&other, "second")] {
        let backup = icecore.on_repository("backup").args(["--name", name, "--image"]);
        let report = backup.arg(format!("d0={}", noise.display())).json()?;
        stored.push(count(&report["disks"][0], "stored_bytes")?);
        let target = icecore.path("restored.raw");
        let restore = icecore.on_repository("restore").arg(text(&report, "point")?);
        restore.args(["--disk", "d0", "--to"]).arg(&target).succeed()?;
        compare(&noise, &target)?;
    }
    assert!(stored[0] >= 48 * MIB && stored[1] <= MIB, "{stored:?}");
    one.check().map(drop)
}
