//! Flags of the commands on this host: its VMs, jobs and hooks.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::VmArgs;
use super::args::{OptionalRepoArgs, RepoArgs};

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
        #[arg(long, value_name = "DIR", default_value = crate::hook::FOLDER)]
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
pub struct TopArgs {
    /// Print one view and leave; so does --json
    #[arg(long)]
    pub once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
}
