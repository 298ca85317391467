//! The ways to say which VM is meant.

use std::path::PathBuf;

use clap::Args;

use crate::libvirt::CaptureForm;

/// A VM by its configured name, or in place by its sockets or images.
#[derive(Debug, Clone, Default, Args)]
pub struct VmArgs {
    /// A VM of the configuration, by name
    #[arg(value_name = "VM", conflicts_with_all = ["qmp", "image", "libvirt"])]
    pub vm: Option<String>,
    /// The QMP socket of a running QEMU
    #[arg(long, value_name = "SOCKET", conflicts_with = "image")]
    pub qmp: Option<PathBuf>,
    /// The guest agent's socket
    #[arg(long, value_name = "SOCKET", requires = "qmp")]
    pub qga: Option<PathBuf>,
    /// A domain of this host's libvirt, by name or UUID
    #[arg(long, num_args = 2, value_names = ["URI", "DOMAIN"], conflicts_with_all = ["qmp", "image"])]
    pub libvirt: Vec<String>,
    /// How that domain is captured while it runs: job (libvirt's backup) or direct [default: job]
    #[arg(long, value_name = "FORM", requires = "libvirt")]
    pub capture: Option<CaptureForm>,
    /// The name under which this VM's points are kept [default: the domain's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// A powered-off VM's disk images, raw or qcow2; ID is the disk's id (default: the file's name)
    #[arg(long, value_name = "[ID=]FILE", num_args = 1..)]
    pub image: Vec<String>,
}
