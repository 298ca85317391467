//! `cargo xtask deb`: the Debian package of the `icecore` command.
//!
//! What goes where is in [`FILES`]; man pages and completions come from the binary itself, and what
//! dpkg runs is in `packaging/debian`.

mod libraries;
mod tree;

use std::path::{Path, PathBuf};

use clap::Args;

use crate::step::{Failure, workspace_root};
use crate::step::{Result, captured, cargo, cargo_target, program, shown, target, timed};
use tree::{Mode, Tree};

/// Files of the workspace, as they are.
const FILES: [(&str, &str); 8] = [
    ("packaging/debian/icecore.toml", "etc/icecore/icecore.toml"),
    ("packaging/icecore.service", "lib/systemd/system/icecore.service"),
    (
        "packaging/icecore-repo-server.service",
        "usr/share/doc/icecore/examples/icecore-repo-server.service",
    ),
    ("packaging/icecore.toml", "usr/share/doc/icecore/examples/icecore.toml"),
    ("packaging/monitoring/alerts.yml", "usr/share/doc/icecore/examples/monitoring/alerts.yml"),
    ("packaging/monitoring/grafana.json", "usr/share/doc/icecore/examples/monitoring/grafana.json"),
    ("packaging/debian/copyright", "usr/share/doc/icecore/copyright"),
    ("README.md", "usr/share/doc/icecore/README.md"),
];
/// What an operator may change, and an upgrade leaves alone.
const CONFFILES: &str = "/etc/icecore/icecore.toml\n";
/// What dpkg runs.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];
/// Pages of `docs/` for operators; the others are for builders.
const PAGES: [&str; 5] = ["LIBVIRT.md", "PROMISES.md", "RECOVERY.md", "THREATS.md", "FORMAT.md"];
/// Where each shell looks for completions.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/icecore"),
    ("zsh", "usr/share/zsh/vendor-completions/_icecore"),
    ("fish", "usr/share/fish/vendor_completions.d/icecore.fish"),
];

/// Build the Debian package
#[derive(Args)]
pub struct Deb {
    /// Package this binary and build none
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// The package's version [default: the workspace's]
    #[arg(long, value_name = "VERSION")]
    package_version: Option<String>,
    /// Where the package goes [default: target/debian]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Deb {
    /// Builds it and says where it is.
    pub fn run(self) -> Result<()> {
        let binary = match self.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => build()?,
        };
        let version = self.package_version.unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned());
        let output = self.output.unwrap_or_else(|| target().join("debian"));
        std::fs::create_dir_all(&output)?;
        let architecture = captured(program("dpkg").arg("--print-architecture"))?.trim().to_owned();
        let package = output.join(format!("icecore_{version}_{architecture}.deb"));
        let tree = Tree::new(output.join("tree"))?;
        fill(&tree, &binary, &version)?;
        control(&tree, &version, &architecture)?;
        let mut dpkg = program("dpkg-deb");
        dpkg.args(["--root-owner-group", "-Zxz", "--build"]).arg(tree.root()).arg(&package);
        captured(&mut dpkg)?;
        std::fs::remove_dir_all(tree.root())?;
        judge(&package)?;
        println!("{}", package.display());
        Ok(())
    }
}

fn build() -> Result<PathBuf> {
    timed("icecore, optimised", || {
        shown(&mut cargo(&["build", "--release", "--package", "icecore"]))
    })?;
    Ok(cargo_target().join("release/icecore"))
}

/// All that is installed.
fn fill(tree: &Tree, binary: &Path, version: &str) -> Result<()> {
    for (source, place) in FILES {
        tree.copy(&workspace_root().join(source), place, Mode::Plain)?;
    }
    for page in PAGES {
        let place = format!("usr/share/doc/icecore/{page}");
        tree.copy(&workspace_root().join("docs").join(page), &place, Mode::Plain)?;
    }
    tree.directory("etc/icecore/conf.d")?;
    tree.copy(binary, "usr/bin/icecore", Mode::Program)?;
    let mut strip = program("strip");
    strip.args(["--strip-unneeded", "--remove-section=.comment", "--remove-section=.note"]);
    captured(strip.arg(tree.path("usr/bin/icecore")))?;
    for (shell, place) in COMPLETIONS {
        let script = captured(program_of(binary)?.args(["completions", shell]))?;
        tree.write(place, &script, Mode::Plain)?;
    }
    let pages = tree.directory("usr/share/man/man1")?;
    captured(program_of(binary)?.arg("man").arg(&pages))?;
    tree.compress_all("usr/share/man/man1")?;
    tree.write("usr/share/doc/icecore/changelog", &changelog(version)?, Mode::Plain)?;
    tree.compress("usr/share/doc/icecore/changelog")?;
    tree.write("usr/share/doc/icecore/crates", &crates()?, Mode::Plain)?;
    tree.compress("usr/share/doc/icecore/crates")
}

/// The binary that is packaged, run here: of what it does, nothing depends on this machine's state.
fn program_of(binary: &Path) -> Result<std::process::Command> {
    let text = binary.to_str().ok_or_else(|| Failure::new("the binary's path is no UTF-8"))?;
    Ok(program(text))
}

/// In Debian's form; what changed is in CHANGELOG.md.
fn changelog(version: &str) -> Result<String> {
    let date = captured(program("date").args(["--utc", "--rfc-email"]))?;
    Ok(format!(
        "icecore ({version}) unstable; urgency=medium\n\n  * Built from the project's sources; see \
         its CHANGELOG.md.\n\n -- Icecore developers <developers@icecore.invalid>  {date}"
    ))
}

/// The crates that are linked in, and their licences.
fn crates() -> Result<String> {
    let tree = ["tree", "--offline", "--package", "icecore", "--edges", "normal"];
    let form = ["--prefix", "none", "--format", "{p}\t{l}"];
    let said = captured(cargo(&tree).args(form))?;
    let mut lines: Vec<String> = said.lines().filter_map(third_party).collect();
    lines.sort();
    lines.dedup();
    Ok(lines.join("\n") + "\n")
}

/// `name version licence` of one that is not of this workspace, whose crates show their path.
fn third_party(line: &str) -> Option<String> {
    let (package, licence) = line.split_once('\t')?;
    let mut words = package.split_whitespace();
    let (name, version) = (words.next()?, words.next()?);
    let ours = words.next().is_some_and(|word| word.starts_with("(/"));
    (!ours).then(|| format!("{name} {version} {}", licence.trim_end_matches(" (*)")))
}

/// What dpkg reads and runs.
fn control(tree: &Tree, version: &str, architecture: &str) -> Result<()> {
    let source = workspace_root().join("packaging/debian");
    let libraries = libraries::packages_of(&tree.path("usr/bin/icecore"))?.join(", ");
    let kibibytes = tree.kibibytes()?.to_string();
    let mut text = std::fs::read_to_string(source.join("control"))?;
    for (name, value) in [
        ("@version@", version),
        ("@architecture@", architecture),
        ("@kibibytes@", &kibibytes),
        ("@libraries@", &libraries),
    ] {
        text = text.replace(name, value);
    }
    tree.write("DEBIAN/md5sums", &tree.md5sums()?, Mode::Plain)?;
    tree.write("DEBIAN/control", &text, Mode::Plain)?;
    tree.write("DEBIAN/conffiles", CONFFILES, Mode::Plain)?;
    for script in SCRIPTS {
        tree.copy(&source.join(script), &format!("DEBIAN/{script}"), Mode::Program)?;
    }
    Ok(())
}

/// Lets lintian look at it, where it is installed; an error is one here, too.
fn judge(package: &Path) -> Result<()> {
    if captured(program("lintian").arg("--version")).is_err() {
        eprintln!("xtask: lintian is not installed: the package was NOT judged by it");
        return Ok(());
    }
    let mut lintian = program("lintian");
    lintian.args(["--allow-root", "--tag-display-limit=0", "--fail-on", "error,warning"]);
    shown(lintian.arg(package).stdout(std::io::stderr()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_of_others_are_listed_without_the_paths_of_ours() {
        let line = |text| third_party(text);
        assert_eq!(
            line("serde v1.0.1\tMIT OR Apache-2.0").as_deref(),
            Some("serde v1.0.1 MIT OR Apache-2.0")
        );
        assert_eq!(line("a v1 (proc-macro)\tMIT (*)").as_deref(), Some("a v1 MIT"));
        assert_eq!(line("icecore-qmp v0.1.0 (/home/x/qmp)\tApache-2.0"), None);
        assert_eq!(line(""), None);
    }
}
