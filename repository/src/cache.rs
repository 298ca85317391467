//! Files of the cache directory: written as the repository's objects are, replaced atomically, and never
//! needed.
//!
//! Whatever is wrong with a cache file costs time, never a result: it is read as absent.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::envelope::Kind;
use crate::sealing::Sealing;

/// No cache file is larger; a larger one is not read.
const CACHE_BYTES_MAX: u64 = 256 << 20;

/// The cache directory of one repository.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    sealing: Sealing,
}

impl Cache {
    pub(crate) fn new(root: PathBuf, sealing: Sealing) -> Self {
        Self { folder: root.join(sealing.repository().as_str()), sealing }
    }

    pub(crate) fn read(&self, kind: Kind, name: &'static str) -> Option<Vec<u8>> {
        let path = self.folder.join(name);
        if fs::metadata(&path).ok()?.len() > CACHE_BYTES_MAX {
            return None;
        }
        let bytes = fs::read(&path).ok()?;
        match self.sealing.open(kind, name, &bytes) {
            Ok(payload) => Some(payload.into_owned()),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "cache file is ignored");
                None
            }
        }
    }

    /// Removes what killed processes have left half written of a file.
    fn remove_unfinished(&self, name: &str) {
        let beginning = format!(".{name}.");
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let is_one = entry.file_name().to_string_lossy().starts_with(&beginning);
            let written = entry.metadata().and_then(|meta| meta.modified());
            let age = written.ok().and_then(|at| at.elapsed().ok());
            if is_one && age.is_some_and(|age| age > WRITING_MAX) {
                // What stays is a few MiB; the next one tries again.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    pub(crate) fn write(&self, kind: Kind, name: &'static str, payload: &[u8]) {
        let folder = self.folder.display();
        match self
            .sealing
            .close(kind, name, payload)
            .map(|closed| replace_private(&self.folder, name, &closed))
        {
            Ok(Ok(())) => self.remove_unfinished(name),
            Ok(Err(error)) => tracing::warn!(%error, %folder, "cache file not written"),
            Err(error) => tracing::warn!(%error, %folder, "cache file not written"),
        }
    }
}

/// Who still writes a cache file does so within this.
const WRITING_MAX: Duration = Duration::from_secs(86_400);

/// Replaces a file that only the owner may read: block ids tell whether a known content is there.
pub(crate) fn replace_private(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // Several may write at once: each his own file, the last rename wins.
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let fresh = folder.join(format!(".{name}.{}.{number}", std::process::id()));
    let mut private = fs::OpenOptions::new();
    private.write(true).create(true).truncate(true).mode(0o600);
    let written = private.open(&fresh).and_then(|mut file| file.write_all(bytes));
    let replaced = written.and_then(|()| fs::rename(&fresh, folder.join(name)));
    if replaced.is_err() {
        // Best effort: what stays behind is of no use to anybody.
        let _ = fs::remove_file(&fresh);
    }
    replaced
}
