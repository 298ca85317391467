//! Where things are: the workspace, the guest's files, a run's own folder.

use std::path::{Path, PathBuf};

use crate::failure::{During, Failure, Result};

/// A unix socket's path has 108 bytes; a run's folder must leave room for the names in it.
const SCRATCH_PATH_BYTES_MAX: usize = 70;

/// The root of the workspace this was compiled in.
pub fn workspace_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// What `cargo xtask` provisions lies here: the guest, other QEMUs.
pub(crate) fn provisioned() -> PathBuf {
    workspace_root().join("target")
}

/// The guest's kernel and initial file system, or what to do when they are not there.
pub fn guest_files() -> Result<(PathBuf, PathBuf)> {
    let dir = provisioned().join("guest");
    let (kernel, initrd) = (dir.join("vmlinuz"), dir.join("initrd.gz"));
    if kernel.exists() && initrd.exists() {
        return Ok((kernel, initrd));
    }
    Err(Failure::new(format!("no test guest in {}: run `cargo xtask test`", dir.display())))
}

/// A run's own folder, removed with its owner.
#[derive(Debug)]
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// A fresh folder on the disk that holds `target`, so that images are sparse and large enough.
    /// Where that path is too long for sockets it lies in the system's temporary folder.
    pub fn new() -> Result<Self> {
        let near = provisioned().join("lab");
        let base = if near.as_os_str().len() > SCRATCH_PATH_BYTES_MAX {
            std::env::temp_dir()
        } else {
            near
        };
        std::fs::create_dir_all(&base).during(base.display())?;
        let dir = tempfile::Builder::new().prefix("r").rand_bytes(5).tempdir_in(&base)?;
        Ok(Self(dir))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A path in the folder.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// Leaves the folder on disk and says where.
    pub fn keep(self) -> PathBuf {
        self.0.keep()
    }
}
