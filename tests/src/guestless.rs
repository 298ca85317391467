//! Writes through the device of a VM without a guest, by the monitor's `qemu-io`.

use crate::disk::Bus;
use crate::failure::{Failure, Result};
use crate::vm::TestVm;

impl TestVm {
    /// Runs a qemu-io command on a disk's device, such as `write -P 7 0 64k`, along the path that
    /// a guest's own requests take.
    pub fn qemu_io(&self, disk: &str, command: &str) -> Result<String> {
        // The device that owns the block backend: of virtio-blk it is a child of the PCI device.
        let owner = match self.find_disk(disk)?.bus {
            Bus::VirtioBlk => format!("/machine/peripheral/{disk}/virtio-backend"),
            _ => disk.to_owned(),
        };
        let line = format!("qemu-io -d {owner} \"{command}\"");
        let output = self.monitor()?.human(&line)?;
        let text = output.to_lowercase();
        if text.contains("error") || text.contains("failed") || text.contains("not found") {
            return Err(Failure::new(format!("{line}: {output}")));
        }
        Ok(output)
    }

    /// Fills a range of a disk with one byte.
    pub fn fill(&self, disk: &str, byte: u8, offset: u64, bytes: u64) -> Result<()> {
        self.qemu_io(disk, &format!("write -P {byte} {offset} {bytes}")).map(drop)
    }

    /// Has the device discard a range, as a guest's trim does.
    pub fn discard(&self, disk: &str, offset: u64, bytes: u64) -> Result<()> {
        self.qemu_io(disk, &format!("discard {offset} {bytes}")).map(drop)
    }

    /// Has the device write zeroes without data, as a guest's write-zeroes does.
    pub fn zero(&self, disk: &str, offset: u64, bytes: u64) -> Result<()> {
        self.qemu_io(disk, &format!("write -z {offset} {bytes}")).map(drop)
    }
}
