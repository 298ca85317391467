//! A domain of a real libvirt without a guest agent: what its points say of that, and its rollback
//! cut off in the middle.

use std::path::Path;
use std::time::Duration;

use icecore_tests::{
    Domain, Icecore, Libvirt, Result, Run, compare, prove_backup, reference_vdb, text, wait_until,
    write_vdb,
};
use rustix::process::Signal;

/// What is undone after a kill takes seconds, also on a busy machine.
const UNDONE: Duration = Duration::from_secs(60);
/// A rollback of whole disks has begun to write by then.
const WRITES: Duration = Duration::from_secs(120);

fn rollback(icecore: &Icecore, domain: &Domain<'_>, point: &str) -> Run {
    domain.icecore(icecore, "rollback").args(["--to", point])
}

#[test]
fn without_an_agent_a_point_says_so_and_a_half_rolled_back_domain_does_not_start() -> Result<()> {
    let icecore = Icecore::new()?;
    let install = |dir: &Path| {
        icecore.command("hook").arg("install").arg("--dir").arg(dir).succeed().map(drop)
    };
    let mut libvirt = Libvirt::with_hook(install)?;
    let domain = libvirt.define_without_agent("mute")?;
    domain.virsh("start", &[])?;
    let mut shell = domain.wait_shell("mute.sh")?;
    write_vdb(&mut shell, 0, 48)?;
    let (first, first_vdb) = prove_backup(&icecore, &domain, domain.icecore(&icecore, "backup"))?;
    let wanted = text(&first, "point")?.to_owned();
    a_point_says_that_nothing_was_frozen(&icecore, &libvirt)?;
    write_vdb(&mut shell, 0, 48)?;
    let mark = icecore.path("state").join("half-written/mute.why");
    cut_off(&icecore, &domain, &wanted, &mark)?;
    nothing_starts_it(&icecore, &mut libvirt)?;
    let domain = libvirt.domain("mute");
    let rolled = rollback(&icecore, &domain, &wanted).json()?;
    // It ran when the first rollback began.
    assert_eq!(rolled["vm_restarted"], true, "{rolled}");
    assert!(!mark.exists());
    domain.wait_shell("mute.sh")?;
    let now = icecore.path("now.raw");
    reference_vdb(&domain, &now)?;
    compare(&first_vdb, &now)
}

/// In JSON, to people, and as a failure where a freeze is asked for; in both forms.
fn a_point_says_that_nothing_was_frozen(icecore: &Icecore, libvirt: &Libvirt) -> Result<()> {
    let domain = libvirt.domain("mute");
    for form in ["job", "direct"] {
        let backup = || domain.icecore(icecore, "backup").args(["--capture", form]);
        let report = backup().json()?;
        let consistency = &report["consistency"];
        assert_eq!(consistency["level"], "crash", "{report}");
        assert_eq!(consistency["frozen_filesystems"], 0, "{report}");
        assert_eq!(text(consistency, "why")?, "the domain has no channel for a guest agent");
        let for_people = icecore.command("backup").arg("--repo").arg(icecore.repository());
        let for_people = for_people.arg("--libvirt").arg(libvirt.uri()).arg("mute");
        let said = for_people.args(["--capture", form]).succeed()?.stdout;
        assert!(said.contains("crash-consistent"), "{said}");
        assert!(said.contains("not frozen: the domain has no channel"), "{said}");
        let refused = backup().args(["--consistency", "filesystem"]).expect(1)?;
        assert!(refused.stderr.contains("no channel for a guest agent"), "{}", refused.stderr);
    }
    assert_eq!(domain.state()?, "running");
    Ok(())
}

/// The rollback is killed when it has begun to write.
fn cut_off(icecore: &Icecore, domain: &Domain<'_>, point: &str, mark: &Path) -> Result<()> {
    let run = rollback(icecore, domain, point).start()?;
    wait_until("the first write", WRITES, || Ok(mark.exists()))?;
    run.signal(Signal::KILL);
    run.finish()?;
    assert!(mark.exists(), "the rollback ended before it was killed");
    assert_eq!(domain.state()?, "shut off");
    Ok(())
}

/// Not by hand, not by libvirt itself at its start, and no point is taken of it.
fn nothing_starts_it(icecore: &Icecore, libvirt: &mut Libvirt) -> Result<()> {
    let refused =
        libvirt.domain("mute").virsh("start", &[]).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(refused.contains("the rollback of mute to point"), "{refused}");
    libvirt.domain("mute").virsh("autostart", &[])?;
    libvirt.kill_daemon();
    // As after a boot of the host.
    std::fs::remove_file(libvirt.path("run/libvirt/qemu/autostarted")).ok();
    libvirt.start_daemon()?;
    let domain = libvirt.domain("mute");
    let log = libvirt.path("run/libvirt/qemu/autostarted");
    wait_until("the autostart", UNDONE, || Ok(log.exists()))?;
    let doctor = domain.icecore(icecore, "doctor").arg("--repair").expect(4)?;
    assert!(doctor.stdout.contains("half-written"), "{}", doctor.stdout);
    let backup = domain.icecore(icecore, "backup").expect(3)?;
    assert!(backup.stderr.contains("half-written"), "{}", backup.stderr);
    assert_eq!(domain.state()?, "shut off");
    Ok(())
}
