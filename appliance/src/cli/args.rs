//! Every command; its flags are here or in the file of its kind.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::VmArgs;
pub use super::backup_args::{
    BACKUP_EXAMPLES, BackupArgs, ConsistencyArg, FallbackArg, LevelArg, PriorityArg, SwitchArg,
};
pub use super::host_args::{DoctorArgs, HookCommand, JobCommand, TopArgs, VmCommand, VmCreateArgs};
pub use super::policy_args::{
    PRUNE_EXAMPLES, PruneArgs, QuotaCommand, QuotaSetArgs, RecordCommand, RecordExportArgs,
    RecordImportArgs, ScheduleCommand,
};
pub use super::repository_args::{
    COPY_EXAMPLES, CatalogCommand, ChainCommand, CheckArgs, CopyArgs, DiffArgs, GcArgs, KeyAddArgs,
    KeyCommand, PointArgs, PointCommand, RepoCommand, RepoInitArgs, RepoServeArgs,
    RepoTokenCommand, ServiceCommand, TokensArgs,
};
pub use super::restore_args::{
    ExportArgs, FormatArg, RESTORE_EXAMPLES, ROLLBACK_EXAMPLES, RestartArg, RestoreArgs,
    RollbackArgs, VerifyRestoreArg, VerifyRollbackArg,
};
use crate::names;
use crate::state::JobId;

/// Point-in-time backup and rollback of QEMU/KVM guests
#[derive(Debug, Parser)]
#[command(name = "icecore", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "Exit status: 0 done and verified, 1 failed (nothing half-done is left), \
2 wrong usage or configuration, 3 refused, 4 damage found, 130 interrupted and cleaned up.")]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Configuration file [default: /etc/icecore/icecore.toml where it exists]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub config: Option<PathBuf>,
    /// Where job records, locks, intents and scratch files live
    #[arg(long, global = true, env = "ICECORE_STATE_DIR", value_name = "DIR")]
    #[arg(default_value = "/var/lib/icecore", help_heading = "Global options")]
    pub state_dir: PathBuf,
    /// Disposable caches [default: cache/ in the state directory]
    #[arg(long, global = true, env = "ICECORE_CACHE_DIR", value_name = "DIR", hide_env = true)]
    #[arg(help_heading = "Global options")]
    pub cache_dir: Option<PathBuf>,
    /// Key of an encrypted repository: any bytes, at least 32, or a recovery kit (the daemon takes it
    /// from its own configuration)
    #[arg(long, global = true, env = "ICECORE_KEY_FILE", value_name = "FILE", hide_env = true)]
    #[arg(help_heading = "Global options")]
    pub key_file: Option<PathBuf>,
    /// File with a passphrase of an encrypted repository; /dev/stdin is one, too
    #[arg(long, global = true, env = "ICECORE_PASSPHRASE_FILE", value_name = "FILE")]
    #[arg(hide_env = true, help_heading = "Global options")]
    pub passphrase_file: Option<PathBuf>,
    /// One JSON document on stdout instead of tables
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// No progress on stderr
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub quiet: bool,
    /// Let the daemon of this host do it: backup, restore, rollback, check, gc and job
    #[arg(long, global = true, help_heading = "Global options")]
    pub daemon: bool,
    /// With --daemon: print the job's id and do not wait
    #[arg(long, global = true, help_heading = "Global options")]
    pub detach: bool,
    /// How data is moved
    #[arg(long, global = true, value_enum, default_value_t = IoEngine::Auto)]
    #[arg(value_name = "ENGINE", help_heading = "Global options")]
    pub io_engine: IoEngine,
    /// Memory that the process may use, whatever the disk's size
    #[arg(long, global = true, value_parser = names::size, default_value = "256M")]
    #[arg(value_name = "SIZE", help_heading = "Global options")]
    pub memory: u64,
    /// The job that this process is the worker of (set by the daemon)
    #[arg(long, global = true, hide = true, value_name = "ID")]
    pub as_job: Option<JobId>,
    /// Say more on stderr (repeat for more)
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    #[arg(help_heading = "Global options")]
    pub verbose: u8,
}

/// The backend of the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IoEngine {
    /// io_uring where the kernel allows it, else threads
    Auto,
    /// io_uring, or fail
    Uring,
    /// Threads
    Threads,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make and describe repositories
    #[command(subcommand)]
    Repo(RepoCommand),
    /// Take a point of a VM
    #[command(after_help = BACKUP_EXAMPLES)]
    Backup(BackupArgs),
    /// Write a point's disks to files, devices or NBD servers
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore(RestoreArgs),
    /// Put a VM back to a point, in place, writing only what differs
    #[command(after_help = ROLLBACK_EXAMPLES)]
    Rollback(RollbackArgs),
    /// Serve a point's disk over NBD, straight from the repository
    #[command(after_help = "Example:\n  icecore export latest --repo /backup --disk vda \
--socket /run/p.sock &\n  qemu-img info nbd+unix:///vda?socket=/run/p.sock")]
    Export(ExportArgs),
    /// List, show, delete and protect points
    #[command(subcommand)]
    Point(PointCommand),
    /// List and delete chains
    #[command(subcommand)]
    Chain(ChainCommand),
    /// Changed extents between two points, per disk
    #[command(after_help = "Example:\n  icecore diff latest~1 latest --repo /backup")]
    Diff(DiffArgs),
    /// Verify a repository or one point
    #[command(after_help = "Example:\n  icecore check --repo /backup --read-data")]
    Check(CheckArgs),
    /// Copy points to another repository, only what it lacks
    #[command(after_help = COPY_EXAMPLES)]
    Copy(CopyArgs),
    /// Delete what no point needs any more
    #[command(after_help = "Example:\n  icecore gc --repo /backup --dry-run")]
    Gc(GcArgs),
    /// The list of points that is cached on this host
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// List, show and release VMs
    #[command(subcommand)]
    Vm(VmCommand),
    /// Delete the points that no rule keeps, and say why each stays or goes
    #[command(after_help = PRUNE_EXAMPLES)]
    Prune(PruneArgs),
    /// A point's metadata, kept outside of the repository
    #[command(subcommand)]
    Record(RecordCommand),
    /// When which VM is backed up
    #[command(subcommand)]
    Schedule(ScheduleCommand),
    /// What projects may store, and what they do
    #[command(subcommand)]
    Quota(QuotaCommand),
    /// How things stand: VMs, last points, failures, repositories, quotas
    #[command(after_help = "Example:\n  icecore status --repo /backup")]
    Status {
        #[command(flatten)]
        repo: OptionalRepoArgs,
    },
    /// Live view of this host's jobs and VMs; q leaves
    #[command(after_help = "Example:\n  icecore top\n  icecore top --once")]
    Top(TopArgs),
    /// What the configuration says, and what is wrong with it
    #[command(subcommand)]
    Config(ConfigCommand),
    /// libvirt's hook: how domains that start and stop are known
    #[command(subcommand)]
    Hook(HookCommand),
    /// Runs on this host, finished and unfinished
    #[command(subcommand)]
    Job(JobCommand),
    /// The daemons of the hosts that share a repository
    #[command(subcommand)]
    Service(ServiceCommand),
    /// The daemon: jobs, API, metrics
    #[command(after_help = "Example:\n  icecore serve --config /etc/icecore/icecore.toml")]
    Serve,
    /// Find and repair what an interrupted run left behind
    #[command(after_help = "Example:\n  icecore doctor --qmp /run/vm1.qmp --name vm1 --repair")]
    Doctor(DoctorArgs),
    /// Shell completions on stdout
    #[command(after_help = "Example:\n  icecore completions bash > \
/usr/share/bash-completion/completions/icecore")]
    Completions(CompletionsArgs),
    /// Write the man pages into a directory
    #[command(after_help = "Example:\n  icecore man /usr/share/man/man1")]
    Man(ManArgs),
    /// The process that keeps the guest safe while a run is under way (started by icecore)
    #[command(name = "__guardian", hide = true)]
    Guardian,
    /// The process that keeps a domain of libvirt safe while a run is under way (started by icecore)
    #[command(name = "__warden", hide = true)]
    Warden,
    /// The process that stands in for the sockets of a domain of libvirt (started by icecore)
    #[command(name = "__relay", hide = true)]
    Relay {
        /// monitor or agent
        channel: crate::libvirt::relay::Channel,
        /// libvirt's
        uri: String,
        /// The domain's
        uuid: String,
    },
}

/// Which repository.
#[derive(Debug, Clone, Args)]
pub struct RepoArgs {
    /// Repository: a directory, or the name of a configured one
    #[arg(long, value_name = "REPO", env = "ICECORE_REPO")]
    pub repo: String,
}

/// Which repository, where one is not needed.
#[derive(Debug, Clone, Args)]
pub struct OptionalRepoArgs {
    /// Repository: a directory, or the name of a configured one
    #[arg(long, value_name = "REPO", env = "ICECORE_REPO")]
    pub repo: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read the configuration and say what is wrong, with file and line
    #[command(after_help = "Example:\n  icecore config check --config /etc/icecore/icecore.toml")]
    Check,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Directory for the pages
    pub dir: PathBuf,
}

impl Command {
    /// Whether it is a job, whose failure an operator wants to be told of, and the VM it is about.
    pub fn job(&self) -> Option<Option<String>> {
        let of_vm = |vm: &VmArgs| vm.vm.clone().or_else(|| vm.name.clone());
        match self {
            Self::Backup(args) => Some(of_vm(&args.vm)),
            Self::Rollback(args) => Some(of_vm(&args.vm)),
            Self::Prune(args) => Some(Some(args.vm.clone())),
            Self::Restore(_) | Self::Check(_) | Self::Gc(_) | Self::Copy(_) => Some(None),
            _ => None,
        }
    }
}
