//! The laboratory itself: its guest, its references and its judge of the writer's order.

use icecore_tests::{Bus, Disk, Fs, MIB, Qemu, Result, Scratch, VmSpec, check_writer_in_images};

#[test]
fn a_guest_boots_on_every_bus_and_its_disks_can_be_read_from_outside() -> Result<()> {
    let mut vm = VmSpec::new("buses")
        .disk(Disk::new("blk", 64 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("scsi", 96 * MIB).fs(Fs::Xfs).bus(Bus::VirtioScsi).iothread())
        .disk(Disk::new("ide", 8 * MIB).bus(Bus::Ide))
        .disk(Disk::new("nvme", 8 * MIB).bus(Bus::Nvme))
        .writer(&["blk", "scsi"])
        .boot()?;
    vm.guest("printf pattern | dd of=/dev/lab/nvme bs=7 seek=1 conv=fsync")?;
    vm.wait_writer(2)?;
    let reference = vm.reference()?;
    let bytes = std::fs::read(reference.raw("nvme"))?;
    assert_eq!(&bytes[7..14], b"pattern");
    assert_eq!(vm.monitor()?.status()?, "running");
    vm.judge_restored(reference.raw("blk").parent().expect("a file in a folder"))?;
    vm.power_off()
}

#[test]
fn the_judge_sees_a_line_whose_data_never_arrived() -> Result<()> {
    let mut vm =
        VmSpec::new("judge").disk(Disk::new("d0", 64 * MIB).fs(Fs::Ext4)).writer(&["d0"]).boot()?;
    vm.guest("ordered-writer stop")?;
    vm.guest("echo torn > /mnt/d0/writer/data.$(ordered-writer last d0)")?;
    vm.power_off()?;
    let scratch = Scratch::new()?;
    let raw = scratch.join("d0.raw");
    vm.disk_to_raw("d0", &raw)?;
    let verdict = check_writer_in_images(&[(raw, Fs::Ext4)]);
    let text = verdict.expect_err("a torn file was accepted").to_string();
    assert!(text.contains("wrong:"), "{text}");
    Ok(())
}

#[test]
fn a_vm_without_a_guest_takes_writes_through_its_device() -> Result<()> {
    let mut vm = VmSpec::new("bare").no_guest().disk(Disk::new("d0", 8 * MIB)).start()?;
    vm.fill("d0", 0x5a, MIB, 4096)?;
    vm.zero("d0", MIB + 2048, 1024)?;
    let reference = vm.reference()?;
    let bytes = std::fs::read(reference.raw("d0"))?;
    let at = |offset: usize| bytes[MIB as usize + offset];
    assert_eq!([at(0), at(2047), at(2048), at(3071), at(3072), at(4096)], [90, 90, 0, 0, 90, 0]);
    vm.quit()
}

fn boots(qemu: Qemu, version: &str) -> Result<()> {
    let mut vm = VmSpec::new("row")
        .qemu(qemu)
        .disk(Disk::new("d0", 64 * MIB).fs(Fs::Ext4).iothread())
        .disk(Disk::new("d1", 8 * MIB).bus(Bus::VirtioScsi))
        .boot()?;
    let said = vm.monitor()?.execute("query-version", serde_json::json!({}))?;
    assert!(said["qemu"].to_string().contains(version), "{said}");
    vm.power_off()
}

#[test]
fn qemu_7_2_runs_the_guest_from_its_folder() -> Result<()> {
    boots(Qemu::V7_2, r#""major":7"#)
}

#[test]
#[ignore = "long: QEMU 11.1 needs a chroot; cargo xtask test --long"]
fn qemu_11_1_runs_the_guest_from_its_chroot() -> Result<()> {
    boots(Qemu::V11_1, r#""major":11"#)
}
