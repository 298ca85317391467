//! Everything that tests and demo need beside cargo.

use crate::apt::{self, Source};
use crate::debian;
use crate::object_stores;
use crate::qemus;
use crate::step::{Result, captured, program, target, timed};

/// For the guest, the judges of restored disks, and independent peers on the wire.
const TOOLS: [&str; 15] = [
    "busybox-static",
    "cpio",
    "kmod",
    "xz-utils",
    "e2fsprogs",
    "xfsprogs",
    "faketime",
    "nbdkit",
    "libnbd-bin",
    "fio",
    "strace",
    "curl",
    "openssl",
    "openssh-client",
    "openssh-server",
];
const QEMU: [&str; 4] = ["qemu-system-x86", "qemu-utils", "qemu-block-extra", "qemu-guest-agent"];
/// For the tests of domains; they start a daemon of their own.
const LIBVIRT: [&str; 4] = ["libvirt-daemon-system", "libvirt-clients", "swtpm", "swtpm-tools"];
/// Makes the chroots of the newest QEMU and of the package's tests, and boots the latter.
const LONG: [&str; 2] = ["debootstrap", "systemd-container"];

/// Installs, builds and provisions; nothing that is there already is done again.
pub fn run(long: bool) -> Result<()> {
    timed("set-up", || {
        install_tools(&TOOLS)?;
        install_qemu()?;
        // After QEMU, which it would otherwise bring in another version.
        install_tools(&LIBVIRT)?;
        if long { install_tools(&LONG) } else { Ok(()) }
    })?;
    timed("object stores", || {
        object_stores::provision();
        Ok(())
    })?;
    timed("test guest", build_guest)?;
    timed("QEMU 7.2", qemus::provision_7_2)?;
    if long {
        timed("QEMU 11.1", qemus::provision_11_1)?;
        timed("a small Debian", debian::provision)?;
    }
    Ok(())
}

/// What the demo needs.
pub fn for_demo() -> Result<()> {
    timed("set-up", || {
        install_tools(&TOOLS)?;
        install_qemu()
    })?;
    timed("test guest", build_guest)
}

fn install_tools(tools: &[&str]) -> Result<()> {
    apt::install_missing(tools, Source::Configured)
}

/// All QEMU packages have to come from one place: the one where those that are installed came
/// from. On a machine with none, backports are better, and what is configured will do.
fn install_qemu() -> Result<()> {
    let missing = apt::missing(&QEMU);
    if missing.is_empty() {
        return Ok(());
    }
    let versions: Vec<String> = QEMU.iter().filter_map(|package| apt::installed(package)).collect();
    if versions.iter().any(|version| version.contains("~bpo")) {
        return apt::install(&missing, Source::Backports);
    }
    if versions.is_empty() {
        match apt::install(&missing, Source::Backports) {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("xtask: no QEMU from backports, taking Debian's own: {error}"),
        }
    }
    apt::install(&missing, Source::Configured)
}

fn build_guest() -> Result<()> {
    let mut command = program("bash");
    command.arg("images/guest/build.sh").arg(target().join("guest"));
    // The kernel is downloaded by apt, which needs to have lists; a fresh machine may not.
    let said = match captured(&mut command) {
        Ok(said) => said,
        Err(_) => {
            apt::update()?;
            captured(&mut command)?
        }
    };
    eprint!("{said}");
    Ok(())
}
