//! `qemu-img`: what an image is, and whether a running VM holds it.

use std::path::Path;
use std::process::{Command, Output};

use serde::Deserialize;

use super::Format;
use crate::failure::{Failure, Outcome};

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

/// Refuses an image that a running VM (or another tool) holds.
pub fn require_unlocked(path: &Path, format: Format, tried: &str) -> Outcome<()> {
    let args = ["info", "--output=json", "-f", format.name()];
    match qemu_img(&args, path, tried) {
        Ok(_) => Ok(()),
        Err(failure) if failure.why.contains("lock") => Err(Failure::refused(
            tried,
            format!("{} is in use by another process: {}", path.display(), failure.why),
        )
        .next("name the running VM by its QMP socket, or stop it first")),
        Err(failure) => Err(failure),
    }
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
