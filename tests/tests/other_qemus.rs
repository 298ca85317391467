//! The same full and incremental points on the oldest and the newest QEMU that Icecore works with,
//! with and without iothreads. QEMU must be alive at the end of each: before 9.1 the wrong way of
//! reading a disk in an iothread kills it.

use icecore_tests::{Bus, Disk, Fs, Icecore, MIB, Qemu, Result, VmSpec, require_mode};

fn full_and_incremental(qemu: Qemu, iothreads: bool) -> Result<()> {
    let with = |disk: Disk| if iothreads { disk.iothread() } else { disk };
    let mut vm = VmSpec::new("row")
        .qemu(qemu)
        .disk(with(Disk::new("blk", 96 * MIB)).fs(Fs::Ext4))
        .disk(with(Disk::new("scsi", 96 * MIB)).bus(Bus::VirtioScsi).fs(Fs::Xfs))
        .writer(&["blk", "scsi"])
        .boot()?;
    let icecore = Icecore::new()?;
    for mode in ["full", "incremental", "incremental"] {
        vm.wait_writer(3)?;
        let report = icecore.prove_next_point(&vm)?;
        vm.require_alive()?;
        require_mode(&report, "blk", mode)?;
        require_mode(&report, "scsi", mode)?;
    }
    vm.power_off()
}

#[test]
fn qemu_7_2_without_iothreads() -> Result<()> {
    full_and_incremental(Qemu::V7_2, false)
}

#[test]
fn qemu_7_2_with_iothreads_is_pushed_and_lives() -> Result<()> {
    full_and_incremental(Qemu::V7_2, true)
}

#[test]
fn the_installed_qemu_with_iothreads() -> Result<()> {
    full_and_incremental(Qemu::Installed, true)
}

#[test]
#[ignore = "long: QEMU 11.1 needs a chroot; cargo xtask test --long"]
fn qemu_11_1_without_iothreads() -> Result<()> {
    full_and_incremental(Qemu::V11_1, false)
}

#[test]
#[ignore = "long: QEMU 11.1 needs a chroot; cargo xtask test --long"]
fn qemu_11_1_with_iothreads() -> Result<()> {
    full_and_incremental(Qemu::V11_1, true)
}
