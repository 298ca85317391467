//! What runs around the daemon: systemd, the live view, the monitoring system.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use icecore_tests::{
    Background, Daemon, Disk, Failure, Icecore, MIB, Result, Scratch, TestVm, VmSpec, run,
    wait_until, workspace_root,
};
use rustix::process::Signal;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(30);

fn bare(name: &str) -> Result<TestVm> {
    let vm = VmSpec::new(name).no_guest().disk(Disk::new("d0", 64 * MIB)).start()?;
    vm.fill("d0", 1, 0, 24 * MIB)?;
    Ok(vm)
}

/// Starts a backup that takes a while and waits until it has told how far it is.
fn slow_backup(daemon: &Daemon, vm: &TestVm) -> Result<String> {
    let path = format!("/v1/vms/{}/backups", vm.name());
    let job = daemon.submit(&path, r#"{"rate_limit":"1M/s"}"#)?;
    wait_until("its progress", DEADLINE, || {
        Ok(daemon.job(&job)?["progress"]["done_bytes"].as_u64() > Some(0))
    })?;
    Ok(job)
}

/// What the daemon told systemd, when, and whether its API answered right afterwards.
struct Told {
    at: Instant,
    text: String,
    answered: bool,
}

/// A systemd that only listens.
fn listen(path: &Path, api: PathBuf) -> Result<Receiver<Told>> {
    let socket = UnixDatagram::bind(path)?;
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = socket.recv(&mut buffer) {
            let (at, text) = (Instant::now(), String::from_utf8_lossy(&buffer[..length]).into());
            if send.send(Told { at, text, answered: answers(&api) }).is_err() {
                return;
            }
        }
    });
    Ok(receive)
}

fn answers(api: &Path) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(api)?;
        stream.write_all(b"GET /healthz HTTP/1.0\r\nhost: icecore\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    ask().is_ok_and(|text| text.starts_with("HTTP/1.0 200"))
}

/// The next thing told that has this line; what came before it is left out.
fn next(told: &Receiver<Told>, line: &str) -> Result<Told> {
    let until = Instant::now() + DEADLINE;
    while let Ok(one) = told.recv_timeout(until.saturating_duration_since(Instant::now())) {
        if one.text.lines().any(|its| its == line) {
            return Ok(one);
        }
    }
    Err(Failure::new(format!("systemd was not told {line}")))
}

#[test]
fn systemd_is_told_when_it_is_ready_alive_reloading_and_stopping() -> Result<()> {
    let icecore = Icecore::new()?;
    let config = icecore.write_config(&[], "")?;
    let socket = icecore.path("notify");
    let told = listen(&socket, icecore.path("api/api.sock"))?;
    let variables: [(&str, &OsStr); 2] =
        [("NOTIFY_SOCKET", socket.as_os_str()), ("WATCHDOG_USEC", OsStr::new("2000000"))];
    let daemon = icecore.serve_in(&config, &variables)?;
    assert!(next(&told, "READY=1")?.answered, "ready before it answers");
    let mut last = next(&told, "WATCHDOG=1")?;
    for _ in 0..3 {
        let now = next(&told, "WATCHDOG=1")?;
        let pause = now.at - last.at;
        // Every second of two; a busy machine takes its time.
        assert!(pause < Duration::from_secs(2) && pause > Duration::from_millis(300), "{pause:?}");
        assert!(now.text.contains("STATUS=0 jobs run, 0 wait"), "{}", now.text);
        last = now;
    }
    daemon.signal(Signal::HUP);
    let reloading = next(&told, "RELOADING=1")?;
    assert!(reloading.text.contains("MONOTONIC_USEC="), "{}", reloading.text);
    next(&told, "READY=1")?;
    daemon.signal(Signal::TERM);
    next(&told, "STOPPING=1")?;
    assert_eq!(daemon.finish()?, Some(0));
    Ok(())
}

#[test]
fn the_unit_is_one_that_systemd_accepts_and_finds_safe() -> Result<()> {
    let scratch = Scratch::new()?;
    let text = std::fs::read_to_string(workspace_root().join("packaging/icecore.service"))?;
    let icecore = Icecore::without_repository()?;
    // The package's path is not there before the package is; its man page neither.
    let text = text.replace("/usr/bin/icecore", &icecore.binary().to_string_lossy());
    let lines = text.lines().filter(|line| !line.starts_with("Documentation="));
    let unit = scratch.join("icecore.service");
    std::fs::write(&unit, lines.collect::<Vec<_>>().join("\n") + "\n")?;
    let verified = run(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit))?;
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    // Others' units that it loads along may have faults of their own.
    let ours = said.lines().any(|line| line.contains("icecore.service"));
    assert!(!ours, "{said}");
    // "OK" is below 5; a service that runs as root and opens images cannot be much safer.
    let security = ["security", "--no-pager", "--offline=true", "--threshold=50"];
    run(Command::new("systemd-analyze").args(security).arg(&unit)).map(drop)
}

#[test]
fn the_live_view_shows_jobs_and_vms_and_leaves_the_terminal_as_it_was() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let mut daemon = icecore.serve(&[&vm], "")?;
    icecore.prove_next_point(&vm)?;
    vm.fill("d0", 2, 0, 24 * MIB)?;
    let job = slow_backup(&daemon, &vm)?;
    let config = daemon.config().to_owned();
    let top = || icecore.command("top").arg("--config").arg(&config);
    let text = top().arg("--once").succeed()?.stdout;
    for part in [&job, "backup", "captured", "% of ", "/s", "JOB", "LAST POINT", "1 jobs run"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains('\u{1b}'), "{text}");
    let seen = top().arg("--json").json()?;
    assert_eq!((&seen["jobs"][0]["job"], &seen["vms"][0]["points"]), (&json!(job), &json!(1)));
    assert_eq!(seen["daemon"]["jobs_running"], 1);
    redraws_until_q(&icecore, &config, &job)?;
    daemon.kill();
    let without = top().arg("--once").succeed()?.stdout;
    assert!(without.contains("no daemon answers") && without.contains(&job), "{without}");
    icecore.command("job").args(["cancel", &job]).succeed().map(drop)
}

/// On a terminal of its own, which `script` makes.
fn redraws_until_q(icecore: &Icecore, config: &Path, job: &str) -> Result<()> {
    let shown = |path: &Path| path.to_string_lossy().into_owned();
    let (binary, state) = (shown(icecore.binary()), shown(&icecore.path("state")));
    let line =
        format!("'{binary}' top --config '{}' --state-dir '{state}'; stty -a", shown(config));
    let output = icecore.path("typescript");
    let mut script = Command::new("script");
    script.args(["--quiet", "--flush", "--return", "--command", &line]).arg(&output);
    script.env("TERM", "xterm").stdin(Stdio::piped()).stdout(Stdio::null());
    let mut process = Background::spawn(&mut script)?;
    let mut keys = process.stdin().ok_or_else(|| Failure::new("no stdin"))?;
    let written = || std::fs::read(&output).map(|bytes| String::from_utf8_lossy(&bytes).into());
    wait_until("a second view", DEADLINE, || {
        let text: String = written().unwrap_or_default();
        Ok(text.matches("\u{1b}[H").count() >= 2 && text.contains(job))
    })?;
    keys.write_all(b"q")?;
    assert_eq!(process.wait_within(DEADLINE)?.code(), Some(0));
    let text: String = written()?;
    let after = text.split("\u{1b}[?25h\u{1b}[?1049l").nth(1).unwrap_or_default();
    assert!(after.contains(" icanon") && after.contains(" echo "), "{after}");
    Ok(())
}

#[test]
fn what_alerts_and_dashboard_name_is_in_a_scrape() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let more = "[quota.shop]\npoints = 9\ngigabytes = 1\n\
                [vm.off]\nimage = ['d0=/nowhere']\nproject = 'shop'\n\
                [schedule.yearly]\ncron = '0 0 1 1 *'\nvms = ['bare']\nrepository = 'main'\n";
    let daemon = icecore.serve(&[&vm], more)?;
    icecore.through(&daemon, "backup").args(["--repo", "main", "bare"]).succeed()?;
    icecore.through(&daemon, "check").args(["--repo", "main", "--read-data"]).succeed()?;
    let restore = icecore.through(&daemon, "restore").args(["--repo", "main", "latest", "--to"]);
    restore.arg(icecore.path("restored")).succeed()?;
    let mut scrape = String::new();
    wait_until("a look after the restore", DEADLINE, || {
        scrape = daemon.get("/metrics")?.body;
        let restored = "icecore_last_verified_restore_timestamp_seconds{vm=\"bare\"}";
        Ok(scrape.contains(restored) && !scrape.contains(&format!("{restored} 0\n")))
    })?;
    for line in [
        "icecore_quota_points_limit{project=\"shop\",repository=\"main\"} 9",
        "icecore_quota_stored_bytes{project=\"shop\",repository=\"main\"} 0",
        "icecore_runs_missed_total{schedule=\"yearly\"} 0",
        "icecore_jobs_ended_total{kind=\"rollback\",state=\"failed\"} 0",
    ] {
        assert!(scrape.lines().any(|its| its == line), "{line} in {scrape}");
    }
    let samples = scrape.lines().filter(|line| !line.starts_with('#'));
    let known: BTreeSet<&str> = samples.filter_map(|line| line.split(['{', ' ']).next()).collect();
    // The guest of this VM has nothing to do: nothing can be said of its latency.
    let silent =
        ["before", "worst"].map(|when| format!("icecore_guest_latency_{when}_milliseconds"));
    let folder = workspace_root().join("packaging/monitoring");
    for file in ["alerts.yml", "grafana.json"] {
        let text = std::fs::read_to_string(folder.join(file))?;
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let named: BTreeSet<&str> = words.filter(|word| word.starts_with("icecore_")).collect();
        assert!(named.len() > 5, "{file} names {named:?}");
        for name in named {
            let idle = silent.iter().any(|its| its == name);
            let declared = scrape.contains(&format!("# TYPE {name} gauge"));
            let there = if idle { declared } else { known.contains(name) };
            assert!(there, "{file} names {name}, which no scrape has: {scrape}");
        }
    }
    vm.require_no_trace()
}
