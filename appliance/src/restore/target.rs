//! Where a restore goes: what the user wrote becomes a checked target, before anything is changed.

use std::fs::Metadata;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};
use crate::image::Format;

/// A checked target of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file that is made beside its place and moved there when it is proven, in place of another
    /// only where that is wanted.
    File { path: PathBuf, format: Format, replace: bool },
    /// A block device, written in place.
    Device { path: PathBuf },
    /// An NBD export, written in place.
    Nbd { uri: String },
}

impl Target {
    /// As reports and messages name it.
    pub fn name(&self) -> String {
        match self {
            Self::File { path, .. } | Self::Device { path } => path.display().to_string(),
            Self::Nbd { uri } => uri.clone(),
        }
    }
}

/// What the user asked for, before it is known which disks there are.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    pub to: &'a str,
    pub format: Option<Format>,
    pub force: bool,
    /// Whether one disk was named with `--disk`.
    pub one_disk: bool,
}

/// Decides the target of each disk. Nothing is made yet.
pub fn targets(wish: &Wish<'_>, disks: &[String]) -> Outcome<Vec<Target>> {
    let tried = format!("restore to {}", wish.to);
    let nbd = ["nbd://", "nbd+unix://", "nbds://", "nbds+unix://"];
    if nbd.iter().any(|scheme| wish.to.starts_with(scheme)) {
        return match disks {
            [_] => Ok(vec![Target::Nbd { uri: wish.to.to_owned() }]),
            _ => Err(Failure::usage(tried, "an NBD export takes one disk, the point has several")
                .next("name one with --disk")),
        };
    }
    if let Some((scheme, _)) = wish.to.split_once("://") {
        return Err(Failure::usage(tried, format!("{scheme}:// is no target")));
    }
    let path = Path::new(wish.to);
    let there = std::fs::symlink_metadata(path).ok();
    if is_directory_wish(wish, path, there.as_ref(), disks) {
        return disks.iter().map(|disk| in_directory(wish, path, disk, &tried)).collect();
    }
    match disks {
        [_] => Ok(vec![single(wish, path, there.as_ref(), &tried)?]),
        _ => Err(Failure::usage(tried, "the point has several disks, and this is one file")
            .next("name a directory, or one disk with --disk")),
    }
}

/// A path that is not there yet is a directory when every disk is asked for, unless its name is
/// that of an image.
fn is_directory_wish(
    wish: &Wish<'_>,
    path: &Path,
    there: Option<&Metadata>,
    disks: &[String],
) -> bool {
    match there {
        Some(meta) => meta.is_dir(),
        None if wish.to.ends_with('/') => true,
        None => !wish.one_disk && (disks.len() > 1 || format_by_name(path).is_none()),
    }
}

fn in_directory(wish: &Wish<'_>, dir: &Path, disk: &str, tried: &str) -> Outcome<Target> {
    let format = wish.format.unwrap_or(Format::Raw);
    let path = dir.join(format!("{disk}.{}", format.name()));
    let there = std::fs::symlink_metadata(&path).ok();
    file(path, format, there.as_ref(), wish.force, tried)
}

fn single(wish: &Wish<'_>, path: &Path, there: Option<&Metadata>, tried: &str) -> Outcome<Target> {
    if there.is_some_and(|meta| meta.file_type().is_block_device()) {
        if wish.format == Some(Format::Qcow2) {
            return Err(Failure::usage(tried, "a block device is written raw, not as qcow2"));
        }
        crate::image::require_unlocked(path, Format::Raw, tried)?;
        return Ok(Target::Device { path: path.to_owned() });
    }
    let format = wish.format.or_else(|| format_by_name(path)).unwrap_or(Format::Raw);
    file(path.to_owned(), format, there, wish.force, tried)
}

fn file(
    path: PathBuf,
    format: Format,
    there: Option<&Metadata>,
    force: bool,
    tried: &str,
) -> Outcome<Target> {
    match there {
        None => {}
        Some(meta) if meta.file_type().is_symlink() => {
            return Err(Failure::refused(tried, format!("{} is a symbolic link", path.display()))
                .next("name the file itself: links are never followed"));
        }
        Some(meta) if !meta.is_file() => {
            return Err(Failure::refused(tried, format!("{} is no file", path.display())));
        }
        Some(_) if !force => {
            return Err(Failure::refused(tried, format!("{} exists", path.display()))
                .next("choose another name, or replace it with --force"));
        }
        // Locks know no formats: what is in the file may be anything.
        Some(_) => crate::image::require_unlocked(&path, Format::Raw, tried)?,
    }
    Ok(Target::File { path, format, replace: force })
}

fn format_by_name(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "qcow2" => Some(Format::Qcow2),
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Status;

    fn wish(to: &str) -> Wish<'_> {
        Wish { to, format: None, force: false, one_disk: false }
    }

    fn disks(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn a_directory_gets_one_file_a_disk() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("new").display().to_string();
        let made = targets(&wish(&to), &disks(&["a", "b"])).unwrap();
        assert_eq!(made[1].name(), format!("{to}/b.raw"));
        let one = targets(&wish(&to), &disks(&["a"])).unwrap();
        assert_eq!(one[0].name(), format!("{to}/a.raw"));
    }

    #[test]
    fn a_file_keeps_its_name_and_tells_its_format() {
        let one = targets(&wish("/nowhere/x.qcow2"), &disks(&["a"])).unwrap();
        let path = PathBuf::from("/nowhere/x.qcow2");
        assert_eq!(one, vec![Target::File { path, format: Format::Qcow2, replace: false }]);
        let named = Wish { one_disk: true, ..wish("/nowhere/x") };
        assert_eq!(targets(&named, &disks(&["a"])).unwrap()[0].name(), "/nowhere/x");
    }

    #[test]
    fn links_existing_files_and_crowded_targets_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.raw");
        std::fs::write(&file, b"x").unwrap();
        let link = dir.path().join("l.raw");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            let refused = targets(&wish(path.to_str().unwrap()), &disks(&["a"])).unwrap_err();
            assert_eq!(refused.status, Status::Refused);
        }
        let crowded = targets(&wish("nbd://localhost/x"), &disks(&["a", "b"])).unwrap_err();
        assert_eq!(crowded.status, Status::Usage);
        let several = targets(&wish(file.to_str().unwrap()), &disks(&["a", "b"])).unwrap_err();
        assert_eq!(several.status, Status::Usage);
    }
}
