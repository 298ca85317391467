//! Installing the hook: one small script beside those of others.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};
use crate::libvirt::half_written::{self, EXTENSION};
use crate::state::State;

const NAME: &str = "icecore";
const MARK: &str = "# Installed by 'icecore hook install'; removed with it.";

/// Whether this host's libvirt finds our script where it looks by itself, and the script the marks of
/// this state directory: that of an earlier version, or of another directory, guards nothing.
pub fn guards(state: &State) -> bool {
    std::path::absolute(state.root())
        .is_ok_and(|root| looks_for(&Path::new(super::FOLDER).join(NAME), &root))
}

fn looks_for(script: &Path, state: &Path) -> bool {
    std::fs::read_to_string(script).is_ok_and(|text| text.contains(&why_line(state)))
}

/// The script's line that names the marks.
fn why_line(state: &Path) -> String {
    format!("why={}/\"$1.{EXTENSION}\"\n", quoted(&state.join(half_written::FOLDER)))
}

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

/// A program that is gone, hangs or fails is no reason for a domain not to start; the mark of a
/// rollback that was cut off is, and the script finds it without the program.
fn script(binary: &Path, state: &Path) -> String {
    let why = why_line(state);
    let (binary, state) = (quoted(binary), quoted(state));
    format!(
        "#!/bin/sh\n{MARK}\n\
         # Two states in one disk: a guest that starts on it ruins both.\n\
         {why}\
         if [ \"$2 $3\" = 'prepare begin' ] && [ -e \"$why\" ]; then\n    \
         head -n 1 -- \"$why\" >&2\n    exit 1\nfi\n\
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
        // A domain with a mark does not start, and its neighbours do.
        let marks = state.dir(half_written::FOLDER).unwrap();
        std::fs::write(marks.join("it's vm.why"), "cut off\n{}\n").unwrap();
        let start = |name: &str, operation: &str| {
            let mut run = std::process::Command::new(&path);
            run.args([name, operation, "begin", "-"]).stdin(std::process::Stdio::null());
            run.output().unwrap()
        };
        let refused = start("it's vm", "prepare");
        assert!(!refused.status.success());
        assert_eq!(String::from_utf8_lossy(&refused.stderr), "cut off\n");
        for (name, operation) in [("it's vm", "release"), ("vm", "prepare"), ("..", "prepare")] {
            assert!(start(name, operation).status.success(), "{name} {operation}");
        }
        install(&state, dir.path()).unwrap();
        assert!(looks_for(&path, &std::path::absolute(state.root()).unwrap()));
        assert!(!looks_for(&path, Path::new("/elsewhere")));
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        assert!(!looks_for(&path, &std::path::absolute(state.root()).unwrap()));
        assert!(install(&state, dir.path()).is_err());
    }
}
