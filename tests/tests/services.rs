//! Hosts that share a repository see each other's daemons.

use icecore_tests::{Icecore, Result, Run, wait_until};
use rustix::process::Signal;
use serde_json::Value;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

fn list(icecore: &Icecore) -> Run {
    icecore.command("service").arg("list").arg(icecore.repository()).arg("--json")
}

/// The states of all daemons, sorted.
fn states(listed: &Value) -> Vec<&str> {
    let rows = listed.as_array().into_iter().flatten();
    let mut states: Vec<&str> = rows.filter_map(|row| row["state"].as_str()).collect();
    states.sort_unstable();
    states
}

#[test]
fn daemons_that_share_a_repository_are_up_stopped_or_down() -> Result<()> {
    let (one, two) = (Icecore::new()?, Icecore::without_repository()?);
    assert_eq!(states(&list(&one).json()?), Vec::<&str>::new());
    let daemon = one.serve(&[], "")?;
    let shared = std::fs::read_to_string(daemon.config())?.replace(
        &one.path("api").to_string_lossy().into_owned(),
        &two.path("api").to_string_lossy(),
    );
    std::fs::write(two.path("icecore.toml"), shared)?;
    let mut other = two.serve_again(&two.path("icecore.toml"))?;
    wait_until("both", DEADLINE, || Ok(states(&list(&one).json()?) == ["up", "up"]))?;
    daemon.signal(Signal::TERM);
    daemon.finish()?;
    assert_eq!(states(&list(&one).json()?), ["stopped", "up"]);
    // Killed, it says nothing: it is down when it has been silent for long enough.
    other.kill();
    assert_eq!(states(&list(&one).json()?), ["stopped", "up"]);
    let later = list(&one).env("LD_PRELOAD", FAKETIME).env("FAKETIME", "+20m");
    let later = later.env("DONT_FAKE_MONOTONIC", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    assert_eq!(states(&later.json()?), ["down", "stopped"]);
    // Started again it is the same daemon.
    let again = one.serve_again(&one.path("icecore.toml"))?;
    wait_until("the first", DEADLINE, || Ok(states(&list(&one).json()?) == ["up", "up"]))?;
    again.signal(Signal::TERM);
    again.finish()?;
    one.check().map(drop)
}
