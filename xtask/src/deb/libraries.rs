//! The packages of the shared libraries that a binary needs, from its own table of versions.

use std::path::Path;

use crate::step::{Failure, Result, captured, program};

/// Debian's names of what a Rust program links to, and the prefix of the versions of its symbols
/// that are the library's own.
const PACKAGES: [(&str, &str, &str); 4] = [
    ("libc.so.6", "libc6", "GLIBC_"),
    ("libm.so.6", "libc6", "GLIBC_"),
    ("ld-linux", "libc6", "GLIBC_"),
    ("libgcc_s.so.1", "libgcc-s1", "GCC_"),
];

/// As `Depends` has them: `package (>= version)`.
pub fn packages_of(binary: &Path) -> Result<Vec<String>> {
    parse(&captured(program("objdump").arg("-p").arg(binary))?)
}

/// `objdump -p` lists `NEEDED library`, then `required from library:` and a line for each version.
fn parse(text: &str) -> Result<Vec<String>> {
    let mut needs: Vec<(&'static str, Vec<u32>)> = Vec::new();
    let mut from = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["NEEDED", library] => {
                add(&mut needs, library, "")?;
            }
            ["required", "from", library] => {
                from = Some(add(&mut needs, library.trim_end_matches(':'), "")?);
            }
            [.., version] if from.is_some() && version.contains('_') => {
                if let Some(library) = from {
                    add(&mut needs, library, version)?;
                }
            }
            _ => {}
        }
    }
    if needs.is_empty() {
        return Err(Failure::new("objdump names no shared library"));
    }
    needs.sort();
    let shown = |(package, version): (&str, Vec<u32>)| {
        let parts: Vec<String> = version.iter().map(u32::to_string).collect();
        if parts.is_empty() {
            package.to_owned()
        } else {
            format!("{package} (>= {})", parts.join("."))
        }
    };
    Ok(needs.into_iter().map(shown).collect())
}

/// Raises what is needed of a library's package; the library's name in the table.
fn add(
    needs: &mut Vec<(&'static str, Vec<u32>)>,
    library: &str,
    version: &str,
) -> Result<&'static str> {
    let known = PACKAGES.iter().find(|(name, ..)| library.starts_with(name));
    let (name, package, prefix) =
        known.ok_or_else(|| Failure::new(format!("no package is known for {library}")))?;
    let digits = version.strip_prefix(prefix).unwrap_or_default();
    let version: Vec<u32> = digits.split('.').filter_map(|part| part.parse().ok()).collect();
    match needs.iter_mut().find(|(known, _)| known == package) {
        Some((_, most)) => *most = version.max(std::mem::take(most)),
        None => needs.push((package, version)),
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_that_is_required_counts() {
        let text = "Dynamic Section:\n  NEEDED               libgcc_s.so.1\n\
            NEEDED               libc.so.6\n  INIT   0x0000\n\nVersion References:\n\
            required from libgcc_s.so.1:\n    0x0b792650 0x00 06 GCC_3.0\n    0x0 0x00 05 GCC_4.2.0\n\
            required from libc.so.6:\n    0x0 0x00 04 GLIBC_2.34\n    0x0 0x00 03 GLIBC_2.4\n";
        assert_eq!(parse(text).unwrap(), ["libc6 (>= 2.34)", "libgcc-s1 (>= 4.2.0)"]);
        assert!(parse("  NEEDED   libfoo.so.1\n").is_err());
        assert!(parse("").is_err());
    }
}
