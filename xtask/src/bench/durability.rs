//! The proof, by a trace of system calls, that what is timed is made durable.
//!
//! Icecore writes each object under a temporary name and links it to its own. It is durable when
//! its content was synced before the link and the folder that it went into after.

use std::collections::BTreeSet;
use std::process::Command;

use super::lab::{Lab, forget_bitmaps, require};
use crate::step::{Failure, Result, captured};

/// The kinds of objects that a point needs, by their folders.
const KINDS: [&str; 4] = ["packs", "runs", "points", "receipts"];

/// Takes a full point under `strace` and says what was synced; an object that was not is an error.
pub fn prove(lab: &Lab) -> Result<String> {
    require("strace")?;
    let repository = lab.repository("traced")?;
    let trace = lab.path("trace");
    let backup = lab.backup_image(&lab.qcow2, &repository);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-y", "-s", "4096", "-e", "trace=fsync,fdatasync,linkat", "-o"]);
    strace.arg(&trace).arg(backup.get_program()).args(backup.get_args());
    let taken = captured(&mut strace);
    forget_bitmaps(&lab.qcow2)?;
    taken?;
    let root = std::fs::canonicalize(&repository)?;
    let objects = objects(&std::fs::read_to_string(trace)?, &root.to_string_lossy())?;
    let count = |kind: &str| objects.iter().filter(|name| name.starts_with(kind)).count();
    if let Some(kind) = KINDS.iter().find(|kind| count(kind) == 0) {
        return Err(Failure::new(format!("the trace of a full point shows nothing in {kind}/")));
    }
    let counts: Vec<String> =
        KINDS.iter().map(|kind| format!("{} in {kind}", count(kind))).collect();
    let counts = counts.join(", ");
    Ok(format!("objects of a full point, each synced before its link, its folder after: {counts}"))
}

/// The objects that `trace` shows being made in the repository at `root`.
fn objects(trace: &str, root: &str) -> Result<Vec<String>> {
    let (mut synced, mut pending) = (BTreeSet::new(), BTreeSet::new());
    let mut made = Vec::new();
    for line in trace.lines().filter(|line| line.trim_end().ends_with("= 0")) {
        if line.contains("sync(") {
            let Some(path) = path_in(line, root) else { continue };
            pending
                .retain(|object: &String| object.rsplit_once('/').map(|cut| cut.0) != Some(path));
            synced.insert(path.to_owned());
        } else if let Some((from, to)) = linked(line) {
            if !synced.contains(from) {
                return Err(Failure::new(format!("{to} was linked before it was synced")));
            }
            pending.insert(to.to_owned());
            made.push(to.to_owned());
        }
    }
    match pending.first() {
        None => Ok(made),
        Some(object) => Err(Failure::new(format!("the folder of {object} was never synced"))),
    }
}

/// `fsync(9</repository/packs/f7>)`: the path below `root`.
fn path_in<'a>(line: &'a str, root: &str) -> Option<&'a str> {
    let path = line.split_once('<')?.1.split_once('>')?.0;
    path.strip_prefix(root)?.strip_prefix('/')
}

/// `linkat(9</repository>, "old", 9</repository>, "new", 0)`: both names.
fn linked(line: &str) -> Option<(&str, &str)> {
    let mut quoted = line.split_once("linkat(")?.1.split('"').skip(1).step_by(2);
    Some((quoted.next()?, quoted.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYNC: &str = "7 fsync(5</r/.incomplete/a>) = 0\n";
    const LINK: &str = "7 linkat(9</r>, \".incomplete/a\", 9</r>, \"packs/f7/b\", 0) = 0\n";
    const FOLDER: &str = "7 fsync(5</r/packs/f7>)    = 0\n";

    #[test]
    fn only_content_then_link_then_folder_is_durable() {
        assert_eq!(objects(&[SYNC, LINK, FOLDER].concat(), "/r").unwrap(), ["packs/f7/b"]);
        for broken in [[LINK, SYNC, FOLDER], [FOLDER, SYNC, LINK]] {
            assert!(objects(&broken.concat(), "/r").is_err(), "{broken:?}");
        }
        let failed = SYNC.replace("= 0", "= -1 EIO");
        assert!(objects(&[&failed, LINK, FOLDER].concat(), "/r").is_err());
    }
}
