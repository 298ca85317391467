//! The cost follows the change: of time, of bytes, of memory.

use std::process::Command;
use std::time::{Duration, Instant};

use icecore_tests::{
    Disk, Fs, Icecore, MIB, Result, Run, VmSpec, count, create_raw, of_disk, run, run_within, text,
};

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
/// What the process may use whatever the disk's size, and some room for what is not its own
/// (libraries' pages, thread stacks).
const MEMORY_BYTES_MAX: u64 = (256 + 64) * MIB;

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
    let restore = icecore.on_repository("restore").arg(text(&report, "point")?);
    let (_, peak) = measured(restore.args(["--disk", "d0", "--to"]).arg(&target))?;
    assert!(peak < MEMORY_BYTES_MAX, "the restore used {peak} bytes");
    sample_compare(&image, &target)
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
