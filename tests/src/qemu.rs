//! The QEMUs that tests can choose from.

use std::path::Path;
use std::process::Command;

use crate::failure::{Failure, Result};
use crate::place::provisioned;

/// One QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qemu {
    /// The one that is installed.
    Installed,
    /// Debian 12's own 7.2, unpacked beside it.
    V7_2,
    /// 11.1 in a chroot of its own; it needs a newer userland.
    V11_1,
}

/// Run as `sh -c SCRIPT sh CHROOT BIND... -- PROGRAM ARGS`: in a mount namespace of its own, so
/// that the binds end with the process, and by `exec` alone, so that the process id is QEMU's.
const ENTER_CHROOT: &str = r#"
root=$1; shift
mount --make-rprivate /
mount --bind /dev "$root/dev"
mount --bind /proc "$root/proc"
while [ "$1" != -- ]; do mkdir -p "$root$1"; mount --bind "$1" "$root$1"; shift; done
shift
exec chroot "$root" "$@"
"#;

impl Qemu {
    /// `qemu-system-x86_64` of this kind, ready for arguments.
    pub fn command(self) -> Result<Command> {
        match self {
            Self::Installed => Ok(Command::new("qemu-system-x86_64")),
            Self::V7_2 => unpacked(&provisioned().join("qemu-7.2")),
            Self::V11_1 => in_chroot(&provisioned().join("qemu-11.1")),
        }
    }
}

fn unpacked(dir: &Path) -> Result<Command> {
    let program = dir.join("usr/bin/qemu-system-x86_64");
    require(&program)?;
    let libraries = dir.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(program);
    command.arg("-L").arg(dir.join("usr/share/qemu")).arg("-L").arg(dir.join("usr/share/seabios"));
    command.env("LD_LIBRARY_PATH", &libraries).env("QEMU_MODULE_DIR", libraries.join("qemu"));
    Ok(command)
}

fn in_chroot(root: &Path) -> Result<Command> {
    require(&root.join("usr/bin/qemu-system-x86_64"))?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-e", "-c", ENTER_CHROOT, "sh"]).arg(root);
    command.arg(provisioned()).arg(std::env::temp_dir());
    command.args(["--", "/usr/bin/qemu-system-x86_64"]);
    Ok(command)
}

fn require(program: &Path) -> Result<()> {
    if program.exists() {
        return Ok(());
    }
    let shown = program.display();
    Err(Failure::new(format!("{shown} is not there: run `cargo xtask test --long`")))
}
