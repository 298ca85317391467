//! Points copied to another repository, and back.

use std::path::Path;
use std::time::Duration;

use icecore_tests::{
    Disk, Icecore, Layout, MIB, Reference, Result, TestVm, VmSpec, compare, count, create_noise,
    text, wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

/// A VM that nobody runs, and what its disks held at each of its points.
fn chain(icecore: &Icecore) -> Result<(TestVm, Vec<(String, Reference)>)> {
    let noise = icecore.path("noise.raw");
    create_noise(&noise, 24 * MIB, 3)?;
    let vm = VmSpec::new("copied")
        .no_guest()
        .disk(Disk::new("d0", 48 * MIB))
        .disk(Disk::new("d1", 24 * MIB).layout(Layout::Raw).content_of(&noise))
        .start()?;
    vm.fill("d0", 1, MIB, 3 * MIB)?;
    let mut points = vec![point(icecore, &vm, &[])?];
    vm.fill("d0", 2, 2 * MIB, 100_000)?;
    vm.zero("d1", 4 * MIB, MIB)?;
    points.push(point(icecore, &vm, &["--label", "second"])?);
    // A point that lacks a disk: the next one's parents are two.
    vm.fill("d0", 3, 20 * MIB, 512)?;
    points.push(point(icecore, &vm, &["--disk", "d0"])?);
    vm.fill("d0", 4, 0, 4096)?;
    vm.fill("d1", 5, 7 * MIB, MIB)?;
    points.push(point(icecore, &vm, &[])?);
    Ok((vm, points))
}

fn point(icecore: &Icecore, vm: &TestVm, flags: &[&str]) -> Result<(String, Reference)> {
    let (report, reference) = icecore.backup_quietly(vm, |run| run.args(flags))?;
    Ok((text(&report, "point")?.to_owned(), reference))
}

fn copy(from: &Icecore, to: &Icecore) -> Result<Value> {
    let run = from.on_repository("copy").args(["--vm", "copied", "--to"]);
    run.arg(to.repository()).json()
}

/// Restores what a copy holds and compares it with what the disks held then.
fn prove(to: &Icecore, report: &Value, points: &[(String, Reference)]) -> Result<()> {
    let rows: Vec<&Value> = report["points"].as_array().into_iter().flatten().collect();
    assert_eq!(rows.len(), points.len(), "{report}");
    for (row, (id, reference)) in rows.into_iter().zip(points) {
        assert_eq!(text(row, "point")?, id);
        prove_one(to, text(row, "copy")?, reference)?;
    }
    to.check().map(drop)
}

fn prove_one(icecore: &Icecore, point: &str, reference: &Reference) -> Result<()> {
    let folder = icecore.path(&format!("restored-{point}"));
    let report = icecore.restore_all(point, &folder)?;
    for disk in report["disks"].as_array().into_iter().flatten() {
        let disk = text(disk, "disk")?;
        reference.compare(disk, &folder.join(format!("{disk}.raw")))?;
    }
    Ok(std::fs::remove_dir_all(folder)?)
}

fn statuses(report: &Value) -> Result<[u64; 3]> {
    Ok([count(report, "copied")?, count(report, "present")?, count(report, "failed")?])
}

#[test]
fn a_chain_is_copied_goes_on_and_comes_back() -> Result<()> {
    let (here, there) = (Icecore::new()?, Icecore::new()?);
    let (vm, mut points) = chain(&here)?;
    let first = copy(&here, &there)?;
    assert_eq!(statuses(&first)?, [4, 0, 0], "{first}");
    prove(&there, &first, &points)?;
    let shape = |icecore: &Icecore| -> Result<Vec<[Value; 5]>> {
        let list = icecore.command("point").args(["list", "copied", "--json", "--repo"]);
        let rows = list.arg(icecore.repository()).json()?;
        let rows = rows.as_array().into_iter().flatten();
        let kept = ["label", "created_at", "captured_at", "consistency", "size_bytes"];
        Ok(rows.map(|row| kept.map(|field| row[field].clone())).collect())
    };
    assert_eq!(shape(&here)?, shape(&there)?);

    // One more point: only its change is read.
    vm.fill("d1", 6, 12 * MIB, 512)?;
    points.push(point(&here, &vm, &[])?);
    let second = copy(&here, &there)?;
    assert_eq!(statuses(&second)?, [1, 4, 0], "{second}");
    assert!(count(&second, "read_bytes")? <= 128 << 10, "{second}");
    prove(&there, &second, &points)?;
    let nothing = copy(&here, &there)?;
    assert_eq!((statuses(&nothing)?, count(&nothing, "stored_bytes")?), ([0, 5, 0], 0));

    // A point that is lost here comes back from there, as the difference to what is left.
    let run = here.command("point").arg("delete").arg(&points[2].0).arg("--repo");
    run.arg(here.repository()).succeed()?;
    let back = copy(&there, &here)?;
    assert_eq!(statuses(&back)?, [1, 4, 0], "{back}");
    assert!(count(&back, "read_bytes")? <= 256 << 10, "{back}");
    let copies: Vec<&Value> = back["points"].as_array().into_iter().flatten().collect();
    prove_one(&here, text(copies[2], "copy")?, &points[2].1)?;
    // The VM's own chain and bitmaps know nothing of all this.
    vm.fill("d0", 7, 9 * MIB, 512)?;
    here.prove_next_point(&vm)?;
    here.check().map(drop)
}

#[test]
fn another_block_size_and_compression_hold_the_same_bytes() -> Result<()> {
    let here = Icecore::new()?;
    let (_vm, points) = chain(&here)?;
    for init in [
        ["--block-size", "16K", "--compression", "none"],
        ["--block-size", "1M", "--compression", "zstd:3"],
    ] {
        let there = Icecore::with_init(&init)?;
        let report = copy(&here, &there)?;
        assert_eq!(statuses(&report)?, [4, 0, 0], "{report}");
        assert!(
            report["points"].as_array().into_iter().flatten().all(|p| p["compared"] == "blocks")
        );
        prove(&there, &report, &points)?;
    }
    Ok(())
}

/// Into an encrypted repository, on in plain, and nothing is compared by ids that differ by their key.
#[test]
fn a_chain_goes_into_an_encrypted_repository_and_out_again() -> Result<()> {
    let (here, sealed, plain) = (Icecore::new()?, Icecore::encrypted()?, Icecore::new()?);
    let (_vm, points) = chain(&here)?;
    let with_key = |from: &Icecore, to: &Icecore| -> Result<Value> {
        let run = sealed.command("copy").args(["--vm", "copied", "--json", "--repo"]);
        run.arg(from.repository()).arg("--to").arg(to.repository()).json()
    };
    let into = with_key(&here, &sealed)?;
    assert_eq!(statuses(&into)?, [4, 0, 0], "{into}");
    let rows = |report: &Value| report["points"].as_array().cloned().unwrap_or_default();
    assert!(rows(&into).iter().all(|point| point["compared"] == "blocks"), "{into}");
    prove(&sealed, &into, &points)?;
    assert_eq!(statuses(&with_key(&sealed, &here)?)?, [0, 4, 0], "originals are recognised");
    let out = with_key(&sealed, &plain)?;
    for (row, (_, reference)) in rows(&out).iter().zip(&points) {
        prove_one(&plain, text(row, "copy")?, reference)?;
    }
    assert_eq!(statuses(&with_key(&here, &plain)?)?, [0, 4, 0], "a copy's copy is, too");
    plain.check().map(drop)
}

/// The packs of a repository.
fn packs(repository: &Path) -> Result<usize> {
    let mut count = 0;
    for folder in std::fs::read_dir(repository.join("packs")).into_iter().flatten() {
        count += std::fs::read_dir(folder?.path())?.count();
    }
    Ok(count)
}

#[test]
fn a_copy_that_is_killed_goes_on_where_it_was() -> Result<()> {
    let (here, there) = (Icecore::new()?, Icecore::new()?);
    let image = here.path("noise.raw");
    create_noise(&image, 320 * MIB, 4)?;
    let backup = here.on_repository("backup").args(["--name", "copied", "--image"]);
    backup.arg(format!("d0={}", image.display())).json()?;
    let run = here.on_repository("copy").args(["--all", "--to"]).arg(there.repository());
    let mut run = run.start()?;
    wait_until("packs in the destination", Duration::from_secs(60), || {
        Ok(!run.runs()? || packs(there.repository())? >= 6)
    })?;
    run.signal(Signal::KILL);
    assert_eq!(run.finish()?.status, None, "it was done before it was killed");
    let list = || there.command("point").args(["list", "--json", "--repo"]).arg(there.repository());
    assert_eq!(list().json()?, serde_json::json!([]), "a killed copy has left a point");

    let report = copy(&here, &there)?;
    assert_eq!(statuses(&report)?, [1, 0, 0], "{report}");
    // Four packs at least were known to be durable.
    assert!(count(&report, "read_bytes")? <= 320 * MIB - 4 * 32 * MIB, "{report}");
    let target = there.path("restored.raw");
    let restore = there.on_repository("restore").args(["latest", "--disk", "d0", "--to"]);
    restore.arg(&target).succeed()?;
    compare(&image, &target)?;
    there.on_repository("gc").succeed()?;
    there.check().map(drop)
}

#[test]
fn damage_fails_one_point_and_the_others_are_copied() -> Result<()> {
    let (here, there) = (Icecore::new()?, Icecore::new()?);
    for (seed, vm) in [(5, "good"), (6, "bad")] {
        let image = here.path(&format!("{vm}.raw"));
        create_noise(&image, 4 * MIB, seed)?;
        let backup = here.on_repository("backup").args(["--name", vm, "--image"]);
        backup.arg(format!("d0={}", image.display())).json()?;
    }
    let show = here.command("point").args(["list", "bad", "--json", "--repo"]);
    let bad = show.arg(here.repository()).json()?;
    damage_newest_pack(here.repository())?;
    let run = here.on_repository("copy").args(["--all", "--to"]).arg(there.repository());
    let outcome = run.expect(4)?;
    assert!(outcome.stderr.contains("damaged"), "{}", outcome.stderr);
    let report = outcome.json()?;
    assert_eq!(statuses(&report)?, [1, 0, 1], "{report}");
    let failed: Vec<&Value> = report["points"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|point| point["status"] == "failed")
        .collect();
    assert_eq!(failed[0]["point"], bad[0]["point"]);
    there.check()?;
    // The other way round there is nothing to copy, and onto itself nothing is copied.
    let same = here.on_repository("copy").args(["--all", "--to"]).arg(here.repository());
    same.expect(2)?;
    here.on_repository("copy")
        .args(["--vm", "nobody", "--to"])
        .arg(there.repository())
        .expect(2)?;
    // A daemon copies, too, but there is none here.
    let elsewhere = here.on_repository("copy").args(["--all", "--daemon", "--to"]);
    let without = elsewhere.arg(there.repository()).expect(1)?;
    assert!(without.stderr.contains("no daemon answers"), "{}", without.stderr);
    Ok(())
}

fn damage_newest_pack(repository: &Path) -> Result<()> {
    let mut packs = Vec::new();
    for folder in std::fs::read_dir(repository.join("packs"))? {
        for pack in std::fs::read_dir(folder?.path())? {
            let path = pack?.path();
            packs.push((std::fs::metadata(&path)?.modified()?, path));
        }
    }
    packs.sort();
    let Some((_, newest)) = packs.pop() else { return Ok(()) };
    let mut bytes = std::fs::read(&newest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    Ok(std::fs::write(newest, bytes)?)
}
