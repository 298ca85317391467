//! Installing the hook: one small script beside those of others.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};
use crate::state::State;

const NAME: &str = "icecore";
const MARK: &str = "# Installed by 'icecore hook install'; removed with it.";

/// Writes the script; one that is not ours is refused.
pub fn install(state: &State, dir: &Path) -> Outcome<PathBuf> {
    let path = dir.join(NAME);
    let tried = format!("install the hook {}", path.display());
    let failed = |e: std::io::Error| Failure::failed(&tried, e);
    let binary = std::env::current_exe().map_err(failed)?;
    let root = std::path::absolute(state.root()).map_err(failed)?;
    if std::fs::read_to_string(&path).is_ok_and(|there| !there.contains(MARK)) {
        return Err(Failure::refused(&tried, "another file is there").next("move it away first"));
    }
    std::fs::create_dir_all(dir).map_err(failed)?;
    let new = dir.join(format!(".{NAME}.new"));
    std::fs::write(&new, script(&binary, &root)).map_err(failed)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).map_err(failed)?;
    std::fs::rename(&new, &path).map_err(failed)?;
    Ok(path)
}

/// A program that is gone, hangs or fails is no reason for a domain not to start.
fn script(binary: &Path, state: &Path) -> String {
    let (binary, state) = (quoted(binary), quoted(state));
    format!(
        "#!/bin/sh\n{MARK}\n\
         timeout -k 1 1 {binary} --state-dir {state} hook libvirt -- \"$@\" || :\nexit 0\n"
    )
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_is_ours_alone_and_ends_well() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path().join("it's state"));
        let path = install(&state, dir.path()).unwrap();
        // Here the test's own binary stands where icecore would: it fails, the script does not.
        let mut run = std::process::Command::new(&path);
        run.args(["vm", "start", "begin", "-"]).stdin(std::process::Stdio::null());
        assert!(run.output().unwrap().status.success());
        install(&state, dir.path()).unwrap();
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        assert!(install(&state, dir.path()).is_err());
    }
}
