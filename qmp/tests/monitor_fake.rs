//! The monitor against peers that misbehave.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use icecore_qmp::testing::{Act, Fake, GREETING, Request};
use icecore_qmp::{Monitor, QmpError};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_millis(100);

fn path() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    (folder, path)
}

/// Connects to a monitor that follows the script.
async fn connected(
    script: impl FnMut(&Request) -> Option<Vec<Act>> + Send + 'static,
) -> (Monitor, Fake, tempfile::TempDir) {
    let (folder, path) = path();
    let fake = Fake::monitor(&path, GREETING, script).unwrap();
    (Monitor::connect(&path, DEADLINE).await.unwrap(), fake, folder)
}

/// The answer to `first` is given as told; all else is answered with its name.
async fn answering(mut acts: Vec<Act>) -> (Monitor, Fake, tempfile::TempDir) {
    connected(move |request| match request.name.as_str() {
        "qmp_capabilities" => None,
        "first" => Some(std::mem::take(&mut acts)),
        name => Some(vec![Act::Return(json!(name))]),
    })
    .await
}

async fn ask(monitor: &Monitor, name: &str, deadline: Duration) -> Result<Value, QmpError> {
    monitor.execute_raw(name, Value::Null, deadline).await
}

#[tokio::test]
async fn what_cannot_be_connected_to_is_named() {
    let (_folder, path) = path();
    let error = Monitor::connect(&path, DEADLINE).await.unwrap_err();
    assert!(matches!(error, QmpError::NoSocket { .. }), "{error}");
    std::fs::write(&path, "").unwrap();
    let error = Monitor::connect(&path, DEADLINE).await.unwrap_err();
    assert!(matches!(error, QmpError::NobodyListens { .. }), "{error}");
    let other = path.join("x".repeat(200));
    let error = Monitor::connect(&other, DEADLINE).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error}");
    assert!(!error.nobody_there(), "it says nothing about a QEMU");
}

#[tokio::test]
async fn other_servers_are_no_monitor() {
    for greeting in
        ["NBDMAGICIHAVEOPT\0\x03", "QEMU 10.0.2 monitor - type 'help'\r\n(qemu) ", "{\"a\": 1}"]
    {
        let (_folder, path) = path();
        let _fake = Fake::monitor(&path, greeting, |_| None).unwrap();
        let error = Monitor::connect(&path, DEADLINE).await.unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
    }
}

#[tokio::test]
async fn an_end_in_the_middle_of_the_negotiation_is_no_other_protocol() {
    let (_folder, path) = path();
    let _fake = Fake::monitor(&path, GREETING, |_| Some(vec![Act::Close])).unwrap();
    let error = Monitor::connect(&path, DEADLINE).await.unwrap_err();
    assert!(error.is_closed(), "{error}");
}

#[tokio::test]
async fn no_greeting_and_no_negotiation_are_not_waited_for() {
    for greeting in ["", &GREETING[..20], GREETING] {
        let (_folder, path) = path();
        let _fake = Fake::monitor(&path, greeting, |_| Some(vec![])).unwrap();
        let error = Monitor::connect(&path, SOON).await.unwrap_err();
        assert!(error.to_string().contains("another client probably holds"), "{error}");
    }
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_the_next() {
    let late = vec![Act::Wait(Duration::from_millis(300)), Act::Return(json!("late"))];
    let (monitor, _fake, _folder) = answering(late).await;
    let error = ask(&monitor, "first", SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert_eq!(ask(&monitor, "second", DEADLINE).await.unwrap(), "second");
}

#[tokio::test]
async fn answers_without_or_with_a_wrong_id_are_nobodys() {
    let wrong =
        b"{\"return\": 1}\n{\"return\": 1, \"id\": 1}\n{\"return\": 1, \"id\": \"icecore-0-1\"}\n";
    let (monitor, _fake, _folder) = answering(vec![Act::Raw(wrong.to_vec())]).await;
    let error = ask(&monitor, "first", SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert_eq!(ask(&monitor, "second", DEADLINE).await.unwrap(), "second");
}

#[tokio::test]
async fn a_second_answer_to_one_question_is_dropped() {
    let twice = vec![Act::Return(json!(1)), Act::Return(json!(2))];
    let (monitor, _fake, _folder) = answering(twice).await;
    assert_eq!(ask(&monitor, "first", DEADLINE).await.unwrap(), 1);
    assert_eq!(ask(&monitor, "second", DEADLINE).await.unwrap(), "second");
}

#[tokio::test]
async fn garbage_bombs_and_broken_ends_end_the_connection() {
    let long = [b"{\"return\": \"".to_vec(), vec![b'x'; 100 << 20]].concat();
    let bombs = [
        (vec![Act::Raw(b"garbage".to_vec())], "expected a JSON object"),
        (vec![Act::Raw(b"}{".to_vec())], "expected a JSON object"),
        (vec![Act::Raw(long)], "longer than"),
        (vec![Act::Raw(vec![b'['; 1 << 20]), Act::Close], "expected a JSON object"),
        (vec![Act::Raw(b"{\"a\":".repeat(1 << 20)), Act::Close], "nested deeper"),
        (vec![Act::Raw(b"{\"return\": {}, ".to_vec()), Act::Close], "middle of a message"),
        (vec![Act::Close], "closed by the other side"),
    ];
    for (acts, expected) in bombs {
        let (monitor, _fake, _folder) = answering(acts).await;
        let error = ask(&monitor, "first", DEADLINE).await.unwrap_err();
        assert!(error.is_closed() && error.to_string().contains(expected), "{error}");
        let after = ask(&monitor, "second", DEADLINE).await.unwrap_err();
        assert_eq!(after.to_string().replace("second", "first"), error.to_string());
    }
}

#[tokio::test]
async fn unbalanced_input_is_waited_for_no_longer_than_the_deadline() {
    let (monitor, _fake, _folder) = answering(vec![Act::Raw(b"{\"return\": {".to_vec())]).await;
    let error = ask(&monitor, "first", SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_flood_of_events_costs_the_slow_subscriber_and_no_one_else() {
    let mut flood = vec![Act::Raw(b"{\"event\": \"FLOOD\"}\r\n".repeat(100_000))];
    flood.push(Act::Event("LAST", json!({"a": 1})));
    flood.push(Act::Return(json!("done")));
    let (monitor, _fake, _folder) = answering(flood).await;
    let mut events = monitor.events();
    assert_eq!(ask(&monitor, "first", DEADLINE).await.unwrap(), "done");
    let mut last = None;
    loop {
        match events.try_recv() {
            Ok(event) => last = Some(event),
            Err(tokio::sync::broadcast::error::TryRecvError::Lagged(_)) => {}
            Err(_) => break,
        }
    }
    let last = last.unwrap();
    assert_eq!((last.name.as_str(), &last.data), ("LAST", &json!({"a": 1})));
}

#[tokio::test]
async fn a_monitor_that_answers_nothing_is_not_asked_for_ever() {
    let (monitor, _fake, _folder) =
        connected(|request| (request.name != "qmp_capabilities").then(Vec::new)).await;
    let started = Instant::now();
    let mut last = None;
    for _ in 0..80 {
        last = Some(ask(&monitor, "x", Duration::from_millis(1)).await.unwrap_err());
    }
    assert!(matches!(last, Some(QmpError::Busy { pending: 64, .. })), "{last:?}");
    assert!(started.elapsed() < DEADLINE);
}

#[tokio::test]
async fn the_connection_closes_with_its_last_handle() {
    let (sender, mut closed) = tokio::sync::mpsc::unbounded_channel();
    let (folder, path) = path();
    let _fake = Fake::monitor(&path, GREETING, move |request| {
        sender.send(request.name.clone()).unwrap();
        None
    })
    .unwrap();
    for _ in 0..2 {
        // The fake serves one client at a time: a second is greeted only if the first left.
        let monitor = Monitor::connect(&path, DEADLINE).await.unwrap();
        drop(monitor.clone());
        drop(monitor);
        assert_eq!(closed.recv().await.unwrap(), "qmp_capabilities");
    }
    drop(folder);
}
