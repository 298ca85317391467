//! What a caller may write: the bodies of requests.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::cli::args::{ConsistencyArg, FallbackArg, FormatArg, LevelArg, RestartArg};
use crate::cli::args::{PriorityArg, SwitchArg, VerifyRestoreArg, VerifyRollbackArg};
use crate::libvirt::CaptureForm;

/// How a VM that the configuration does not name is reached. Only administrators may say so.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InPlace {
    /// QMP socket, an absolute path.
    pub qmp: Option<String>,
    /// Guest agent socket, an absolute path.
    pub qga: Option<String>,
    /// A domain of this host's libvirt.
    pub libvirt: Option<LibvirtDomain>,
    /// `ID=FILE` of each disk of a VM that is off; absolute paths.
    #[serde(default)]
    pub image: Vec<String>,
}

/// A domain by its name or UUID.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LibvirtDomain {
    /// As in `qemu:///system`.
    pub uri: String,
    pub domain: String,
    /// How it is captured while it runs; `job` when left out.
    pub capture: Option<CaptureForm>,
}

/// Body of a backup. Everything has the default of the command.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupBody {
    /// A configured repository; may be left out where there is only one.
    pub repo: Option<String>,
    /// For a VM that the configuration does not name.
    pub vm: Option<InPlace>,
    pub level: Option<LevelArg>,
    #[serde(default)]
    pub disks: Vec<String>,
    #[serde(default)]
    pub exclude_disks: Vec<String>,
    pub chain: Option<String>,
    pub label: Option<String>,
    pub description: Option<String>,
    pub consistency: Option<ConsistencyArg>,
    /// As in `5s`.
    pub freeze_timeout: Option<String>,
    /// A directory, an absolute path.
    pub scratch: Option<String>,
    /// As in `4G`.
    pub scratch_limit: Option<String>,
    /// As in `100M/s`.
    pub rate_limit: Option<String>,
    pub on_fallback: Option<FallbackArg>,
    pub governor: Option<SwitchArg>,
    pub priority: Option<PriorityArg>,
    #[serde(default)]
    pub paranoid: bool,
    #[serde(default)]
    pub dry_run: bool,
}

/// Body of a restore.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreBody {
    pub repo: Option<String>,
    /// Absolute path of a file, a directory or a device, or an NBD URI.
    pub to: String,
    pub disk: Option<String>,
    /// For `latest`: of this VM.
    pub vm: Option<String>,
    pub format: Option<FormatArg>,
    #[serde(default)]
    pub force: bool,
    pub verify: Option<VerifyRestoreArg>,
}

/// Body of a rollback.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackBody {
    pub repo: Option<String>,
    /// The point: an id, a unique prefix, `latest`, `latest~N`.
    pub to: String,
    /// For a VM that the configuration does not name.
    pub vm: Option<InPlace>,
    #[serde(default)]
    pub disks: Vec<String>,
    #[serde(default)]
    pub no_safety_point: bool,
    pub verify: Option<VerifyRollbackArg>,
    #[serde(default)]
    pub resize: bool,
    pub restart: Option<RestartArg>,
    pub scratch: Option<String>,
    #[serde(default)]
    pub dry_run: bool,
}

/// Body of a check.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckBody {
    pub repo: Option<String>,
    /// Only this point.
    pub point: Option<String>,
    /// Read and decode every block.
    #[serde(default)]
    pub read_data: bool,
    /// Read and decode so many per cent of the blocks.
    pub sample: Option<f64>,
}

/// Body of a gc.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GcBody {
    pub repo: Option<String>,
    #[serde(default)]
    pub dry_run: bool,
}

/// Body of a copy of points to another repository: of one point, of a VM's, or of all.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyBody {
    /// Where they are.
    pub repo: Option<String>,
    /// Another configured repository.
    pub to: String,
    /// The point: an id, a unique prefix, `latest`, `latest~N`.
    pub point: Option<String>,
    /// All points of this VM; with `latest`, its latest one.
    pub vm: Option<String>,
    #[serde(default)]
    pub all: bool,
}
