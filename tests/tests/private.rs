//! What a backup leaves and uses on the host is for its owner alone, whatever the umask allows.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use icecore_tests::{Disk, Icecore, MIB, Result, VmSpec};
use rustix::fs::Mode;
use rustix::process::Signal;

/// Everything that others can reach below `folder` and read, write, connect to or list.
fn open_to_others(folder: &Path, found: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        // A file that is temporary by nature may be gone again.
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        // QEMU, which may be another user, has to pass through to its scratch.
        let mask = if metadata.is_dir() { 0o066 } else { 0o077 };
        let mode = metadata.permissions().mode() & 0o777;
        if mode & mask != 0 && !metadata.is_symlink() {
            found.push(format!("{mode:o} {}", path.display()));
        }
        if metadata.is_dir() && mode & 0o011 != 0 {
            open_to_others(&path, found)?;
        }
    }
    Ok(())
}

#[test]
fn nobody_else_reads_scratch_sockets_state_cache_or_repository() -> Result<()> {
    rustix::process::umask(Mode::empty());
    let vm = VmSpec::new("private").no_guest().disk(Disk::new("vda", 64 * MIB)).start()?;
    vm.fill("vda", 7, 0, 8 * MIB)?;
    let icecore = Icecore::new()?;
    icecore.backup(&vm).succeed()?;
    vm.fill("vda", 8, 0, 48 * MIB)?;
    let run = icecore.start_slow_backup(&vm)?;
    let mut found = Vec::new();
    open_to_others(&icecore.path(""), &mut found)?;
    run.signal(Signal::INT);
    run.finish()?;
    icecore.restore_all("latest", &icecore.path("restored"))?;
    open_to_others(&icecore.path(""), &mut found)?;
    let own = icecore.path("restored");
    found.retain(|line| !line.ends_with(&own.display().to_string()));
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}
