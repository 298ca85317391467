//! What is asked wrongly gets the documented status and a message that helps.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;

use icecore_tests::{Disk, Icecore, MIB, Monitor, Outcome, Result, Run, TestVm, VmSpec, run, text};

fn bare_vm() -> Result<TestVm> {
    let vm = VmSpec::new("bare").no_guest().disk(Disk::new("d0", 8 * MIB)).start()?;
    vm.fill("d0", 1, 0, MIB)?;
    Ok(vm)
}

/// The status is one of these, and the message names what it is about.
fn complains(run: Run, statuses: &[i32], about: &str) -> Result<Outcome> {
    let outcome = run.outcome()?;
    let status = outcome.status.unwrap_or(-1);
    assert!(statuses.contains(&status), "wanted one of {statuses:?}: {outcome:?}");
    assert!(outcome.stderr.contains(about), "no word of {about}: {}", outcome.stderr);
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    Ok(outcome)
}

fn backup_of(icecore: &Icecore, socket: &Path) -> Run {
    icecore.on_repository("backup").args(["--name", "vm", "--qmp"]).arg(socket)
}

#[test]
fn no_such_socket() -> Result<()> {
    let icecore = Icecore::new()?;
    complains(backup_of(&icecore, Path::new("/nonexistent/qmp")), &[1], "/nonexistent/qmp")
        .map(drop)
}

#[test]
fn a_socket_that_is_not_qmp() -> Result<()> {
    let icecore = Icecore::new()?;
    let socket = icecore.path("http.sock");
    let listener = UnixListener::bind(&socket)?;
    // For whoever comes, until the test's process ends.
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    complains(backup_of(&icecore, &socket), &[1], "http.sock").map(drop)
}

#[test]
fn another_client_holds_the_monitor() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    let _holder = Monitor::connect(&vm.qmp())?;
    complains(icecore.backup(&vm), &[1, 3], "client").map(drop)
}

#[test]
fn an_unknown_disk_is_wrong_usage_and_the_known_ones_are_named() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    let outcome = complains(icecore.backup(&vm).args(["--disk", "nope"]), &[2], "nope")?;
    assert!(outcome.stderr.contains("d0"), "{}", outcome.stderr);
    vm.require_no_trace()
}

#[test]
fn an_incremental_without_a_chain_is_refused() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    complains(icecore.backup(&vm).args(["--level", "incremental"]), &[3], "chain").map(drop)
}

#[test]
fn a_folder_that_is_no_repository() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::without_repository()?;
    complains(icecore.backup(&vm), &[1, 2], "repository")?;
    std::fs::create_dir_all(icecore.repository())?;
    std::fs::write(icecore.repository().join("holiday.jpg"), b"not a repository")?;
    complains(icecore.backup(&vm), &[1, 2], "repository")?;
    let init = icecore.command("repo").arg("init").arg(icecore.repository());
    complains(init, &[1, 3], "repository").map(drop)
}

#[test]
fn an_init_over_a_repository_is_refused() -> Result<()> {
    let icecore = Icecore::new()?;
    let init = icecore.command("repo").arg("init").arg(icecore.repository());
    complains(init, &[1, 3], "repository").map(drop)
}

#[test]
fn an_unknown_point_is_named() -> Result<()> {
    let icecore = Icecore::new()?;
    let run = icecore.on_repository("restore").args(["nosuchpoint", "--to", "/nonexistent/x"]);
    complains(run, &[1, 2], "nosuchpoint").map(drop)
}

#[test]
fn names_that_are_not_names() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::new()?;
    for name in ["", "..", "a/b", "a\u{7}b"] {
        let run =
            icecore.on_repository("backup").arg("--qmp").arg(vm.qmp()).arg("--name").arg(name);
        complains(run, &[2], "name")?;
    }
    Ok(())
}

/// A small file system of its own, so that it can be full.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(dir: &Path, options: &str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut mount = std::process::Command::new("mount");
        run(mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir))?;
        Ok(Self(dir.to_path_buf()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = run(std::process::Command::new("umount").arg("-l").arg(&self.0));
    }
}

#[test]
fn a_full_repository_disk_fails_the_backup_and_the_next_one_works() -> Result<()> {
    let icecore = Icecore::without_repository()?;
    let _disk = SmallDisk::mount(icecore.repository(), "size=3m")?;
    icecore.command("repo").arg("init").arg(icecore.repository()).succeed()?;
    let random = icecore.path("random.raw");
    run(std::process::Command::new("sh")
        .args(["-c", "head -c 8M /dev/urandom > \"$1\"", "sh"])
        .arg(&random))?;
    let image = |run: Run, file: &Path| {
        run.args(["--name", "vm", "--image"]).arg(format!("d0={}", file.display()))
    };
    complains(image(icecore.on_repository("backup"), &random), &[1], "space")?;
    let list = icecore.command("point").arg("list").arg("--repo").arg(icecore.repository());
    let points = list.arg("--json").json()?;
    let available = points.as_array().into_iter().flatten().filter(|p| p["status"] == "available");
    assert_eq!(available.count(), 0, "{points}");
    icecore.on_repository("gc").succeed()?;
    let small = icecore.path("small.raw");
    std::fs::write(&small, vec![5; 1 << 20])?;
    let report = image(icecore.on_repository("backup"), &small).json()?;
    assert!(!text(&report, "point")?.is_empty());
    icecore.check().map(drop)
}

#[test]
fn a_read_only_repository() -> Result<()> {
    let vm = bare_vm()?;
    let icecore = Icecore::without_repository()?;
    let disk = SmallDisk::mount(icecore.repository(), "size=20m")?;
    icecore.command("repo").arg("init").arg(icecore.repository()).succeed()?;
    icecore.backup(&vm).succeed()?;
    let mut remount = std::process::Command::new("mount");
    run(remount.args(["-o", "remount,ro"]).arg(&disk.0))?;
    complains(icecore.backup(&vm), &[1, 3], "ead-only")?;
    // What only reads still works.
    icecore.restore_all("latest", &icecore.path("restored"))?;
    icecore.check()?;
    vm.require_no_trace()
}

#[test]
fn wrong_flags_are_wrong_usage() -> Result<()> {
    let icecore = Icecore::new()?;
    complains(icecore.on_repository("backup").arg("--no-such-flag"), &[2], "--no-such-flag")?;
    complains(icecore.on_repository("backup"), &[2], "").map(drop)
}
