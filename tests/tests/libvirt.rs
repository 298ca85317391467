//! Domains of a real libvirt: full and incremental points, faults in mid-backup, rollback, a domain
//! that is off, a new domain from a point, the hook.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use icecore_tests::{
    Domain, Icecore, Libvirt, MIB, Result, Run, Shell, compare, count, image_to_raw, of_disk,
    prove_backup, prove_point, reference_vdb, require_mode, text, wait_until, write_vdb,
};
use rustix::process::Signal;
use serde_json::Value;

/// What is undone after a kill takes seconds, also on a busy machine.
const UNDONE: Duration = Duration::from_secs(60);
/// A hook may keep a domain waiting for so long at most (its own deadline is 0.3 s, and processes
/// are started slowly on a busy machine).
const HOOK_MAX: Duration = Duration::from_secs(3);

/// Takes a point and proves it.
fn prove_next(icecore: &Icecore, domain: &Domain<'_>) -> Result<(Value, PathBuf)> {
    prove_backup(icecore, domain, domain.icecore(icecore, "backup"))
}

fn slow_backup(icecore: &Icecore, domain: &Domain<'_>) -> Run {
    domain.icecore(icecore, "backup").args(["--level", "full", "--rate-limit", "2M"])
}

fn wait_for_job(domain: &Domain<'_>) -> Result<()> {
    wait_until("the backup job", UNDONE, || Ok(domain.has_job()))
}

/// Nothing of ours is in the domain but one checkpoint, and the foreign one is.
fn require_clean(icecore: &Icecore, domain: &Domain<'_>, report: &Value) -> Result<()> {
    assert!(!domain.has_job());
    let checkpoints = domain.checkpoints()?;
    let ours: Vec<_> = checkpoints.iter().filter(|name| name.starts_with("icecore.")).collect();
    assert!(ours.len() == 1 && ours[0].ends_with(text(report, "point")?), "{checkpoints:?}");
    assert!(checkpoints.iter().any(|name| name == "foreign"), "{checkpoints:?}");
    let scratch = icecore.path("state").join("scratch");
    assert!(!scratch.exists() || std::fs::read_dir(scratch)?.next().is_none());
    Ok(())
}

#[test]
fn a_running_domain_keeps_its_chain_through_faults_rollback_and_power_off() -> Result<()> {
    let mut libvirt = Libvirt::start()?;
    let mut shell = libvirt.define("one")?.boot()?;
    libvirt.domain("one").virsh("checkpoint-create-as", &["--name", "foreign"])?;
    let icecore = Icecore::new()?;
    write_vdb(&mut shell, 0, 8)?;
    let (first, first_vdb) = prove_next(&icecore, &libvirt.domain("one"))?;
    assert_eq!(first["consistency"]["level"], "filesystem", "{first}");
    require_mode(&first, "vdb", "full")?;
    for at in [12, 40] {
        write_vdb(&mut shell, at, 2)?;
        let (next, _) = prove_next(&icecore, &libvirt.domain("one"))?;
        require_mode(&next, "vda", "incremental")?;
        require_mode(&next, "vdb", "incremental")?;
        let read = count(of_disk(&next, "vdb")?, "read_bytes")?;
        assert!((2 * MIB..4 * MIB).contains(&read), "{next}");
        require_clean(&icecore, &libvirt.domain("one"), &next)?;
    }
    a_worker_is_killed(&icecore, &libvirt, &mut shell)?;
    libvirt_is_killed(&icecore, &mut libvirt, &mut shell)?;
    scratch_has_a_limit(&icecore, &libvirt.domain("one"), &mut shell)?;
    rollback_and_off(&icecore, &libvirt.domain("one"), &first, &first_vdb)
}

/// The guest runs, is not frozen, and the next point is right.
fn a_worker_is_killed(icecore: &Icecore, libvirt: &Libvirt, shell: &mut Shell) -> Result<()> {
    let domain = libvirt.domain("one");
    let run = slow_backup(icecore, &domain).start()?;
    wait_for_job(&domain)?;
    run.signal(Signal::KILL);
    run.finish()?;
    wait_until("the end of the job", UNDONE, || Ok(!domain.has_job()))?;
    write_vdb(shell, 20, 1)?;
    let (next, _) = prove_next(icecore, &domain)?;
    require_mode(&next, "vdb", "incremental")?;
    require_clean(icecore, &domain, &next)
}

/// The domain does not notice, and neither does the backup.
fn libvirt_is_killed(icecore: &Icecore, libvirt: &mut Libvirt, shell: &mut Shell) -> Result<()> {
    write_vdb(shell, 24, 1)?;
    let raw = icecore.path("killed.raw");
    reference_vdb(&libvirt.domain("one"), &raw)?;
    let run = slow_backup(icecore, &libvirt.domain("one")).start()?;
    wait_for_job(&libvirt.domain("one"))?;
    std::thread::sleep(Duration::from_secs(1));
    libvirt.kill_daemon();
    std::thread::sleep(Duration::from_secs(2));
    libvirt.start_daemon()?;
    let ended = run.finish()?;
    if ended.status == Some(0) {
        prove_point(icecore, &ended.json()?, &raw)?;
    }
    let (next, _) = prove_next(icecore, &libvirt.domain("one"))?;
    require_clean(icecore, &libvirt.domain("one"), &next)
}

/// With less scratch than disk, the backup is given up and the guest goes on.
fn scratch_has_a_limit(icecore: &Icecore, domain: &Domain<'_>, shell: &mut Shell) -> Result<()> {
    let limit = ["--scratch-limit", "8M", "--disk", "vdb"];
    let run = slow_backup(icecore, domain).args(limit).start()?;
    wait_for_job(domain)?;
    write_vdb(shell, 0, 12)?;
    let ended = run.finish()?;
    assert_eq!(ended.status, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("scratch"), "{}", ended.stderr);
    assert_eq!(domain.state()?, "running");
    let (next, _) = prove_next(icecore, domain)?;
    require_clean(icecore, domain, &next)
}

fn rollback_and_off(
    icecore: &Icecore,
    domain: &Domain<'_>,
    first: &Value,
    first_vdb: &Path,
) -> Result<()> {
    let wanted = text(first, "point")?;
    let rolled = domain.icecore(icecore, "rollback").args(["--to", wanted]).json()?;
    assert_eq!(rolled["vm_restarted"], true, "{rolled}");
    assert_eq!(domain.state()?, "running");
    let mut shell = domain.wait_ready("one.sh")?;
    let now = icecore.path("now.raw");
    reference_vdb(domain, &now)?;
    compare(first_vdb, &now)?;
    write_vdb(&mut shell, 30, 1)?;
    let (next, _) = prove_next(icecore, domain)?;
    require_mode(&next, "vdb", "incremental")?;
    shell.send("clean-poweroff")?;
    wait_until("the guest's end", UNDONE, || Ok(domain.state()? == "shut off"))?;
    let (off, _) = prove_next(icecore, domain)?;
    require_mode(&off, "vdb", "incremental")?;
    assert_eq!(off["chain"], next["chain"]);
    let mut shell = domain.boot()?;
    write_vdb(&mut shell, 50, 1)?;
    let (again, _) = prove_next(icecore, domain)?;
    require_mode(&again, "vdb", "incremental")?;
    require_clean(icecore, domain, &again)
}

#[test]
fn a_new_domain_boots_and_the_hook_knows_it() -> Result<()> {
    let icecore = Icecore::new()?;
    let install = |dir: &Path| {
        icecore.command("hook").arg("install").arg("--dir").arg(dir).succeed().map(drop)
    };
    let libvirt = Libvirt::with_hook(install)?;
    let old = libvirt.define("old")?;
    let mut shell = old.boot()?;
    write_vdb(&mut shell, 3, 2)?;
    shell.run("ordered-writer stop")?;
    let (report, vdb) = prove_next(&icecore, &old)?;
    let dir = libvirt.path("made");
    let create = icecore.command("vm").args(["create", "--name", "new", "--json", "--from"]);
    let create = create.arg(text(&report, "point")?).arg("--repo").arg(icecore.repository());
    let made = create.arg("--libvirt").arg(libvirt.uri()).arg("--dir").arg(&dir).json()?;
    assert_eq!(made["defined"], true, "{made}");
    compare_image(&dir.join("new-vdb.qcow2"), &vdb, &icecore)?;
    let new = libvirt.domain("new");
    assert_ne!(new.virsh("domuuid", &[])?, old.virsh("domuuid", &[])?);
    new.virsh("start", &[])?;
    let id = new.virsh("domid", &[])?;
    let shell = format!("lib/qemu/channel/target/domain-{}-new/icecore.lab.shell", id.trim());
    let mut shell = new.wait_ready(&shell)?;
    shell.run("ordered-writer stop && check-writer /mnt/vda")?;
    new.virsh("destroy", &[])?;
    let listed = icecore.command("vm").args(["list", "--json"]).json()?;
    let of = |name: &str| listed.as_array().and_then(|all| all.iter().find(|vm| vm["vm"] == name));
    assert_eq!(of("old").map(|vm| &vm["libvirt"]["state"]), Some(&Value::from("running")));
    assert_eq!(of("new").map(|vm| &vm["libvirt"]["state"]), Some(&Value::from("released")));
    Ok(())
}

fn compare_image(image: &Path, raw: &Path, icecore: &Icecore) -> Result<()> {
    let copy = icecore.path("copy.raw");
    image_to_raw(image, "qcow2", &copy)?;
    compare(raw, &copy)
}

/// Whatever is wrong with our side, libvirt gets its answer, soon and well.
#[test]
fn the_hook_never_fails_and_never_waits() -> Result<()> {
    let icecore = Icecore::new()?;
    let dir = icecore.path("qemu.d");
    icecore.command("hook").arg("install").arg("--dir").arg(&dir).succeed()?;
    let script = dir.join("icecore");
    let words: [&[&str]; 3] = [&["vm", "start", "begin", "-"], &[], &["--help", "-", "--", "x"]];
    for words in words {
        // Its standard input stays open and silent: nothing to wait for.
        let mut command = std::process::Command::new(&script);
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        let mut child = command.spawn()?;
        let kept_open = child.stdin.take();
        assert!(child.wait()?.success());
        assert!(started.elapsed() < HOOK_MAX, "{words:?}: {:?}", started.elapsed());
        drop(kept_open);
    }
    // A state directory that is none.
    std::fs::remove_dir_all(icecore.path("state")).ok();
    std::fs::write(icecore.path("state"), "")?;
    let mut command = std::process::Command::new(&script);
    assert!(command.args(["vm", "start"]).stdin(Stdio::null()).status()?.success());
    Ok(())
}
