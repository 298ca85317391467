//! Domains of a real libvirt, captured as a bare QEMU is, through libvirt's monitor passthrough.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use icecore_tests::{
    AGENT_CHANNEL, Domain, Icecore, Libvirt, MIB, Qemu, Result, Run, Shell, Started, count,
    of_disk, prove_backup, require_mode, wait_until, write_vdb,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// What is undone after a kill takes seconds, also on a busy machine.
const UNDONE: Duration = Duration::from_secs(60);
/// Begins the names of all that is ours in a QEMU.
const OURS: &str = "ic-";

fn direct(icecore: &Icecore, domain: &Domain<'_>, subcommand: &str) -> Run {
    domain.icecore(icecore, subcommand).args(["--capture", "direct"])
}

fn prove_next(icecore: &Icecore, domain: &Domain<'_>) -> Result<(Value, PathBuf)> {
    prove_backup(icecore, domain, direct(icecore, domain, "backup"))
}

fn start_slowly(icecore: &Icecore, domain: &Domain<'_>) -> Result<Started> {
    let slow = ["--level", "full", "--rate-limit", "2M"];
    let run = direct(icecore, domain, "backup").args(slow).start()?;
    wait_until("the exports", UNDONE, || Ok(exports(domain)? > 0))?;
    Ok(run)
}

fn exports(domain: &Domain<'_>) -> Result<usize> {
    let answer = domain.qmp(r#"{"execute":"query-block-exports"}"#)?;
    Ok(answer["return"].as_array().map_or(0, Vec::len))
}

/// Nodes of ours in the domain's QEMU.
fn nodes(domain: &Domain<'_>) -> Result<Vec<String>> {
    let answer =
        domain.qmp(r#"{"execute":"query-named-block-nodes","arguments":{"flat":true}}"#)?;
    let all = answer["return"].as_array().cloned().unwrap_or_default().into_iter();
    let names = all.filter_map(|node| node["node-name"].as_str().map(str::to_owned));
    Ok(names.filter(|name| name.starts_with(OURS)).collect())
}

/// The graph is out, the guest runs and writes, and libvirt's own things are as they were.
fn require_clean(domain: &Domain<'_>, shell: &mut Shell) -> Result<()> {
    wait_until("the end of the graph", UNDONE, || {
        Ok(exports(domain)? == 0 && nodes(domain)?.is_empty())
    })?;
    assert_eq!(domain.state()?, "running");
    assert_eq!(domain.checkpoints()?, ["foreign"]);
    shell.run("touch /mnt/vda/alive && sync")?;
    Ok(())
}

#[test]
fn a_domain_is_captured_through_libvirts_monitor() -> Result<()> {
    let libvirt = Libvirt::start()?;
    let domain = libvirt.define("one")?;
    let mut shell = domain.boot()?;
    domain.virsh("checkpoint-create-as", &["--name", "foreign"])?;
    let icecore = Icecore::new()?;
    write_vdb(&mut shell, 0, 8)?;
    let (first, _) = prove_next(&icecore, &domain)?;
    assert_eq!(first["consistency"]["level"], "filesystem", "{first}");
    require_mode(&first, "vda", "full")?;
    require_clean(&domain, &mut shell)?;
    the_bitmaps_are_shown(&icecore, &libvirt)?;
    the_daemon_takes_it_from_its_configuration(&icecore, &libvirt)?;
    require_clean(&domain, &mut shell)?;
    write_vdb(&mut shell, 12, 2)?;
    let (next, _) = prove_next(&icecore, &domain)?;
    require_mode(&next, "vda", "incremental")?;
    require_mode(&next, "vdb", "incremental")?;
    let read = count(of_disk(&next, "vdb")?, "read_bytes")?;
    assert!((2 * MIB..4 * MIB).contains(&read), "{next}");
    require_clean(&domain, &mut shell)?;
    a_worker_is_killed(&icecore, &domain, &mut shell)?;
    all_of_ours_are_killed(&icecore, &domain, &mut shell)?;
    others_come_first(&icecore, &libvirt, &domain, &mut shell)?;
    let mut shell = off_and_back(&icecore, &domain, shell)?;
    a_job_that_begins_ends_the_backup(&icecore, &libvirt, &domain, &mut shell)
}

fn the_bitmaps_are_shown(icecore: &Icecore, libvirt: &Libvirt) -> Result<()> {
    let show = icecore.command("vm").args(["show", "--json", "--capture", "direct", "--libvirt"]);
    let shown = show.arg(libvirt.uri()).arg("one").json()?;
    for disk in shown["disks"].as_array().into_iter().flatten() {
        assert_eq!(disk["bitmaps"][0]["health"], "ok", "{shown}");
    }
    assert_eq!(shown["disks"].as_array().map(Vec::len), Some(2), "{shown}");
    Ok(())
}

fn the_daemon_takes_it_from_its_configuration(icecore: &Icecore, libvirt: &Libvirt) -> Result<()> {
    let uri = libvirt.uri();
    let more =
        format!("[libvirt]\nuri = '{uri}'\ninclude = ['one']\n[vm.one]\ncapture = 'direct'\n");
    let daemon = icecore.serve(&[], &more)?;
    let point = icecore.through(&daemon, "backup").args(["--repo", "main", "one"]).json()?;
    // Its own bitmap is what it goes on from: libvirt's form would read all of it.
    require_mode(&point, "vda", "incremental")?;
    require_mode(&point, "vdb", "incremental")
}

/// libvirt's own form would end such a QEMU, and is refused.
#[test]
fn a_disk_in_an_iothread_of_an_old_qemu_is_pushed() -> Result<()> {
    let libvirt = Libvirt::start()?;
    let emulator = old_qemu(&libvirt.path("qemu"))?;
    let edit = |xml: String| {
        xml.replace("/usr/bin/qemu-system-x86_64", &emulator)
            .replace("</vcpu>", "</vcpu><iothreads>1</iothreads>")
            .replace("type='qcow2'/>", "type='qcow2' iothread='1'/>")
    };
    let domain = libvirt.define_edited("old", AGENT_CHANNEL, edit)?;
    let mut shell = domain.boot()?;
    let icecore = Icecore::new()?;
    write_vdb(&mut shell, 0, 8)?;
    let refused = domain.icecore(&icecore, "backup").outcome()?;
    assert!(refused.status != Some(0) && refused.stderr.contains("iothread"), "{refused:?}");
    let (first, _) = prove_next(&icecore, &domain)?;
    assert_eq!(first["consistency"]["level"], "filesystem", "{first}");
    write_vdb(&mut shell, 12, 2)?;
    let (next, _) = prove_next(&icecore, &domain)?;
    require_mode(&next, "vdb", "incremental")?;
    assert!(nodes(&domain)?.is_empty());
    shell.run("touch /mnt/vda/alive && sync").map(drop)
}

/// A program at `path` that is QEMU 7.2.
fn old_qemu(path: &Path) -> Result<String> {
    let command = Qemu::V7_2.command()?;
    let text = |text: &OsStr| format!("'{}'", text.to_string_lossy());
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={}", name.to_string_lossy(), text(value?))));
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(text);
    let line: Vec<String> = variables.chain(words).collect();
    std::fs::write(path, format!("#!/bin/sh\nexec env {} \"$@\"\n", line.join(" ")))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o755))?;
    Ok(path.to_string_lossy().into_owned())
}

/// The guardian takes the graph out.
fn a_worker_is_killed(icecore: &Icecore, domain: &Domain<'_>, shell: &mut Shell) -> Result<()> {
    let run = start_slowly(icecore, domain)?;
    run.signal(Signal::KILL);
    run.finish()?;
    require_clean(domain, shell)?;
    write_vdb(shell, 20, 1)?;
    let (next, _) = prove_next(icecore, domain)?;
    require_mode(&next, "vdb", "incremental")
}

/// Nobody is left to undo anything: `doctor` does.
fn all_of_ours_are_killed(icecore: &Icecore, domain: &Domain<'_>, shell: &mut Shell) -> Result<()> {
    let run = start_slowly(icecore, domain)?;
    let children = format!("/proc/{0}/task/{0}/children", run.pid());
    for guardian in std::fs::read_to_string(children)?.split_whitespace() {
        if let Some(pid) = guardian.parse().ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::KILL).map_err(std::io::Error::from)?;
        }
    }
    run.signal(Signal::KILL);
    run.finish()?;
    assert!(!nodes(domain)?.is_empty(), "nothing was left to be repaired");
    let doctor = direct(icecore, domain, "doctor");
    doctor.arg("--repair").succeed()?;
    require_clean(domain, shell)?;
    let (next, _) = prove_next(icecore, domain)?;
    require_mode(&next, "vdb", "incremental")
}

/// A block job of libvirt's is waited for, and a copy does not begin meanwhile. A save that comes to
/// its end meanwhile fails in QEMU and the guest goes on; one that takes longer ends the backup.
fn others_come_first(
    icecore: &Icecore,
    libvirt: &Libvirt,
    domain: &Domain<'_>,
    shell: &mut Shell,
) -> Result<()> {
    let copy = libvirt.path("copy.qcow2").to_string_lossy().into_owned();
    let begin = ["--path", "vdb", "--dest", &copy, "--transient-job", "--bandwidth", "1"];
    let run = start_slowly(icecore, domain)?;
    let refused =
        domain.virsh("blockcopy", &begin).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(refused.contains("root block node"), "{refused}");
    let saved = domain.virsh("managedsave", &[]);
    let ended = run.finish()?;
    let given_up = ended.status == Some(1) && ended.stderr.contains("job on the domain: save");
    assert!(given_up || (saved.is_err() && ended.status == Some(0)), "{saved:?} {ended:?}");
    if saved.is_ok() {
        *shell = domain.boot()?;
    }
    require_clean(domain, shell)?;
    domain.virsh("blockcopy", &begin)?;
    let refused = direct(icecore, domain, "backup").expect(3)?;
    assert!(refused.stderr.contains("mirror"), "{}", refused.stderr);
    domain.virsh("blockjob", &["--path", "vdb", "--abort"])?;
    write_vdb(shell, 28, 1)?;
    let (next, _) = prove_next(icecore, domain)?;
    require_mode(&next, "vdb", "incremental")?;
    require_clean(domain, shell)
}

/// The bitmaps go on while the domain is off, and after a rollback.
fn off_and_back(icecore: &Icecore, domain: &Domain<'_>, mut shell: Shell) -> Result<Shell> {
    shell.send("clean-poweroff")?;
    wait_until("the guest's end", UNDONE, || Ok(domain.state()? == "shut off"))?;
    let (off, vdb) = prove_next(icecore, domain)?;
    require_mode(&off, "vdb", "incremental")?;
    let mut shell = domain.boot()?;
    write_vdb(&mut shell, 32, 1)?;
    let (on, _) = prove_next(icecore, domain)?;
    require_mode(&on, "vdb", "incremental")?;
    assert_eq!(on["chain"], off["chain"]);
    let wanted = icecore_tests::text(&off, "point")?;
    direct(icecore, domain, "rollback").args(["--to", wanted]).json()?;
    let mut shell = domain.wait_ready("one.sh")?;
    let now = icecore.path("now.raw");
    icecore_tests::reference_vdb(domain, &now)?;
    icecore_tests::compare(&vdb, &now)?;
    let (last, _) = prove_next(icecore, domain)?;
    require_mode(&last, "vdb", "incremental")?;
    require_clean(domain, &mut shell)?;
    Ok(shell)
}

/// Into an external snapshot, which is no job: it is made under the filter.
fn a_job_that_begins_ends_the_backup(
    icecore: &Icecore,
    libvirt: &Libvirt,
    domain: &Domain<'_>,
    shell: &mut Shell,
) -> Result<()> {
    let run = start_slowly(icecore, domain)?;
    let overlay = format!("vdb,file={}", libvirt.path("overlay.qcow2").display());
    let snapshot = ["--disk-only", "--no-metadata", "--diskspec", "vda,snapshot=no", "--diskspec"];
    domain.virsh("snapshot-create-as", &[&snapshot[..], &[&overlay]].concat())?;
    domain.virsh("blockpull", &["--path", "vdb", "--bandwidth", "1"])?;
    let ended = run.finish()?;
    assert_eq!(ended.status, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("another job") && ended.stderr.contains("stream"), "{ended:?}");
    require_clean(domain, shell)
}
