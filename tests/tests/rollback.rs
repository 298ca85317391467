//! Rollback in place: to any point, and back again.

use icecore_tests::{
    Disk, Fs, Icecore, Layout, MIB, Reference, Result, TestVm, VmSpec, count, of_disk, text,
};
use serde_json::json;

fn vm() -> Result<TestVm> {
    VmSpec::new("rolled")
        .disk(Disk::new("d0", 128 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("d1", 96 * MIB).fs(Fs::Xfs).layout(Layout::Raw))
        .writer(&["d0", "d1"])
        .boot()
}

fn three_points(icecore: &Icecore, vm: &TestVm) -> Result<Vec<(String, Reference)>> {
    let mut points = Vec::new();
    for n in 0..3 {
        vm.guest(&format!("dd if=/dev/urandom of=/mnt/d0/bulk{n} bs=1M count=6 conv=fsync"))?;
        vm.wait_writer(3)?;
        let (report, reference) = icecore.backup_quietly(vm, |run| run)?;
        points.push((text(&report, "point")?.to_owned(), reference));
    }
    Ok(points)
}

/// Rolls back and leaves the VM stopped, so that its disks can be compared.
fn roll_back_and_compare(
    icecore: &Icecore,
    vm: &TestVm,
    point: &str,
    wanted: &Reference,
) -> Result<serde_json::Value> {
    let report = icecore.rollback(vm, point).args(["--restart", "none"]).json()?;
    for disk in ["d0", "d1"] {
        assert_eq!(of_disk(&report, disk)?["verified"], json!(true), "{report}");
    }
    vm.reference()?.same_as(wanted)?;
    vm.require_no_trace()?;
    Ok(report)
}

#[test]
fn a_guest_comes_back_to_any_point_and_the_rollback_can_be_rolled_back() -> Result<()> {
    let mut vm = vm()?;
    let icecore = Icecore::new()?;
    let points = three_points(&icecore, &vm)?;
    vm.guest("rm -rf /mnt/d0/* /mnt/d1/writer; sync")?;
    vm.monitor()?.execute("stop", json!({}))?;
    let before = vm.reference()?;

    let (middle, wanted) = &points[1];
    let report = roll_back_and_compare(&icecore, &vm, middle, wanted)?;
    let safety = text(&report, "safety_point")?.to_owned();
    let written = count(&report["disks"][0], "written_bytes")?;
    assert!(written < 64 * MIB, "the cost follows the change: {written}");

    roll_back_and_compare(&icecore, &vm, &points[0].0, &points[0].1)?;
    roll_back_and_compare(&icecore, &vm, &points[2].0, &points[2].1)?;
    roll_back_and_compare(&icecore, &vm, &safety, &before)?;
    vm.require_alive()?;
    icecore.check().map(drop)
}

#[test]
fn a_running_guest_is_reset_into_the_point_and_its_next_point_is_incremental() -> Result<()> {
    let vm = vm()?;
    let icecore = Icecore::new()?;
    let points = three_points(&icecore, &vm)?;
    vm.guest("ordered-writer stop; rm -rf /mnt/*/writer /mnt/d0/bulk*; sync")?;
    let report = icecore.rollback(&vm, &points[1].0).json()?;
    assert_eq!(report["vm_restarted"], json!(true), "{report}");
    vm.wait_ready()?;
    vm.guest("test -f /mnt/d0/bulk1 && test ! -e /mnt/d0/bulk2")?;
    vm.wait_writer(2)?;
    vm.guest("ordered-writer stop; check-writer /mnt/d0 /mnt/d1; ordered-writer start d0 d1")?;
    vm.require_no_trace()?;
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn a_rollback_after_another_repositorys_backup_misses_nothing() -> Result<()> {
    let vm = vm()?;
    let (one, other) = (Icecore::new()?, Icecore::new()?);
    let points = three_points(&one, &vm)?;
    vm.wait_writer(3)?;
    other.backup(&vm).succeed()?;
    vm.wait_writer(3)?;
    roll_back_and_compare(&one, &vm, &points[0].0, &points[0].1).map(drop)
}

#[test]
fn a_dry_run_says_what_differs_and_changes_nothing() -> Result<()> {
    let vm = vm()?;
    let icecore = Icecore::new()?;
    let points = three_points(&icecore, &vm)?;
    vm.monitor()?.execute("stop", json!({}))?;
    let before = vm.reference()?;
    let report = icecore.rollback(&vm, &points[0].0).arg("--dry-run").json()?;
    for disk in ["d0", "d1"] {
        let said = count(of_disk(&report, disk)?, "differing_bytes")?;
        assert!(said > 0, "{report}");
        assert_eq!(said, differing(&points[0].1.raw(disk), &before.raw(disk))?, "{disk}: {report}");
    }
    vm.reference()?.same_as(&before)?;
    vm.require_no_trace()
}

/// Bytes of the 64 KiB blocks in which two files of one size differ.
fn differing(one: &std::path::Path, other: &std::path::Path) -> Result<u64> {
    let (one, other) = (std::fs::read(one)?, std::fs::read(other)?);
    assert_eq!(one.len(), other.len());
    let pairs = one.chunks(65536).zip(other.chunks(65536));
    Ok(pairs.filter(|(a, b)| a != b).map(|(a, _)| a.len() as u64).sum())
}
