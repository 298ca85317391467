//! The configuration file: repositories and VMs by name.
//!
//! Unknown keys are refused with their line. A file named by `--config` must exist; the default
//! one need not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::failure::{Failure, Outcome};

/// Read when `--config` is not given and it exists.
pub const DEFAULT_PATH: &str = "/etc/icecore/icecore.toml";

/// The whole configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `[repository.NAME]`
    #[serde(default)]
    pub repository: BTreeMap<String, RepositoryConfig>,
    /// `[vm.NAME]`
    #[serde(default)]
    pub vm: BTreeMap<String, VmConfig>,
}

/// A repository under a name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryConfig {
    /// A directory's path.
    pub url: String,
}

/// A VM under a name: a running QEMU's sockets, or a powered-off VM's images.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// QMP socket.
    pub qmp: Option<PathBuf>,
    /// Guest agent socket.
    pub qga: Option<PathBuf>,
    /// `[ID=]FILE` of each disk of a powered-off VM.
    #[serde(default)]
    pub image: Vec<String>,
    /// The disks to back up; all when empty.
    #[serde(default)]
    pub disks: Vec<String>,
}

impl Config {
    /// Reads `path`, or the default file where there is one.
    pub fn load(path: Option<&Path>) -> Outcome<Self> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let tried = format!("read the configuration {}", path.display());
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !required => {
                return Ok(Self::default());
            }
            Err(e) => return Err(Failure::usage(tried, e)),
        };
        toml::from_str(&text).map_err(|e| Failure::usage(tried, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("icecore.toml");
        std::fs::write(&path, "[vm.a]\nqmp = '/x'\nqmpp = '/y'\n").unwrap();
        let failure = Config::load(Some(&path)).unwrap_err();
        assert_eq!(failure.status, crate::failure::Status::Usage);
        assert!(failure.why.contains("line 3") && failure.why.contains("qmpp"), "{}", failure.why);
    }

    #[test]
    fn a_named_file_must_exist() {
        assert!(Config::load(Some(Path::new("/nowhere/icecore.toml"))).is_err());
        assert!(Config::load(None).is_ok());
    }
}
