//! A small Debian in a folder, on which the package is installed.

use crate::apt;
use crate::qemus::{COMPLETE, begin};
use crate::step::{Result, captured, privileged};

/// Its folder under target.
const NAME: &str = "debian-root";
/// What the package depends on, so that installing it needs no mirror, and a systemd to boot it with.
/// Not booted it is what a container is.
const PACKAGES: &str =
    "qemu-utils,qemu-system-common,libgcc-s1,init-system-helpers,systemd,systemd-sysv,dbus";

/// Of the same release as this one: the binary was built for its libraries.
pub fn provision() -> Result<()> {
    let Some(dir) = begin(NAME)? else { return Ok(()) };
    let mut bootstrap = privileged("debootstrap")?;
    bootstrap.args(["--variant=minbase", &format!("--include={PACKAGES}")]);
    captured(bootstrap.arg(apt::codename()?).arg(&dir).arg(apt::mirror()?))?;
    Ok(std::fs::write(dir.join(COMPLETE), "")?)
}
