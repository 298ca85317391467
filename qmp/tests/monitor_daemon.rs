//! The monitor against a real `qemu-storage-daemon`.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use icecore_qmp::testing::{Process, daemon_command};
use icecore_qmp::{Monitor, QmpError};
use qapi::qmp;
use rustix::process::Signal;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(10);

fn daemon() -> (Process, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (Process::start(daemon_command(), folder.path()).unwrap(), folder)
}

#[tokio::test]
async fn commands_are_answered_typed_and_raw() {
    let (daemon, _folder) = daemon();
    let monitor = Monitor::connect(daemon.monitor(), DEADLINE).await.unwrap();
    assert!(monitor.version().major >= 7);
    let version = monitor.execute(qmp::query_version {}, DEADLINE).await.unwrap();
    assert_eq!(version.qemu.major, i64::from(monitor.version().major));
    let add = json!({"driver": "null-co", "node-name": "n", "size": 65536});
    assert_eq!(monitor.execute_raw("blockdev-add", add, DEADLINE).await.unwrap(), json!({}));
    let gone = json!({"node-name": "other"});
    let error = monitor.execute_raw("blockdev-del", gone, DEADLINE).await.unwrap_err();
    assert!(error.refusal().unwrap().contains("other"), "{error}");
    let error = monitor.execute_raw("no-such", Value::Null, DEADLINE).await.unwrap_err();
    assert!(error.is_unknown_command());
    let error = monitor.execute_raw("query-version", json!([1]), DEADLINE).await.unwrap_err();
    assert!(matches!(error, QmpError::Content { .. }), "{error}");
}

#[tokio::test]
async fn many_callers_share_one_monitor() {
    let (daemon, _folder) = daemon();
    let monitor = Monitor::connect(daemon.monitor(), DEADLINE).await.unwrap();
    let calls = (0..50).map(|number| {
        let monitor = monitor.clone();
        tokio::spawn(async move {
            let add = json!({"driver": "null-co", "node-name": format!("n{number}")});
            monitor.execute_raw("blockdev-add", add, DEADLINE).await
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap().unwrap();
    }
    let nodes =
        monitor.execute_raw("query-named-block-nodes", Value::Null, DEADLINE).await.unwrap();
    assert_eq!(nodes.as_array().unwrap().len(), 50);
}

#[tokio::test]
async fn a_second_client_is_told_that_the_monitor_is_held() {
    let (daemon, _folder) = daemon();
    let first = Monitor::connect(daemon.monitor(), DEADLINE).await.unwrap();
    for _ in 0..4 {
        let second = Monitor::connect(daemon.monitor(), Duration::from_millis(100)).await;
        assert!(matches!(second, Err(QmpError::NoGreeting { .. })), "{second:?}");
    }
    drop(first);
    Monitor::connect(daemon.monitor(), DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_silent_qemu_times_out_and_is_heard_again() {
    let (daemon, _folder) = daemon();
    let monitor = Monitor::connect(daemon.monitor(), DEADLINE).await.unwrap();
    daemon.signal(Signal::STOP).unwrap();
    let soon = Duration::from_millis(100);
    let add = json!({"driver": "null-co", "node-name": "late"});
    let error = monitor.execute_raw("blockdev-add", add, soon).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }) && error.outcome_unknown(), "{error}");
    daemon.signal(Signal::CONT).unwrap();
    let nodes =
        monitor.execute_raw("query-named-block-nodes", Value::Null, DEADLINE).await.unwrap();
    assert_eq!(nodes[0]["node-name"], "late", "a command given up may still be carried out");
}

#[tokio::test]
async fn the_death_of_qemu_ends_calls_and_events() {
    let (mut daemon, _folder) = daemon();
    let monitor = Monitor::connect(daemon.monitor(), DEADLINE).await.unwrap();
    let mut events = monitor.events();
    daemon.kill().unwrap();
    let error = monitor.execute(qmp::query_version {}, DEADLINE).await.unwrap_err();
    assert!(error.is_closed(), "{error}");
    assert!(monitor.ended().is_some());
    assert!(events.recv().await.is_err());
    let gone = Monitor::connect(daemon.monitor(), DEADLINE).await;
    assert!(matches!(gone, Err(QmpError::NobodyListens { .. })), "{gone:?}");
}
