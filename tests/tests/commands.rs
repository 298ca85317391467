//! What surrounds a backup: refusals, dry runs, listings, good-bye.

use icecore_tests::{Disk, Icecore, MIB, Result, TestVm, VmSpec, text};
use rustix::process::Signal;

fn bare_vm() -> Result<TestVm> {
    let vm = VmSpec::new("bare").no_guest().disk(Disk::new("d0", 64 * MIB)).start()?;
    vm.fill("d0", 1, 0, 24 * MIB)?;
    Ok(vm)
}

#[test]
fn a_second_run_on_a_vm_is_refused_and_names_the_first() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    let first = icecore.start_slow_backup(&vm)?;
    let second = icecore.backup(&vm).expect(3)?;
    assert!(second.stderr.contains("job"), "{}", second.stderr);
    first.signal(Signal::INT);
    assert_eq!(first.finish()?.status, Some(130));
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn a_dry_run_stores_nothing() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    icecore.backup(&vm).arg("--dry-run").succeed()?;
    let info =
        icecore.command("repo").arg("info").arg(icecore.repository()).arg("--json").json()?;
    assert_eq!(info["points"], 0, "{info}");
    assert_eq!(vm.bitmaps("d0")?, Vec::<String>::new());
    vm.require_no_trace()
}

#[test]
fn points_are_listed_shown_protected_and_deleted() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    let first = icecore.prove_next_point(&vm)?;
    vm.fill("d0", 2, MIB, MIB)?;
    let (second, reference) = icecore.backup_quietly(&vm, |run| run.args(["--label", "two"]))?;
    let point = |action: &str| {
        let run = icecore.command("point").arg(action).arg("--repo").arg(icecore.repository());
        run.arg("--json")
    };
    let listed = point("list").json()?;
    assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");
    assert!(listed.as_array().into_iter().flatten().all(|one| one["status"] == "available"));
    assert_eq!(point("show").arg("latest").json()?["label"], "two");
    let id = text(&first, "point")?;
    point("protect").arg(id).succeed()?;
    point("delete").arg(id).expect(3)?;
    point("unprotect").arg(id).succeed()?;
    point("delete").arg(id).succeed()?;
    icecore.on_repository("gc").succeed()?;
    icecore.prove_point(&vm, text(&second, "point")?, &reference)?;
    icecore.check().map(drop)
}

#[test]
fn after_a_release_the_vm_is_as_if_icecore_had_never_been() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    icecore.prove_next_point(&vm)?;
    assert_eq!(vm.bitmaps("d0")?.len(), 1);
    let release = icecore.command("vm").arg("release").arg("--name").arg(vm.name());
    release.arg("--qmp").arg(vm.qmp()).succeed()?;
    assert_eq!(vm.bitmaps("d0")?, Vec::<String>::new());
    vm.require_no_trace()?;
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn the_doctor_finds_nothing_after_a_run_that_ended_well() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    icecore.prove_next_point(&vm)?;
    let doctor = icecore.command("doctor").arg("--name").arg(vm.name()).arg("--qmp").arg(vm.qmp());
    doctor.arg("--json").succeed().map(drop)
}
