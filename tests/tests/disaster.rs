//! The drill: everything but the repository is lost, and everything comes back from it.

use icecore_tests::{
    Disk, Fs, Icecore, Layout, MIB, Result, Site, VmSpec, of_disk, require_rehash, text,
};
use serde_json::json;

/// A repository that outlives its hosts.
fn refuge() -> Result<(Icecore, Site)> {
    let owner = Icecore::without_repository()?;
    let address = owner.repository().display().to_string();
    Ok((owner, Site { address, ..Site::default() }))
}

#[test]
fn a_guest_comes_back_from_the_repository_alone() -> Result<()> {
    let (_owner, site) = refuge()?;
    let host = Icecore::at(&site)?;
    let vm = VmSpec::new("lost")
        .disk(Disk::new("d0", 128 * MIB).fs(Fs::Ext4))
        .disk(Disk::new("d1", 32 * MIB))
        .writer(&["d0"])
        .boot()?;
    vm.wait_writer(2)?;
    host.prove_next_point(&vm)?;
    vm.guest("echo survived > /mnt/d0/letter; sync")?;
    vm.wait_writer(2)?;
    let (report, reference) = host.backup_quietly(&vm, |run| run)?;
    let point = text(&report, "point")?;

    // The fire: the guest with its images, the host with its state, caches and configuration.
    let new = host.another_host()?;
    drop((vm, host));

    let open = new.command("repo").args(["open", "--json"]).arg(new.repository());
    let opened = open.json()?;
    assert_eq!(opened["points"], 2, "{opened}");
    assert_eq!(opened["vms"][0]["vm"], "lost");
    assert_eq!(opened["vms"][0]["newest"]["point"], point);
    assert!(opened["next"].to_string().contains("restore"), "{opened}");
    let rebuild = new.command("catalog").args(["rebuild", "--json", "--repo"]);
    assert_eq!(rebuild.arg(new.repository()).json()?, json!({ "points": 2 }));
    let restored = new.path("restored");
    new.restore_all(point, &restored)?;
    reference.compare_all(&restored)?;

    let disk = |id: &str, mib| {
        let image = restored.join(format!("{id}.raw"));
        Disk::new(id, mib * MIB).layout(Layout::Raw).content_of(&image)
    };
    let vm = VmSpec::new("lost")
        .disk(disk("d0", 128).fs(Fs::Ext4))
        .disk(disk("d1", 32))
        .writer(&["d0"])
        .boot()?;
    assert_eq!(vm.guest("cat /mnt/d0/letter")?, "survived");
    vm.wait_writer(2)?;
    // Its chain goes on where it was, without a bitmap and without storing it all again.
    let next = new.prove_next_point(&vm)?;
    assert_eq!(next["chain"], report["chain"]);
    for id in ["d0", "d1"] {
        // Another file now, so no bitmap is asked for.
        require_rehash(&next, id, "DiskReplaced")?;
        assert_eq!(of_disk(&next, id)?["parent"], point);
    }
    new.check().map(drop)
}

#[test]
fn a_record_kept_elsewhere_brings_a_lost_point_back() -> Result<()> {
    let (_owner, site) = refuge()?;
    let host = Icecore::at(&site)?;
    let vm = VmSpec::new("kept").no_guest().disk(Disk::new("d0", 32 * MIB)).start()?;
    vm.fill("d0", 3, MIB, 5 * MIB)?;
    let report = host.prove_next_point(&vm)?;
    let (point, reference) = (text(&report, "point")?, vm.reference()?);
    let record = host.path("offline.record");
    let export = host.command("record").args(["export", point, "-o"]).arg(&record);
    export.arg("--repo").arg(host.repository()).succeed()?;
    std::fs::remove_file(host.repository().join("points").join(point))?;

    let new = host.another_host()?;
    let opened = new.command("repo").args(["open", "--json"]).arg(new.repository()).expect(4)?;
    assert_eq!(opened.json()?["damaged"][0]["point"], point);
    let import = || {
        let run = new.command("record").arg("import").arg(&record).args(["--json", "--repo"]);
        run.arg(new.repository())
    };
    assert_eq!(import().expect(4)?.json()?["state"], "missing");
    let back = import().arg("--repair").json()?;
    assert_eq!((&back["state"], &back["restorable"]), (&json!("reinstated"), &json!(true)));
    new.prove_point(&vm, point, &reference)?;
    new.check().map(drop)
}
