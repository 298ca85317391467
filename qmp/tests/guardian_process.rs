//! The guardian as the process that it is: signals, locks, and a probe that gets stuck.

mod guardian_rig;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use guardian_rig::{MIB, Machine, Qemu, bitmap, ended, instant, run};
use icecore_qmp::guardian::protocol::{Form, Then};
use icecore_qmp::guardian::{GuardianClient, main};
use icecore_qmp::recover::{Intents, ServerIntent};
use rustix::fs::{FlockOperation, flock};

/// Not a test: the body of the process that the tests below start.
#[test]
#[ignore = "started by the other tests with a socket as standard input"]
fn guardian_body() {
    main();
}

fn body_arguments() -> Vec<OsString> {
    ["--ignored", "--exact", "guardian_body", "--nocapture"].map(OsString::from).to_vec()
}

fn lock(path: &std::path::Path) -> Result<OwnedFd, rustix::io::Errno> {
    let file = std::fs::File::options().create(true).append(true).open(path).expect("a lock file");
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file.into())
}

fn guardians() -> Vec<String> {
    let me = std::process::id().to_string();
    let found = Command::new("pgrep").args(["-P", &me, "-f", "guardian_body"]).output();
    let found = found.expect("pgrep").stdout;
    String::from_utf8_lossy(&found).lines().map(str::to_owned).collect()
}

/// FAULTS 1, 30, 31: what ends the worker leaves the guardian; the lock outlives the worker.
#[tokio::test]
async fn a_guardian_is_deaf_and_holds_the_locks() {
    let qemu = Qemu::start(&Machine::single()).await;
    let path = qemu.path("lock");
    let held = lock(&path).expect("free");
    let exe = std::env::current_exe().expect("this test");
    let client = GuardianClient::spawn(&exe, &body_arguments(), &[held]).expect("a guardian");
    client.connect(qemu.path("qmp"), None).await.expect("connected");
    qemu.capture(&client, "p1", None).await;
    for pid in guardians() {
        for signal in ["-INT", "-TERM", "-HUP"] {
            run("kill", &[signal, &pid]);
        }
    }
    client.sizes().await.expect("it is still there");
    assert!(lock(&path).is_err(), "held by the guardian alone");
    drop(client);
    let freed = async {
        while lock(&path).is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let within = Duration::from_secs(10);
    tokio::time::timeout(within, freed).await.expect("the lock goes with the guardian");
    qemu.assert_clean(&[bitmap("p1", "vd0")]).await;
}

/// FAULTS 53: scratch storage that hangs: the graph stays, and that is said.
#[tokio::test]
async fn a_hung_scratch_leaves_the_graph() {
    let qemu = Qemu::start(&Machine::single()).await;
    let (client, thread) = qemu.connected_with("exec sleep 60").await;
    client.prepare(qemu.prepare(16 * MIB, "p1").await).await.expect("prepared");
    client.instant(instant(Then::Continue)).await.expect("instant");
    client.expose(qemu.expose_plan(Form::Pull, None).await).await.expect("exposed");
    let released = client.release().await.expect("an answer");
    assert!(!released.left.is_empty());
    assert!(released.left.iter().all(|left| left.contains("does not answer")), "{released:?}");
    assert!(!qemu.path("nbd").exists(), "the server is stopped all the same");
    qemu.write(0, 3, 0..MIB).await;
    drop(client);
    ended(thread).await;
    // The next start, with the storage as it is, and then with a probe that does not work.
    for (probe, why) in [("exec sleep 60", "does not answer"), ("false", "is not known")] {
        let left = recovered(&qemu, probe).await;
        assert!(!left.is_empty());
        assert!(left.iter().all(|left| left.contains(why)), "{left:?}");
    }
    // The storage is back: the directory's name comes from QEMU.
    let probe = format!("test $ICECORE_GUARDIAN_PROBE = {}", qemu.dir.path().display());
    assert_eq!(recovered(&qemu, &probe).await, Vec::<String>::new());
    qemu.assert_clean(&[bitmap("p1", "vd0")]).await;
}

/// FAULTS 53: the storage comes back while the worker is still there, and asks for nothing.
#[tokio::test]
async fn what_could_not_be_undone_is_tried_again() {
    let qemu = Qemu::start(&Machine::single()).await;
    let back = qemu.path("back");
    let probe = format!("test -e {} || exec sleep 60", back.display());
    let (client, thread) = qemu.connected_with(&probe).await;
    qemu.capture(&client, "p1", None).await;
    assert!(!client.abort().await.expect("an answer").left.is_empty());
    std::fs::write(&back, "").expect("a file");
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while !qemu.seen().await.runs().is_empty() {
        assert!(std::time::Instant::now() < until, "nothing is tried");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    qemu.assert_clean(&[bitmap("p1", "vd0")]).await;
    drop(client);
    ended(thread).await;
}

/// What is left after the next start.
async fn recovered(qemu: &Qemu, probe: &str) -> Vec<String> {
    let (client, thread) = qemu.connected_with(probe).await;
    let mut intents = Intents::unknown(client.inspect().await.expect("inspected").leftovers[0]);
    intents.server = ServerIntent::Asked;
    let left = client.recover(intents, None).await.expect("recovered").left;
    drop(client);
    ended(thread).await;
    left
}
