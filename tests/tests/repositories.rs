//! Several repositories for one VM, and points that hold only some of its disks.

use icecore_tests::{Disk, Fs, Icecore, MIB, Result, TestVm, VmSpec, of_disk, require_mode, text};

fn vm() -> Result<TestVm> {
    let vm = VmSpec::new("shared")
        .disk(Disk::new("d0", 96 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("d1", 96 * MIB).fs(Fs::Xfs))
        .writer(&["d0", "d1"])
        .boot()?;
    // A first point from before the first line would have nothing to check.
    vm.wait_writer(2)?;
    Ok(vm)
}

#[test]
fn two_repositories_in_turn_do_not_take_each_others_changes() -> Result<()> {
    let vm = vm()?;
    let (one, other) = (Icecore::new()?, Icecore::new()?);
    for round in 0..3 {
        for icecore in [&one, &other] {
            vm.wait_writer(3)?;
            let report = icecore.prove_next_point(&vm)?;
            let mode = if round == 0 { "full" } else { "incremental" };
            require_mode(&report, "d0", mode)?;
            require_mode(&report, "d1", mode)?;
        }
    }
    assert_eq!(vm.bitmaps("d0")?.len(), 2);
    Ok(())
}

#[test]
fn subsets_of_disks_in_turn_have_each_their_own_parent() -> Result<()> {
    let vm = vm()?;
    let icecore = Icecore::new()?;
    let first = icecore.prove_next_point(&vm)?;
    let mut parents = [text(&first, "point")?.to_owned(), text(&first, "point")?.to_owned()];
    for round in 0..4 {
        vm.wait_writer(2)?;
        let disk = ["d0", "d1"][round % 2];
        let (report, reference) = icecore.backup_quietly(&vm, |run| run.args(["--disk", disk]))?;
        assert_eq!(report["disks"].as_array().map(Vec::len), Some(1), "{report}");
        require_mode(&report, disk, "incremental")?;
        let of_disk = of_disk(&report, disk)?;
        assert_eq!(of_disk["parent"], parents[round % 2].as_str(), "{report}");
        let point = text(&report, "point")?;
        let target = icecore.path(&format!("{point}.raw"));
        let restore = icecore.on_repository("restore").arg(point).args(["--disk", disk, "--to"]);
        restore.arg(&target).succeed()?;
        reference.compare(disk, &target)?;
        parents[round % 2] = point.to_owned();
    }
    vm.wait_writer(1)?;
    let whole = icecore.prove_next_point(&vm)?;
    require_mode(&whole, "d0", "incremental")?;
    require_mode(&whole, "d1", "incremental")
}
