//! Moving a finished file to its place.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::failure::{Failure, Outcome};
use crate::image::{Format, RunDir, Served, StorageDaemon, require_unlocked};
use crate::state::sync_parent;

/// Moves `partial` to `path`; over what is there only with `replace`, and only where no VM holds it.
pub fn move_there(
    partial: &Path,
    path: &Path,
    replace: bool,
    dir: &RunDir,
    tried: &str,
) -> Outcome<()> {
    let failed = |e: io::Error| Failure::failed(tried, e);
    // A VM that starts on the old image now, or did while the new one was made, would lose
    // everything that it writes: its lock is ours until the old one is gone.
    let old = match replace && path.exists() {
        true => Some(lock(path, dir, tried)?),
        false => None,
    };
    let moved = if replace { std::fs::rename(partial, path) } else { rename_new(partial, path) };
    moved.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => {
            let why = format!("{} was made by someone else meanwhile", path.display());
            Failure::refused(tried, why).next("choose another name, or replace it with --force")
        }
        _ => failed(e),
    })?;
    drop(old);
    sync_parent(path).map_err(failed)
}

fn lock(path: &Path, dir: &RunDir, tried: &str) -> Outcome<StorageDaemon> {
    require_unlocked(path, Format::Raw, tried)?;
    let dir = dir.path().map_err(|e| Failure::failed(tried, e))?;
    StorageDaemon::start(path, Format::Raw, &Served::Exclusive { bitmap: None }, dir)
}

/// A rename that never replaces anything.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some file systems (NFS) know no such rename, but all of them that matter know links.
        Err(Errno::INVAL | Errno::NOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Status;

    #[test]
    fn a_file_that_appeared_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (partial, path) = (dir.path().join("p"), dir.path().join("x.raw"));
        std::fs::write(&partial, b"new").unwrap();
        std::fs::write(&path, b"old").unwrap();
        let run = RunDir::at(&dir.path().join("run"));
        let refused = move_there(&partial, &path, false, &run, "restore").unwrap_err();
        assert_eq!(refused.status, Status::Refused);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        std::fs::remove_file(&path).unwrap();
        move_there(&partial, &path, false, &run, "restore").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert!(!partial.exists());
    }
}
