//! A guest whose storage is slow, and a backup that must not take it away from it.

use std::time::Duration;

use icecore_tests::{Disk, Icecore, MIB, Result, TestVm, VmSpec, count, wait_until};
use serde_json::Value;

/// What the guest's storage moves in a second: all of it is what a backup would take.
const FAST: u64 = 64 * MIB;
/// What the guest writes to, again and again.
const AREA: u64 = 8 * MIB;

/// A guest that writes all the time, on a disk with so many bytes of data.
fn busy_vm(data: u64) -> Result<TestVm> {
    let disk = Disk::new("d0", 256 * MIB).bandwidth(FAST);
    let vm = VmSpec::new("governed").disk(disk).no_agent().boot()?;
    for part in 0..data / (8 * MIB) {
        vm.fill("d0", part as u8 + 1, part * 8 * MIB, 8 * MIB)?;
    }
    let blocks = AREA / 4096;
    vm.guest(&format!(
        "echo 'n=0; while dd if=/dev/zero of=/dev/lab/d0 bs=4k count={blocks} oflag=direct \
         conv=notrunc 2>/dev/null; do n=$((n + 1)); echo $n > /tmp/rounds; done; \
         echo failed > /tmp/rounds' > /tmp/busy; \
         sh /tmp/busy > /dev/null 2>&1 < /dev/null 3>&- &"
    ))?;
    Ok(vm)
}

fn rounds(vm: &TestVm) -> Result<String> {
    vm.guest("cat /tmp/rounds 2>/dev/null || echo 0")
}

/// The guest goes on writing, without a failure.
fn require_writing(vm: &TestVm) -> Result<()> {
    let before = rounds(vm)?;
    wait_until("the guest's writes", Duration::from_secs(60), || Ok(rounds(vm)? != before))?;
    assert_ne!(rounds(vm)?, "failed");
    Ok(())
}

fn figure(report: &Value, name: &str) -> f64 {
    report["governor"][name].as_f64().unwrap_or(f64::NAN)
}

#[test]
fn a_backup_slows_down_for_a_guest_that_shares_its_storage() -> Result<()> {
    let vm = busy_vm(96 * MIB)?;
    let icecore = Icecore::new()?;
    require_writing(&vm)?;
    let report = icecore.backup(&vm).json()?;
    assert!(figure(&report, "baseline_latency_ms") > 0.0, "{report:#}");
    assert!(figure(&report, "slowed_seconds") > 0.0, "{report:#}");
    assert!(count(&report["governor"], "least_rate_bytes")? < FAST, "{report:#}");
    require_writing(&vm)?;
    icecore.check()?;
    let report = icecore.backup(&vm).args(["--governor", "off", "--priority", "normal"]).json()?;
    assert!(report["governor"].is_null(), "{report:#}");
    vm.require_no_trace()
}
