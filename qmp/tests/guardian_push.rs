//! Push: QEMU writes the snapshot to a server of ours, for disks that must not be exported.
//!
//! Also runs under a QEMU before 9.1 (`ICECORE_TEST_QEMU`), which an export would crash here.

mod guardian_rig;

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use guardian_rig::{MIB, Machine, Qemu, bitmap, ended, instant, keep_alive, run};
use icecore_qmp::bitmap::Granularity;
use icecore_qmp::capture::plan::Base;
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{ErrorKind, Form, Push, PushState, Then};
use serde_json::Value;

const GRANULE: u64 = 64 << 10;
const UNTOUCHED: u8 = 0xEE;

/// An NBD server that takes a push.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn receiver(qemu: &Qemu, name: &str, size: u64, bytes_per_second: u64) -> Receiver {
    let (file, socket) = (qemu.path(name), qemu.path(&format!("{name}.sock")));
    std::fs::write(&file, vec![UNTOUCHED; usize::try_from(size).expect("small")]).expect("a file");
    let limits = format!("throttle-group,id=g,limits.bps-write={bytes_per_second}");
    let image = format!(
        "driver=throttle,throttle-group=g,file.driver=raw,file.file.driver=file,\
         file.file.filename={}",
        file.display()
    );
    let child = Command::new("qemu-nbd")
        .args(["--object", &limits, "--image-opts", &image, "-x", name, "-t", "-k"])
        .arg(&socket)
        .spawn()
        .expect("qemu-nbd starts");
    while !socket.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Receiver(child)
}

fn push(qemu: &Qemu, disk: u16, name: &str, base: Option<Base>) -> Push {
    let socket = qemu.path(&format!("{name}.sock"));
    let samples = std::iter::once(5 * MIB..5 * MIB + GRANULE).collect();
    Push { disk, socket, export: name.into(), base, samples }
}

async fn until_done(client: &GuardianClient, disk: u16) -> PushState {
    loop {
        match client.push_status(disk).await.expect("a status") {
            PushState::Running { .. } => tokio::time::sleep(Duration::from_millis(20)).await,
            end => return end,
        }
    }
}

#[tokio::test]
async fn a_push_brings_everything_and_then_only_changes_and_samples() {
    let qemu = Qemu::start(&Machine::iothread()).await;
    let (client, thread) = qemu.connected().await;
    let alive = keep_alive(&client);
    let disks = client.inspect().await.expect("inspected").inventory.disks;
    for (point, base) in [("p1", None), ("p2", Some("p1"))] {
        client.prepare(qemu.prepare(16 * MIB, point).await).await.expect("prepared");
        client.instant(instant(Then::Continue)).await.expect("instant");
        let exposed = client.expose(qemu.expose_plan(Form::Push, base).await).await.expect("ready");
        for (index, disk) in (0u16..).zip(&disks) {
            let size = disk.size_bytes;
            let name = format!("{point}-{index}");
            let _receiver = receiver(&qemu, &name, size, 1 << 40).await;
            let base = base.map(|base| Base {
                bitmap: bitmap(base, &disk.id),
                granularity: Granularity::DEFAULT,
            });
            if let (Some(export), Some(context)) = (
                &exposed.disks[usize::from(index)].export,
                &exposed.disks[usize::from(index)].dirty_context,
            ) {
                let sentinels = [0..GRANULE, size - GRANULE..size];
                assert_eq!(qemu.dirty(export, context).await, sentinels);
            }
            let whole = base.is_none();
            client.push(push(&qemu, index, &name, base)).await.expect("started");
            assert_eq!(until_done(&client, index).await, PushState::Done);
            check_received(&std::fs::read(qemu.path(&name)).expect("received"), whole);
        }
        assert!(client.release().await.expect("released").left.is_empty());
    }
    let both = |point: &str| disks.iter().map(|d| bitmap(point, &d.id)).collect::<Vec<_>>();
    client.retire(both("p1")).await.expect("retired");
    qemu.assert_clean(&both("p2")).await;
    alive.abort();
    drop(client);
    ended(thread).await;
}

/// The disk holds one MiB of ones, then zeroes.
fn check_received(data: &[u8], whole: bool) {
    let granule = 64 << 10;
    let (start, end) = (&data[..granule], &data[data.len() - granule..]);
    assert!(start.iter().all(|b| *b == 1) && end.iter().all(|b| *b == 0), "the sentinels' data");
    let sample = &data[5 << 20..(5 << 20) + granule];
    assert!(sample.iter().all(|b| *b == 0), "the sample");
    let clean = &data[granule..1 << 20];
    assert!(clean.iter().all(|b| *b == if whole { 1 } else { UNTOUCHED }), "nothing else");
}

/// FAULTS 51, push: a receiver that stops answering is cut off, and the guest is free.
#[tokio::test]
async fn a_stopped_receiver_is_cut_off() {
    let qemu = Qemu::start(&Machine::iothread()).await;
    let (client, thread) = qemu.connected().await;
    client.prepare(qemu.prepare(16 * MIB, "p1").await).await.expect("prepared");
    client.instant(instant(Then::Continue)).await.expect("instant");
    client.expose(qemu.expose_plan(Form::Push, None).await).await.expect("ready");
    let receiver = receiver(&qemu, "slow", 64 * MIB, MIB).await;
    client.push(push(&qemu, 0, "slow", None)).await.expect("started");
    tokio::time::sleep(Duration::from_millis(300)).await;
    run("kill", &["-STOP", &receiver.0.id().to_string()]);
    tokio::time::sleep(Duration::from_millis(3500)).await;
    let started = Instant::now();
    qemu.ask("stop", Value::Null).await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let error = client.push_status(0).await.expect_err("cut");
    assert_eq!(error.kind, ErrorKind::WorkerStalled, "{error}");
    client.drop_new().await.expect("dropped");
    qemu.assert_clean(&[]).await;
    drop(client);
    ended(thread).await;
}
