//! The whole way of a point, from inspection to retired bitmaps, on a QEMU without a guest.

mod guardian_rig;

use guardian_rig::{MIB, Machine, Qemu, bitmap, ended, instant, keep_alive};
use icecore_qmp::guardian::protocol::{ErrorKind, Form, Then};
use serde_json::{Value, json};

async fn full_and_incremental(qemu: Qemu) {
    let (client, thread) = qemu.connected().await;
    let alive = keep_alive(&client);
    let inspection = client.inspect().await.expect("inspected");
    assert_eq!(inspection.inventory.disks.len(), qemu.disks);
    assert!(inspection.leftovers.is_empty());
    inspection.features.check().expect("supported");
    qemu.write(0, 1, 0..MIB).await;

    let (_, exposed) = qemu.capture(&client, "p1", None).await;
    qemu.write(0, 2, 0..MIB).await;
    qemu.write(1, 3, 5 * MIB..6 * MIB).await;
    let first = exposed.disks[0].export.clone().expect("exported");
    let read = qemu.read(&first).await.expect("read");
    assert_eq!(read.len() as u64, exposed.disks[0].size_bytes);
    assert!(read[..1 << 20].iter().all(|b| *b == 1), "as at the instant");
    assert!(client.release().await.expect("released").left.is_empty());
    let names: Vec<_> = inspection.inventory.disks.iter().map(|d| bitmap("p1", &d.id)).collect();
    qemu.assert_clean(&names).await;

    qemu.write(0, 4, 10 * MIB..11 * MIB).await;
    let (_, exposed) = qemu.capture(&client, "p2", Some("p1")).await;
    let context = exposed.disks[0].dirty_context.clone().expect("a context");
    let size = exposed.disks[0].size_bytes;
    let granule = 64 << 10;
    let dirty = qemu.dirty(&first, &context).await;
    assert_eq!(dirty, [0..MIB, 10 * MIB..11 * MIB, size - granule..size], "with sentinels");
    let second = exposed.disks[1].export.clone().expect("exported");
    let size = exposed.disks[1].size_bytes;
    let wanted = [0..granule, 5 * MIB..6 * MIB, size - granule..size];
    assert_eq!(qemu.dirty(&second, &context).await, wanted);
    assert!(qemu.read(&second).await.expect("read")[5 << 20..6 << 20].iter().all(|b| *b == 3));
    client.release().await.expect("released");
    client.retire(names).await.expect("retired");
    let names: Vec<_> = inspection.inventory.disks.iter().map(|d| bitmap("p2", &d.id)).collect();
    qemu.assert_clean(&names).await;
    alive.abort();
    drop(client);
    ended(thread).await;
    qemu.assert_clean(&names).await;
}

#[tokio::test]
async fn a_full_and_an_incremental_point() {
    full_and_incremental(Qemu::start(&Machine::plain()).await).await;
}

#[tokio::test]
async fn the_same_in_an_iothread() {
    let qemu = Qemu::start(&Machine::iothread()).await;
    if qemu.exports_from_iothreads() {
        return full_and_incremental(qemu).await;
    }
    let (client, thread) = qemu.connected().await;
    client.prepare(qemu.prepare(16 * MIB, "p1").await).await.expect("prepared");
    client.instant(instant(Then::Continue)).await.expect("instant");
    let error = client.expose(qemu.expose_plan(Form::Pull, None).await).await.expect_err("unsafe");
    assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    qemu.assert_clean(&[]).await;
    drop(client);
    ended(thread).await;
}

#[tokio::test]
async fn a_guest_that_runs_runs_on_and_a_paused_one_stays_paused() {
    let qemu = Qemu::start(&Machine::plain()).await;
    let (client, _thread) = qemu.connected().await;
    qemu.ask("cont", Value::Null).await;
    let (report, _) = qemu.capture(&client, "p1", None).await;
    assert!(report.was_running && report.pause_ms > 0.0 && report.pause_ms < 2000.0);
    assert_eq!(qemu.ask("query-status", Value::Null).await["status"], json!("running"));
    client.release().await.expect("released");
    client.drop_new().await.expect("dropped");
    qemu.ask("stop", Value::Null).await;
    let (report, _) = qemu.capture(&client, "p2", None).await;
    assert!(!report.was_running && report.pause_ms == 0.0);
    client.release().await.expect("released");
    assert_eq!(qemu.ask("query-status", Value::Null).await["status"], json!("paused"));
}

#[tokio::test]
async fn a_foreign_nbd_server_is_refused_and_left_alone() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected().await;
    let socket = qemu.path("foreign");
    let addr = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    qemu.ask("nbd-server-start", addr).await;
    client.prepare(qemu.prepare(16 * MIB, "p1").await).await.expect("prepared");
    client.instant(instant(Then::Continue)).await.expect("instant");
    let error = client.expose(qemu.expose_plan(Form::Pull, None).await).await.expect_err("busy");
    assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    assert!(socket.exists(), "still there");
    qemu.assert_clean(&[]).await;
    drop(client);
    ended(thread).await;
    assert!(socket.exists(), "still there");
}
