//! What the guardian does when the worker, the scratch or other managers misbehave.

mod guardian_rig;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use guardian_rig::{MIB, Machine, Qemu, RUN, bitmap, ended, instant, keep_alive, run, text};
use icecore_qmp::capture::guest_io::DeviceIo;
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{ErrorKind, Form, Then};
use icecore_qmp::recover::Intents;
use serde_json::{Value, json};

const GRANULE: u64 = 64 << 10;

/// An NBD client that asks for a lot and reads nothing (QEMU docs/interop/nbd.rst).
fn greedy_client(socket: &std::path::Path, export: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the server listens");
    stream.read_exact(&mut [0; 18]).expect("a greeting");
    let name = export.as_bytes();
    let length = u32::try_from(name.len()).expect("short");
    let mut go = 1u32.to_be_bytes().to_vec();
    go.extend(b"IHAVEOPT");
    go.extend(7u32.to_be_bytes());
    go.extend((4 + length + 2).to_be_bytes());
    go.extend(length.to_be_bytes());
    go.extend(name);
    go.extend([0, 0]);
    stream.write_all(&go).expect("sent");
    std::thread::sleep(Duration::from_millis(200));
    let _ = stream.read(&mut [0; 4096]).expect("export info");
    for cookie in 0..8u64 {
        let mut read = 0x2560_9513u32.to_be_bytes().to_vec();
        read.extend([0, 0, 0, 0]);
        read.extend(cookie.to_be_bytes());
        read.extend((cookie * MIB).to_be_bytes());
        read.extend((1u32 << 20).to_be_bytes());
        stream.write_all(&read).expect("sent");
    }
    std::thread::sleep(Duration::from_millis(200));
    stream
}

/// FAULTS 51: a worker that is stopped in mid-copy; then somebody else stops the VM.
#[tokio::test]
async fn a_stalled_worker_does_not_stall_the_guest() {
    stall(Qemu::start(&Machine::plain()).await).await;
}

#[tokio::test]
async fn nor_one_whose_disks_are_in_an_iothread() {
    let qemu = Qemu::start(&Machine::iothread()).await;
    if qemu.exports_from_iothreads() {
        stall(qemu).await;
    }
}

/// The guest's counters: they count what its devices do, and asking for them is no sign of life.
#[tokio::test]
async fn counters_of_the_guest_are_told_and_keep_no_stalled_worker_alive() {
    let qemu = Qemu::start(&Machine::plain()).await;
    let (client, thread) = qemu.connected().await;
    let writes = |io: &[DeviceIo]| io.iter().map(|io| io.writes.operations).sum::<u64>();
    let before = client.guest_io().await.expect("counters");
    let path = &qemu.inventory().await.disks[0].drive_path;
    assert!(before.iter().any(|io| &io.device == path), "{before:?}");
    // Of the monitor's writes only the asynchronous ones are counted.
    let line = format!("qemu-io -d {path} \"aio_write -q 0 4096\"");
    for _ in 0..3 {
        qemu.ask("human-monitor-command", json!({"command-line": line})).await;
    }
    qemu.ask(
        "human-monitor-command",
        json!({"command-line": format!("qemu-io -d {path} aio_flush")}),
    )
    .await;
    let after = client.guest_io().await.expect("counters");
    assert_eq!(writes(&after), writes(&before) + 3);
    qemu.capture(&client, "p1", None).await;
    let started = Instant::now();
    let error = loop {
        match client.guest_io().await {
            Ok(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(error) => break error,
        }
        assert!(started.elapsed() < Duration::from_secs(10), "the worker counts as alive");
    };
    assert_eq!(error.kind, ErrorKind::WorkerStalled, "{error}");
    client.drop_new().await.expect("dropped");
    drop(client);
    ended(thread).await;
}

async fn stall(qemu: Qemu) {
    let (client, thread) = qemu.connected().await;
    qemu.ask("cont", Value::Null).await;
    qemu.write(0, 9, 0..16 * MIB).await;
    let (_, exposed) = qemu.capture(&client, "p1", None).await;
    let export = exposed.disks[0].export.clone().expect("an export");
    let stuck = greedy_client(&qemu.path("nbd"), &export);
    client.leash(stuck.as_fd()).expect("leashed");
    let started = Instant::now();
    qemu.ask("stop", Value::Null).await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    qemu.ask("cont", Value::Null).await;
    let error = client.sizes().await.expect_err("cut");
    assert!(matches!(error.kind, ErrorKind::WorkerStalled | ErrorKind::Timeout), "{error}");
    let disks = qemu.inventory().await.disks;
    let both: Vec<_> = disks.iter().map(|disk| bitmap("p1", &disk.id)).collect();
    qemu.assert_clean(&both).await;
    client.drop_new().await.expect("dropped");
    qemu.assert_clean(&[]).await;
    drop((client, stuck));
    ended(thread).await;
}

async fn steps(qemu: &Qemu, client: &GuardianClient, count: usize) {
    if count > 0 {
        client.prepare(qemu.prepare(16 * MIB, "p1").await).await.expect("prepared");
    }
    if count > 1 {
        client.instant(instant(Then::Continue)).await.expect("instant");
    }
    if count > 2 {
        client.expose(qemu.expose_plan(Form::Pull, None).await).await.expect("exposed");
    }
    if count > 3 {
        client.release().await.expect("released");
    }
}

/// FAULTS 1, 5, 57: the worker dies between any two steps; the VM runs or stands as before.
#[tokio::test]
async fn a_dead_worker_leaves_nothing_between_any_two_steps() {
    let qemu = Qemu::start(&Machine::plain()).await;
    let foreign = json!({"node": "disk0", "name": "x"});
    qemu.ask("block-dirty-bitmap-add", foreign).await;
    let both = [bitmap("p1", "vd0"), bitmap("p1", "vd1")];
    for status in ["running", "paused"] {
        let change = if status == "running" { "cont" } else { "stop" };
        qemu.ask(change, Value::Null).await;
        for count in 0..=4 {
            let (client, thread) = qemu.connected().await;
            steps(&qemu, &client, count).await;
            drop(client);
            ended(thread).await;
            // Nobody can have committed before anything was readable; later only a repository
            // knows.
            let kept: &[String] = if count > 2 { &both } else { &[] };
            qemu.assert_clean(kept).await;
            assert_eq!(qemu.ask("query-status", Value::Null).await["status"], json!(status));
            assert!(qemu.seen().await.bitmap("disk0", "x").is_some(), "a foreign bitmap stays");
            if count > 2 {
                let (client, thread) = qemu.connected().await;
                client.forget(both.to_vec()).await.expect("forgotten");
                drop(client);
                ended(thread).await;
            }
        }
    }
}

/// FAULTS 7: the guest is gone in mid-copy.
#[tokio::test]
async fn a_qemu_that_quits_ends_the_run() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected().await;
    qemu.capture(&client, "p1", None).await;
    qemu.ask("quit", Value::Null).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let error = client.sizes().await.expect_err("gone");
    assert_eq!(error.kind, ErrorKind::QemuGone, "{error}");
    drop(client);
    ended(thread).await;
}

/// FAULTS 17: the guest's writes never fail, the snapshot's reads do.
#[tokio::test]
async fn a_full_scratch_breaks_the_snapshot_and_nothing_else() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected().await;
    let alive = keep_alive(&client);
    qemu.write(0, 1, 0..32 * MIB).await;
    client.prepare(qemu.prepare(2 * MIB, "p1").await).await.expect("prepared");
    client.instant(instant(Then::Continue)).await.expect("instant");
    let plan = qemu.expose_plan(Form::Pull, None).await;
    let exposed = client.expose(plan).await.expect("exposed");
    qemu.write(0, 2, 0..32 * MIB).await;
    assert!(qemu.holds(0, 2, 0..32 * MIB).await, "the guest goes on");
    let scratch = std::fs::metadata(qemu.path("scratch0")).expect("it exists");
    assert!(scratch.len() <= 2 * MIB, "the cap holds");
    let export = exposed.disks[0].export.clone().expect("an export");
    assert!(qemu.read(&export).await.is_err(), "a broken snapshot is not read");
    assert!(client.release().await.expect("released").left.is_empty());
    client.drop_new().await.expect("dropped");
    qemu.assert_clean(&[]).await;
    alive.abort();
    drop(client);
    ended(thread).await;
}

/// FAULTS 58: an external snapshot goes in under the filter; the device goes back on it.
#[tokio::test]
async fn an_external_snapshot_below_the_filter_is_kept() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected().await;
    qemu.capture(&client, "p1", None).await;
    snapshot_over(&qemu, "disk0").await;
    let released = client.release().await.expect("released");
    assert!(released.left.is_empty(), "{released:?}");
    let disk = qemu.inventory().await.disks.remove(0);
    assert_eq!((disk.root.as_str(), disk.node.as_str()), ("over", "over"));
    qemu.write(0, 5, 0..GRANULE).await;
    assert_eq!(qemu.seen().await.runs(), []);
    drop(client);
    ended(thread).await;
}

/// FAULTS 58: a bitmap that an external snapshot leaves on a node nobody may write to.
#[tokio::test]
async fn a_stray_bitmap_is_tried_and_named() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected().await;
    qemu.capture(&client, "p1", None).await;
    client.release().await.expect("released");
    snapshot_over(&qemu, "disk0").await;
    let (file, name) = (qemu.path("disk0"), bitmap("p1", "vd0"));
    let loose = json!({"driver": "null-co", "node-name": "loose", "size": MIB});
    qemu.ask("blockdev-add", loose).await;
    qemu.ask("block-dirty-bitmap-add", json!({"node": "loose", "name": name})).await;
    let stray = client.inspect().await.expect("inspected").inventory.stray_bitmaps;
    let names: Vec<_> = stray.iter().map(|bitmap| bitmap.name.to_string()).collect();
    assert_eq!(names, [name.clone(), name], "one on either node");
    let left = client.forget(names.clone()).await.expect("an answer").left;
    let there = qemu.seen().await.bitmap("disk0", &names[0]).is_some();
    let named = |left: &String| left.contains(&names[0]) && left.contains(text(&file));
    assert_eq!(there, left.iter().any(named), "{left:?}");
    assert!(qemu.seen().await.bitmap("loose", &names[0]).is_none(), "gone where it can go");
    drop(client);
    ended(thread).await;
}

/// As another manager would.
async fn snapshot_over(qemu: &Qemu, disk: &str) {
    let overlay = qemu.path("overlay");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&overlay), "64M"]);
    let file = json!({"driver": "file", "filename": overlay});
    let node = json!({"driver": "qcow2", "node-name": "over", "file": file, "backing": null});
    qemu.ask("blockdev-add", node).await;
    qemu.ask("blockdev-snapshot", json!({"node": disk, "overlay": "over"})).await;
}

/// FAULTS 52: a disk that grows or shrinks while it is read; QEMU lives, nothing is left.
#[tokio::test]
async fn a_resized_disk_ends_the_run() {
    let qemu = Qemu::start(&Machine::single()).await;
    for (point, size) in [("p1", 96 * MIB), ("p2", 48 * MIB)] {
        let (client, thread) = qemu.connected().await;
        let alive = keep_alive(&client);
        let (_, exposed) = qemu.capture(&client, point, None).await;
        let export = exposed.disks[0].export.clone().expect("an export");
        let filter = RUN.name(0, icecore_qmp::capture::Role::Cbw);
        qemu.ask("block_resize", json!({"node-name": filter, "size": size})).await;
        tokio::time::sleep(Duration::from_millis(600)).await;
        let error = client.sizes().await.expect_err("changed");
        assert_eq!(error.kind, ErrorKind::SizeChanged, "{error}");
        assert!(qemu.read(&export).await.is_err(), "nothing is exported any more");
        client.drop_new().await.expect("dropped");
        qemu.assert_clean(&[]).await;
        alive.abort();
        drop(client);
        ended(thread).await;
    }
}

/// FAULTS 8: a stopped QEMU is answered for within a deadline, and cleaned up when it is back.
#[tokio::test]
async fn a_stopped_qemu_is_cleaned_up_when_it_comes_back() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected().await;
    let alive = keep_alive(&client);
    qemu.capture(&client, "p1", None).await;
    let pid = qemu.child.id().to_string();
    run("kill", &["-STOP", &pid]);
    let late = tokio::time::timeout(Duration::from_secs(60), client.sizes());
    let resume = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        run("kill", &["-CONT", &pid]);
    };
    let (late, ()) = tokio::join!(late, resume);
    let error = late.expect("an answer in time").expect_err("no success");
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    qemu.assert_clean(&[bitmap("p1", "vd0")]).await;
    alive.abort();
    drop(client);
    ended(thread).await;
}

/// FAULTS 5, 30: the guardian dies too; the next start undoes it from the journal, or from the
/// names alone.
#[tokio::test]
async fn what_a_dead_guardian_left_is_undone_by_the_next_start() {
    let qemu = Qemu::start(&Machine::plain()).await;
    for known in [true, false] {
        let (client, thread) = qemu.connected().await;
        qemu.capture(&client, "p1", None).await;
        let prepare = qemu.prepare(16 * MIB, "p1").await;
        let names: Vec<_> = prepare
            .disks
            .iter()
            .filter_map(|d| d.bitmap.as_ref())
            .map(|b| b.name.clone())
            .collect();
        client.release().await.expect("released");
        client.drop_new().await.expect("dropped");
        drop(client);
        ended(thread).await;
        // What a guardian killed in mid-copy leaves, made by hand.
        leave_a_graph(&qemu, &names[0]).await;
        let (client, thread) = qemu.connected().await;
        assert_eq!(client.inspect().await.expect("inspected").leftovers, [RUN]);
        let mut intents = Intents::unknown(RUN);
        if known {
            intents = Intents::before_prepare(&prepare).with_server_asked();
        } else {
            intents.server = icecore_qmp::recover::ServerIntent::Asked;
        }
        let socket = Some(qemu.path("nbd"));
        let left = client.recover(intents, socket).await.expect("recovered").left;
        assert!(left.is_empty(), "{left:?}");
        let kept: &[String] = if known { &[] } else { &names[..1] };
        qemu.assert_clean(kept).await;
        client.forget(names).await.expect("forgotten");
        drop(client);
        ended(thread).await;
    }
}

async fn leave_a_graph(qemu: &Qemu, bitmap: &str) {
    use icecore_qmp::capture::{Call, Role};
    let scratch = qemu.path("left.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&scratch), "64M"]);
    let file = json!({"driver": "file", "filename": scratch});
    let tmp = RUN.name(0, Role::Tmp);
    let node = json!({"driver": "qcow2", "node-name": tmp, "file": file});
    qemu.ask("blockdev-add", node).await;
    let disk = &qemu.inventory().await.disks[0];
    let granularity = icecore_qmp::bitmap::Granularity::DEFAULT;
    let calls = [
        Call::add_bitmap(&disk.bitmap_node, bitmap, granularity, true),
        Call::filter(RUN, 0, &disk.node),
        Call::set_drive(&disk.drive_path, &RUN.name(0, Role::Cbw)),
        Call::snapshot(RUN, 0),
        Call::start_server(&qemu.path("nbd")),
        Call::add_export(&RUN.name(0, Role::Export), &RUN.name(0, Role::Snap), false, &[]),
    ];
    for call in calls {
        qemu.ask(call.name, call.arguments).await;
    }
}
