//! The directory of a run for what it needs for a moment: sockets, the donor of sentinels.

use std::io;
use std::path::{Path, PathBuf};

use crate::context::Context;
use crate::failure::Outcome;
use crate::state::{JobId, make_private_dir};

/// A private directory, made when it is first asked for and removed when this is dropped.
#[derive(Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The directory at `path`, which belongs to one run alone.
    pub fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The directory of `job`.
    pub fn of(context: &Context, job: &JobId) -> Outcome<Self> {
        Ok(Self(context.state.dir("run")?.join(job.run())))
    }

    /// Its path; it is there now.
    pub fn path(&self) -> io::Result<&Path> {
        make_private_dir(&self.0)?;
        Ok(&self.0)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Most runs never asked for it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
