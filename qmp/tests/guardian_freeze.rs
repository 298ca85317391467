//! Freezing under a deadline, and the thaw that is owed.

mod guardian_rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use guardian_rig::{MIB, Machine, Qemu, ended};
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{ErrorKind, Freeze, InstantPlan, Then};
use icecore_qmp::testing::{Act, Fake};
use serde_json::{Value, json};

#[derive(Default)]
struct Guest {
    frozen: AtomicBool,
    thaws: AtomicUsize,
}

/// An agent whose freeze takes a while.
fn agent(qemu: &Qemu, freeze_takes: Duration) -> (Fake, Arc<Guest>) {
    let guest = Arc::new(Guest::default());
    let state = Arc::clone(&guest);
    let fake = Fake::agent(&qemu.path("qga"), move |request| {
        Some(match request.name.as_str() {
            "guest-fsfreeze-status" => {
                let frozen = state.frozen.load(Ordering::SeqCst);
                vec![Act::Return(json!(if frozen { "frozen" } else { "thawed" }))]
            }
            "guest-fsfreeze-freeze" => {
                state.frozen.store(true, Ordering::SeqCst);
                vec![Act::Wait(freeze_takes), Act::Return(json!(2))]
            }
            "guest-fsfreeze-thaw" => {
                state.frozen.store(false, Ordering::SeqCst);
                state.thaws.fetch_add(1, Ordering::SeqCst);
                vec![Act::Return(json!(2))]
            }
            _ => return None,
        })
    });
    (fake.expect("a fake agent"), guest)
}

async fn prepared(qemu: &Qemu) -> (GuardianClient, std::thread::JoinHandle<()>) {
    let (client, thread) = qemu.guardian();
    client.connect(qemu.path("qmp"), Some(qemu.path("qga"))).await.expect("connected");
    qemu.ask("cont", Value::Null).await;
    client.prepare(qemu.prepare(16 * MIB, "p1").await).await.expect("prepared");
    (client, thread)
}

fn plan(freeze: Freeze, then: Then) -> InstantPlan {
    InstantPlan { freeze, then }
}

#[tokio::test]
async fn a_frozen_instant_is_thawed_and_needs_no_pause() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (_agent, guest) = agent(&qemu, Duration::from_millis(20));
    let (client, thread) = prepared(&qemu).await;
    let report = client.instant(plan(Freeze::Require(5000), Then::Continue)).await.expect("taken");
    assert_eq!((report.frozen_filesystems, report.thaw_owed), (Some(2), false));
    assert!(report.freeze_ms > 0.0 && report.pause_ms == 0.0, "{report:?}");
    assert!(!guest.frozen.load(Ordering::SeqCst));
    client.release().await.expect("released");
    drop(client);
    ended(thread).await;
    assert_eq!(guest.thaws.load(Ordering::SeqCst), 1);
}

/// FAULTS 29: a freeze that comes too late is given up at its deadline and thawed when the agent
/// is back.
#[tokio::test]
async fn a_late_freeze_is_thawed_all_the_same() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (_agent, guest) = agent(&qemu, Duration::from_secs(4));
    let (client, thread) = prepared(&qemu).await;
    let started = Instant::now();
    let report = client.instant(plan(Freeze::Try(500), Then::Continue)).await.expect("taken");
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    assert!(report.frozen_filesystems.is_none() && report.why_not_frozen.is_some());
    assert!(report.pause_ms > 0.0, "crash-consistent: stopped for the insertion");
    client.release().await.expect("released");
    drop(client);
    ended(thread).await;
    assert!(!guest.frozen.load(Ordering::SeqCst), "thawed before the guardian ends");
}

#[tokio::test]
async fn a_required_freeze_that_fails_undoes_the_run() {
    let qemu = Qemu::start(&Machine::single()).await;
    // Nobody listens: nothing is owed either.
    let (client, thread) = prepared(&qemu).await;
    let freeze = plan(Freeze::Require(1000), Then::Continue);
    let error = client.instant(freeze).await.expect_err("no agent");
    assert_eq!(error.kind, ErrorKind::NotFrozen, "{error}");
    qemu.assert_clean(&[]).await;
    drop(client);
    ended(thread).await;
    assert_eq!(qemu.ask("query-status", Value::Null).await["status"], json!("running"));
}

/// FAULTS 30: the worker dies while the guest is frozen and stopped.
#[tokio::test]
async fn a_worker_that_dies_during_the_freeze_leaves_a_free_guest() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (_agent, guest) = agent(&qemu, Duration::ZERO);
    let (client, thread) = prepared(&qemu).await;
    client.instant(plan(Freeze::Require(5000), Then::Hold)).await.expect("held");
    assert!(guest.frozen.load(Ordering::SeqCst));
    drop(client);
    ended(thread).await;
    assert!(!guest.frozen.load(Ordering::SeqCst));
    qemu.assert_clean(&[]).await;
    assert_eq!(qemu.ask("query-status", Value::Null).await["status"], json!("running"));
}
