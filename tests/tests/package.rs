//! The Debian package on a fresh root: installed, used, upgraded while a job runs, removed, purged.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use icecore_tests::{
    Background, Debian, Failure, Icecore, Result, Scratch, run_within, wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(60);
/// A binary with all its symbols is stripped and compressed for 20 s and more.
const PACK_DEADLINE: Duration = Duration::from_secs(300);

const CONFIG: &str = "[repository.main]\nurl = '/srv/repository'\n\
                      [vm.off]\nimage = ['vda=/srv/off.qcow2']\nproject = 'shop'\n";

/// Every path, but of what is no part of the system: dpkg's own memory, logs, and what was brought.
const EVERYTHING: &str = "find / -xdev -path /srv -prune -o -path /tmp -prune -o -path /var/log \
                          -prune -o -path '/var/lib/dpkg*' -prune -o -print | sort";

/// Packages the command of these tests, as `cargo xtask deb` does.
fn package(version: &str, output: &Path) -> Result<PathBuf> {
    let icecore = Icecore::without_repository()?;
    let xtask = icecore.binary().with_file_name("xtask");
    if !xtask.exists() {
        return Err(Failure::new("no xtask beside the tests: run them by `cargo xtask test`"));
    }
    let mut command = Command::new(xtask);
    command.arg("deb").arg("--binary").arg(icecore.binary());
    command.args(["--package-version", version, "--output"]).arg(output);
    let said = run_within(&mut command, PACK_DEADLINE)?;
    if !said.status.success() {
        let why = String::from_utf8_lossy(&said.stderr);
        return Err(Failure::new(format!("no package of version {version}: {why}")));
    }
    Ok(String::from_utf8_lossy(&said.stdout).trim().into())
}

fn install(debian: &Debian, package: &Path) -> Result<()> {
    debian.put(package, "/srv/icecore.deb")?;
    debian.run(&["dpkg", "--force-unsafe-io", "-i", "/srv/icecore.deb"]).map(drop)
}

fn serve(debian: &Debian) -> Result<Background> {
    let daemon = debian.start(&["icecore", "serve"])?;
    wait_until("the daemon", DEADLINE, || {
        Ok(debian.run(&["icecore", "job", "list", "--daemon", "--json"]).is_ok())
    })?;
    Ok(daemon)
}

fn job(debian: &Debian, id: &str) -> Result<Value> {
    let said = debian.run(&["icecore", "job", "show", id, "--daemon", "--json"])?;
    Ok(serde_json::from_str(&said)?)
}

#[test]
#[ignore = "long: it needs a Debian that set-up makes, and packs the command twice"]
fn a_fresh_debian_takes_it_keeps_jobs_over_an_upgrade_and_is_clean_afterwards() -> Result<()> {
    let packages = Scratch::new()?;
    let (old, new) = (package("0.1.0", packages.path())?, package("0.1.1~test", packages.path())?);
    let debian = Debian::new()?;
    let before = debian.sh(EVERYTHING)?;
    install(&debian, &old)?;
    is_all_there(&debian)?;
    prepare(&debian)?;
    let mut daemon = serve(&debian)?;
    let backup = ["icecore", "backup", "off", "--repo", "main", "--daemon", "--detach"];
    let id = debian.run(&[&backup[..], &["--rate-limit", "2M/s"]].concat())?.trim().to_owned();
    wait_until("the copy", DEADLINE, || Ok(job(&debian, &id)?["progress"].is_object()))?;
    install(&debian, &new)?;
    let version = debian.run(&["dpkg-query", "-W", "-f", "${Version}", "icecore"])?;
    assert_eq!(version, "0.1.1~test");
    let now = job(&debian, &id)?;
    assert_eq!(now["state"], "running", "the upgrade is no reason to end: {now}");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait_within(DEADLINE)?.code(), Some(0));
    let mut daemon = serve(&debian)?;
    assert_eq!(job(&debian, &id)?["state"], "running", "adopted by the new one");
    debian.run(&["icecore", "job", "watch", &id, "--daemon"])?;
    debian.run(&["icecore", "check", "--repo", "main", "--read-data"])?;
    daemon.signal(Signal::TERM);
    daemon.wait_within(DEADLINE)?;
    debian.run(&["dpkg", "-r", "icecore"])?;
    debian.sh("test -e /etc/icecore/icecore.toml && test -d /var/lib/icecore/jobs")?;
    debian.sh("test ! -e /usr/bin/icecore && dpkg -P icecore < /dev/null")?;
    assert_eq!(debian.sh(EVERYTHING)?, before, "more, or less, than was there before");
    debian.sh("test -e /srv/repository/config && test ! -e /run/icecore").map(drop)
}

#[test]
#[ignore = "long: it boots a Debian that set-up makes"]
fn under_systemd_the_unit_starts_reloads_restarts_in_mid_job_and_is_watched() -> Result<()> {
    let packages = Scratch::new()?;
    let package = package("0.1.0", packages.path())?;
    let debian = Debian::boot()?;
    install(&debian, &package)?;
    let shown = |what: &str| {
        let said = debian.run(&["systemctl", "show", "-p", what, "--value", "icecore"])?;
        Ok::<_, Failure>(said.trim().to_owned())
    };
    assert_eq!(shown("ActiveState")?, "active", "started by its package, and it said READY");
    assert!(shown("StatusText")?.contains("0 jobs run"), "{}", shown("StatusText")?);
    prepare(&debian)?;
    debian.run(&["systemctl", "reload", "icecore"])?;
    // All of it within the unit's sandbox, and with a configuration that the reload has brought.
    let backup = ["icecore", "--daemon", "--detach", "backup", "off", "--repo", "main"];
    let id = wait_for_job(&debian, &[&backup[..], &["--rate-limit", "2M/s"]].concat())?;
    let first = shown("MainPID")?;
    debian.run(&["systemctl", "restart", "icecore"])?;
    assert_ne!(shown("MainPID")?, first);
    assert_eq!(job(&debian, &id)?["state"], "running", "adopted by the new one");
    debian.run(&["icecore", "job", "watch", &id, "--daemon"])?;
    debian.run(&["icecore", "check", "--repo", "main", "--read-data"])?;

    debian.sh("mkdir /etc/systemd/system/icecore.service.d
         printf '[Service]\\nWatchdogSec=2\\n' > /etc/systemd/system/icecore.service.d/test.conf
         systemctl daemon-reload
         systemctl restart icecore")?;
    let stuck = shown("MainPID")?;
    debian.sh(&format!("kill -STOP {stuck}"))?;
    wait_until("another daemon in place of one that hangs", DEADLINE, || {
        let now = shown("MainPID")?;
        Ok(now != stuck && now != "0" && shown("ActiveState")? == "active")
    })?;
    debian.run(&["systemctl", "stop", "icecore"])?;
    assert_eq!((&*shown("ActiveState")?, &*shown("Result")?), ("inactive", "success"));
    let journal = debian.run(&["journalctl", "--unit", "icecore", "--no-pager"])?;
    assert!(journal.contains("listening") && journal.contains("Watchdog timeout"), "{journal}");
    debian.sh("test ! -e /run/icecore/api.sock").map(drop)
}

/// A reload is read by the daemon a moment after systemd has sent its signal.
fn wait_for_job(debian: &Debian, words: &[&str]) -> Result<String> {
    let mut id = String::new();
    wait_until("a job that the daemon takes", DEADLINE, || {
        id = debian.run(words).unwrap_or_default().trim().to_owned();
        Ok(!id.is_empty())
    })?;
    wait_until("the copy", DEADLINE, || Ok(job(debian, &id)?["progress"].is_object()))?;
    Ok(id)
}

fn is_all_there(debian: &Debian) -> Result<()> {
    let version = debian.run(&["icecore", "--version"])?;
    assert!(version.starts_with("icecore "), "{version}");
    debian.run(&["icecore", "config", "check"])?;
    assert_eq!(debian.run(&["dpkg", "-V", "icecore"])?, "");
    let modes = debian.sh("stat -c %a /etc/icecore/private /var/lib/icecore /etc/icecore")?;
    assert_eq!(modes, "700\n711\n755\n");
    for path in [
        "/usr/share/man/man1/icecore.1.gz",
        "/usr/share/man/man1/icecore-backup.1.gz",
        "/usr/share/bash-completion/completions/icecore",
        "/usr/share/zsh/vendor-completions/_icecore",
        "/usr/share/fish/vendor_completions.d/icecore.fish",
        "/usr/share/doc/icecore/examples/icecore.toml",
        "/usr/share/doc/icecore/examples/monitoring/alerts.yml",
        "/etc/systemd/system/multi-user.target.wants/icecore.service",
    ] {
        debian.sh(&format!("test -s {path} || {{ echo {path} >&2; exit 1; }}"))?;
    }
    let example = "/usr/share/doc/icecore/examples/icecore.toml";
    debian.run(&["icecore", "config", "check", "--config", example]).map(drop)
}

/// A repository, a VM that is off, and the configuration that names both.
fn prepare(debian: &Debian) -> Result<()> {
    debian.sh(&format!("cat > /etc/icecore/conf.d/site.toml <<'E'\n{CONFIG}E\n"))?;
    debian.run(&["icecore", "repo", "init", "main"])?;
    debian.sh("qemu-img create -q -f qcow2 /srv/off.qcow2 64M
         for i in 1 2 3 4 5 6; do
           qemu-io -c \"write -q -P $i $((i * 4))M 4M\" /srv/off.qcow2
         done
         icecore quota set shop --points 10
         icecore config check")?;
    Ok(())
}
