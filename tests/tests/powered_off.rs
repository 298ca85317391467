//! Images of a VM that is off: read without being in its way, with its own bitmap where it has one.

use icecore_tests::{
    Disk, Icecore, Layout, MIB, Result, Run, TestVm, VmSpec, count, of_disk, require_mode,
    require_rehash, text,
};

fn vm() -> Result<TestVm> {
    let vm = VmSpec::new("off")
        .no_guest()
        .disk(Disk::new("kept", 32 * MIB))
        .disk(Disk::new("plain", 16 * MIB).layout(Layout::Raw))
        .start()?;
    vm.fill("kept", 7, 0, 4 * MIB)?;
    vm.fill("plain", 8, MIB, 4 * MIB)?;
    Ok(vm)
}

fn images(run: Run, vm: &TestVm) -> Result<Run> {
    let mut run = run.arg("--name").arg(vm.name());
    for disk in vm.disks() {
        run = run.arg("--image").arg(format!("{}={}", disk.id(), vm.image(disk.id())?.display()));
    }
    Ok(run)
}

fn backup_images(icecore: &Icecore, vm: &TestVm) -> Result<serde_json::Value> {
    let reference = vm.reference()?;
    let report = images(icecore.on_repository("backup"), vm)?.json()?;
    icecore.prove_point(vm, text(&report, "point")?, &reference)?;
    Ok(report)
}

#[test]
fn a_vm_that_goes_off_and_on_again_keeps_its_chain() -> Result<()> {
    let mut vm = vm()?;
    let icecore = Icecore::new()?;
    let running = icecore.prove_next_point(&vm)?;
    vm.fill("kept", 9, 20 * MIB, 65536)?;
    vm.fill("plain", 9, 12 * MIB, 65536)?;
    vm.quit()?;
    let off = backup_images(&icecore, &vm)?;
    assert_eq!(off["chain"], running["chain"]);
    require_mode(&off, "kept", "incremental")?;
    require_rehash(&off, "plain", "BitmapMissing")?;
    assert!(count(of_disk(&off, "plain")?, "stored_bytes")? < MIB, "{off}");
    vm.power_on()?;
    vm.fill("kept", 10, 24 * MIB, 512)?;
    let again = icecore.prove_next_point(&vm)?;
    assert_eq!(again["chain"], running["chain"]);
    require_mode(&again, "kept", "incremental")
}

#[test]
fn images_that_never_ran_are_captured_and_rolled_back() -> Result<()> {
    let mut vm = vm()?;
    vm.quit()?;
    let icecore = Icecore::new()?;
    let before = vm.reference()?;
    let first = backup_images(&icecore, &vm)?;
    require_mode(&first, "kept", "full")?;
    vm.power_on()?;
    vm.fill("kept", 1, 0, 2 * MIB)?;
    vm.zero("plain", MIB, MIB)?;
    vm.quit()?;
    let rollback = icecore.on_repository("rollback").arg("--to").arg(text(&first, "point")?);
    images(rollback, &vm)?.succeed()?;
    vm.reference()?.same_as(&before)
}

#[test]
fn an_image_that_a_running_vm_holds_is_refused() -> Result<()> {
    let vm = vm()?;
    let icecore = Icecore::new()?;
    let outcome = images(icecore.on_repository("backup"), &vm)?.outcome()?;
    assert!(matches!(outcome.status, Some(1 | 3)), "{outcome:?}");
    assert!(outcome.stderr.contains("use"), "{}", outcome.stderr);
    Ok(())
}
