//! Repositories in object stores: real servers, and what networks and servers do to requests.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use icecore_tests::{
    Disk, FaultProxy, Icecore, MIB, Mischief, ObjectServer, ObjectStore, Result, Rule, SECRET_KEY,
    TestVm, VmSpec, acceptance, count, require_mode, run, text, wait_until,
};

/// A repository that nothing of is there before.
const PLACE: &str = "s3://laboratory/site/one";

/// More than one part of an upload, however it is packed.
const LARGE_BYTES: u64 = 20 * MIB;

/// Bytes that do not compress and that no other seed gives.
fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let mut word = seed;
    let step = || {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (word ^ (word >> 29)).to_le_bytes()
    };
    std::iter::repeat_with(step).take(bytes as usize / 8).flatten().collect()
}

/// Two small disks, one of them with data.
fn vm() -> Result<TestVm> {
    let vm = VmSpec::new("remote")
        .no_guest()
        .disk(Disk::new("large", 64 * MIB))
        .disk(Disk::new("small", 16 * MIB))
        .start()?;
    vm.fill("small", 8, MIB, MIB)?;
    Ok(vm)
}

/// Fills the beginning of the large disk with something new.
fn renew(vm: &TestVm, seed: u64) -> Result<()> {
    let file = vm.dir().join("noise");
    std::fs::write(&file, noise(seed, LARGE_BYTES))?;
    vm.qemu_io("large", &format!("write -s {} 0 {LARGE_BYTES}", file.display())).map(drop)
}

fn accepted_at(server: ObjectServer) -> Result<()> {
    let Some(store) = ObjectStore::start(server)? else { return Ok(()) };
    acceptance(&store.site(PLACE))
}

#[test]
fn rclone_is_accepted() -> Result<()> {
    accepted_at(ObjectServer::Rclone)
}

#[test]
fn moto_is_accepted() -> Result<()> {
    accepted_at(ObjectServer::Moto)
}

#[test]
fn ceph_is_accepted() -> Result<()> {
    accepted_at(ObjectServer::Ceph)
}

#[test]
fn a_server_with_an_authority_of_its_own_is_known_by_it_alone() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::RcloneTls)? else { return Ok(()) };
    let mut site = store.site(PLACE);
    // Plain HTTP must not be what makes it work.
    site.environment.retain(|(name, _)| name != "AWS_ALLOW_HTTP");
    let known = ("ICECORE_CA_FILE".to_owned(), store.path("ca.pem").into());
    // This machine may have one for all of its programs.
    site.environment.push(("AWS_CA_BUNDLE".to_owned(), "".into()));
    let (stranger, nobody) = (site.clone(), store.path("other-ca.pem"));
    site.environment.push(known);
    let icecore = Icecore::at(&site)?;
    icecore.prove_next_point(&vm()?)?;
    let info = || icecore.command("repo").args(["info", PLACE]);
    // What all programs for S3 know goes first.
    info().env("AWS_CA_BUNDLE", store.path("ca.pem")).env("ICECORE_CA_FILE", &nobody).succeed()?;
    let wrong = info().env("ICECORE_CA_FILE", &nobody).expect(1)?;
    let missing = info().env("ICECORE_CA_FILE", store.path("no-such.pem")).expect(1)?;
    assert!(missing.stderr.contains("no-such.pem"), "{missing:?}");
    let unknown = Icecore::without_repository_at(&stranger)?;
    let unknown = unknown.command("repo").args(["info", PLACE]).expect(1)?;
    for refused in [wrong, unknown] {
        assert!(refused.stderr.contains("invalid peer certificate"), "{refused:?}");
        assert!(refused.stderr.contains("check the keys and certificates"), "{refused:?}");
        assert!(
            !refused.stderr.contains("tries"),
            "a certificate does not get better: {refused:?}"
        );
    }
    Ok(())
}

#[test]
fn a_wrong_secret_is_said_and_never_shown() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::Rclone)? else { return Ok(()) };
    let icecore = Icecore::at(&store.site(PLACE))?;
    let info = || icecore.command("repo").args(["info", PLACE]);
    info().succeed()?;
    let wrong = info().env("AWS_SECRET_ACCESS_KEY", "no-such-secret").expect(1)?;
    assert!(wrong.stderr.contains("check the keys"), "{wrong:?}");
    for shown in [&wrong.stderr, &wrong.stdout] {
        assert!(!shown.contains("no-such-secret") && !shown.contains(SECRET_KEY), "{wrong:?}");
    }
    let none = info().env("AWS_SECRET_ACCESS_KEY", "").expect(1)?;
    assert!(none.stderr.contains("AWS_SECRET_ACCESS_KEY is not set"), "{none:?}");
    let nobody = info().env("AWS_ENDPOINT_URL", "http://127.0.0.1:9").expect(1)?;
    assert!(nobody.stderr.contains("cannot be reached"), "{nobody:?}");
    let elsewhere = icecore.command("repo").args(["info", "s3://no-such-bucket/x"]).expect(2)?;
    assert!(elsewhere.stderr.contains("no Icecore repository"), "{elsewhere:?}");
    icecore.command("repo").args(["init", PLACE]).expect(3)?;
    Ok(())
}

fn rule(method: &'static str, contains: &'static str, times: usize, mischief: Mischief) -> Rule {
    Rule { method, contains, after: 0, times, mischief }
}

/// What a run outlasts.
fn troubles() -> Vec<Rule> {
    vec![
        rule("PUT", "/packs/", 2, Mischief::Refuse(500, "InternalError")),
        rule("PUT", "/runs/", 2, Mischief::Refuse(503, "SlowDown")),
        rule("PUT", "/packs/", 1, Mischief::Reset),
        rule("PUT", "/points/", 1, Mischief::LoseReply),
        rule("PUT", "/receipts/", 1, Mischief::LoseReply),
        rule("PUT", "/coordination/", 1, Mischief::LoseReply),
        rule("POST", "?uploads", 1, Mischief::LoseReply),
        rule("POST", "?uploadId", 1, Mischief::LoseReply),
        rule("POST", "?uploadId", 1, Mischief::RefuseKindly("InternalError")),
        rule("GET", "/packs/", 2, Mischief::Truncate),
        rule("GET", "list-type", 2, Mischief::Truncate),
        rule("PUT", "/points/", 1, Mischief::WrongTag),
        rule("PUT", "/packs/", 1, Mischief::Refuse(400, "ExpiredToken")),
        rule("HEAD", "/packs/", 1, Mischief::Refuse(403, "RequestTimeTooSkewed")),
        rule("DELETE", "/coordination/", 1, Mischief::LoseReply),
    ]
}

fn troubles_at(server: ObjectServer) -> Result<()> {
    let Some(store) = ObjectStore::start(server)? else { return Ok(()) };
    let proxy = FaultProxy::start(store.port())?;
    let icecore = Icecore::at(&proxy.site(PLACE))?;
    let vm = vm()?;
    for (round, rule) in troubles().into_iter().enumerate() {
        renew(&vm, round as u64)?;
        proxy.play(vec![rule.clone()]);
        icecore.prove_next_point(&vm)?;
        assert!(proxy.hits() > 0, "{rule:?} met nothing");
    }
    proxy.play(Vec::new());
    let points =
        icecore.on_repository("check").arg("--read-data").json()?["points_checked"].clone();
    // What does not end is told, and nothing is committed.
    let endless = [
        rule("PUT", "/points/", 1000, Mischief::Refuse(403, "AccessDenied")),
        rule("PUT", "/packs/", 1000, Mischief::Refuse(400, "ExpiredToken")),
    ];
    for rule in endless {
        vm.fill("small", 3, 2 * MIB, MIB)?;
        proxy.play(vec![rule]);
        let failed = icecore.backup(&vm).expect(1)?;
        assert!(failed.stderr.contains("check the keys"), "{failed:?}");
        assert!(proxy.hits() < 10, "it asked {} times", proxy.hits());
        proxy.play(Vec::new());
        vm.require_no_trace()?;
        let checked = icecore.check()?;
        assert_eq!(checked["points_checked"], points, "{checked}");
    }
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn a_listing_that_is_late_costs_a_full_read_and_no_point() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::Moto)? else { return Ok(()) };
    let proxy = FaultProxy::start(store.port())?;
    let icecore = Icecore::at(&proxy.site(PLACE))?;
    let vm = vm()?;
    icecore.prove_next_point(&vm)?;
    vm.fill("small", 3, 2 * MIB, MIB)?;
    icecore.prove_next_point(&vm)?;
    let late = rule("GET", "list-type", 100_000, Mischief::Omit("/points/"));
    proxy.play(vec![late]);
    let refused = icecore.on_repository("gc").expect(3)?;
    assert!(refused.stderr.contains("does not list point"), "{refused:?}");
    vm.fill("small", 4, 3 * MIB, MIB)?;
    let reference = vm.reference()?;
    let third = icecore.backup(&vm).json()?;
    require_mode(&third, "small", "full")?;
    assert!(proxy.hits() > 0);
    proxy.play(Vec::new());
    icecore.prove_point(&vm, text(&third, "point")?, &reference)?;
    icecore.on_repository("gc").succeed()?;
    let checked = icecore.check()?;
    assert_eq!(checked["points_checked"], 3, "{checked}");
    vm.require_no_trace()
}

#[test]
fn a_host_asks_no_more_of_a_store_than_it_may() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::Moto)? else { return Ok(()) };
    let icecore = Icecore::at(&store.site(PLACE))?;
    let vm = vm()?;
    renew(&vm, 1)?;
    let backup = |name: &str, value: &str| icecore.backup(&vm).env(name, value);
    let nonsense = backup("ICECORE_STORE_RATE", "fast").expect(2)?;
    assert!(nonsense.stderr.contains("ICECORE_STORE_RATE"), "{nonsense:?}");
    let spent = backup("ICECORE_STORE_REQUESTS_MAX", "12").expect(1)?;
    assert!(spent.stderr.contains("12 requests that ICECORE_STORE_REQUESTS_MAX"), "{spent:?}");
    vm.require_no_trace()?;
    assert_eq!(icecore.check()?["points_checked"], 0);
    let begun = Instant::now();
    let slow = backup("ICECORE_STORE_RATE", "5M/s").json()?;
    // The last part is not waited for.
    let least = Duration::from_secs((LARGE_BYTES - 8 * MIB) / (5 * MIB));
    assert!(begun.elapsed() >= least, "{LARGE_BYTES} bytes took {:?}", begun.elapsed());
    icecore.prove_point(&vm, text(&slow, "point")?, &vm.reference()?)?;
    let begun = Instant::now();
    renew(&vm, 2)?;
    let paced = backup("ICECORE_STORE_REQUEST_RATE", "5").json()?;
    let requests = paced["store"]["writes"].as_u64().unwrap_or_default();
    assert!(begun.elapsed().as_secs() + 4 >= requests / 5, "{paced}");
    Ok(())
}

#[test]
fn troubles_at_a_server_that_overwrites_are_outlasted() -> Result<()> {
    troubles_at(ObjectServer::Rclone)
}

#[test]
fn troubles_at_a_server_with_conditions_are_outlasted() -> Result<()> {
    troubles_at(ObjectServer::Moto)
}

/// The files that a host has kept of maps and tables.
fn kept(icecore: &Icecore) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for repository in std::fs::read_dir(icecore.path("cache"))? {
        let folder = repository?.path().join("kept");
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        assert_eq!(folder.metadata()?.permissions().mode() & 0o777, 0o700);
        for entry in entries {
            files.push(entry?.path());
        }
    }
    Ok(files)
}

#[test]
fn maps_and_tables_are_fetched_once_and_what_is_kept_is_never_believed() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::Rclone)? else { return Ok(()) };
    let icecore = Icecore::at(&store.site(PLACE))?;
    let vm = vm()?;
    renew(&vm, 1)?;
    icecore.backup(&vm).succeed()?;
    renew(&vm, 2)?;
    let point = icecore.prove_next_point(&vm)?;
    let reference = vm.reference()?;
    let reader = icecore.another_host()?;
    let restore = |name: &str| -> Result<u64> {
        let folder = reader.path(name);
        let report = reader.restore_all("latest", &folder)?;
        reference.compare("large", &folder.join("large.raw"))?;
        std::fs::remove_dir_all(&folder)?;
        count(&report["store"], "reads")
    };
    let first = restore("first")?;
    let files = kept(&reader)?;
    assert!(!files.is_empty(), "nothing was kept of {point}");
    let again = restore("again")?;
    assert!(again < first, "{first} requests, then {again}");
    // Bits that changed, an end that is missing, and another object's: each costs its journeys.
    for (number, file) in files.iter().enumerate() {
        let mut bytes = std::fs::read(file)?;
        match number % 3 {
            0 => *bytes.last_mut().expect("files are not empty") ^= 1,
            1 => bytes.truncate(bytes.len() / 2),
            _ => bytes = std::fs::read(&files[0])?,
        }
        std::fs::write(file, bytes)?;
    }
    let damaged = restore("damaged")?;
    assert!(damaged > again, "{damaged} requests, {again} with all that was kept");
    let mended = restore("mended")?;
    assert!(mended < damaged, "{damaged} requests, then {mended}");
    Ok(())
}

#[test]
fn what_is_gone_from_a_store_is_not_built_upon_because_a_host_has_kept_it() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::Rclone)? else { return Ok(()) };
    let icecore = Icecore::at(&store.site(PLACE))?;
    let vm = vm()?;
    renew(&vm, 1)?;
    icecore.backup(&vm).succeed()?;
    renew(&vm, 2)?;
    // Its restore keeps the maps and tables here.
    icecore.prove_next_point(&vm)?;
    assert!(kept(&icecore)?.iter().any(|file| file.to_string_lossy().contains("runs-")));
    std::fs::remove_dir_all(store.path("objects/laboratory/site/one/runs"))?;
    renew(&vm, 3)?;
    let reference = vm.reference()?;
    let outcome = icecore.backup(&vm).outcome()?;
    if outcome.status != Some(0) {
        assert!(outcome.stderr.contains("runs/"), "{outcome:?}");
        return vm.require_no_trace();
    }
    // What it says is there, another host finds.
    let stranger = icecore.another_host()?;
    stranger.prove_point(&vm, text(&outcome.json()?, "point")?, &reference)
}

/// Requests until the first byte of an exported point; each is a journey.
const FIRST_BYTE_REQUESTS_MAX: usize = 20;
/// A journey within a country.
const JOURNEY: Duration = Duration::from_millis(15);
/// What a user waits for the first byte.
const FIRST_BYTE_WITHIN: Duration = Duration::from_secs(1);

/// Time from the start of `icecore export` to the first block that a client has read.
fn first_byte(icecore: &Icecore, socket: &Path) -> Result<Duration> {
    let started = Instant::now();
    let export = icecore.command("export").args(["latest", "--disk", "large", "--repo"]);
    let server = export.arg(icecore.repository()).arg("--socket").arg(socket).start()?;
    wait_until("the export", Duration::from_secs(10), || Ok(socket.exists()))?;
    let image =
        format!("driver=nbd,server.type=unix,server.path={},export=large", socket.display());
    run(Command::new("qemu-io").args(["-r", "-c", "read 1M 4k", "--image-opts", &image]))?;
    let taken = started.elapsed();
    server.signal(rustix::process::Signal::INT);
    assert!(matches!(server.finish()?.status, Some(0 | 130)));
    Ok(taken)
}

#[test]
fn the_first_byte_of_an_exported_point_takes_few_journeys() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::Rclone)? else { return Ok(()) };
    let proxy = FaultProxy::start(store.port())?;
    let icecore = Icecore::at(&proxy.site(PLACE))?;
    let vm = vm()?;
    for seed in 1..3 {
        renew(&vm, seed)?;
        icecore.backup(&vm).succeed()?;
    }
    let reader = icecore.another_host()?;
    for name in ["cold", "warm"] {
        proxy.be_far(JOURNEY);
        let taken = first_byte(&reader, &reader.path(name))?;
        let requests = proxy.requests();
        println!("{name}: {requests} requests, {taken:?}");
        assert!(requests <= FIRST_BYTE_REQUESTS_MAX, "{name}: {requests} requests");
        assert!(taken < FIRST_BYTE_WITHIN, "{name}: {taken:?}");
    }
    Ok(())
}
