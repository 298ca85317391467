//! Repositories on Icecore's own server, over TLS: who may do what, and what becomes of a backup whose
//! server dies or is full.

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use icecore_tests::{
    RepoServer, Result, VmSpec, acceptance, icecore_binary, require_mode, run, text, wait_until,
};

#[test]
fn a_repository_server_is_accepted() -> Result<()> {
    let server = RepoServer::start(&icecore_binary()?)?;
    let keeper = server.add_token("keeper", "administer", "accepted")?;
    acceptance(&server.site("accepted", &keeper))
}

#[test]
fn hosts_add_to_a_repository_server_and_only_its_keeper_deletes() -> Result<()> {
    let server = RepoServer::start(&icecore_binary()?)?;
    let one = server.user("one", "append", "main")?;
    let two = server.user("two", "append", "main")?;
    let admin = server.user("admin", "administer", "main")?;
    let reader = server.user("reader", "read", "main")?;
    one.init_repository()?;
    let (vm_one, vm_two) = (VmSpec::start_noisy("one")?, VmSpec::start_noisy("two")?);
    let [first, third] = one.live_through_a_kill(&vm_one)?;
    // Both hosts hold the same bytes: they are stored once.
    let theirs = two.prove_next_point(&vm_two)?;
    require_mode(&theirs, "large", "full")?;
    let refused = [
        one.word_on_repository("point", "delete").arg(&first).outcome()?,
        two.word_on_repository("point", "delete").arg(&first).outcome()?,
        one.word_on_repository("point", "protect").arg(&first).outcome()?,
        reader.word_on_repository("point", "delete").arg(&first).outcome()?,
    ];
    for outcome in refused {
        assert_eq!(outcome.status, Some(1), "{outcome:?}");
        assert!(outcome.stderr.contains("token"), "{outcome:?}");
    }
    assert_eq!(two.points()?.len(), 4);
    let written = reader.backup(&vm_one).outcome()?;
    assert_eq!(written.status, Some(1), "{written:?}");
    vm_one.require_no_trace()?;
    admin.collect_after_a_kill(&first)?;
    // A host's gc condemns the deleted point's last bytes, perhaps, and deletes nothing.
    assert_eq!(reader.points()?.len(), 3);
    reader.check()?;
    reader.restore_all(&third, &reader.path("third"))?;
    Ok(())
}

#[test]
fn hosts_that_see_their_own_points_share_a_repository_and_learn_nothing_of_others() -> Result<()> {
    let server = RepoServer::start(&icecore_binary()?)?;
    let one = server.user("one", "own", "main")?;
    let two = server.user("two", "own", "main")?;
    let admin = server.user("admin", "administer", "main")?;
    one.init_repository()?;
    let (vm_one, vm_two) = (VmSpec::start_noisy("one")?, VmSpec::start_noisy("two")?);
    let first = one.prove_next_point(&vm_one)?;
    let theirs = two.prove_next_point(&vm_two)?;
    vm_one.renew_noise(7)?;
    let second = one.prove_next_point(&vm_one)?;
    require_mode(&second, "large", "incremental")?;
    assert_eq!(one.points()?.len(), 2);
    assert_eq!(two.points()?.len(), 1);
    for user in [&one, &two] {
        user.check()?;
    }
    let taken = two.path("taken");
    std::fs::create_dir_all(&taken)?;
    let restore = two.on_repository("restore").arg(text(&first, "point")?).arg("--to").arg(&taken);
    let unknown = restore.outcome()?;
    assert!(matches!(unknown.status, Some(1 | 2)), "{unknown:?}");
    let shown = two.word_on_repository("repo", "info").json()?;
    assert_eq!((&shown["points"], &shown["packs"]), (&json!(1), &json!(0)), "{shown}");
    assert_eq!(admin.points()?.len(), 3);
    admin.word_on_repository("point", "delete").arg(text(&first, "point")?).succeed()?;
    admin.on_repository("gc").succeed()?;
    admin.check()?;
    one.restore_all(text(&second, "point")?, &one.path("second"))?;
    two.restore_all(text(&theirs, "point")?, &two.path("theirs"))?;
    Ok(())
}

#[test]
fn who_has_no_right_to_come_in_is_told_why() -> Result<()> {
    let mut server = RepoServer::start(&icecore_binary()?)?;
    let icecore = server.user("one", "append", "main")?;
    icecore.init_repository()?;
    let info = || icecore.word_on_repository("repo", "info");
    info().succeed()?;
    let other = server.add_token("other", "append", "another")?;
    let elsewhere = info().env("ICECORE_REPO_TOKEN_FILE", &other).expect(1)?;
    assert!(elsewhere.stderr.contains("token"), "{elsewhere:?}");
    let wrong = server.path("wrong.token");
    std::fs::copy(&other, &wrong)?;
    std::fs::write(&wrong, "icecore_0123456789")?;
    let unknown = info().env("ICECORE_REPO_TOKEN_FILE", &wrong).expect(1)?;
    assert!(unknown.stderr.contains("token") && !unknown.stderr.contains("0123456789"));
    let ca = info().env("ICECORE_CA_FILE", server.path("other-ca.pem")).expect(1)?;
    assert!(ca.stderr.contains("certificate"), "{ca:?}");
    let clear = format!("http://{}/main", server.authority());
    let plain = icecore.command("repo").args(["info", &clear]).expect(1)?;
    assert!(plain.stderr.contains(&clear), "{plain:?}");
    let far = icecore.command("repo").args(["info", "http://10.255.255.1/main"]).expect(2)?;
    assert!(far.stderr.contains("https://"), "{far:?}");
    // A token that is taken away is refused from then on, without a restart.
    let mut remove = Command::new(icecore.binary());
    remove.args(["repo", "token", "remove", "one", "--directory"]).arg(server.served());
    run(&mut remove)?;
    info().expect(1)?;
    assert_eq!(server.end()?, Some(0));
    let gone = info().expect(1)?;
    assert!(gone.stderr.contains("refused"), "{gone:?}");
    Ok(())
}

#[test]
fn a_repository_server_that_dies_or_is_full_commits_nothing() -> Result<()> {
    let mut server = RepoServer::start(&icecore_binary()?)?;
    let icecore = server.user("one", "append", "main")?;
    let admin = server.user("admin", "administer", "main")?;
    icecore.init_repository()?;
    let vm = VmSpec::start_noisy("dying")?;
    icecore.prove_next_point(&vm)?;
    let incomplete = server.served().join("main/.incomplete");
    let unfinished = || -> Result<usize> { Ok(std::fs::read_dir(&incomplete)?.count()) };
    // Killed: what was being written stays unfinished and is found by a gc.
    let killed = icecore.start_noisy_backup(&vm, 5)?;
    wait_until("an upload", Duration::from_secs(20), || Ok(unfinished()? > 0))?;
    server.kill();
    server.restart()?;
    let outcome = killed.finish()?;
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    vm.require_no_trace()?;
    assert!(unfinished()? > 0);
    icecore.prove_next_point(&vm)?;
    admin.on_repository("gc").succeed()?;
    assert_eq!(unfinished()?, 0);
    // Ended: it cleans up itself.
    let ended = icecore.start_noisy_backup(&vm, 6)?;
    wait_until("an upload", Duration::from_secs(20), || Ok(unfinished()? > 0))?;
    assert_eq!(server.end()?, Some(0));
    assert_eq!(unfinished()?, 0);
    server.restart()?;
    assert_eq!(ended.finish()?.status, Some(1));
    // Full.
    vm.renew_noise(7)?;
    server.allow("[repository.main]\nquota = \"40M\"")?;
    let full = icecore.backup(&vm).outcome()?;
    assert_eq!(full.status, Some(1), "{full:?}");
    assert!(full.stderr.contains("quota"), "{full:?}");
    vm.require_no_trace()?;
    assert_eq!(icecore.points()?.len(), 2);
    admin.check().map(drop)
}
