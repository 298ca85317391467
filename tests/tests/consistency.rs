//! What the guest notices, and what a point says about how it was taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use icecore_tests::{
    Answers, Disk, Fs, Icecore, MIB, Result, TestVm, VmSpec, count, text, wait_until,
};
use rustix::process::Signal;

fn writing_vm() -> VmSpec {
    VmSpec::new("guest")
        .disk(Disk::new("d0", 96 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("d1", 96 * MIB).fs(Fs::Xfs))
        .writer(&["d0", "d1"])
}

/// The longest that one write of the guest took, and how many failed, over what is done.
fn stalls(vm: &TestVm, work: impl FnOnce() -> Result<()>) -> Result<(u64, u64)> {
    vm.guest("stall-meter start /mnt/d0")?;
    work()?;
    let result = vm.guest("stall-meter read")?;
    let mut words = result.split_whitespace().map(|word| word.parse().unwrap_or(u64::MAX));
    Ok((words.next().unwrap_or(u64::MAX), words.next().unwrap_or(u64::MAX)))
}

#[test]
fn with_an_agent_every_file_system_is_frozen_for_a_moment() -> Result<()> {
    let vm = writing_vm().boot()?;
    vm.wait_writer(2)?;
    let icecore = Icecore::new()?;
    let (longest, failed) = stalls(&vm, || {
        let report = icecore.backup(&vm).json()?;
        assert_eq!(report["consistency"]["level"], "filesystem", "{report}");
        assert_eq!(report["consistency"]["frozen_filesystems"], 2, "{report}");
        Ok(())
    })?;
    assert!(longest < 3000 && failed == 0, "longest {longest} ms, {failed} failed");
    vm.require_no_trace()
}

#[test]
fn without_an_agent_the_point_is_crash_consistent_and_says_so() -> Result<()> {
    let vm = writing_vm().no_agent().boot()?;
    vm.wait_writer(3)?;
    let icecore = Icecore::new()?;
    let report = icecore.backup(&vm).json()?;
    assert_eq!(report["consistency"]["level"], "crash", "{report}");
    assert!(!text(&report["consistency"], "why")?.is_empty());
    let folder = icecore.path("restored");
    icecore.restore_all(text(&report, "point")?, &folder)?;
    vm.judge_restored(&folder)
}

#[test]
fn an_agent_that_is_asked_for_but_not_there_fails_only_who_insists() -> Result<()> {
    let vm = writing_vm().no_agent().boot()?;
    let icecore = Icecore::new()?;
    let refused = icecore.backup(&vm).args(["--consistency", "filesystem"]).expect(1)?;
    assert!(refused.stderr.contains("agent"), "{}", refused.stderr);
    vm.require_no_trace()
}

#[test]
fn an_agent_that_never_answers_costs_its_deadline_and_no_more() -> Result<()> {
    let vm = writing_vm().boot()?;
    vm.guest("kill -STOP $(pidof qemu-ga)")?;
    let icecore = Icecore::new()?;
    let (longest, failed) = stalls(&vm, || {
        let start = Instant::now();
        let report = icecore.backup(&vm).args(["--freeze-timeout", "2s"]).json()?;
        assert_eq!(report["consistency"]["level"], "crash", "{report}");
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
        Ok(())
    })?;
    assert!(longest < 3000 && failed == 0, "longest {longest} ms, {failed} failed");
    icecore
        .backup(&vm)
        .args(["--consistency", "filesystem", "--freeze-timeout", "1s"])
        .expect(1)?;
    vm.require_no_trace()
}

#[test]
fn a_freeze_that_is_never_confirmed_ends_at_the_deadline() -> Result<()> {
    let vm = writing_vm().boot()?;
    vm.wait_writer(2)?;
    let icecore = Icecore::new()?;
    let proxy = vm.agent_proxy(Answers::NoneToFreeze, || {})?;
    let (longest, failed) = stalls(&vm, || {
        let run = icecore.backup_through(&vm, proxy.socket()).args(["--freeze-timeout", "2s"]);
        let report = run.json()?;
        assert_eq!(report["consistency"]["level"], "crash", "{report}");
        Ok(())
    })?;
    assert!(longest < 5000 && failed == 0, "longest {longest} ms, {failed} failed");
    vm.wait_writer(1)?;
    vm.require_no_trace()
}

#[test]
fn kill_of_icecore_while_the_guest_is_frozen_thaws_it() -> Result<()> {
    let vm = writing_vm().boot()?;
    vm.wait_writer(2)?;
    let icecore = Icecore::new()?;
    let frozen = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&frozen);
    let proxy = vm.agent_proxy(Answers::All, move || {
        flag.store(true, Ordering::Release);
        std::thread::sleep(Duration::from_millis(700));
    })?;
    let run = icecore.backup_through(&vm, proxy.socket()).start()?;
    wait_until("the freeze", Duration::from_secs(30), || Ok(frozen.load(Ordering::Acquire)))?;
    run.signal(Signal::KILL);
    assert_eq!(run.finish()?.status, None);
    vm.wait_writer(2)?;
    vm.require_no_trace()?;
    drop(proxy);
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn a_vm_that_its_operator_paused_is_still_paused_afterwards() -> Result<()> {
    let vm = writing_vm().boot()?;
    vm.wait_writer(2)?;
    vm.monitor()?.execute("stop", serde_json::json!({}))?;
    let icecore = Icecore::new()?;
    let reference = vm.reference()?;
    let report = icecore.backup(&vm).args(["--freeze-timeout", "1s"]).json()?;
    assert_eq!(vm.monitor()?.status()?, "paused");
    icecore.prove_point(&vm, text(&report, "point")?, &reference)?;
    assert!(
        count(&report["consistency"], "pause_ms").is_ok()
            || report["consistency"]["pause_ms"].is_number()
    );
    vm.require_no_trace()
}
