//! The disks of a test VM: what they are made of and how QEMU is told about them.

use std::path::{Path, PathBuf};

use crate::failure::Result;
use crate::image::{copy_image, create_overlay, create_qcow2, create_raw};

/// The bus, and with it the device model, that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// `virtio-blk-pci`
    VirtioBlk,
    /// `scsi-hd` on a shared `virtio-scsi-pci`
    VirtioScsi,
    /// `ide-hd` on the machine `pc`
    Ide,
    /// `ide-hd` on the AHCI controller of the machine `q35`
    Sata,
    /// `nvme`
    Nvme,
}

/// What lies on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One qcow2 file, which can hold persistent bitmaps.
    Qcow2,
    /// One raw file.
    Raw,
    /// A qcow2 file over a qcow2 backing file.
    Qcow2OnBacking,
}

/// How the block node is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// `-blockdev` with node names, as libvirt does.
    Blockdev,
    /// `-drive if=none`, whose nodes get names that change at each start.
    Drive,
}

/// What the guest makes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fs {
    /// Mounted at `/mnt/ID`.
    Ext4,
    /// Mounted at `/mnt/ID`.
    Xfs,
    /// Left alone; `/dev/lab/ID`.
    Raw,
}

impl Fs {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Raw => "raw",
        }
    }
}

/// One disk. Its id is the device's id in QEMU and the serial that the guest sees.
#[derive(Clone, Debug)]
pub struct Disk {
    pub(crate) id: String,
    pub(crate) bytes: u64,
    pub(crate) bus: Bus,
    pub(crate) layout: Layout,
    pub(crate) attach: Attach,
    pub(crate) fs: Fs,
    pub(crate) iothread: bool,
    /// What its storage moves in a second, in bytes.
    bandwidth: Option<u64>,
    /// What it is made a copy of.
    content: Option<PathBuf>,
    /// Where the top image is now, when it is no longer where it was made.
    pub(crate) moved_to: Option<PathBuf>,
}

impl Disk {
    /// A qcow2 disk on virtio-blk by `-blockdev`, raw to the guest.
    pub fn new(id: &str, bytes: u64) -> Self {
        Self {
            id: id.to_owned(),
            bytes,
            bus: Bus::VirtioBlk,
            layout: Layout::Qcow2,
            attach: Attach::Blockdev,
            fs: Fs::Raw,
            iothread: false,
            bandwidth: None,
            content: None,
            moved_to: None,
        }
    }

    /// On another bus.
    pub fn bus(mut self, bus: Bus) -> Self {
        self.bus = bus;
        self
    }

    /// On storage that moves so many bytes in a second, whoever asks (by `-blockdev` only).
    pub fn bandwidth(mut self, bytes_per_second: u64) -> Self {
        self.bandwidth = Some(bytes_per_second);
        self
    }

    /// A copy of this image, which has the disk's format and size, instead of a blank one.
    pub fn content_of(mut self, image: &Path) -> Self {
        self.content = Some(image.to_owned());
        self
    }

    /// In another layout.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Attached in another way.
    pub fn attach(mut self, attach: Attach) -> Self {
        self.attach = attach;
        self
    }

    /// With a file system that the guest makes and mounts.
    pub fn fs(mut self, fs: Fs) -> Self {
        self.fs = fs;
        self
    }

    /// In an iothread (virtio-blk and virtio-scsi only).
    pub fn iothread(mut self) -> Self {
        self.iothread = true;
        self
    }

    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// QEMU's name of the format of the top image.
    pub fn format(&self) -> &'static str {
        if self.layout == Layout::Raw { "raw" } else { "qcow2" }
    }

    /// The top image's file in the VM's folder.
    pub fn file(&self, dir: &Path) -> PathBuf {
        let made = || dir.join(format!("{}.{}", self.id, self.format()));
        self.moved_to.clone().unwrap_or_else(made)
    }

    pub(crate) fn create(&self, dir: &Path) -> Result<()> {
        let file = self.file(dir);
        if let Some(image) = &self.content {
            return copy_image(image, &file);
        }
        match self.layout {
            Layout::Raw => create_raw(&file, self.bytes),
            Layout::Qcow2 => create_qcow2(&file, self.bytes),
            Layout::Qcow2OnBacking => {
                let base = dir.join(format!("{}-base.qcow2", self.id));
                create_qcow2(&base, self.bytes)?;
                create_overlay(&file, &base)
            }
        }
    }

    /// QEMU's arguments for this disk, the `index`-th of its bus.
    pub(crate) fn arguments(&self, dir: &Path, index: usize) -> Vec<String> {
        let mut arguments = self.node_arguments(dir);
        if self.iothread && self.bus == Bus::VirtioBlk {
            arguments.extend(["-object".to_owned(), format!("iothread,id={}-iot", self.id)]);
        }
        arguments.extend(["-device".to_owned(), self.device(index)]);
        arguments
    }

    /// The id of the block node's owner: what a device's `drive` property names.
    pub(crate) fn drive(&self) -> String {
        format!("{}-node", self.id)
    }

    fn node_arguments(&self, dir: &Path) -> Vec<String> {
        let (node, file, format) = (self.drive(), self.file(dir), self.format());
        let file = file.display();
        match self.attach {
            Attach::Drive => vec![
                "-drive".to_owned(),
                format!("if=none,id={node},file={file},format={format},discard=unmap"),
            ],
            Attach::Blockdev => {
                let limited = self.bandwidth.is_some();
                let storage = if limited { "storage" } else { "file" };
                let mut arguments = vec![
                    "-blockdev".to_owned(),
                    format!(
                        r#"{{"driver":"file","node-name":"{node}-{storage}","filename":"{file}","discard":"unmap"}}"#
                    ),
                ];
                arguments.extend(self.bandwidth.into_iter().flat_map(|bytes| limit(&node, bytes)));
                arguments.extend([
                    "-blockdev".to_owned(),
                    format!(
                        r#"{{"driver":"{format}","node-name":"{node}","file":"{node}-file","discard":"unmap"}}"#
                    ),
                ]);
                arguments
            }
        }
    }

    fn device(&self, index: usize) -> String {
        let (id, drive) = (&self.id, self.drive());
        let common = format!("drive={drive},id={id},serial={id}");
        match self.bus {
            Bus::VirtioBlk if self.iothread => {
                format!("virtio-blk-pci,{common},iothread={id}-iot")
            }
            Bus::VirtioBlk => format!("virtio-blk-pci,{common}"),
            Bus::VirtioScsi => format!("scsi-hd,bus={}.0,{common}", self.scsi_controller()),
            Bus::Ide => format!("ide-hd,bus=ide.{},unit={},{common}", index / 2, index % 2),
            Bus::Sata => format!("ide-hd,bus=ide.{index},{common}"),
            Bus::Nvme => format!("nvme,{common}"),
        }
    }

    /// Disks with an iothread share one controller, those without another.
    pub(crate) fn scsi_controller(&self) -> &'static str {
        if self.iothread { "lab-scsi-iot" } else { "lab-scsi" }
    }
}

/// A slow storage between file and format.
fn limit(node: &str, bytes_per_second: u64) -> [String; 4] {
    let group = format!("throttle-group,id={node}-limit,x-bps-total={bytes_per_second}");
    let filter = format!(
        r#"{{"driver":"throttle","node-name":"{node}-file","throttle-group":"{node}-limit","file":"{node}-storage"}}"#
    );
    ["-object".to_owned(), group, "-blockdev".to_owned(), filter]
}
