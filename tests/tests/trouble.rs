//! Things that go wrong in the middle of a copy. Whatever happens, the guest goes on, nothing of
//! Icecore's stays in QEMU, and the next point is right.

use std::time::{Duration, Instant};

use icecore_tests::{
    Attach, Disk, Fs, Icecore, MIB, Result, TestVm, VmSpec, require_mode, require_rehash, text,
    wait_until,
};
use rustix::process::Signal;
use serde_json::json;

fn vm_with_data() -> Result<TestVm> {
    let vm = VmSpec::new("trouble")
        .disk(Disk::new("d0", 192 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("d1", 64 * MIB).attach(Attach::Drive))
        .writer(&["d0"])
        .boot()?;
    vm.guest("dd if=/dev/urandom of=/mnt/d0/bulk bs=1M count=24 conv=fsync")?;
    vm.guest("dd if=/dev/urandom of=/dev/lab/d1 bs=1M count=24 conv=fsync")?;
    Ok(vm)
}

#[test]
fn a_full_scratch_fails_the_backup_and_never_the_guest() -> Result<()> {
    let vm = vm_with_data()?;
    let icecore = Icecore::new()?;
    vm.guest("stall-meter start /mnt/d0")?;
    let slow = ["--rate-limit", "1M", "--scratch-limit", "2M"];
    let mut run = icecore.backup(&vm).args(slow).start()?;
    wait_until("the copy", Duration::from_secs(30), || Ok(!run.runs()? || vm.is_being_copied()?))?;
    // What has not been read yet is overwritten: more than the scratch may hold.
    vm.guest("dd if=/dev/urandom of=/dev/lab/d1 bs=1M count=24 conv=fsync")?;
    let outcome = run.finish()?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("scratch"), "{}", outcome.stderr);
    let result = vm.guest("stall-meter read")?;
    assert!(result.ends_with(" 0"), "longest stall and failed writes: {result}");
    vm.require_no_trace()?;
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn a_stopped_icecore_does_not_stop_the_guest() -> Result<()> {
    let vm = vm_with_data()?;
    let icecore = Icecore::new()?;
    let run = icecore.start_slow_backup(&vm)?;
    run.signal(Signal::STOP);
    let start = Instant::now();
    vm.monitor()?.execute("system_reset", json!({}))?;
    vm.monitor()?.wait_event("RESET", Duration::from_secs(5))?;
    vm.monitor()?.execute("stop", json!({}))?;
    vm.monitor()?.execute("cont", json!({}))?;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // The agent is still the guardian's.
    vm.wait_guest()?;
    vm.require_no_trace()?;
    run.signal(Signal::CONT);
    let outcome = run.finish()?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn an_interrupt_cleans_up_and_says_130() -> Result<()> {
    let vm = vm_with_data()?;
    let icecore = Icecore::new()?;
    let run = icecore.start_slow_backup(&vm)?;
    run.signal(Signal::INT);
    assert_eq!(run.finish()?.status, Some(130));
    // At its end, not some time later.
    assert_eq!(vm.traces()?, Vec::<String>::new());
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn a_disk_that_grows_in_mid_copy_kills_nobody() -> Result<()> {
    resize_in_mid_copy(&[256 * MIB])
}

#[test]
fn a_disk_that_shrinks_and_grows_back_in_mid_copy_kills_nobody() -> Result<()> {
    resize_in_mid_copy(&[32 * MIB, 64 * MIB])
}

/// The point that was being taken is right or absent; what is right cannot be known from here
/// (the instant has passed), so its own proof must at least hold.
fn resize_in_mid_copy(sizes: &[u64]) -> Result<()> {
    let mut vm = vm_with_data()?;
    let icecore = Icecore::new()?;
    let run = icecore.start_slow_backup(&vm)?;
    for bytes in sizes {
        vm.resize("d1", *bytes)?;
    }
    let outcome = run.finish()?;
    vm.require_alive()?;
    vm.require_no_trace()?;
    if outcome.status == Some(0) {
        icecore.restore_all(text(&outcome.json()?, "point")?, &icecore.path("taken"))?;
    } else {
        assert_eq!(outcome.status, Some(1), "{outcome:?}");
    }
    icecore.prove_next_point(&vm)?;
    vm.guest("dd if=/dev/urandom of=/dev/lab/d1 bs=64k count=4 conv=fsync")?;
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn shrinking_and_growing_back_between_points_is_noticed() -> Result<()> {
    let vm = vm_with_data()?;
    let icecore = Icecore::new()?;
    icecore.prove_next_point(&vm)?;
    vm.resize("d1", 8 * MIB)?;
    vm.resize("d1", 64 * MIB)?;
    let report = icecore.prove_next_point(&vm)?;
    require_rehash(&report, "d1", "Contradiction")
}

#[test]
fn an_external_snapshot_in_mid_copy_leaves_a_clean_graph() -> Result<()> {
    let mut vm = vm_with_data()?;
    let icecore = Icecore::new()?;
    icecore.prove_next_point(&vm)?;
    vm.guest("dd if=/dev/urandom of=/mnt/d0/more bs=1M count=10 conv=fsync")?;
    let run = icecore.start_slow_backup(&vm)?;
    vm.external_snapshot("d0")?;
    let outcome = run.finish()?;
    assert!(matches!(outcome.status, Some(0 | 1)), "{outcome:?}");
    vm.require_alive()?;
    vm.require_no_trace()?;
    vm.wait_writer(2)?;
    let report = icecore.prove_next_point(&vm)?;
    require_mode(&report, "d0", "rehash")?;
    require_mode(&report, "d1", "incremental")
}

#[test]
fn killed_at_any_moment_icecore_leaves_nothing_and_the_next_point_is_right() -> Result<()> {
    let vm = VmSpec::new("killed")
        .no_guest()
        .disk(Disk::new("d0", 32 * MIB))
        .disk(Disk::new("d1", 16 * MIB))
        .start()?;
    let icecore = Icecore::new()?;
    vm.fill("d0", 1, 0, 8 * MIB)?;
    let start = Instant::now();
    icecore.prove_next_point(&vm)?;
    // The moments are spread over what a whole run takes here.
    let whole = start.elapsed().min(Duration::from_secs(2));
    for moment in 0..16u8 {
        vm.fill("d0", moment + 2, u64::from(moment) * MIB, 100_000)?;
        vm.fill("d1", moment + 2, u64::from(moment) * 65536, 512)?;
        let run = icecore.backup(&vm).start()?;
        std::thread::sleep(whole * u32::from(moment) / 20);
        run.signal(Signal::KILL);
        run.finish()?;
        vm.require_no_trace()?;
        icecore.prove_next_point(&vm)?;
        assert_eq!(vm.bitmaps("d0")?.len(), 1, "after moment {moment}");
    }
    icecore.check().map(drop)
}

/// FAULTS: a live migration while a point is taken. QEMU cannot hand over a disk that it exports, so
/// the migration fails and the guest stays; afterwards it may leave, and its stored bitmap with it.
#[test]
fn a_migration_in_mid_copy_is_refused_and_one_after_it_takes_the_bitmap_along() -> Result<()> {
    let mut vm = VmSpec::new("leaving").no_guest().disk(Disk::new("d0", 64 * MIB)).start()?;
    vm.monitor()?.execute("cont", json!({}))?;
    vm.fill("d0", 5, 0, 24 * MIB)?;
    let icecore = Icecore::new()?;
    icecore.prove_next_point(&vm)?;
    vm.fill("d0", 6, 0, 20 * MIB)?;
    let run = icecore.start_slow_backup(&vm)?;
    assert_eq!(migrate(&vm)?, "failed");
    assert_eq!(vm.monitor()?.status()?, "running");
    run.finish()?.json()?;
    vm.require_no_trace()?;
    assert_eq!(migrate(&vm)?, "completed");
    // What the other host sees: the image with the bitmap that was stored as its guest left.
    vm.quit()?;
    vm.power_on()?;
    vm.fill("d0", 7, 0, MIB)?;
    require_mode(&icecore.prove_next_point(&vm)?, "d0", "incremental")
}

/// Migrates the guest to nowhere and says how that ended.
fn migrate(vm: &TestVm) -> Result<String> {
    vm.monitor()?.execute("migrate", json!({"uri": "exec:cat > /dev/null"}))?;
    let mut status = String::new();
    wait_until("the migration", Duration::from_secs(60), || {
        let seen = vm.monitor()?.execute("query-migrate", json!({}))?;
        status = text(&seen, "status")?.to_owned();
        Ok(["failed", "completed"].contains(&status.as_str()))
    })?;
    Ok(status)
}
