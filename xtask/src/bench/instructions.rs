//! Instructions that the parsers execute on their checked-in inputs, counted by valgrind: a number
//! that a busy machine does not change, so that a regression of a few per cent shows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::apt::{self, Source};
use crate::step::{Failure, Result, captured, cargo, cargo_target, program, shown, workspace_root};

/// Runs of all inputs between the two counts whose difference is the cost: start-up falls out.
const TIMES: [u32; 2] = [10, 110];
/// How much more than the kept count is a regression.
const TOLERANCE: f64 = 1.05;

/// The kept counts: of which compiler, and per target the instructions of one pass over its inputs.
#[derive(Serialize, Deserialize)]
struct Kept {
    compiler: String,
    instructions: BTreeMap<String, u64>,
}

/// Counts, prints, and compares with what is kept (or keeps it).
pub fn run(save: bool) -> Result<()> {
    if !save && !kept_path().exists() {
        let path = shown_path(&kept_path());
        return Err(Failure::new(format!("no counts are kept in {path} yet: --save keeps them")));
    }
    apt::install_missing(&["valgrind"], Source::Configured)?;
    let manifest = workspace_root().join("fuzz/Cargo.toml");
    let mut build = cargo(&["build", "-q", "--release", "--bin", "repeat", "--manifest-path"]);
    shown(build.arg(&manifest).arg("--target-dir").arg(cargo_target()))?;
    let now = Kept { compiler: compiler()?, instructions: count_all()? };
    if save {
        return Ok(std::fs::write(kept_path(), serde_json::to_string_pretty(&now)? + "\n")?);
    }
    let kept: Kept = serde_json::from_str(&std::fs::read_to_string(kept_path())?)?;
    report(&kept, &now)
}

fn kept_path() -> PathBuf {
    workspace_root().join("fuzz/instructions.json")
}

fn compiler() -> Result<String> {
    captured(program("rustc").arg("--version")).map(|text| text.trim().to_owned())
}

fn count_all() -> Result<BTreeMap<String, u64>> {
    let mut targets = BTreeMap::new();
    for entry in std::fs::read_dir(workspace_root().join("fuzz/corpus"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let [few, many] = TIMES.map(|times| count(&name, times));
        let passes = u64::from(TIMES[1] - TIMES[0]);
        targets.insert(name, many?.saturating_sub(few?) / passes);
    }
    Ok(targets)
}

/// Instructions of a whole process.
fn count(target: &str, times: u32) -> Result<u64> {
    let binary = cargo_target().join("release/repeat");
    let mut valgrind = program("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(binary);
    let run = valgrind.arg(target).arg(times.to_string()).output()?;
    let said = String::from_utf8_lossy(&run.stderr);
    collected(&said).ok_or_else(|| Failure::new(format!("valgrind counted nothing: {said}")))
}

/// The count in callgrind's closing lines (`==7== Collected : 123`).
fn collected(said: &str) -> Option<u64> {
    said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
}

fn report(kept: &Kept, now: &Kept) -> Result<()> {
    let same = kept.compiler == now.compiler;
    println!("| parsers of | instructions a pass | kept | ratio |\n|---|---|---|---|");
    let mut worse = Vec::new();
    for (name, count) in &now.instructions {
        let before = kept.instructions.get(name).copied().unwrap_or_default();
        let ratio = *count as f64 / before.max(1) as f64;
        println!("| {name} | {count} | {before} | {ratio:.3} |");
        if ratio > TOLERANCE {
            worse.push(name.as_str());
        }
    }
    match worse.is_empty() {
        true => Ok(()),
        false if same => Err(Failure::new(format!(
            "{} execute more instructions than {} says; mend them, or keep the new counts with \
             --save and say why in the commit",
            worse.join(", "),
            shown_path(&kept_path()),
        ))),
        false => {
            println!("kept by {}, this is {}: not judged", kept.compiler, now.compiler);
            Ok(())
        }
    }
}

fn shown_path(path: &Path) -> String {
    path.strip_prefix(workspace_root()).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_what_callgrind_says() {
        assert_eq!(collected("==7== Events    : Ir\n==7== Collected : 123\n"), Some(123));
        assert_eq!(collected("==7== nothing\n"), None);
    }
}
