//! The cost follows the change: of time, of bytes, of memory.

use std::process::Command;
use std::time::{Duration, Instant};

use icecore_tests::{
    Background, Disk, Failure, Fs, Icecore, MIB, Result, Run, TestVm, VmSpec, count, create_qcow2,
    create_raw, of_disk, require_mode, run, run_within, text, wait_until,
};
use serde_json::json;

#[test]
fn what_little_changes_costs_little() -> Result<()> {
    let vm = VmSpec::new("little").no_guest().disk(Disk::new("d0", 512 * MIB)).start()?;
    let icecore = Icecore::new()?;
    vm.fill("d0", 1, 0, 256 * MIB)?;
    icecore.backup(&vm).succeed()?;

    vm.qemu_io("d0", &format!("write -P 77 {} 65536", 100 * MIB))?;
    let report = icecore.backup(&vm).json()?;
    let disk = of_disk(&report, "d0")?;
    // Two sentinels and a few samples are read beside the change.
    assert!(count(disk, "dirty_bytes")? <= 4 * 65536, "{report}");
    assert!(count(disk, "read_bytes")? <= 24 * 65536, "{report}");
    assert!(count(disk, "stored_bytes")? <= 66_000, "{report}");

    let start = Instant::now();
    let report = icecore.backup(&vm).json()?;
    assert!(start.elapsed() < Duration::from_millis(1500), "no change took {:?}", start.elapsed());
    assert_eq!(count(of_disk(&report, "d0")?, "new_bytes")?, 0, "{report}");
    Ok(())
}

#[test]
fn a_zeroed_disk_costs_no_storage() -> Result<()> {
    let vm = VmSpec::new("zeroed")
        .disk(Disk::new("d0", 96 * MIB))
        .disk(Disk::new("d1", 32 * MIB).fs(Fs::Ext4))
        .no_agent()
        .boot()?;
    let icecore = Icecore::new()?;
    vm.guest("dd if=/dev/urandom of=/dev/lab/d0 bs=1M count=48 conv=fsync")?;
    icecore.prove_next_point(&vm)?;
    vm.guest("/sbin/blkdiscard -z /dev/lab/d0")?;
    let report = icecore.prove_next_point(&vm)?;
    assert_eq!(count(of_disk(&report, "d0")?, "stored_bytes")?, 0, "{report}");
    Ok(())
}

const TIB: u64 = 1 << 40;
/// What the process may use for a million extents on 1 TiB, its libraries' pages included.
const MEMORY_BYTES_MAX: u64 = 96 * MIB;
/// Far more than a restore of a million extents takes, far less than one that reads or writes the
/// holes between them.
const RESTORE_WITHIN: Duration = Duration::from_secs(400);

/// Runs it and hands back its report and the most memory it ever held.
fn measured(run: Run) -> Result<(serde_json::Value, u64)> {
    let mut started = run.start()?;
    let status = format!("/proc/{}/status", started.pid());
    let mut peak_bytes = 0;
    while started.runs()? {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak_bytes = peak_bytes.max(kib.unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_millis(20));
    }
    let outcome = started.finish()?;
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    Ok((outcome.json()?, peak_bytes))
}

#[test]
#[ignore = "long: a million extents over 1 TiB take minutes; cargo xtask test --long"]
fn a_tebibyte_with_a_million_scattered_extents_stays_within_the_memory_budget() -> Result<()> {
    let icecore = Icecore::new()?;
    let image = icecore.path("huge.raw");
    create_raw(&image, TIB)?;
    // 4 KiB of one pattern at every MiB: a million extents, 4 GiB allocated.
    let mut bench = Command::new("qemu-img");
    bench.args([
        "bench", "-w", "-t", "unsafe", "-f", "raw", "-c", "1000000", "-d", "32", "-s", "4096",
    ]);
    bench.args(["-S", "1048576", "--pattern=90"]).arg(&image);
    assert!(run_within(&mut bench, Duration::from_secs(900))?.status.success());
    let backup = icecore.on_repository("backup").args(["--name", "huge", "--image"]);
    let (report, peak) = measured(backup.arg(format!("d0={}", image.display())))?;
    assert!(peak < MEMORY_BYTES_MAX, "the backup used {peak} bytes");
    let target = icecore.path("restored.raw");
    let report = restored(&icecore, text(&report, "point")?, &target.display().to_string())?;
    // The zeroes around each 4 KiB stay holes.
    assert_eq!(count(of_disk(&report, "d0")?, "written_bytes")?, 1_000_000 * 4096, "{report}");
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&target)?) * 512;
    assert!(allocated < 5 << 30, "{allocated} bytes are allocated");
    sample_compare(&image, &target)
}

/// Restores `d0` with its root proven, in bounded time and memory.
fn restored(icecore: &Icecore, point: &str, target: &str) -> Result<serde_json::Value> {
    let start = Instant::now();
    let restore = icecore.on_repository("restore").arg(point).args(["--disk", "d0", "--to"]);
    let (report, peak) = measured(restore.arg(target))?;
    assert_eq!(of_disk(&report, "d0")?["root_verified"], serde_json::json!(true), "{report}");
    assert!(peak < MEMORY_BYTES_MAX, "the restore to {target} used {peak} bytes");
    assert!(start.elapsed() < RESTORE_WITHIN, "{target} took {:?}", start.elapsed());
    Ok(report)
}

/// A granule in each MiB of a live disk is dirty, a few hundred of them hold data: as an incremental
/// point, and back into each kind of target.
#[test]
#[ignore = "long: a million dirty extents over 1 TiB take minutes; cargo xtask test --long"]
fn a_million_dirty_extents_of_a_live_tebibyte_are_captured_and_restored() -> Result<()> {
    let vm = VmSpec::new("wide").no_guest().disk(Disk::new("d0", TIB)).start()?;
    let icecore = Icecore::new()?;
    icecore.backup(&vm).succeed()?;
    dirty_a_granule_in_each_mib(&vm, &icecore)?;
    for n in 0..256 {
        vm.fill("d0", 90, n * (TIB / 256) + MIB, 65536)?;
    }
    let (report, peak) = measured(icecore.backup(&vm))?;
    require_mode(&report, "d0", "incremental")?;
    let dirty = count(of_disk(&report, "d0")?, "dirty_bytes")?;
    assert!((1 << 36..(1 << 36) + MIB).contains(&dirty), "{report}");
    assert!(peak < MEMORY_BYTES_MAX, "the backup used {peak} bytes");
    let point = text(&report, "point")?;
    let image = vm.image("d0")?;
    for name in ["back.raw", "back.qcow2"] {
        let target = icecore.path(name);
        restored(&icecore, point, &target.display().to_string())?;
        compare_images(&image, &target)?;
        std::fs::remove_file(&target)?;
    }
    let (served, socket) = (icecore.path("served.qcow2"), icecore.path("nbd.sock"));
    create_qcow2(&served, TIB)?;
    let mut serve = Command::new("qemu-nbd");
    serve.args(["--persistent", "-f", "qcow2", "-e", "8", "-x", "disk", "-k"]);
    let server = Background::spawn(serve.arg(&socket).arg(&served))?;
    wait_until("qemu-nbd", Duration::from_secs(5), || Ok(socket.exists()))?;
    restored(&icecore, point, &format!("nbd+unix:///disk?socket={}", socket.display()))?;
    drop(server);
    compare_images(&image, &served)
}

/// Through a node of its own, whose bitmap is added to that of the disk: the device writes none.
fn dirty_a_granule_in_each_mib(vm: &TestVm, icecore: &Icecore) -> Result<()> {
    let socket = icecore.path("pattern.sock");
    let node = "pattern";
    let execute = |command: &str, arguments| vm.monitor()?.execute(command, arguments);
    execute("blockdev-add", json!({ "driver": "null-co", "node-name": node, "size": TIB }))?;
    let bitmap = json!({ "node": node, "name": node, "granularity": 65536 });
    execute("block-dirty-bitmap-add", bitmap)?;
    let address = json!({ "type": "unix", "data": { "path": socket } });
    execute("nbd-server-start", json!({ "addr": address }))?;
    let export = json!({ "type": "nbd", "id": node, "node-name": node, "writable": true });
    execute("block-export-add", export)?;
    let mut bench = Command::new("qemu-img");
    bench.args(["bench", "-w", "-t", "none", "-f", "raw", "-c", "1048576", "-d", "64", "-s"]);
    bench
        .args(["4096", "-S", "1048576"])
        .arg(format!("nbd+unix:///pattern?socket={}", socket.display()));
    assert!(run_within(&mut bench, Duration::from_secs(600))?.status.success());
    execute("nbd-server-stop", json!({}))?;
    let names = vm.bitmaps("d0")?;
    let target = names.iter().find(|name| name.starts_with("icecore:"));
    let target = target.ok_or_else(|| Failure::new("the backup left no bitmap"))?;
    let from = json!([{ "node": node, "name": node }]);
    let disk = vm.node("d0")?;
    let merge = json!({ "node": disk, "target": target, "bitmaps": from });
    execute("block-dirty-bitmap-merge", merge)?;
    execute("block-dirty-bitmap-remove", json!({ "node": node, "name": node }))?;
    execute("blockdev-del", json!({ "node-name": node })).map(drop)
}

/// The VM stands still, so that its image may be looked at beside it.
fn compare_images(one: &std::path::Path, other: &std::path::Path) -> Result<()> {
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-U"]).arg(one).arg(other);
    let outcome = run_within(&mut compare, Duration::from_secs(600))?;
    assert!(outcome.status.success(), "{outcome:?}");
    Ok(())
}

/// The restore has proven its root; a few windows are compared by other means too.
fn sample_compare(expected: &std::path::Path, actual: &std::path::Path) -> Result<()> {
    for index in [0u64, 1, 499_999, 999_999, 1_000_001] {
        let window = |file: &std::path::Path| -> Result<Vec<u8>> {
            let mut dd = Command::new("dd");
            dd.args(["bs=1M", "count=1", &format!("skip={index}"), "status=none"]);
            Ok(run(dd.arg(format!("if={}", file.display())))?.stdout)
        };
        assert!(window(expected)? == window(actual)?, "MiB {index} differs");
    }
    Ok(())
}
