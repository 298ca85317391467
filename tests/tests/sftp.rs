//! Repositories on an SFTP server: a real sshd, and what it, its disk and ssh refuse.

use std::path::PathBuf;
use std::process::Command;

use icecore_tests::{Icecore, Result, SshServer, VmSpec, acceptance, run};

#[test]
fn an_sftp_server_is_accepted() -> Result<()> {
    acceptance(&SshServer::start()?.site("accepted"))
}

#[test]
fn a_repository_lives_on_an_sftp_server() -> Result<()> {
    let server = SshServer::start()?;
    let icecore = Icecore::at(&server.site("repo"))?;
    let vm = VmSpec::start_noisy("sftp")?;
    let [first, third] = icecore.live_through_a_kill(&vm)?;
    // The server's host dies in the middle of a copy. Its name says what happened; the next run
    // finds a server again.
    let cut_off = icecore.start_noisy_backup(&vm, 3)?;
    server.kill_sessions();
    let outcome = cut_off.finish()?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("sftp://"), "{outcome:?}");
    vm.require_no_trace()?;
    icecore.prove_next_point(&vm)?;
    assert_eq!(icecore.points()?.len(), 4);
    icecore.collect_after_a_kill(&first)?;
    icecore.restore_all(&third, &icecore.path("third"))?;
    let again = icecore.word_on_repository("repo", "init").outcome()?;
    assert_eq!(again.status, Some(3), "{again:?}");
    Ok(())
}

#[test]
fn what_ssh_and_its_server_refuse_is_said() -> Result<()> {
    let mut server = SshServer::start()?;
    let icecore = Icecore::at(&server.site("repo"))?;
    let info = |status| icecore.word_on_repository("repo", "info").expect(status);
    info(0)?;
    // Without what it takes to create objects a server is good for reading.
    for sftp_server in ["internal-sftp -P hardlink", "internal-sftp -R"] {
        server.restart(sftp_server)?;
        info(0)?;
        let other = server.address("other");
        let without = icecore.command("repo").args(["init", &other]).expect(1)?;
        assert!(without.stderr.contains("hardlink@openssh.com"), "{without:?}");
        assert!(!server.served().join("other").exists());
    }
    server.restart("internal-sftp")?;
    let nothing = icecore.command("repo").args(["info", &server.address("none")]).expect(2)?;
    assert!(nothing.stderr.contains("no Icecore repository"), "{nothing:?}");
    // As NAS boxes have them: the path that everybody knows is a link.
    std::os::unix::fs::symlink(server.served().join("repo"), server.served().join("link"))?;
    icecore.command("repo").args(["info", &server.address("link")]).succeed()?;
    server.forget_user()?;
    let refused = info(1)?;
    assert!(refused.stderr.contains("does not let this user in"), "{refused:?}");
    server.forge_known_host()?;
    let forged = info(1)?;
    assert!(forged.stderr.contains("host key"), "{forged:?}");
    server.kill();
    let gone = info(1)?;
    assert!(gone.stderr.contains("refused"), "{gone:?}");
    Ok(())
}

/// A file system of so many MiB in a server's folder.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: PathBuf, size: &str) -> Result<Self> {
        let mut mount = Command::new("mount");
        run(mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&path))?;
        Ok(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server may still be in it.
        let _ = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

#[test]
fn a_full_disk_behind_sftp_is_said_and_nothing_is_committed() -> Result<()> {
    let server = SshServer::start()?;
    let _disk = SmallDisk::mount(server.served(), "10m")?;
    let icecore = Icecore::at(&server.site("repo"))?;
    let vm = VmSpec::start_noisy("full")?;
    let outcome = icecore.backup(&vm).outcome()?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("No space left"), "{outcome:?}");
    assert!(outcome.stderr.contains("free space"), "{outcome:?}");
    vm.require_no_trace()?;
    assert!(icecore.points()?.is_empty());
    icecore.on_repository("gc").succeed()?;
    vm.drop_noise()?;
    icecore.prove_next_point(&vm).map(drop)
}
