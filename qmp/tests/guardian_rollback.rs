//! Writing to the disks of a held guest, and what becomes of it when the worker dies.

mod guardian_rig;

use guardian_rig::{MIB, Machine, Qemu, bitmap, ended, instant, keep_alive, run};
use icecore_qmp::bitmap::Granularity;
use icecore_qmp::capture::RunId;
use icecore_qmp::capture::plan::Base;
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{
    ErrorKind, Form, Freeze, InstantPlan, Restart, SwapAway, SwapDisk, Then, WritableDisk,
};
use serde_json::{Value, json};

async fn status(qemu: &Qemu) -> Value {
    qemu.ask("query-status", Value::Null).await["status"].clone()
}

async fn swap(qemu: &Qemu) -> SwapAway {
    let disks = qemu.inventory().await.disks.iter().map(SwapDisk::new).collect();
    SwapAway { run: RunId(0xeeee), disks, server_socket: qemu.path("nbd") }
}

async fn bases(qemu: &Qemu, point: &str) -> Vec<Option<Base>> {
    let base = |id: &str| Base { bitmap: bitmap(point, id), granularity: Granularity::DEFAULT };
    qemu.inventory().await.disks.iter().map(|disk| Some(base(&disk.id))).collect()
}

fn write_export(qemu: &Qemu, disk: &WritableDisk, byte: u8) {
    let url = format!("nbd+unix:///{}?socket={}", disk.export, qemu.path("nbd").display());
    run("qemu-io", &["-f", "raw", "-c", &format!("write -q -P {byte} 0 1M"), &url]);
}

/// Safety point while held, then swap, write, swap back, reset.
async fn roll_back(qemu: Qemu) {
    let (client, thread) = qemu.connected().await;
    let alive = keep_alive(&client);
    qemu.ask("cont", Value::Null).await;
    qemu.write(0, 1, 0..MIB).await;
    client.prepare(qemu.prepare(16 * MIB, "p1").await).await.expect("prepared");
    let report = client.instant(instant(Then::Hold)).await.expect("held");
    assert!(report.was_running);
    let exposed = client.expose(qemu.expose_plan(Form::Pull, None).await).await.expect("exposed");
    let export = exposed.disks[0].export.clone().expect("an export");
    assert!(qemu.read(&export).await.expect("read")[..1 << 20].iter().all(|b| *b == 1));
    client.release().await.expect("released");
    assert_eq!(status(&qemu).await, json!("paused"), "held until the rollback ends");

    client.swap_away(swap(&qemu).await).await.expect("swapped");
    let disks = client.expose_writable(bases(&qemu, "p1").await).await.expect("writable");
    let (map, context) = (&disks[0].map_export, &disks[0].dirty_context);
    let dirty = qemu.dirty(map.as_deref().expect("a map"), context.as_deref().expect("a context"));
    assert_eq!(dirty.await.len(), 2, "only the sentinels: nothing changed since the instant");
    client.begin_writing().await.expect("on record");
    write_export(&qemu, &disks[0], 7);
    assert!(client.swap_back().await.expect("back").left.is_empty());
    assert_eq!(status(&qemu).await, json!("paused"));
    client.restart(Restart::Reset).await.expect("restarted");
    assert_eq!(status(&qemu).await, json!("running"));
    assert!(qemu.holds(0, 7, 0..MIB).await);
    let names: Vec<_> = qemu.inventory().await.disks.iter().map(|d| bitmap("p1", &d.id)).collect();
    qemu.assert_clean(&names).await;
    let first = qemu.inventory().await.disks.remove(0);
    let seen = qemu.seen().await;
    let recorded = seen.bitmap(&first.bitmap_node, &names[0]).expect("it is there").dirty_bytes;
    assert!(recorded >= MIB, "the live bitmap recorded the rollback's own writes");
    alive.abort();
    drop(client);
    ended(thread).await;
    assert_eq!(status(&qemu).await, json!("running"));
}

#[tokio::test]
async fn a_rollback_in_place() {
    roll_back(Qemu::start(&Machine::plain()).await).await;
}

#[tokio::test]
async fn a_rollback_of_disks_in_an_iothread() {
    let qemu = Qemu::start(&Machine::iothread()).await;
    if qemu.exports_from_iothreads() {
        return roll_back(qemu).await;
    }
    let (client, thread) = qemu.connected().await;
    client.instant(instant(Then::Hold)).await.expect("held");
    let error = client.swap_away(swap(&qemu).await).await.expect_err("unsafe");
    assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    drop(client);
    ended(thread).await;
    qemu.assert_clean(&[]).await;
}

async fn until_swapped(qemu: &Qemu, client: &GuardianClient) -> Vec<WritableDisk> {
    qemu.ask("cont", Value::Null).await;
    // No safety point: an instant of no disks only holds.
    client.instant(instant(Then::Hold)).await.expect("held");
    client.swap_away(swap(qemu).await).await.expect("swapped");
    let none = vec![None; qemu.disks];
    client.expose_writable(none).await.expect("writable")
}

/// FAULTS 46: before the first write a dead worker's guest goes on as if nothing had been.
#[tokio::test]
async fn a_worker_that_dies_before_writing_frees_the_guest() {
    for machine in [Machine::plain(), Machine::iothread()] {
        let qemu = Qemu::start(&machine).await;
        if machine.in_iothread && !qemu.exports_from_iothreads() {
            continue;
        }
        let (client, thread) = qemu.connected().await;
        until_swapped(&qemu, &client).await;
        drop(client);
        ended(thread).await;
        qemu.assert_clean(&[]).await;
        assert_eq!(status(&qemu).await, json!("running"));
    }
}

/// FAULTS 46: after it, the guest never runs again by itself; not even when somebody continues
/// it in between.
#[tokio::test]
async fn a_worker_that_dies_while_writing_leaves_the_guest_stopped() {
    for continued in [false, true] {
        let qemu = Qemu::start(&Machine::plain()).await;
        let (client, thread) = qemu.connected().await;
        let disks = until_swapped(&qemu, &client).await;
        client.begin_writing().await.expect("on record");
        write_export(&qemu, &disks[0], 7);
        if continued {
            qemu.ask("cont", Value::Null).await;
        }
        drop(client);
        ended(thread).await;
        qemu.assert_clean(&[]).await;
        assert_eq!(status(&qemu).await, json!("paused"));
        finish_another_time(&qemu).await;
    }
}

async fn finish_another_time(qemu: &Qemu) {
    let (client, thread) = qemu.connected().await;
    let hold = InstantPlan { freeze: Freeze::No, then: Then::Hold };
    client.instant(hold).await.expect("held");
    client.swap_away(swap(qemu).await).await.expect("swapped");
    let disks = client.expose_writable(vec![None; qemu.disks]).await.expect("writable");
    client.begin_writing().await.expect("on record");
    write_export(qemu, &disks[0], 8);
    client.swap_back().await.expect("back");
    client.restart(Restart::Reset).await.expect("restarted");
    drop(client);
    ended(thread).await;
    assert_eq!(status(qemu).await, json!("running"));
    assert!(qemu.holds(0, 8, 0..MIB).await);
}

#[tokio::test]
async fn nothing_is_swapped_under_a_guest_that_is_not_held() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected().await;
    let error = client.swap_away(swap(&qemu).await).await.expect_err("not held");
    assert_eq!(error.kind, ErrorKind::OutOfOrder);
    drop(client);
    ended(thread).await;
    qemu.assert_clean(&[]).await;
}
