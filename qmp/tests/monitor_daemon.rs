//! The monitor against a real `qemu-storage-daemon`.

#![allow(clippy::unwrap_used)]

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use icecore_qmp::{Monitor, QmpError};
use qapi::qmp;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(10);

struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Daemon {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let child = Command::new("qemu-storage-daemon")
            .arg("--chardev")
            .arg(format!("socket,id=c,path={},server=on,wait=off", socket.display()))
            .args(["--monitor", "chardev=c"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        while !socket.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self { child, folder }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("qmp")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn commands_are_answered_typed_and_raw() {
    let daemon = Daemon::start().await;
    let monitor = Monitor::connect(&daemon.socket(), DEADLINE).await.unwrap();
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
}

#[tokio::test]
async fn a_second_client_is_told_that_the_monitor_is_held() {
    let daemon = Daemon::start().await;
    let first = Monitor::connect(&daemon.socket(), DEADLINE).await.unwrap();
    let second = Monitor::connect(&daemon.socket(), Duration::from_millis(200)).await;
    assert!(matches!(second, Err(QmpError::NoGreeting { .. })), "{second:?}");
    drop(first);
    Monitor::connect(&daemon.socket(), DEADLINE).await.unwrap();
}

#[tokio::test]
async fn death_and_silence_of_qemu_end_calls() {
    let mut daemon = Daemon::start().await;
    let monitor = Monitor::connect(&daemon.socket(), DEADLINE).await.unwrap();
    let mut events = monitor.events();
    let stop = |signal| {
        let pid = rustix::process::Pid::from_child(&daemon.child);
        rustix::process::kill_process(pid, signal).unwrap();
    };
    stop(rustix::process::Signal::STOP);
    let error =
        monitor.execute(qmp::query_version {}, Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }) && error.outcome_unknown());
    stop(rustix::process::Signal::CONT);
    monitor.execute(qmp::query_version {}, DEADLINE).await.unwrap();
    daemon.child.kill().unwrap();
    let error = monitor.execute(qmp::query_version {}, DEADLINE).await.unwrap_err();
    assert!(error.is_closed(), "{error}");
    assert!(monitor.ended().is_some());
    assert!(events.recv().await.is_err());
    daemon.child.wait().unwrap();
    let gone = Monitor::connect(&daemon.socket(), DEADLINE).await;
    assert!(matches!(gone, Err(QmpError::Connect { .. } | QmpError::NoSocket { .. })), "{gone:?}");
}
