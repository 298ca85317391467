//! Schedules and messages of the daemon, end to end.

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use icecore_tests::{
    Daemon, Disk, Failure, Icecore, MIB, Result, TestVm, VmSpec, require_rehash, wait_until,
};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
/// The daemon looks at its schedules every 10 s: two looks and a bit.
const TWO_LOOKS: Duration = Duration::from_secs(23);
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

fn bare() -> Result<TestVm> {
    let vm = VmSpec::new("bare").no_guest().disk(Disk::new("d0", 32 * MIB)).start()?;
    vm.fill("d0", 1, 0, 4 * MIB)?;
    Ok(vm)
}

/// A server that answers every request with 200 and hands on the documents that it got.
fn webhook() -> Result<(u16, Receiver<Value>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let (send, receive) = channel();
    std::thread::spawn(move || -> std::io::Result<()> {
        loop {
            let (mut stream, _) = listener.accept()?;
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.ends_with(b"}") {
                match stream.read(&mut buffer)? {
                    0 => break,
                    read => request.extend_from_slice(&buffer[..read]),
                }
            }
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
            let body = request.split(|byte| *byte == b'\n').next_back().unwrap_or_default();
            if send.send(serde_json::from_slice(body).unwrap_or_default()).is_err() {
                return Ok(());
            }
        }
    });
    Ok((port, receive))
}

/// The next message of this kind; others that came before it are left out.
fn told(messages: &Receiver<Value>, event: &str) -> Result<Value> {
    while let Ok(message) = messages.recv_timeout(DEADLINE) {
        if message["event"] == event {
            return Ok(message);
        }
    }
    Err(Failure::new(format!("nobody was told of a {event}")))
}

/// As a daemon left it that has not run for a long time.
fn was_away(icecore: &Icecore, schedule: &str) -> Result<()> {
    let marks = icecore.path("state/schedule");
    std::fs::create_dir_all(&marks)?;
    let mark = json!({ schedule: { "bare": "2020-06-01T00:00:00Z" } });
    Ok(std::fs::write(marks.join("marks.json"), mark.to_string())?)
}

/// The runs of the schedule, whatever became of them.
fn runs(daemon: &Daemon) -> Result<usize> {
    let jobs = daemon.get("/v1/jobs?kind=backup")?.expect(200)?;
    let by = |job: &&Value| job["order"]["requested_by"] == "schedule daily";
    Ok(jobs.as_array().into_iter().flatten().filter(by).count())
}

#[test]
fn a_missed_run_a_fallback_and_a_failure_are_told() -> Result<()> {
    let mut vm = bare()?;
    let icecore = Icecore::new()?;
    was_away(&icecore, "yearly")?;
    let (port, messages) = webhook()?;
    let more = format!(
        "[notify]\nwebhook = 'http://127.0.0.1:{port}/x'\n\
         [schedule.yearly]\ncron = '0 0 1 1 *'\nvms = ['bare']\nrepository = 'main'\n"
    );
    let daemon = icecore.serve(&[&vm], &more)?;
    let missed = told(&messages, "missed")?;
    assert_eq!(missed["vm"], "bare", "{missed}");
    assert!(missed["subject"].as_str().is_some_and(|s| s.contains("yearly")), "{missed}");
    let ended = || daemon.get("/v1/jobs?state=succeeded")?.expect(200);
    wait_until("the run", DEADLINE, || Ok(ended()?.as_array().is_some_and(|all| all.len() == 1)))?;
    // The bitmap goes, as somebody's script might take it away.
    let bitmaps = vm.bitmaps("d0")?;
    let node = vm.node("d0")?;
    for name in bitmaps {
        let arguments = json!({ "node": node, "name": name });
        vm.monitor()?.execute("block-dirty-bitmap-remove", arguments)?;
    }
    let report = icecore.through(&daemon, "backup").args(["--repo", "main", "bare"]).json()?;
    require_rehash(&report, "d0", "BitmapMissing")?;
    let fallback = told(&messages, "fallback")?;
    assert!(fallback["text"].as_str().is_some_and(|t| t.contains("BitmapMissing")), "{fallback}");
    vm.kill();
    icecore.through(&daemon, "backup").args(["--repo", "main", "bare"]).expect(1)?;
    let failure = told(&messages, "failure")?;
    assert!(failure["text"].as_str().is_some_and(|t| t.contains("next:")), "{failure}");
    Ok(())
}

fn set_clock(file: &Path, offset: &str) -> Result<()> {
    Ok(std::fs::write(file, format!("{offset}\n"))?)
}

#[test]
#[ignore = "long: it waits for many looks at the schedules"]
fn a_clock_that_jumps_makes_up_for_one_run_and_repeats_none() -> Result<()> {
    assert!(Path::new(FAKETIME).exists(), "install the package faketime");
    let vm = bare()?;
    let icecore = Icecore::new()?;
    let clock = icecore.path("clock");
    set_clock(&clock, "+0")?;
    let schedule = "[schedule.daily]\ncron = '0 3 * * *'\nvms = ['bare']\nrepository = 'main'\n\
                    timezone = 'UTC'\n[schedule.daily.retention]\ndaily = 1\n";
    let config = icecore.write_config(&[&vm], schedule)?;
    let variables: [(&str, &OsStr); 5] = [
        ("LD_PRELOAD", OsStr::new(FAKETIME)),
        ("FAKETIME_TIMESTAMP_FILE", clock.as_os_str()),
        ("FAKETIME_NO_CACHE", OsStr::new("1")),
        ("DONT_FAKE_MONOTONIC", OsStr::new("1")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", OsStr::new("1")),
    ];
    let daemon = icecore.serve_in(&config, &variables)?;
    let marks = icecore.path("state/schedule/marks.json");
    wait_until("the first look", DEADLINE, || Ok(marks.exists()))?;
    assert_eq!(runs(&daemon)?, 0, "a VM that is new to a schedule waits for its moment");
    // Three moments pass at once: one run.
    set_clock(&clock, "+3d")?;
    wait_until("the run", DEADLINE, || Ok(runs(&daemon)? == 1))?;
    std::thread::sleep(TWO_LOOKS);
    assert_eq!(runs(&daemon)?, 1, "one run makes up for all");
    // A day back: that moment comes again, and was dealt with. All the way back: a mark of the future.
    for offset in ["+2d", "+0"] {
        set_clock(&clock, offset)?;
        std::thread::sleep(TWO_LOOKS);
        assert_eq!(runs(&daemon)?, 1, "nothing is repeated at {offset}");
    }
    let points = daemon.get("/v1/points")?.expect(200)?;
    assert_eq!(points.as_array().map(Vec::len), Some(1), "and nothing is deleted: {points}");
    vm.require_no_trace()
}
