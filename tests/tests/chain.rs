//! The main promise: every point of a chain restores byte for byte what the disks held at its
//! instant, while the guest writes, trims, zeroes and rewrites.

use icecore_tests::{
    Attach, Bus, Disk, Fs, Icecore, Layout, MIB, Reference, Result, TestVm, VmSpec, count, of_disk,
    require_mode, text,
};

/// What happens in the guest before each point.
const CHANGES: [&str; 4] = [
    "dd if=/dev/urandom of=/dev/lab/raw bs=1M count=24 conv=fsync; \
     dd if=/dev/urandom of=/mnt/sys/old bs=1M count=8 conv=fsync; \
     dd if=/dev/urandom of=/mnt/data/old bs=1M count=8 conv=fsync",
    // Trim: what is gone must read as it reads now, not as it was.
    "/sbin/blkdiscard -o 2M -l 3M /dev/lab/raw; rm /mnt/sys/old /mnt/data/old; \
     sync; /sbin/fstrim /mnt/sys; /sbin/fstrim /mnt/data",
    // Zeroes, with and without unmapping, on and off block boundaries.
    "/sbin/blkdiscard -z -o 8M -l 1M /dev/lab/raw; \
     dd if=/dev/zero of=/dev/lab/raw bs=4k seek=3001 count=37 conv=notrunc,fsync; \
     dd if=/dev/urandom of=/mnt/data/hole bs=1M count=4 conv=fsync; \
     /sbin/fallocate -p -o 1M -l 1M /mnt/data/hole; sync",
    // In-place rewrites, and data where zeroes and holes were.
    "for n in 1 77 300 512 513 3002; do \
       dd if=/dev/urandom of=/dev/lab/raw bs=4k seek=$n count=1 conv=notrunc,fsync; done; \
     dd if=/dev/urandom of=/mnt/data/hole bs=4k seek=300 count=3 conv=notrunc,fsync",
];

fn busy_vm() -> VmSpec {
    VmSpec::new("chain")
        .disk(Disk::new("sys", 128 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("data", 128 * MIB).fs(Fs::Xfs).bus(Bus::VirtioScsi).attach(Attach::Drive))
        .disk(Disk::new("raw", 48 * MIB).layout(Layout::Qcow2OnBacking))
        .writer(&["sys", "data"])
}

fn take_points(icecore: &Icecore, vm: &TestVm) -> Result<Vec<(String, Reference)>> {
    let mut points = Vec::new();
    for (index, change) in CHANGES.iter().enumerate() {
        vm.wait_writer(3)?;
        vm.guest(change)?;
        let (report, reference) = icecore.backup_quietly(vm, |run| run)?;
        for disk in vm.disks() {
            require_mode(&report, disk.id(), if index == 0 { "full" } else { "incremental" })?;
            if index > 0 {
                let read = count(of_disk(&report, disk.id())?, "read_bytes")?;
                assert!(read < 40 * MIB, "{} read {read} bytes", disk.id());
            }
        }
        points.push((text(&report, "point")?.to_owned(), reference));
        vm.require_no_trace()?;
    }
    Ok(points)
}

#[test]
fn full_and_three_incrementals_of_a_writing_guest_restore_byte_for_byte() -> Result<()> {
    let mut vm = busy_vm().boot()?;
    let icecore = Icecore::new()?;
    let points = take_points(&icecore, &vm)?;
    for disk in ["sys", "data", "raw"] {
        assert_eq!(vm.bitmaps(disk)?.len(), 1, "one recording bitmap for each disk: {disk}");
    }
    vm.power_off()?;
    for (point, reference) in &points {
        icecore.prove_point(&vm, point, reference)?;
    }
    icecore.check().map(drop)
}

#[test]
fn without_an_agent_the_points_of_a_quiet_guest_restore_byte_for_byte() -> Result<()> {
    let mut vm = busy_vm().no_agent().boot()?;
    let icecore = Icecore::new()?;
    let points = take_points(&icecore, &vm)?;
    vm.power_off()?;
    for (point, reference) in &points {
        icecore.prove_point(&vm, point, reference)?;
    }
    Ok(())
}

#[test]
fn disks_on_ide_sata_and_nvme_chain_like_all_others() -> Result<()> {
    for (name, bus) in [("ide", Bus::Ide), ("sata", Bus::Sata), ("nvme", Bus::Nvme)] {
        let mut vm =
            VmSpec::new(name).no_guest().disk(Disk::new(name, 16 * MIB).bus(bus)).start()?;
        let icecore = Icecore::new()?;
        let mut modes = Vec::new();
        for byte in 1..=3 {
            vm.fill(name, byte, u64::from(byte) * MIB, 65536)?;
            let report = icecore.prove_next_point(&vm)?;
            modes.push(text(of_disk(&report, name)?, "mode")?.to_owned());
        }
        vm.require_alive()?;
        assert_eq!(modes, ["full", "incremental", "incremental"], "{name}");
    }
    Ok(())
}

/// More disks than are read at one time, attached in turns by `-blockdev` and `-drive`, which QEMU
/// lists apart: the report has them as the guest numbers them, and each restores.
#[test]
fn many_disks_are_read_side_by_side_and_listed_in_device_order() -> Result<()> {
    let ids = ["zeta", "beta", "omega", "alpha", "kappa", "iota"];
    let mut spec = VmSpec::new("many").no_guest();
    for (index, id) in ids.iter().enumerate() {
        let attach = if index % 2 == 0 { Attach::Blockdev } else { Attach::Drive };
        spec = spec.disk(Disk::new(id, 16 * MIB).attach(attach));
    }
    let mut vm = spec.start()?;
    let icecore = Icecore::new()?;
    for mode in ["full", "incremental"] {
        for (byte, id) in (1..).zip(ids) {
            vm.fill(id, byte, u64::from(byte) * MIB, 3 * MIB)?;
        }
        let report = icecore.prove_next_point(&vm)?;
        let listed: Vec<_> = report["disks"].as_array().into_iter().flatten().collect();
        let listed: Vec<_> = listed.iter().filter_map(|disk| disk["disk"].as_str()).collect();
        assert_eq!(listed, ids);
        for id in ids {
            require_mode(&report, id, mode)?;
        }
        let show = icecore.command("point").args(["show", "latest", "--repo"]);
        let point = show.arg(icecore.repository()).json()?;
        let held: Vec<_> = point["disks"].as_array().into_iter().flatten().collect();
        let held: Vec<_> = held.iter().filter_map(|d| d.as_str().or(d["disk"].as_str())).collect();
        assert_eq!(held, ids, "the manifest has the same order");
    }
    vm.require_alive()
}
