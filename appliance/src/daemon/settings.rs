//! What a daemon reads from its configuration, all at once, again at each SIGHUP.

use std::path::{Path, PathBuf};

use super::access::Access;
use super::queue::Limits;
use crate::cli::args::Global;
use crate::config;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::state::State;

/// A configuration that was found right.
#[derive(Debug)]
pub struct Settings {
    pub context: Context,
    pub access: Access,
    pub limits: Limits,
    /// A copy of the configuration as it was then: a worker never sees one that was not accepted.
    pub copy: PathBuf,
}

impl Settings {
    /// Reads and checks everything. `generation` tells copies apart.
    pub fn load(global: &Global, generation: u64) -> Outcome<Self> {
        let context = Context::new(global)?;
        let access = Access::load(&context.config.api)?;
        let wanted = &context.config.limits;
        let host = usize::try_from(wanted.jobs.max(1)).unwrap_or(1);
        let repository = wanted.jobs_per_repository.and_then(|n| usize::try_from(n.max(1)).ok());
        let limits = Limits { host, repository: repository.unwrap_or(host) };
        let source = global.config.clone().unwrap_or_else(|| config::DEFAULT_PATH.into());
        let copy = copy(&context.state, &source, generation)?;
        Ok(Self { context, access, limits, copy })
    }
}

/// Copies the configuration file and `conf.d` beside it; one that is not there is copied as empty.
fn copy(state: &State, source: &Path, generation: u64) -> Outcome<PathBuf> {
    let base = state.dir("daemon")?;
    let tried = format!("copy the configuration into {}", base.display());
    let failed = |e: std::io::Error| Failure::failed(&tried, e);
    forget_old(&base, generation);
    let folder = base.join(format!("config-{generation}"));
    let parts = folder.join("conf.d");
    std::fs::create_dir_all(&parts).map_err(failed)?;
    let target = folder.join("icecore.toml");
    let text = match std::fs::read(source) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        other => other.map_err(failed)?,
    };
    std::fs::write(&target, text).map_err(failed)?;
    let beside = source.parent().unwrap_or(Path::new(".")).join("conf.d");
    if let Ok(entries) = std::fs::read_dir(beside) {
        let files = entries.flatten().map(|entry| entry.path());
        for file in files.filter(|file| file.extension().is_some_and(|e| e == "toml")) {
            let name = file.file_name().unwrap_or_default();
            std::fs::copy(&file, parts.join(name)).map_err(failed)?;
        }
    }
    Ok(target)
}

/// A worker that has just been started may still read the copy before this one.
fn forget_old(base: &Path, generation: u64) {
    let kept = generation.checked_sub(1).map(|before| format!("config-{before}"));
    let Ok(entries) = std::fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("config-") && Some(&name) != kept.as_ref() {
            // One that stays is only untidy.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
