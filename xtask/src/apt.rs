//! Debian packages, without touching what is there.
//!
//! A plain `apt-get install qemu-system-x86` where qemu-utils comes from backports would remove
//! qemu-utils. So nothing here may remove a package, and where backports are needed they are added
//! in a private set of sources and lists: /etc/apt stays as it is, and no mirror is named here, it
//! is the one that is configured.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::step::{Failure, Result, captured, privileged, program, target};

/// What has to come from backports together; all else stays what it is.
const FROM_BACKPORTS: &str = "qemu-* seabios";

/// Where packages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The configured sources.
    Configured,
    /// Those and the backports of this Debian, in private lists.
    Backports,
}

/// The version of an installed package.
pub fn installed(package: &str) -> Option<String> {
    let query = ["-W", "-f", "${db:Status-Status} ${Version}", package];
    let line = captured(program("dpkg-query").args(query)).ok()?;
    line.strip_prefix("installed ").map(str::to_owned)
}

/// Those of the packages that are not installed.
pub fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages.iter().copied().filter(|package| installed(package).is_none()).collect()
}

/// Installs those packages that are not there.
pub fn install_missing(packages: &[&str], source: Source) -> Result<()> {
    let missing = missing(packages);
    if missing.is_empty() { Ok(()) } else { install(&missing, source) }
}

/// Refreshes the lists of the configured sources.
pub fn update() -> Result<()> {
    captured(apt_get(Source::Configured)?.arg("update")).map(drop)
}

/// Refreshes the lists and installs packages; fails rather than remove one.
pub fn install(packages: &[&str], source: Source) -> Result<()> {
    captured(apt_get(source)?.arg("update"))?;
    let mut command = apt_get(source)?;
    command.args(["install", "-y", "--no-install-recommends", "--no-remove"]);
    captured(command.args(packages)).map(drop)
}

fn apt_get(source: Source) -> Result<Command> {
    let mut command = privileged("env")?;
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]);
    command.args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Options::=--force-confold"]);
    if source == Source::Backports {
        let dir = private_sources()?;
        command.arg("-o").arg(format!("Dir::Etc::SourceParts={}", dir.join("parts").display()));
        command.arg("-o").arg(format!("Dir::State::Lists={}", dir.join("lists").display()));
        let preferences = dir.join("preferences");
        command.arg("-o").arg(format!("Dir::Etc::Preferences={}", preferences.display()));
        // The lists lie in a folder that apt's own unprivileged user may not reach.
        command.args(["-o", "APT::Sandbox::User=root"]);
    }
    Ok(command)
}

fn private_sources() -> Result<PathBuf> {
    let dir = target().join("apt");
    let parts = dir.join("parts");
    std::fs::create_dir_all(&parts)?;
    std::fs::create_dir_all(dir.join("lists/partial"))?;
    for file in source_files() {
        if let (Some(name), true) = (file.file_name(), file.parent() != Some(Path::new("/etc/apt")))
        {
            std::fs::copy(&file, parts.join(name))?;
        }
    }
    let (mirror, suite) = (mirror()?, codename()?);
    let text = format!(
        "Types: deb\nURIs: {mirror}\nSuites: {suite}-backports\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    std::fs::write(parts.join("icecore-backports.sources"), text)?;
    // By pins and not by `-t`, which would take every library from there that is newer.
    let pins =
        format!("Package: {FROM_BACKPORTS}\nPin: release n={suite}-backports\nPin-Priority: 990\n");
    std::fs::write(dir.join("preferences"), pins)?;
    Ok(dir)
}

/// The code name of this Debian.
pub fn codename() -> Result<String> {
    let text = std::fs::read_to_string("/etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = name.ok_or_else(|| Failure::new("/etc/os-release names no Debian"))?;
    Ok(name.trim_matches('"').to_owned())
}

/// The mirror that is configured for this Debian.
pub fn mirror() -> Result<String> {
    let suite = codename()?;
    for file in source_files() {
        let text = std::fs::read_to_string(&file)?;
        let deb822 = file.extension().is_some_and(|extension| extension == "sources");
        let found = if deb822 { in_stanzas(&text, &suite) } else { in_lines(&text, &suite) };
        if let Some(mirror) = found {
            return Ok(mirror);
        }
    }
    Err(Failure::new(format!("no source for {suite} in /etc/apt")))
}

fn source_files() -> Vec<PathBuf> {
    let parts = std::fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    files.retain(|file| {
        file.extension().is_some_and(|extension| extension == "list" || extension == "sources")
    });
    files.push(PathBuf::from("/etc/apt/sources.list"));
    files.retain(|file| file.is_file());
    files.sort();
    files
}

/// `deb [options] URI SUITE COMPONENT...`
fn in_lines(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (words.next()? == suite).then(|| uri.to_owned())
    })
}

/// Stanzas of `Key: value` lines, an empty line between them.
fn in_stanzas(text: &str, suite: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).find_map(|stanza| {
        let value = |key: &str| stanza.iter().find_map(|line| line.strip_prefix(key));
        let suites = value("Suites:")?;
        let serves = suites.split_whitespace().any(|one| one == suite);
        let enabled = value("Enabled:").is_none_or(|word| word.trim() != "no");
        let uri = value("URIs:")?.split_whitespace().next()?;
        (serves && enabled).then(|| uri.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_both_forms_of_sources() {
        let lines = "# deb http://no bookworm main\ndeb [arch=amd64] http://m/debian bookworm main";
        assert_eq!(in_lines(lines, "bookworm").as_deref(), Some("http://m/debian"));
        assert_eq!(in_lines(lines, "trixie"), None);
        let stanzas = "Types: deb\nURIs: http://s/sec\nSuites: bookworm-security\n\n\
                       Types: deb\n# note\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\n";
        assert_eq!(in_stanzas(stanzas, "bookworm").as_deref(), Some("http://m/debian"));
        assert_eq!(in_stanzas(stanzas, "trixie"), None);
    }
}
