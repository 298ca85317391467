//! QEMU ends, well or badly, between two points or in the middle of one.

use icecore_tests::{
    Disk, Fs, Icecore, Layout, MIB, Result, TestVm, VmSpec, count, of_disk, require_mode,
    require_rehash,
};

/// `stored` can keep bitmaps, `plain` (a raw image) cannot.
fn vm() -> Result<TestVm> {
    VmSpec::new("restarts")
        .disk(Disk::new("stored", 128 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("plain", 64 * MIB).fs(Fs::Ext4).layout(Layout::Raw))
        .writer(&["stored", "plain"])
        .boot()
}

fn require_small(report: &serde_json::Value, disk: &str) -> Result<()> {
    let stored = count(of_disk(report, disk)?, "stored_bytes")?;
    assert!(stored < 12 * MIB, "{disk}: a rehash stored {stored} bytes");
    Ok(())
}

#[test]
fn a_clean_stop_and_start_keeps_the_incremental() -> Result<()> {
    let mut vm = vm()?;
    let icecore = Icecore::new()?;
    vm.guest("dd if=/dev/urandom of=/mnt/stored/bulk bs=1M count=30 conv=fsync")?;
    vm.wait_writer(2)?;
    let first = icecore.prove_next_point(&vm)?;
    vm.power_off()?;
    vm.power_on()?;
    vm.wait_ready()?;
    vm.wait_writer(2)?;
    let second = icecore.prove_next_point(&vm)?;
    assert_eq!(first["chain"], second["chain"]);
    require_mode(&second, "stored", "incremental")?;
    require_rehash(&second, "plain", "BitmapMissing")?;
    require_small(&second, "stored")
}

#[test]
fn after_a_kill_of_qemu_a_stored_bitmap_is_inconsistent_and_the_disk_read_whole() -> Result<()> {
    let mut vm = vm()?;
    let icecore = Icecore::new()?;
    vm.guest("dd if=/dev/urandom of=/mnt/stored/bulk bs=1M count=30 conv=fsync")?;
    vm.wait_writer(2)?;
    let first = icecore.prove_next_point(&vm)?;
    vm.power_off()?;
    vm.power_on()?;
    vm.wait_ready()?;
    vm.wait_writer(2)?;
    vm.kill();
    vm.power_on()?;
    vm.wait_ready()?;
    let second = icecore.prove_next_point(&vm)?;
    assert_eq!(first["chain"], second["chain"]);
    require_rehash(&second, "stored", "BitmapInconsistent")?;
    require_rehash(&second, "plain", "BitmapMissing")?;
    require_small(&second, "stored")?;
    require_small(&second, "plain")?;
    vm.wait_writer(1)?;
    let third = icecore.prove_next_point(&vm)?;
    require_mode(&third, "stored", "incremental")?;
    require_mode(&third, "plain", "incremental")
}

#[test]
fn after_a_kill_of_qemu_a_bitmap_that_was_never_stored_is_missing() -> Result<()> {
    let mut vm = vm()?;
    let icecore = Icecore::new()?;
    vm.guest("dd if=/dev/urandom of=/mnt/stored/bulk bs=1M count=30 conv=fsync")?;
    icecore.prove_next_point(&vm)?;
    vm.wait_writer(2)?;
    vm.kill();
    vm.power_on()?;
    vm.wait_ready()?;
    let second = icecore.prove_next_point(&vm)?;
    require_rehash(&second, "stored", "BitmapMissing")?;
    require_small(&second, "stored")
}

#[test]
fn a_quit_in_mid_backup_keeps_the_incremental() -> Result<()> {
    let mut vm = vm()?;
    let icecore = Icecore::new()?;
    let first = icecore.prove_next_point(&vm)?;
    vm.guest("dd if=/dev/urandom of=/mnt/stored/bulk bs=1M count=20 conv=fsync")?;
    let run = icecore.start_slow_backup(&vm)?;
    vm.quit()?;
    let outcome = run.finish()?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    assert!(!outcome.stderr.is_empty());
    vm.power_on()?;
    vm.wait_ready()?;
    let second = icecore.prove_next_point(&vm)?;
    assert_eq!(first["point"], second["parent"]);
    require_mode(&second, "stored", "incremental")
}

#[test]
fn a_kill_of_qemu_in_mid_backup_fails_it_with_a_reason_and_the_next_is_right() -> Result<()> {
    let mut vm = vm()?;
    let icecore = Icecore::new()?;
    vm.guest("dd if=/dev/urandom of=/mnt/stored/bulk bs=1M count=20 conv=fsync")?;
    let run = icecore.start_slow_backup(&vm)?;
    vm.kill();
    let outcome = run.finish()?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    vm.power_on()?;
    vm.wait_ready()?;
    icecore.prove_next_point(&vm).map(drop)
}
