//! Repositories whose objects nobody takes away before their time: a real server with object lock,
//! and somebody with the host's keys who wants everything gone.

use std::process::Command;
use std::time::{Duration, Instant};

use icecore_tests::{
    ACCESS_KEY, Disk, Icecore, KIB, MIB, ObjectServer, ObjectStore, Result, SECRET_KEY, Scratch,
    Site, TestVm, VmSpec, count, run, text,
};

const PLACE: &str = "s3://immutable/site";
/// Long enough for what is done before the first lock runs out, on a busy machine too.
const LOCK: Duration = Duration::from_secs(24);
/// After this a second point has to extend what it takes over from the first: a quarter of the lock.
const RESERVE: Duration = Duration::from_secs(7);

fn locked(store: &ObjectStore) -> Site {
    let init = ["--lock", &format!("{}s", LOCK.as_secs())].map(str::to_owned).to_vec();
    Site { init, ..store.site(PLACE) }
}

fn vm() -> Result<TestVm> {
    let vm = VmSpec::new("locked").no_guest().disk(Disk::new("system", 32 * MIB)).start()?;
    vm.fill("system", 8, 0, 12 * MIB)?;
    Ok(vm)
}

/// Somebody who has the host's keys, and no icecore.
struct Attacker<'a>(&'a ObjectStore);

impl Attacker<'_> {
    /// Head and body of an answer.
    fn ask(&self, method: &str, target: &str) -> Result<String> {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-i", "-m", "20", "--aws-sigv4", "aws:amz:us-east-1:s3"]);
        // Without this header the signature is for other services than S3.
        curl.args(["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
        curl.args(["--user", &format!("{ACCESS_KEY}:{SECRET_KEY}")]);
        curl.args(if method == "HEAD" { ["--head", "-s"] } else { ["-X", method] });
        curl.arg(format!("{}/immutable{target}", self.0.endpoint()));
        Ok(String::from_utf8_lossy(&run(&mut curl)?.stdout).into_owned())
    }

    /// Keys and versions of all that lies there, but for coordination.
    fn versions(&self) -> Result<Vec<(String, String)>> {
        let list = self.ask("GET", "?prefix=site%2F&versions=")?;
        let of = |entry: &str, tag: &str| {
            let rest = entry.split_once(&format!("<{tag}>"))?.1;
            Some(rest.split_once('<')?.0.to_owned())
        };
        let entries = list.split("<Version>").skip(1);
        let all = entries.filter_map(|entry| Some((of(entry, "Key")?, of(entry, "VersionId")?)));
        let is_data = |key: &str| !key.contains("/coordination/") && !key.contains("/.icecore/");
        Ok(all.filter(|(key, _)| is_data(key)).collect())
    }

    fn locked_until(&self, key: &str) -> Result<String> {
        let head = self.ask("HEAD", &format!("/{key}"))?.to_ascii_lowercase();
        let header = "x-amz-object-lock-retain-until-date: ";
        let line = head.lines().find_map(|line| line.strip_prefix(header));
        Ok(line.unwrap_or_default().trim().to_ascii_uppercase())
    }
}

#[test]
fn moto_keeps_what_is_locked_until_its_time_has_come() -> Result<()> {
    kept_until_its_time_has_come(ObjectServer::Moto)
}

#[test]
fn ceph_keeps_what_is_locked_until_its_time_has_come() -> Result<()> {
    kept_until_its_time_has_come(ObjectServer::Ceph)
}

fn kept_until_its_time_has_come(server: ObjectServer) -> Result<()> {
    let Some(store) = ObjectStore::start(server)? else { return Ok(()) };
    let attacker = Attacker(&store);
    let icecore = Icecore::at(&locked(&store))?;
    let info = icecore.command("repo").args(["info", PLACE, "--json"]).json()?;
    assert_eq!(info["lock"]["mode"], "governance", "{info}");
    assert_eq!(info["lock"]["seconds"], LOCK.as_secs(), "{info}");
    let vm = vm()?;
    let first = icecore.prove_next_point(&vm)?;
    let first = text(&first, "point")?;
    let begun = Instant::now();
    let of_first = attacker.versions()?;
    std::thread::sleep(RESERVE);
    vm.fill("system", 9, MIB, 65 * KIB)?;
    let second = icecore.prove_next_point(&vm)?;
    let second = text(&second, "point")?;
    refused_deletions(&icecore, first)?;
    extended(&icecore, &attacker, &of_first, second)?;
    destroyed_nothing(&attacker)?;
    icecore.check()?;
    assert!(begun.elapsed() < LOCK, "too slow a machine for this lock");
    std::thread::sleep(LOCK.saturating_sub(begun.elapsed()) + Duration::from_secs(1));
    gone_for_good(&icecore, &attacker, first)?;
    icecore.prove_point(&vm, second, &vm.reference()?)
}

/// Whatever the way, and with the date.
fn refused_deletions(icecore: &Icecore, point: &str) -> Result<()> {
    let on = |words: &[&str]| {
        icecore.command(words[0]).args(&words[1..]).arg("--repo").arg(PLACE).arg("--json")
    };
    let shown = on(&["point", "show", point]).json()?;
    let until = text(&shown, "locked_until")?.to_owned();
    let chain = text(&shown, "chain")?;
    for words in [
        vec!["point", "delete", point],
        vec!["point", "delete", point, "--with-descendants"],
        vec!["chain", "delete", chain],
    ] {
        let refused = on(&words).expect(3)?;
        assert!(refused.stderr.contains("is locked until"), "{refused:?}");
        assert!(refused.stderr.contains(&until), "{refused:?}");
    }
    let pruned = on(&["prune", "locked", "--keep-last", "1"]).json()?;
    assert_eq!(pruned["removed"].as_array().map(Vec::len), Some(0), "{pruned}");
    let why = pruned["left_alone"][0]["why"].as_str().unwrap_or_default();
    assert!(why.contains("locked until"), "{pruned}");
    let collected = on(&["gc"]).json()?;
    assert_eq!(count(&collected, "packs_deleted")?, 0, "{collected}");
    Ok(())
}

/// What the second point took over from the first is locked as long as the second.
fn extended(
    icecore: &Icecore,
    attacker: &Attacker<'_>,
    of_first: &[(String, String)],
    second: &str,
) -> Result<()> {
    let show = icecore.command("point").args(["show", second]).arg("--repo").arg(PLACE);
    let until = text(&show.arg("--json").json()?, "locked_until")?.to_owned();
    let needed = |key: &&(String, String)| key.0.contains("/packs/") || key.0.ends_with("/config");
    let needed: Vec<_> = of_first.iter().filter(needed).collect();
    assert!(needed.len() > 1, "{of_first:?}");
    for (key, _) in needed {
        let lock = attacker.locked_until(key)?;
        assert!(lock >= until, "{key} is locked until {lock:?}, the point until {until}");
    }
    Ok(())
}

fn destroyed_nothing(attacker: &Attacker<'_>) -> Result<()> {
    let before = attacker.versions()?;
    for (key, version) in &before {
        let answer = attacker.ask("DELETE", &format!("/{key}?versionId={version}"))?;
        assert!(answer.starts_with("HTTP/1.1 403"), "{key}: {answer}");
    }
    assert_eq!(attacker.versions()?, before);
    Ok(())
}

/// Nothing is left of what is deleted, no version either.
fn gone_for_good(icecore: &Icecore, attacker: &Attacker<'_>, point: &str) -> Result<()> {
    icecore.command("point").args(["delete", point, "--repo", PLACE]).succeed()?;
    let collected = icecore.on_repository("gc").json()?;
    assert_eq!(count(&collected, "points_locked")?, 0, "{collected}");
    // Objects are locked a little longer than points.
    assert!(count(&collected, "objects_locked")? > 0, "{collected}");
    std::thread::sleep(RESERVE);
    icecore.on_repository("gc").json()?;
    let left = attacker.versions()?;
    assert!(left.iter().all(|(key, _)| !key.ends_with(&format!("/points/{point}"))), "{left:?}");
    Ok(())
}

#[test]
fn a_place_without_locks_is_refused() -> Result<()> {
    let folder = Scratch::new()?;
    let site = Site { address: folder.join("repository").display().to_string(), ..Site::default() };
    let icecore = Icecore::without_repository_at(&site)?;
    let lock = ["--lock", "30d"];
    let directory = icecore.command("repo").args(["init", &site.address]).args(lock).expect(3)?;
    assert!(directory.stderr.contains("cannot do that"), "{directory:?}");
    let nonsense = icecore.command("repo").args(["init", &site.address, "--lock", "0s"]);
    nonsense.expect(2)?;
    for server in [ObjectServer::Moto, ObjectServer::Rclone] {
        let Some(store) = ObjectStore::start(server)? else { continue };
        let icecore = Icecore::without_repository_at(&store.site("s3://plain/one"))?;
        icecore.command("repo").args(["init", "s3://plain/one"]).succeed()?;
        let late = icecore.command("repo").args(["init", "s3://plain/two"]).args(lock).expect(3)?;
        assert!(late.stderr.contains("object lock"), "{late:?}");
    }
    Ok(())
}
