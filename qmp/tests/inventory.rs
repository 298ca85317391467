//! The inventory of guest-less machines in the layouts that are met with. A second QEMU is tested
//! by `ICECORE_TEST_QEMU=<binary>`.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use icecore_qmp::Monitor;
use icecore_qmp::features::{Features, SAFE_IOTHREAD_EXPORTS};
use icecore_qmp::inventory::{self, Disk, Exclusion, Inventory, Refusal};
use icecore_qmp::testing::{Process, binary_under_test, daemon_command, qemu_command};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(20);
const SIZE: u64 = 8 << 20;

struct Machine {
    monitor: Monitor,
    _process: Process,
    folder: tempfile::TempDir,
}

fn image(folder: &Path, name: &str, options: &[&str]) {
    let format = if name.ends_with("qcow2") { "qcow2" } else { "raw" };
    let mut command = Command::new("qemu-img");
    command.current_dir(folder).args(["create", "-q", "-f", format]).args(options).arg(name);
    assert!(command.arg("8M").status().unwrap().success());
}

/// A machine whose arguments name images `*.qcow2` and `*.raw`, which are made.
async fn machine(arguments: &str) -> Machine {
    machine_in(tempfile::tempdir().unwrap(), arguments).await
}

async fn machine_in(folder: tempfile::TempDir, arguments: &str) -> Machine {
    for word in arguments.split([' ', ',', '=', '\n']) {
        if (word.ends_with(".qcow2") || word.ends_with(".raw"))
            && !folder.path().join(word).exists()
        {
            image(folder.path(), word, &[]);
        }
    }
    let mut command = qemu_command(binary_under_test());
    command.args(arguments.split_whitespace());
    let process = Process::start(command, folder.path()).unwrap();
    let monitor = Monitor::connect(process.monitor(), DEADLINE).await.unwrap();
    Machine { monitor, _process: process, folder }
}

impl Machine {
    async fn run(&self, command: &str, arguments: Value) -> Value {
        self.monitor.execute_raw(command, arguments, DEADLINE).await.unwrap()
    }

    async fn inventory(&self) -> Inventory {
        inventory::inventory(&self.monitor, DEADLINE).await.unwrap()
    }

    async fn disk(&self, id: &str) -> Disk {
        let inventory = self.inventory().await;
        let ids: Vec<_> = inventory.disks.iter().map(|disk| disk.id.clone()).collect();
        inventory.disks.into_iter().find(|disk| disk.id == id).ok_or(ids).unwrap()
    }

    async fn disk_of_device(&self, device: &str) -> Disk {
        let disks = self.inventory().await.disks;
        disks.into_iter().find(|disk| disk.device == device).unwrap()
    }

    /// Swaps the disk to a null-co node and back, and looks each time.
    async fn swap_there_and_back(&self, disk: &Disk) {
        let set = |node: &str| json!({"path": disk.drive_path, "property": "drive", "value": node});
        let add = json!({"driver": "null-co", "node-name": "ic-t", "size": disk.size_bytes});
        self.run("blockdev-add", add).await;
        self.run("qom-set", set("ic-t")).await;
        let swapped = self.disk_of_device(&disk.device).await;
        assert_eq!(swapped.refusal, Some(Refusal::SwappedAway { root: "ic-t".into() }));
        self.run("qom-set", set(&disk.node)).await;
        self.run("blockdev-del", json!({"node-name": "ic-t"})).await;
        assert_eq!(&self.disk(&disk.id).await, disk);
    }
}

/// Where nothing of `swap_there_and_back` needs a name, the disk is kept by a filter.
async fn filter_over(machine: &Machine, disk: &Disk) {
    let scratch = json!({"driver": "null-co", "node-name": "ic-s", "size": disk.size_bytes});
    machine.run("blockdev-add", scratch).await;
    let filter = json!({"driver": "copy-before-write", "node-name": "ic-f", "file": disk.node,
        "target": "ic-s", "on-cbw-error": "break-snapshot"});
    machine.run("blockdev-add", filter).await;
    let set = json!({"path": disk.drive_path, "property": "drive", "value": "ic-f"});
    machine.run("qom-set", set).await;
}

#[tokio::test]
async fn disks_of_every_controller_are_found() {
    let machine = machine(
        "-object iothread,id=io0 -object iothread,id=io1
         -drive file=a.qcow2,if=virtio
         -drive file=b.qcow2,if=none,id=drv -device virtio-blk-pci,drive=drv
         -blockdev driver=qcow2,node-name=disk0,file.driver=file,file.filename=c.qcow2
         -device virtio-blk-pci,drive=disk0,id=vd0,serial=S1,iothread=io0
         -device virtio-scsi-pci,id=sc0,iothread=io1
         -drive file=d.raw,format=raw,if=none,id=dr
         -device scsi-hd,drive=dr,id=sd0,bus=sc0.0,wwn=0x5000c50015ea71ac,serial=XX
         -device virtio-scsi-pci,id=sc1
         -blockdev driver=raw,node-name=nj,file.driver=file,file.filename=j.raw
         -device scsi-hd,drive=nj,bus=sc1.0
         -drive file=e.qcow2,if=ide
         -device ahci,id=ah -blockdev driver=qcow2,node-name=sata,file.driver=file,file.filename=f.qcow2
         -device ide-hd,drive=sata,bus=ah.0,id=sata0
         -blockdev driver=qcow2,node-name=ng,file.driver=file,file.filename=g.qcow2
         -device nvme,drive=ng,serial=NV1,id=nv
         -blockdev driver=qcow2,node-name=nh,file.driver=file,file.filename=h.qcow2
         -device nvme,id=nv2,serial=NV2 -device nvme-ns,drive=nh,bus=nv2,nsid=3,id=ns3
         -blockdev driver=file,node-name=ni,filename=i.raw
         -device usb-ehci,id=ue -device usb-storage,drive=ni,bus=ue.0,id=us",
    )
    .await;
    let inventory = machine.inventory().await;
    let row = |disk: &Disk| {
        let bus = format!("{} {}", disk.device_type, disk.iothread.as_deref().unwrap_or("-"));
        let serial = disk.serial.clone().unwrap_or_default();
        (disk.id.clone(), bus, serial, disk.persistent_bitmaps, disk.layers.len())
    };
    let rows: Vec<_> = inventory.disks.iter().map(row).collect();
    // By address: QEMU adds what `if=virtio` asks for after the last `-device`, and q35 has its own
    // controller in slot 31. A namespace hangs off its subsystem, which has no address.
    let expected = [
        ("drv", "virtio-blk-device -", "", true, 2),
        ("vd0", "virtio-blk-device io0", "S1", true, 2),
        ("sd0", "scsi-hd io1", "XX", false, 2),
        ("nj", "scsi-hd -", "", false, 2),
        ("sata0", "ide-hd -", "QM00013", true, 2),
        ("nv", "nvme -", "NV1", true, 2),
        ("us", "scsi-hd -", "", false, 1),
        ("virtio0", "virtio-blk-device -", "", true, 2),
        ("ide0-hd0", "ide-hd -", "QM00001", true, 2),
        ("ns3", "nvme-ns -", "", true, 2),
    ];
    let expected = expected.map(|(id, bus, serial, stored, layers)| {
        (id.to_owned(), bus.to_owned(), serial.to_owned(), stored, layers)
    });
    assert_eq!(rows, expected);
    for disk in &inventory.disks {
        assert_eq!((disk.refusal.clone(), disk.size_bytes, disk.writable), (None, SIZE, true));
        assert_eq!((&disk.root, &disk.bitmap_node), (&disk.node, &disk.node));
        assert!(!disk.identity.0.contains('#'), "{}", disk.identity);
    }
    let vd0 = &inventory.disks[1];
    assert_eq!(vd0.drive_path, "/machine/peripheral/vd0/virtio-backend");
    assert_eq!(vd0.identity.0, "id=vd0;serial=S1;file=c.qcow2");
    assert_eq!(inventory.disks[2].identity.0, "id=sd0;serial=XX;wwn=5000c50015ea71ac;file=d.raw");
    assert_eq!(inventory.disks[9].identity.0, "id=ns3;nsid=3;file=h.qcow2");
    // Disks in iothreads need their placeholder pinned first, and anonymous nodes die unpinned.
    let named = |disk: &&Disk| disk.iothread.is_none() && !disk.node.starts_with('#');
    for disk in inventory.disks.iter().filter(named) {
        machine.swap_there_and_back(disk).await;
    }
}

#[tokio::test]
async fn images_throttled_layered_and_of_old_formats_are_understood() {
    let folder = tempfile::tempdir().unwrap();
    image(folder.path(), "base.qcow2", &[]);
    image(folder.path(), "over.qcow2", &["-b", "base.qcow2", "-F", "qcow2"]);
    image(folder.path(), "v2.qcow2", &["-o", "compat=0.10"]);
    let machine = machine_in(
        folder,
        "-object throttle-group,id=tg,x-iops-total=100000
         -blockdev driver=qcow2,node-name=img,file.driver=file,file.filename=over.qcow2
         -blockdev driver=copy-on-read,node-name=cor,file=img
         -blockdev driver=throttle,throttle-group=tg,node-name=thr,file=cor
         -device virtio-blk-pci,drive=thr,id=vd0
         -blockdev driver=qcow2,node-name=old,file.driver=file,file.filename=v2.qcow2
         -device virtio-blk-pci,drive=old,id=vd1
         -blockdev driver=qcow2,node-name=rdo,read-only=on,file.driver=file,file.filename=x.qcow2
         -device virtio-blk-pci,drive=rdo,id=vd2
         -drive if=none,id=snapped,file=y.qcow2,snapshot=on -device virtio-blk-pci,drive=snapped,id=vd3",
    )
    .await;
    let layered = machine.disk("vd0").await;
    let drivers: Vec<_> = layered.layers.iter().map(|layer| layer.driver.as_str()).collect();
    assert_eq!(drivers, ["throttle", "copy-on-read", "qcow2", "file"]);
    assert_eq!((layered.node.as_str(), layered.bitmap_node.as_str()), ("thr", "img"));
    assert!(layered.persistent_bitmaps && layered.refusal.is_none());
    assert_eq!(layered.identity.0, "id=vd0;file=over.qcow2");
    assert!(!machine.disk("vd1").await.persistent_bitmaps);
    let read_only = machine.disk("vd2").await;
    assert_eq!((read_only.refusal, read_only.writable), (Some(Refusal::ReadOnly), false));
    assert_eq!(machine.disk("vd3").await.refusal, None);
}

#[tokio::test]
async fn what_is_no_disk_is_left_out_and_what_cannot_be_seen_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = daemon_command();
    let exported =
        "type=vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path=../vub";
    daemon.args(["--blockdev", "driver=null-co,node-name=n,size=8388608", "--export", exported]);
    let side = folder.path().join("side");
    std::fs::create_dir(&side).unwrap();
    let _daemon = Process::start(daemon, &side).unwrap();
    std::fs::write(folder.path().join("flash.raw"), vec![0; 65536]).unwrap();
    let machine = machine_in(
        folder,
        "-object memory-backend-memfd,id=mem,size=64M,share=on -numa node,memdev=mem
         -drive if=none,id=unused,file=u.qcow2
         -device virtio-scsi-pci,id=sc0 -device scsi-cd,id=cdempty -drive if=none,id=cd,file=c.raw,format=raw,media=cdrom,readonly=on
         -device scsi-cd,drive=cd
         -device isa-fdc,id=fdc -drive if=none,id=fl,file=f.raw,format=raw -device floppy,drive=fl
         -drive if=pflash,format=raw,file=flash.raw,readonly=on
         -drive if=none,id=sh,file=s.qcow2 -device virtio-blk-pci,drive=sh,id=shared,share-rw=on
         -chardev socket,id=vu,path=vub -device vhost-user-blk-pci,chardev=vu,id=vub0
         -fsdev local,id=fs,path=.,security_model=none -device virtio-9p-pci,fsdev=fs,mount_tag=t",
    )
    .await;
    let inventory = machine.inventory().await;
    let disks: Vec<_> =
        inventory.disks.iter().map(|d| (d.id.as_str(), d.refusal.clone())).collect();
    assert_eq!(disks, [("shared", Some(Refusal::ShareRw))]);
    let mut excluded: Vec<_> =
        inventory.excluded.iter().map(|e| (e.why, e.device.as_str())).collect();
    excluded.sort_by_key(|(why, device)| (format!("{why:?}"), *device));
    let whys: Vec<_> = excluded.iter().map(|(why, _)| *why).collect();
    use Exclusion::{Cdrom, Flash, Floppy, NoDevice};
    assert_eq!(whys, [Cdrom, Cdrom, Flash, Floppy, NoDevice], "{excluded:?}");
    let unseen: Vec<_> = inventory.unprotected.iter().map(|u| u.device_type.as_str()).collect();
    assert_eq!(unseen, ["vhost-user-blk-pci", "virtio-9p-pci"]);
    assert_eq!(inventory.unprotected[0].id, "vub0");
}

#[tokio::test]
async fn this_qemu_has_what_a_capture_needs() {
    let machine = machine("").await;
    let features = Features::query(&machine.monitor, DEADLINE).await.unwrap();
    assert_eq!(features.check(), Ok(()), "{features:?}");
    assert!(features.export_iothread);
    let safe = features.version >= SAFE_IOTHREAD_EXPORTS;
    assert_eq!(features.iothread_exports_are_safe(), safe);
    assert_eq!(machine.inventory().await, Inventory::default());
}

#[tokio::test]
async fn disks_that_qemu_decrypts_are_marked() {
    let folder = tempfile::tempdir().unwrap();
    let secret = ["--object", "secret,id=s,data=x"];
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    image(folder.path(), "c.qcow2", &[&secret[..], &["-o", luks]].concat());
    let machine = machine_in(
        folder,
        "-object secret,id=s,data=x
         -blockdev driver=qcow2,node-name=n0,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename=c.qcow2
         -device virtio-blk-pci,drive=n0,id=vd0
         -blockdev driver=file,node-name=n2,filename=p.raw -device virtio-blk-pci,drive=n2,id=vd2",
    )
    .await;
    let seen = machine.inventory().await.disks;
    let seen: Vec<_> =
        seen.iter().map(|d| (d.decrypted, d.persistent_bitmaps, d.size_bytes)).collect();
    assert_eq!(seen, [(true, true, SIZE), (false, false, SIZE)]);
}

/// Queues of one disk spread over iothreads exist from QEMU 9.0 (virtio-blk) and 10.0 (scsi).
#[tokio::test]
async fn disks_of_several_iothreads_name_the_first() {
    let mapped = r#"{"driver":"virtio-blk-pci","drive":"n0","id":"vd0","num-queues":2,
        "iothread-vq-mapping":[{"iothread":"io1"},{"iothread":"io0"}]}"#;
    let bare = machine("").await;
    if bare.monitor.version().major < 9 {
        return;
    }
    let mapped: String = mapped.split_whitespace().collect();
    let machine = machine(&format!(
        "-object iothread,id=io0 -object iothread,id=io1
         -blockdev driver=qcow2,node-name=n0,file.driver=file,file.filename=a.qcow2 -device {mapped}"
    ))
    .await;
    let disk = machine.disk("vd0").await;
    assert_eq!((disk.iothread.as_deref(), disk.refusal), (Some("io1"), None));
}

const ONE_DISK: &str =
    "-blockdev driver=qcow2,node-name=disk0,file.driver=file,file.filename=a.qcow2
    -device virtio-blk-pci,drive=disk0";

#[tokio::test]
async fn a_graph_of_ours_changes_nothing_of_the_disk() {
    let machine = machine(ONE_DISK).await;
    let before = machine.disk("disk0").await;
    filter_over(&machine, &before).await;
    let during = machine.disk("disk0").await;
    assert_eq!(during.root, "ic-f");
    assert_eq!(Disk { root: before.root.clone(), ..during }, before);
}

#[tokio::test]
async fn a_snapshot_taken_under_our_filter_is_found_below_it() {
    let machine = machine(ONE_DISK).await;
    let bitmap = "icecore:r:c:p:disk0";
    machine.run("block-dirty-bitmap-add", json!({"node": "disk0", "name": bitmap})).await;
    filter_over(&machine, &machine.disk("disk0").await).await;
    assert_eq!(machine.inventory().await.stray_bitmaps, []);
    image(machine.folder.path(), "overlay.qcow2", &[]);
    let overlay = json!({"driver": "qcow2", "node-name": "snap1", "backing": null,
        "file": {"driver": "file", "filename": "overlay.qcow2"}});
    machine.run("blockdev-add", overlay).await;
    machine.run("blockdev-snapshot", json!({"node": "disk0", "overlay": "snap1"})).await;
    let disk = machine.disk("snap1").await;
    assert_eq!((disk.root.as_str(), disk.node.as_str()), ("ic-f", "snap1"));
    assert_eq!(disk.identity.0, "id=snap1;file=overlay.qcow2");
    assert!(disk.bitmaps.is_empty());
    let stray = &machine.inventory().await.stray_bitmaps[0];
    assert_eq!((stray.node.as_str(), stray.name.to_string().as_str()), ("disk0", bitmap));
}

#[tokio::test]
async fn jobs_of_others_stand_against_a_backup_and_their_exports_do_not() {
    let machine = machine(ONE_DISK).await;
    let address = json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}});
    machine.run("nbd-server-start", address).await;
    machine.run("block-export-add", json!({"id": "x", "type": "nbd", "node-name": "disk0"})).await;
    assert_eq!(machine.disk("disk0").await.refusal, None);
    let exports = inventory::exports(&machine.monitor, DEADLINE).await.unwrap();
    assert_eq!((exports[0].id.as_str(), exports[0].node.as_str()), ("x", "disk0"));
    let target = json!({"driver": "null-co", "node-name": "t", "size": SIZE});
    machine.run("blockdev-add", target).await;
    let mirror =
        json!({"device": "disk0", "target": "t", "sync": "full", "job-id": "m", "speed": 1});
    machine.run("blockdev-mirror", mirror).await;
    let refusal = machine.disk("disk0").await.refusal.unwrap();
    assert!(
        matches!(&refusal, Refusal::BlockJob { driver, .. } if driver == "mirror_top"),
        "{refusal}"
    );
    let jobs = inventory::jobs(&machine.monitor, DEADLINE).await.unwrap();
    assert_eq!((jobs[0].id.as_str(), jobs[0].kind.as_str()), ("m", "mirror"));
    machine.run("block-job-cancel", json!({"device": "m", "force": true})).await;
    machine.run("blockdev-del", json!({"node-name": "t"})).await;
}

#[tokio::test]
async fn bitmaps_are_shown_with_their_flaws() {
    let folder = tempfile::tempdir().unwrap();
    let name = "icecore:r:c:p:disk0";
    let path = folder.path().to_owned();
    image(&path, "a.qcow2", &[]);
    assert!(
        Command::new("qemu-img")
            .current_dir(&path)
            .args(["bitmap", "--add", "a.qcow2", name, "-g", "32768"])
            .status()
            .unwrap()
            .success()
    );
    let mut machine = machine_in(folder, ONE_DISK).await;
    let stored = &machine.disk("disk0").await.bitmaps[0];
    assert_eq!((stored.name.as_str(), stored.granularity_bytes), (name, 32768));
    assert!(stored.recording && stored.persistent && !stored.busy && !stored.inconsistent);
    let add = json!({"node": "disk0", "name": "foreign", "disabled": true});
    machine.run("block-dirty-bitmap-add", add).await;
    let foreign = &machine.disk("disk0").await.bitmaps;
    let foreign = foreign.iter().find(|bitmap| bitmap.name == "foreign").unwrap();
    assert!(!foreign.recording && !foreign.persistent);
    machine._process.kill().unwrap();
    std::fs::remove_file(path.join("qmp.sock")).unwrap();
    let again = machine_in(machine.folder, ONE_DISK).await;
    let found = again.disk("disk0").await.bitmaps;
    assert_eq!(found.len(), 1);
    assert!(found[0].inconsistent && found[0].name == name);
}
