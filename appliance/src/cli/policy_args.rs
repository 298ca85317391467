//! Flags of the commands that carry out an operator's policy: retention, schedules, quotas, records.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::args::{OptionalRepoArgs, RepoArgs};
use crate::policy::retention::Keep;

/// Shown below the help of `prune`.
pub const PRUNE_EXAMPLES: &str = "Examples:
  icecore prune vm1 --repo /backup --keep-last 3 --keep-daily 14 --keep-weekly 8 --dry-run
  icecore prune vm1 --repo /backup --keep-monthly 12 --timezone Europe/Berlin";

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// The VM whose points are judged
    pub vm: String,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Keep the newest N points
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_last: u32,
    /// Keep the newest point of each of the last N hours that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_hourly: u32,
    /// Keep the newest point of each of the last N days that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_daily: u32,
    /// Keep the newest point of each of the last N weeks that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_weekly: u32,
    /// Keep the newest point of each of the last N months that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_monthly: u32,
    /// Keep the newest point of each of the last N years that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_yearly: u32,
    /// The zone of hours, days and weeks [default: the host's]
    #[arg(long, value_name = "ZONE")]
    pub timezone: Option<String>,
    /// The clock is right although a point is later than now: such points stay
    #[arg(long)]
    pub trust_clock: bool,
    /// Say what would go, delete nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub enum RecordCommand {
    /// Write a point's metadata into a file
    #[command(after_help = "Example:\n  icecore record export latest --repo /backup -o vm1.record")]
    Export(RecordExportArgs),
    /// Compare such a file with the repository, and say whether its point can be restored
    #[command(after_help = "Example:\n  icecore record import vm1.record --repo /backup")]
    Import(RecordImportArgs),
}

#[derive(Debug, Args)]
pub struct RecordExportArgs {
    /// Point: an id, a unique prefix, latest, latest~N
    pub point: String,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Overwrite a file that exists
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct RecordImportArgs {
    /// The file
    pub file: PathBuf,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Read and decode every block of the point
    #[arg(long)]
    pub read_data: bool,
    /// Put the manifest back where it is damaged or gone and the receipt proves this one
    #[arg(long)]
    pub repair: bool,
}

#[derive(Debug, Subcommand)]
pub enum ScheduleCommand {
    /// The schedules of the configuration and when each runs next
    #[command(after_help = "Example:\n  icecore schedule list")]
    List,
    /// Begin what is due and wait for it, one after the other: for a timer where no daemon runs
    #[command(after_help = "Example:\n  icecore schedule run    # each minute, from a timer")]
    Run {
        /// Say what is due, begin nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// The next runs in the order of time
    #[command(after_help = "Example:\n  icecore schedule next nightly --count 5")]
    Next {
        /// Only of this schedule
        schedule: Option<String>,
        /// So many
        #[arg(long, value_name = "N", default_value_t = 10)]
        count: usize,
    },
}

#[derive(Debug, Subcommand)]
pub enum QuotaCommand {
    /// All quotas and their use
    #[command(after_help = "Example:\n  icecore quota list")]
    List {
        #[command(flatten)]
        repo: OptionalRepoArgs,
    },
    /// One project's
    #[command(after_help = "Example:\n  icecore quota show shop")]
    Show {
        /// The project
        project: String,
        #[command(flatten)]
        repo: OptionalRepoArgs,
    },
    /// Write a quota into conf.d/quota-PROJECT.toml beside the configuration
    #[command(after_help = "Example:\n  icecore quota set shop --points 200 --gigabytes 500")]
    Set(QuotaSetArgs),
}

#[derive(Debug, Args)]
pub struct QuotaSetArgs {
    /// The project
    pub project: String,
    /// Points that its VMs may have in a repository
    #[arg(long, value_name = "N")]
    pub points: Option<u64>,
    /// GiB that these may take as stored
    #[arg(long, value_name = "N")]
    pub gigabytes: Option<f64>,
}

impl PruneArgs {
    /// The rules.
    pub fn keep(&self) -> Keep {
        Keep {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
        }
    }
}
