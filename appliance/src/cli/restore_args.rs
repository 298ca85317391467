//! Flags of the commands that bring a point back: restore, rollback, export.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmArgs;
use super::args::RepoArgs;

/// Shown below the help.
pub const RESTORE_EXAMPLES: &str = "Examples:
  icecore restore latest --repo /backup --disk vda --to /images/vda.raw
  icecore restore latest~2 --repo /backup --to /images/restored --format qcow2
  icecore restore latest --repo /backup --disk vda --to 'nbd+unix:///vda?socket=/run/nbd.sock'";

/// Shown below the help.
pub const ROLLBACK_EXAMPLES: &str = "Examples:
  icecore rollback --qmp /run/vm1.qmp --name vm1 --to latest --repo /backup
  icecore rollback --image vda=/images/vm2.qcow2 --name vm2 --to latest~1 --repo /backup";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FormatArg {
    Raw,
    Qcow2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VerifyRestoreArg {
    /// Read the target back and compare the content root
    Root,
    /// Do not read back
    None,
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Point: an id, a unique prefix, latest, latest~N
    pub point: String,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Only this disk
    #[arg(long, value_name = "ID")]
    pub disk: Option<String>,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    /// A file, a block device, nbd://…, nbd+unix://…, or a directory for all disks
    #[arg(long, value_name = "TARGET")]
    pub to: String,
    /// Format of files [default: qcow2 for *.qcow2, else raw]
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
    /// Overwrite a file that exists
    #[arg(long)]
    pub force: bool,
    /// How the restore is proven
    #[arg(long, value_enum, default_value_t = VerifyRestoreArg::Root)]
    pub verify: VerifyRestoreArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VerifyRollbackArg {
    /// Every written block is read back, the rest sampled
    Written,
    /// Everything is read and the content root compared
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RestartArg {
    /// Reset and continue
    Reset,
    /// Continue where it stood (the guest's memory knows nothing of the change)
    Start,
    /// Leave the VM stopped
    None,
}

#[derive(Debug, Args)]
pub struct RollbackArgs {
    #[command(flatten)]
    pub vm: VmArgs,
    /// Point: an id, a unique prefix, latest, latest~N
    #[arg(long, value_name = "POINT")]
    pub to: String,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Only this disk (repeatable)
    #[arg(long, value_name = "ID")]
    pub disk: Vec<String>,
    /// Do not keep what is there now as a point
    #[arg(long)]
    pub no_safety_point: bool,
    /// How much is read back
    #[arg(long, value_enum, default_value_t = VerifyRollbackArg::Written)]
    pub verify: VerifyRollbackArg,
    /// Allow another size: the disk is resized to the point's
    #[arg(long)]
    pub resize: bool,
    /// What happens to the VM afterwards
    #[arg(long, value_enum, default_value_t = RestartArg::Reset)]
    pub restart: RestartArg,
    /// Where the guest's overwritten blocks wait to be read
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Say what differs, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("where").required(true).args(["socket", "listen"])))]
pub struct ExportArgs {
    /// Point: an id, a unique prefix, latest, latest~N
    pub point: String,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    /// The disk; it is also the export's name
    #[arg(long, value_name = "ID")]
    pub disk: String,
    /// Unix socket to make
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// TCP address (there is no authentication: use a loopback address)
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<String>,
    /// Let clients write, into the overlay
    #[arg(long, requires = "overlay")]
    pub writable: bool,
    /// File that takes the clients' writes, made if it is not there
    #[arg(long, value_name = "FILE", requires = "writable")]
    pub overlay: Option<PathBuf>,
}
