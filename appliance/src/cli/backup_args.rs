//! Flags of `backup`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmArgs;
use super::args::RepoArgs;
use crate::names;

/// Shown below the help.
pub const BACKUP_EXAMPLES: &str = "Examples:
  icecore backup --qmp /run/vm1.qmp --qga /run/vm1.qga --name vm1 --repo /backup
  icecore backup --libvirt qemu:///system vm1 --repo /backup
  icecore backup --image vda=/images/vm2.qcow2 --name vm2 --repo /backup --level full
  icecore backup vm1 --repo /backup --disk vda --json";

/// How a point is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LevelArg {
    /// Incremental where it can be trusted, else whole, with a reason
    Auto,
    /// A new chain, everything read
    Full,
    /// Never a new chain
    Incremental,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConsistencyArg {
    /// Freeze through the agent where there is one
    Auto,
    /// Fail when the filesystems cannot be frozen
    Filesystem,
    /// Do not freeze
    Crash,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FallbackArg {
    /// Read the whole disk, and say why
    Run,
    /// Fail instead
    Fail,
}

#[derive(Debug, Args)]
pub struct BackupArgs {
    #[command(flatten)]
    pub vm: VmArgs,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// How much is read
    #[arg(long, value_enum, default_value_t = LevelArg::Auto)]
    pub level: LevelArg,
    /// Only this disk (repeatable)
    #[arg(long, value_name = "ID")]
    pub disk: Vec<String>,
    /// Not this disk (repeatable)
    #[arg(long, value_name = "ID", conflicts_with = "disk")]
    pub exclude_disk: Vec<String>,
    /// The chain to grow [default: the newest of this VM]
    #[arg(long, value_name = "ID")]
    pub chain: Option<String>,
    /// A name for the point
    #[arg(long, value_name = "NAME")]
    pub label: Option<String>,
    /// What the point must be
    #[arg(long, value_enum, default_value_t = ConsistencyArg::Auto)]
    pub consistency: ConsistencyArg,
    /// How long the guest agent may take to freeze
    #[arg(long, value_name = "TIME", value_parser = names::duration, default_value = "5s")]
    pub freeze_timeout: Duration,
    /// Where the guest's overwritten blocks wait to be read [default: scratch/ in the state dir]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// At most so much scratch for each disk
    #[arg(long, value_name = "SIZE", value_parser = names::size)]
    pub scratch_limit: Option<u64>,
    /// A line about the point
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// Read no faster than this
    #[arg(long, value_name = "SIZE/s", value_parser = names::rate)]
    pub rate_limit: Option<u64>,
    /// Read slower, and give up in the end (status 1), when the running guest's own requests take
    /// more than 1.25 times as long as without the backup
    #[arg(long, value_enum, default_value_t = SwitchArg::On)]
    pub governor: SwitchArg,
    /// CPU and IO priority of the threads that hash, compress and store
    #[arg(long, value_enum, default_value_t = PriorityArg::Low)]
    pub priority: PriorityArg,
    /// When a disk cannot be read incrementally
    #[arg(long, value_enum, default_value_t = FallbackArg::Run)]
    pub on_fallback: FallbackArg,
    /// Ask for the whole allocation map also where the bitmap says clean
    #[arg(long)]
    pub paranoid: bool,
    /// Read and hash, store nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SwitchArg {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PriorityArg {
    /// Guests go first
    Low,
    /// As any other program
    Normal,
}
