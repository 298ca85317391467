//! The agent's channel against the real `qemu-ga`, run here and asked only what changes nothing.

#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use icecore_qmp::agent::{Agent, FreezeStatus};
use icecore_qmp::testing::is_listening;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(10);
const BINARIES: [&str; 2] = ["/usr/sbin/qemu-ga", "/usr/bin/qemu-ga"];

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `None` where the agent is not installed.
fn start(folder: &Path) -> Option<Running> {
    let binary = BINARIES.iter().find(|path| Path::new(path).exists())?;
    let socket = folder.join("qga");
    let child = Command::new(binary)
        .args(["-m", "unix-listen", "-p"])
        .arg(&socket)
        .arg("-t")
        .arg(folder)
        .arg("-f")
        .arg(folder.join("pid"))
        // Should a test ever ask for it, this machine must not be the one that freezes.
        .args(["-b", "guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-shutdown"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(child);
    let until = Instant::now() + DEADLINE;
    while !is_listening(&socket).unwrap() {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    Some(running)
}

#[tokio::test]
async fn the_real_agent_is_brought_into_step_and_understood() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_running) = start(folder.path()) else {
        eprintln!("skipped: qemu-ga is not installed");
        return;
    };
    let mut agent = Agent::connect(&folder.path().join("qga"), DEADLINE).await.unwrap();
    agent.ping(DEADLINE).await.unwrap();
    let info = agent.info(DEADLINE).await.unwrap();
    assert!(info.allows("guest-ping") && !info.allows("guest-fsfreeze-freeze"));
    assert_eq!(agent.freeze_status(DEADLINE).await.unwrap(), FreezeStatus::Thawed);
    let error = agent.freeze(DEADLINE).await.unwrap_err();
    assert!(error.is_unknown_command(), "{error}");
    // Dropped in the middle, over and over: no answer is taken for another's.
    for micros in [0, 1, 20, 50, 100, 200, 500, 1000] {
        let wait = Duration::from_micros(micros);
        let _ = tokio::time::timeout(wait, agent.info(DEADLINE)).await;
        let status = agent.execute_raw("guest-fsfreeze-status", json!({}), DEADLINE).await;
        assert_eq!(status.unwrap(), "thawed");
    }
}

#[tokio::test]
async fn what_another_client_left_half_said_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_running) = start(folder.path()) else {
        eprintln!("skipped: qemu-ga is not installed");
        return;
    };
    let socket = folder.path().join("qga");
    let mut other = UnixStream::connect(&socket).unwrap();
    std::io::Write::write_all(&mut other, b"{\"execute\": \"guest-inf").unwrap();
    drop(other);
    let mut agent = Agent::connect(&socket, DEADLINE).await.unwrap();
    agent.ping(DEADLINE).await.unwrap();
}
