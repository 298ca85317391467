//! Every flag of every command, with its help.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmArgs;
pub use super::policy_args::{
    PRUNE_EXAMPLES, PruneArgs, QuotaCommand, QuotaSetArgs, RecordCommand, RecordExportArgs,
    RecordImportArgs, ScheduleCommand,
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
    #[arg(long, global = true, requires = "daemon", help_heading = "Global options")]
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
    /// What the configuration says, and what is wrong with it
    #[command(subcommand)]
    Config(ConfigCommand),
    /// libvirt's hook: how domains that start and stop are known
    #[command(subcommand)]
    Hook(HookCommand),
    /// Runs on this host, finished and unfinished
    #[command(subcommand)]
    Job(JobCommand),
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
}

const BACKUP_EXAMPLES: &str = "Examples:
  icecore backup --qmp /run/vm1.qmp --qga /run/vm1.qga --name vm1 --repo /backup
  icecore backup --libvirt qemu:///system vm1 --repo /backup
  icecore backup --image vda=/images/vm2.qcow2 --name vm2 --repo /backup --level full
  icecore backup vm1 --repo /backup --disk vda --json";

const RESTORE_EXAMPLES: &str = "Examples:
  icecore restore latest --repo /backup --disk vda --to /images/vda.raw
  icecore restore latest~2 --repo /backup --to /images/restored --format qcow2
  icecore restore latest --repo /backup --disk vda --to 'nbd+unix:///vda?socket=/run/nbd.sock'";

const ROLLBACK_EXAMPLES: &str = "Examples:
  icecore rollback --qmp /run/vm1.qmp --name vm1 --to latest --repo /backup
  icecore rollback --image vda=/images/vm2.qcow2 --name vm2 --to latest~1 --repo /backup";

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
pub enum RepoCommand {
    /// Make a new repository
    #[command(after_help = "Example:\n  icecore repo init /backup --compression zstd:3")]
    Init(RepoInitArgs),
    /// Describe a repository
    #[command(after_help = "Example:\n  icecore repo info /backup")]
    Info {
        /// Repository
        #[arg(env = "ICECORE_REPO")]
        repo: String,
    },
}

#[derive(Debug, Args)]
pub struct RepoInitArgs {
    /// Where: a directory that is empty or does not exist
    #[arg(env = "ICECORE_REPO")]
    pub repo: String,
    /// Size of a block, a power of two
    #[arg(long, value_name = "SIZE", value_parser = names::size, default_value = "64K")]
    pub block_size: u64,
    /// zstd:LEVEL or none
    #[arg(long, value_name = "CODEC", default_value = "zstd:1")]
    pub compression: String,
}

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

#[derive(Debug, Subcommand)]
pub enum PointCommand {
    /// List points
    #[command(after_help = "Example:\n  icecore point list vm1 --repo /backup")]
    List {
        /// Only this VM's
        vm: Option<String>,
        #[command(flatten)]
        repo: RepoArgs,
    },
    /// Everything about one point
    #[command(after_help = "Example:\n  icecore point show latest --repo /backup")]
    Show(PointArgs),
    /// Delete a point; all others stay restorable
    #[command(after_help = "Example:\n  icecore point delete latest~3 --repo /backup")]
    Delete {
        #[command(flatten)]
        point: PointArgs,
        /// Delete what grew from it, too
        #[arg(long)]
        with_descendants: bool,
    },
    /// Keep a point from being deleted
    #[command(after_help = "Example:\n  icecore point protect latest --repo /backup")]
    Protect(PointArgs),
    /// Allow a point to be deleted again
    #[command(after_help = "Example:\n  icecore point unprotect latest --repo /backup")]
    Unprotect(PointArgs),
}

#[derive(Debug, Args)]
pub struct PointArgs {
    /// Point: an id, a unique prefix, latest, latest~N
    pub point: String,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
}

#[derive(Debug, Subcommand)]
pub enum ChainCommand {
    /// List chains
    #[command(after_help = "Example:\n  icecore chain list --repo /backup")]
    List {
        /// Only this VM's
        vm: Option<String>,
        #[command(flatten)]
        repo: RepoArgs,
    },
    /// Delete a chain with all its points
    #[command(after_help = "Example:\n  icecore chain delete CHAIN --repo /backup")]
    Delete {
        /// The chain's id
        chain: String,
        #[command(flatten)]
        repo: RepoArgs,
    },
}

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The older point
    pub from: String,
    /// The newer point
    pub to: String,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Only this point
    pub point: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Read and decode every block
    #[arg(long, conflicts_with = "sample")]
    pub read_data: bool,
    /// Read and decode so many per cent of the blocks
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub sample: Option<f64>,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').parse::<f64>() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(value),
        _ => Err("a percentage is a number from 0 to 100".into()),
    }
}

#[derive(Debug, Args)]
pub struct GcArgs {
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Say what would go, delete nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Make the cache anew from the repository
    #[command(after_help = "Example:\n  icecore catalog rebuild --repo /backup")]
    Rebuild {
        #[command(flatten)]
        repo: RepoArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read the configuration and say what is wrong, with file and line
    #[command(after_help = "Example:\n  icecore config check --config /etc/icecore/icecore.toml")]
    Check,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// The VMs of the configuration and of the repository
    #[command(after_help = "Example:\n  icecore vm list --repo /backup")]
    List {
        #[command(flatten)]
        repo: OptionalRepoArgs,
    },
    /// Disks, bitmaps and their health, last point
    #[command(after_help = "Example:\n  icecore vm show --qmp /run/vm1.qmp --name vm1 --repo /b")]
    Show {
        #[command(flatten)]
        vm: VmArgs,
        #[command(flatten)]
        repo: OptionalRepoArgs,
    },
    /// Make a new VM of a point: its disks and its definition
    #[command(
        after_help = "Example:\n  icecore vm create --from latest --name vm2 --repo /backup \\\n    \
--libvirt qemu:///system --dir /var/lib/libvirt/images"
    )]
    Create(VmCreateArgs),
    /// Remove all that is ours from a VM, bitmaps too
    #[command(after_help = "Example:\n  icecore vm release --qmp /run/vm1.qmp --name vm1")]
    Release {
        #[command(flatten)]
        vm: VmArgs,
    },
}

#[derive(Debug, Args)]
pub struct VmCreateArgs {
    /// Point: an id, a unique prefix, latest, latest~N
    #[arg(long, value_name = "POINT")]
    pub from: String,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// The new VM's name
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Define it in this libvirt, too
    #[arg(long, value_name = "URI")]
    pub libvirt: Option<String>,
    /// Where its disks and its definition go; made where it is missing
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The old VM's UUID and MAC addresses, for one that is gone
    #[arg(long)]
    pub keep_identity: bool,
}

#[derive(Debug, Subcommand)]
pub enum HookCommand {
    /// Put the hook beside libvirt's own
    #[command(after_help = "Example:\n  icecore hook install")]
    Install {
        /// libvirt's folder of hooks
        #[arg(long, value_name = "DIR", default_value = "/etc/libvirt/hooks/qemu.d")]
        dir: PathBuf,
    },
    /// What libvirt runs, with the domain's XML on stdin; never fails
    #[command(
        after_help = "Example:\n  virsh dumpxml vm1 | icecore hook libvirt vm1 started begin -"
    )]
    Libvirt {
        /// NAME OPERATION SUBOPERATION EXTRA, as libvirt gives them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// List runs, newest first
    #[command(after_help = "Example:\n  icecore job list")]
    List,
    /// One run
    #[command(after_help = "Example:\n  icecore job show JOB --json")]
    Show {
        /// The job's id
        job: String,
    },
    /// Follow a run to its end, and exit as it does
    #[command(after_help = "Example:\n  icecore job watch JOB")]
    Watch {
        /// The job's id
        job: String,
    },
    /// Ask a run to end and to undo what it began
    #[command(after_help = "Example:\n  icecore job cancel JOB")]
    Cancel {
        /// The job's id
        job: String,
        /// Kill its process; what it leaves is undone by the next start of any command
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub vm: VmArgs,
    #[command(flatten)]
    pub repo: OptionalRepoArgs,
    /// Repair; without it nothing is changed
    #[arg(long)]
    pub repair: bool,
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
            Self::Restore(_) | Self::Check(_) | Self::Gc(_) => Some(None),
            _ => None,
        }
    }
}
