//! What every kind of repository has to pass, whatever store is under it.

use rustix::process::Signal;
use serde_json::Value;

use crate::disk::{Disk, Layout};
use crate::failure::{Failure, Result};
use crate::icecore::{Icecore, Site};
use crate::image::create_noise;
use crate::place::Scratch;
use crate::proof::{count, require_mode, require_rehash, text};
use crate::reference::Reference;
use crate::spec::VmSpec;
use crate::vm::TestVm;
use crate::{KIB, MIB};

/// Enough that a backup at the laboratory's slow rate is in its middle for seconds.
const NOISE_BYTES: u64 = 24 * MIB;

/// Full, incremental, rehash, restore, rollback, a writer that is killed, two writers at once,
/// deletion, gc, check, and all of it seen from another host.
pub fn acceptance(site: &Site) -> Result<()> {
    let icecore = Icecore::at(site)?;
    let mut vm = vm("accepted", 1)?;
    let (first, then) = full_and_incremental(&icecore, &vm)?;
    rehash(&icecore, &mut vm)?;
    roll_back(&icecore, &vm, &first, &then)?;
    kill_in_mid_backup(&icecore, &vm)?;
    let other = icecore.another_host()?;
    two_writers_at_once(&icecore, &vm, &other, &self::vm("neighbour", 2)?)?;
    collect(&icecore, &vm)?;
    let newest = vm.reference()?;
    let last = text(&icecore.prove_next_point(&vm)?, "point")?.to_owned();
    other.prove_point(&vm, &last, &newest)?;
    vm.require_alive()
}

/// A VM that nobody runs: its disks change when the test says so.
fn vm(name: &str, seed: u64) -> Result<TestVm> {
    let images = Scratch::new()?;
    let noise = images.join("noise.raw");
    create_noise(&noise, NOISE_BYTES, seed)?;
    let spec = VmSpec::new(name)
        .no_guest()
        .disk(Disk::new("kept", 32 * MIB))
        .disk(Disk::new("noise", NOISE_BYTES).layout(Layout::Raw).content_of(&noise));
    let vm = spec.start()?;
    vm.fill("kept", 7, 0, 4 * MIB)?;
    Ok(vm)
}

fn full_and_incremental(icecore: &Icecore, vm: &TestVm) -> Result<(String, Reference)> {
    let then = vm.reference()?;
    let first = icecore.prove_next_point(vm)?;
    require_mode(&first, "kept", "full")?;
    vm.fill("kept", 8, MIB, 65 * KIB)?;
    vm.zero("kept", 2 * MIB, MIB)?;
    vm.fill("noise", 9, 3 * MIB, 512)?;
    let second = icecore.prove_next_point(vm)?;
    for disk in ["kept", "noise"] {
        require_mode(&second, disk, "incremental")?;
    }
    require_small(&second)?;
    Ok((text(&first, "point")?.to_owned(), then))
}

fn require_small(report: &Value) -> Result<()> {
    for disk in report["disks"].as_array().into_iter().flatten() {
        let stored = count(disk, "stored_bytes")?;
        if stored > MIB {
            return Err(Failure::new(format!("{stored} bytes stored anew: {report}")));
        }
    }
    Ok(())
}

/// A raw disk's bitmap is gone with its QEMU.
fn rehash(icecore: &Icecore, vm: &mut TestVm) -> Result<()> {
    vm.quit()?;
    vm.power_on()?;
    vm.fill("noise", 10, 5 * MIB, 512)?;
    let report = icecore.prove_next_point(vm)?;
    require_mode(&report, "kept", "incremental")?;
    require_rehash(&report, "noise", "BitmapMissing")?;
    require_small(&report)
}

fn roll_back(icecore: &Icecore, vm: &TestVm, point: &str, then: &Reference) -> Result<()> {
    let now = vm.reference()?;
    let report = icecore.rollback(vm, point).args(["--restart", "none"]).json()?;
    vm.reference()?.same_as(then)?;
    let safety = text(&report, "safety_point")?;
    icecore.prove_point(vm, safety, &now)
}

fn kill_in_mid_backup(icecore: &Icecore, vm: &TestVm) -> Result<()> {
    // All of the disk is dirty, so that the copy takes long enough.
    vm.fill("noise", 11, 0, NOISE_BYTES)?;
    let run = icecore.start_slow_backup(vm)?;
    run.signal(Signal::KILL);
    run.finish()?;
    vm.require_no_trace()?;
    icecore.prove_next_point(vm).map(drop)
}

fn two_writers_at_once(
    one: &Icecore,
    vm: &TestVm,
    other: &Icecore,
    neighbour: &TestVm,
) -> Result<()> {
    vm.fill("kept", 12, 8 * MIB, 2 * MIB)?;
    let runs = [one.backup(vm).start()?, other.backup(neighbour).start()?];
    let mut points = Vec::new();
    for run in runs {
        let outcome = run.finish()?;
        if outcome.status != Some(0) {
            return Err(Failure::new(format!("one of two writers failed: {outcome:?}")));
        }
        points.push(text(&outcome.json()?, "point")?.to_owned());
    }
    // Each is read by the host that did not write it.
    other.prove_point(vm, &points[0], &vm.reference()?)?;
    one.prove_point(neighbour, &points[1], &neighbour.reference()?)
}

fn collect(icecore: &Icecore, vm: &TestVm) -> Result<()> {
    // Nothing of the first packs is in use any more, once the older points are gone.
    vm.fill("kept", 13, 0, 4 * MIB)?;
    let newest = icecore.prove_next_point(vm)?;
    let point = |action: &str| {
        let run = icecore.command("point").arg(action).arg("--repo").arg(icecore.repository());
        run.arg("--json")
    };
    for old in point("list").arg(vm.name()).json()?.as_array().into_iter().flatten() {
        if old["status"] == "available" && old["point"] != newest["point"] {
            point("delete").arg(text(old, "point")?).succeed()?;
        }
    }
    let report = icecore.on_repository("gc").json()?;
    if count(&report, "packs_deleted")? == 0 {
        return Err(Failure::new(format!("nothing was collected: {report}")));
    }
    icecore.check()?;
    icecore.prove_point(vm, text(&newest, "point")?, &vm.reference()?)
}
