//! `qemu-img`: what an image is, and whether a running VM holds it.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use icecore_qmp::bitmap::BitmapName;
use serde::Deserialize;
use serde_json::json;

use super::Format;
use crate::failure::{Failure, Outcome};
use crate::libvirt::checkpoint::name_in_image;

/// What is known of an image.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    pub format: Format,
    /// Size of the disk in it, in bytes.
    pub size_bytes: u64,
    /// Persistent bitmaps.
    pub bitmaps: Vec<ImageBitmap>,
    /// Whether the format can keep a bitmap.
    pub keeps_bitmaps: bool,
    /// The file that it is based on, if any.
    pub backing: Option<String>,
}

impl ImageInfo {
    /// What the image calls the bitmap that is remembered as `bitmap`.
    pub fn name_of(&self, bitmap: &BitmapName) -> String {
        name_in_image(self.bitmaps.iter().map(|bitmap| bitmap.name.as_str()), bitmap)
    }
}

/// A persistent bitmap of an image.
#[derive(Debug, Clone, Deserialize)]
pub struct ImageBitmap {
    pub name: String,
    pub granularity: u64,
    flags: Vec<String>,
}

impl ImageBitmap {
    /// Never closed properly: nobody knows what it missed.
    pub fn inconsistent(&self) -> bool {
        self.flags.iter().any(|flag| flag == "in-use")
    }

    /// Records from the moment its VM starts.
    pub fn recording(&self) -> bool {
        self.flags.iter().any(|flag| flag == "auto")
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawInfo {
    virtual_size: u64,
    format_specific: Option<FormatSpecific>,
    full_backing_filename: Option<String>,
}

#[derive(Debug, Deserialize)]
struct FormatSpecific {
    data: Qcow2Data,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Qcow2Data {
    compat: Option<String>,
    bitmaps: Vec<ImageBitmap>,
}

#[derive(Debug, Deserialize)]
struct ChainMember {
    filename: String,
}

/// How QEMU's words about a lock begin.
const LOCK_WORDS: &str = "Failed to get ";

/// Describes the image without asking for its lock.
pub fn info(path: &Path, format: Format) -> Outcome<ImageInfo> {
    let tried = format!("look at the image {}", path.display());
    let output = qemu_img(&["info", "-U", "--output=json", "-f", format.name()], path, &tried)?;
    let raw: RawInfo = serde_json::from_slice(&output.stdout).map_err(|e| {
        Failure::failed(&tried, format!("qemu-img's answer is not understood: {e}"))
    })?;
    let data = match (format, raw.format_specific) {
        (Format::Qcow2, Some(specific)) => specific.data,
        _ => Qcow2Data::default(),
    };
    Ok(ImageInfo {
        format,
        size_bytes: raw.virtual_size,
        keeps_bitmaps: format == Format::Qcow2 && data.compat.as_deref() != Some("0.10"),
        bitmaps: data.bitmaps,
        backing: raw.full_backing_filename,
    })
}

/// The local files that the image's content comes from: itself, then what it is based on.
pub fn chain(path: &Path, info: &ImageInfo) -> Outcome<Vec<PathBuf>> {
    let mut files = vec![path.to_owned()];
    if info.backing.is_some() {
        let tried = format!("look at what the image {} is based on", path.display());
        let args = ["info", "-U", "--backing-chain", "--output=json", "-f", info.format.name()];
        let output = qemu_img(&args, path, &tried)?;
        let members: Vec<ChainMember> = serde_json::from_slice(&output.stdout).map_err(|e| {
            Failure::failed(&tried, format!("qemu-img's answer is not understood: {e}"))
        })?;
        let based_on = members.into_iter().skip(1).map(|member| PathBuf::from(member.filename));
        // What is no local file (an NBD export) has nothing to be told apart by.
        files.extend(based_on.filter(|file| file.exists()));
    }
    Ok(files)
}

/// Refuses an image or block device that a running VM (or another tool) can write to.
pub fn require_unlocked(path: &Path, format: Format, tried: &str) -> Outcome<()> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json"]);
    match format {
        Format::Qcow2 => command.args(["-f", format.name()]).arg(path),
        Format::Raw => command.arg(format!("json:{}", unshared(path, tried)?)),
    };
    match run(command, tried) {
        Ok(_) => Ok(()),
        Err(failure) if tells_of_lock(&failure.why) => Err(in_use(path, tried, &failure.why)),
        Err(failure) => Err(failure),
    }
}

/// A raw image with everybody else's writes forbidden: to look at a raw image alone asks for no lock
/// that a writer would be in the way of.
fn unshared(path: &Path, tried: &str) -> Outcome<serde_json::Value> {
    let file = json!({ "driver": protocol(path), "filename": utf8(path, tried)? });
    Ok(json!({
        "driver": "raw",
        "file": { "driver": "blkdebug", "unshare-child-perms": ["write"], "image": file },
    }))
}

/// How QEMU opens what is at `path`.
pub fn protocol(path: &Path) -> &'static str {
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => "host_device",
        _ => "file",
    }
}

/// QEMU's options are JSON, which has no way to write any other name.
pub fn utf8<'a>(path: &'a Path, tried: &str) -> Outcome<&'a str> {
    path.to_str().ok_or_else(|| {
        Failure::usage(tried, format!("the name {} is not UTF-8", path.display()))
            .next("give it another name, or a link with another name to reach it by")
    })
}

/// Whether QEMU's words (and not a path within them) tell of a lock that another process holds.
pub fn tells_of_lock(said: &str) -> bool {
    let after = said.split(LOCK_WORDS).skip(1);
    after.map(|rest| rest.strip_prefix("shared ").unwrap_or(rest)).any(|rest| {
        rest.strip_prefix('"')
            .and_then(|rest| rest.split_once('"'))
            .is_some_and(|(_, rest)| rest.starts_with(" lock"))
    })
}

/// The refusal of an image that another process holds.
pub fn in_use(path: &Path, tried: &str, said: &str) -> Failure {
    // What comes before is only how QEMU was told to open it.
    let lock = said.find(LOCK_WORDS).map_or(said, |at| &said[at..]);
    let lock = lock.split(';').next().unwrap_or(lock);
    let why = format!("{} is in use by another process (QEMU: {lock})", path.display());
    Failure::refused(tried, why).next("name the running VM by its QMP socket, or stop it first")
}

/// Makes an empty qcow2 image.
pub fn create_qcow2(path: &Path, size_bytes: u64, tried: &str) -> Outcome<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size_bytes.to_string());
    run(command, tried).map(|_| ())
}

/// Adds a recording bitmap whose first and last granule are set: our sentinels. They come from a
/// bitmap of the same size in an empty image in `dir`.
pub fn add_bitmap(
    path: &Path,
    name: &str,
    granularity: u64,
    size_bytes: u64,
    dir: &Path,
    tried: &str,
) -> Outcome<()> {
    let granularity = granularity.to_string();
    let donor = dir.join("sentinels.qcow2");
    create_qcow2(&donor, size_bytes, tried)?;
    let mut add = Command::new("qemu-img");
    add.args(["bitmap", "--add", "-g", &granularity]).arg(&donor).arg("s");
    run(add, tried)?;
    if size_bytes > 0 {
        let mut write = Command::new("qemu-io");
        write.args(["-f", "qcow2", "-c", "write -z 0 1"]);
        write.args(["-c", &format!("write -z {} 1", size_bytes - 1)]).arg(&donor);
        run(write, tried)?;
    }
    let mut merge = Command::new("qemu-img");
    merge.args(["bitmap", "-f", "qcow2", "--add", "-g", &granularity, "--merge", "s"]);
    merge.args(["-F", "qcow2", "-b"]).arg(&donor).arg(path).arg(name);
    run(merge, tried)?;
    std::fs::remove_file(&donor).map_err(|e| Failure::failed(tried, e))
}

/// Removes a bitmap.
pub fn remove_bitmap(path: &Path, name: &str, tried: &str) -> Outcome<()> {
    let mut command = Command::new("qemu-img");
    command.args(["bitmap", "-f", "qcow2", "--remove"]).arg(path).arg(name);
    run(command, tried).map(|_| ())
}

/// Changes the size of the disk in an image.
pub fn resize(path: &Path, format: Format, size_bytes: u64, tried: &str) -> Outcome<()> {
    let mut command = Command::new("qemu-img");
    command.args(["resize", "-q", "--shrink", "-f", format.name()]);
    command.arg(path).arg(size_bytes.to_string());
    run(command, tried).map(|_| ())
}

fn qemu_img(args: &[&str], path: &Path, tried: &str) -> Outcome<Output> {
    let mut command = Command::new("qemu-img");
    command.args(args).arg(path);
    run(command, tried)
}

fn run(mut command: Command, tried: &str) -> Outcome<Output> {
    let output = command.output().map_err(|e| {
        Failure::failed(tried, format!("qemu-img does not start: {e}"))
            .next("install the package qemu-utils")
    })?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::failed(tried, said.trim().replace('\n', "; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_qemus_own_words_tell_of_a_lock() {
        let held = "qemu-img: Could not open '/x': Failed to get shared \"write\" lock; Is another";
        assert!(tells_of_lock(held));
        assert!(tells_of_lock("Failed to get \"consistent read\" lock"));
        assert!(!tells_of_lock("Could not open '/blocks/lock': No such file or directory"));
        assert!(!tells_of_lock("Failed to get size of '/blocks/write lock'"));
    }

    #[test]
    fn a_name_that_is_not_utf8_is_wrong_usage() {
        use std::os::unix::ffi::OsStrExt as _;
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/a\xff.raw"));
        let refused = require_unlocked(path, Format::Raw, "look").unwrap_err();
        assert_eq!(refused.status, crate::failure::Status::Usage);
    }
}
