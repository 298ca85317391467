//! Where a point can be restored to, and what is refused as a target.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use icecore_tests::{
    Background, Disk, Icecore, MIB, Outcome, Reference, Result, TestVm, VmSpec, create_qcow2,
    create_raw, image_to_raw, run, text, wait_until,
};

struct Taken {
    vm: TestVm,
    icecore: Icecore,
    reference: Reference,
    point: String,
}

fn taken() -> Result<Taken> {
    let vm = VmSpec::new("source").no_guest().disk(Disk::new("d0", 24 * MIB + 512)).start()?;
    vm.fill("d0", 3, 5 * MIB + 100, 3 * MIB)?;
    vm.fill("d0", 4, 24 * MIB, 512)?;
    let icecore = Icecore::new()?;
    let (report, reference) = icecore.backup_quietly(&vm, |run| run)?;
    let point = text(&report, "point")?.to_owned();
    Ok(Taken { vm, icecore, reference, point })
}

impl Taken {
    fn restore(&self, target: impl AsRef<std::ffi::OsStr>, more: &[&str]) -> Result<Outcome> {
        let run = self.icecore.on_repository("restore").arg(&self.point).args(["--disk", "d0"]);
        run.arg("--to").arg(target).args(more).outcome()
    }

    fn restored(&self, target: impl AsRef<std::ffi::OsStr>, more: &[&str]) -> Result<()> {
        let outcome = self.restore(target, more)?;
        assert_eq!(outcome.status, Some(0), "{outcome:?}");
        Ok(())
    }
}

#[test]
fn files_in_both_formats_over_what_was_there_only_by_force() -> Result<()> {
    let taken = taken()?;
    let raw = taken.icecore.path("one.raw");
    taken.restored(&raw, &[])?;
    taken.reference.compare("d0", &raw)?;
    let refused = taken.restore(&raw, &[])?;
    assert!(matches!(refused.status, Some(1 | 3)), "{refused:?}");
    std::fs::write(&raw, vec![0xee; 30 << 20])?;
    taken.restored(&raw, &["--force"])?;
    taken.reference.compare("d0", &raw)?;
    let qcow2 = taken.icecore.path("one.qcow2");
    taken.restored(&qcow2, &["--format", "qcow2"])?;
    let back = taken.icecore.path("back.raw");
    image_to_raw(&qcow2, "qcow2", &back)?;
    taken.reference.compare("d0", &back)
}

#[test]
fn an_nbd_server_that_holds_rubbish() -> Result<()> {
    let taken = taken()?;
    let image = taken.icecore.path("served.raw");
    std::fs::write(&image, vec![0xee; 24 * MIB as usize + 512])?;
    let socket = taken.icecore.path("nbd.sock");
    // One client at a time is its default, and it does not wait for a second one.
    let mut serve = Command::new("qemu-nbd");
    serve
        .args(["--persistent", "-f", "raw", "-x", "disk", "--discard=unmap", "-k"])
        .arg(&socket)
        .arg(&image);
    let _server = Background::spawn(&mut serve)?;
    wait_until("qemu-nbd", std::time::Duration::from_secs(5), || Ok(socket.exists()))?;
    taken.restored(format!("nbd+unix:///disk?socket={}", socket.display()), &[])?;
    taken.reference.compare("d0", &image)
}

/// A loop device, detached when dropped.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Result<Self> {
        let output = run(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").args(["--detach", &self.0]));
    }
}

#[test]
fn a_block_device_that_holds_rubbish() -> Result<()> {
    let taken = taken()?;
    let image = taken.icecore.path("device.raw");
    std::fs::write(&image, vec![0xee; 24 * MIB as usize + 512])?;
    let device = Loop::over(&image)?;
    taken.restored(&device.0, &["--force"])?;
    run(Command::new("sync").arg(&device.0))?;
    taken.reference.compare("d0", &image)
}

#[test]
fn a_device_that_is_too_small_a_symlink_and_an_image_in_use_are_refused() -> Result<()> {
    let taken = taken()?;
    let small = taken.icecore.path("small.raw");
    create_raw(&small, 8 * MIB)?;
    let device = Loop::over(&small)?;
    let outcome = taken.restore(&device.0, &["--force"])?;
    assert!(matches!(outcome.status, Some(1 | 3)), "{outcome:?}");

    let (link, target) = (taken.icecore.path("link.raw"), taken.icecore.path("target.raw"));
    create_raw(&target, MIB)?;
    symlink(&target, &link)?;
    let outcome = taken.restore(&link, &["--force"])?;
    assert!(matches!(outcome.status, Some(1..=3)), "{outcome:?}");
    assert_eq!(std::fs::metadata(&target)?.len(), MIB);

    let in_use = taken.vm.image("d0")?;
    let outcome = taken.restore(&in_use, &["--force", "--format", "qcow2"])?;
    assert!(matches!(outcome.status, Some(1 | 3)), "{outcome:?}");
    taken.vm.reference()?.same_as(&taken.reference)
}

#[test]
fn an_export_serves_the_point_to_any_nbd_client() -> Result<()> {
    let taken = taken()?;
    let socket = taken.icecore.path("export.sock");
    let export = taken.icecore.command("export").arg(&taken.point).arg("--repo");
    let export = export.arg(taken.icecore.repository()).args(["--disk", "d0", "--socket"]);
    let server = export.arg(&socket).start()?;
    wait_until("the export", std::time::Duration::from_secs(10), || Ok(socket.exists()))?;
    let copy = taken.icecore.path("copy.raw");
    let uri = format!("nbd+unix:///d0?socket={}", socket.display());
    run(Command::new("nbdcopy").arg(&uri).arg(&copy))?;
    taken.reference.compare("d0", &copy)?;
    server.signal(rustix::process::Signal::INT);
    assert!(matches!(server.finish()?.status, Some(0 | 130)));
    Ok(())
}

#[test]
fn a_qcow2_target_that_exists_with_a_backing_file_is_not_written_through() -> Result<()> {
    let taken = taken()?;
    let target = taken.icecore.path("there.qcow2");
    create_qcow2(&target, 4 * MIB)?;
    taken.restored(&target, &["--force", "--format", "qcow2"])?;
    let back = taken.icecore.path("back.raw");
    image_to_raw(&target, "qcow2", &back)?;
    taken.reference.compare("d0", &back)
}

#[test]
fn a_target_that_fills_up_or_fails_ends_the_restore_and_looks_unfinished() -> Result<()> {
    let taken = taken()?;
    let small = taken.icecore.path("small");
    std::fs::create_dir_all(&small)?;
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&small))?;
    let raw = taken.restore(small.join("d0.raw"), &[]);
    let qcow2 = taken.restore(small.join("d0.qcow2"), &[]);
    let left = std::fs::read_dir(&small)?.count();
    run(Command::new("umount").arg(&small))?;
    for outcome in [raw?, qcow2?] {
        assert_eq!(outcome.status, Some(1), "{outcome:?}");
        assert!(outcome.stderr.to_lowercase().contains("space"), "{}", outcome.stderr);
    }
    assert_eq!(left, 0, "nothing is left behind");

    let socket = taken.icecore.path("failing.sock");
    let mut serve = Command::new("nbdkit");
    serve.args(["--foreground", "--filter=error", "--unix"]).arg(&socket);
    serve.args(["memory", "25M", "error-pwrite=EIO", "error-pwrite-rate=100%"]);
    let _server = Background::spawn(&mut serve)?;
    wait_until("nbdkit", std::time::Duration::from_secs(5), || Ok(socket.exists()))?;
    let outcome = taken.restore(format!("nbd+unix:///?socket={}", socket.display()), &[])?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    let said = outcome.stderr.contains("wiped");
    assert!(said, "it says what became of the target: {}", outcome.stderr);
    Ok(())
}
