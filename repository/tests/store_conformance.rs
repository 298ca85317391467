//! One suite that every store passes: the directory store on the real file system, the same store on
//! the simulated one, and the one in memory.

#![allow(clippy::unwrap_used)] // a test that panics has failed

use std::path::Path;
use std::sync::{Arc, Barrier};

use icecore_repository::store::served::{ServedStore, ServerAddress};
use icecore_repository::store::{
    Access, CrashMode, DirectoryStore, Locking, MemoryStore, ObjectName, S3Address, S3Settings,
    S3Store, SimFileSystem, Store, StoreErrorKind, sftp,
};
use icecore_tests::{ObjectServer, ObjectStore, RepoServer, SshServer, icecore_binary};

fn name(text: &str) -> ObjectName {
    ObjectName::new(text).unwrap()
}

fn names(store: &dyn Store, prefix: &str) -> Vec<String> {
    store.list(prefix).unwrap().iter().map(|entry| entry.name.to_string()).collect()
}

fn an_object_is_read_back_in_ranges(store: &dyn Store) {
    let object = name("packs/ab/one");
    let mut writer = store.create(&object).unwrap();
    writer.write(b"hello ").unwrap();
    writer.write(b"world").unwrap();
    assert!(!store.exists(&object).unwrap(), "visible before it is complete");
    assert_eq!(writer.finish().unwrap(), 11);
    assert_eq!(store.len(&object).unwrap(), 11);
    let mut middle = [0; 5];
    store.read_exact(&object, 3, &mut middle).unwrap();
    assert_eq!(&middle, b"lo wo");
    assert_eq!(store.read(&object, 11).unwrap(), b"hello world");
}

fn reads_beyond_the_end_and_of_large_objects_are_damage(store: &dyn Store) {
    let object = name("small");
    store.put(&object, b"12345").unwrap();
    for (offset, length) in [(0, 6), (5, 1), (4, 2), (1 << 40, 1)] {
        let error = store.read_exact(&object, offset, &mut vec![0; length]).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{error}");
        assert_eq!(error.object(), "small");
    }
    assert_eq!(store.read(&object, 4).unwrap_err().kind(), StoreErrorKind::Corrupt);
    store.read_exact(&object, 5, &mut []).unwrap();
}

fn a_name_is_created_once(store: &dyn Store) {
    let object = name("points/p1");
    store.put(&object, b"first").unwrap();
    let error = store.put(&object, b"second").unwrap_err();
    assert!(error.already_exists(), "{error}");
    let late = name("points/p2");
    let mut slow = store.create(&late).unwrap();
    slow.write(b"slow").unwrap();
    store.put(&late, b"fast").unwrap();
    assert!(slow.finish().unwrap_err().already_exists());
    assert_eq!(store.read(&late, 9).unwrap(), b"fast");
    assert_eq!(store.read(&object, 9).unwrap(), b"first");
}

/// More than any store keeps back before it begins an object in its place.
const LARGE: usize = 9 << 20;

fn an_abandoned_object_leaves_nothing(store: &dyn Store) {
    let before = store.list("").unwrap();
    let mut writer = store.create(&name("packs/never")).unwrap();
    writer.write(&vec![7; LARGE]).unwrap();
    assert_eq!(store.leftovers().unwrap().len(), 1);
    drop(writer);
    assert_eq!(store.list("").unwrap(), before);
    assert!(store.leftovers().unwrap().is_empty());
}

fn a_leftover_that_is_removed_fails_its_writer(store: &dyn Store) {
    let mut writer = store.create(&name("packs/fenced")).unwrap();
    writer.write(&vec![7; LARGE]).unwrap();
    store.remove_leftovers(&store.leftovers().unwrap()).unwrap();
    assert!(writer.finish().is_err());
    assert!(!store.exists(&name("packs/fenced")).unwrap());
}

fn a_large_object_is_whole_and_created_once(store: &dyn Store) {
    let object = name("packs/large");
    let content: Vec<u8> = (0..3 * LARGE).map(|at| (at / 4099) as u8).collect();
    let mut writer = store.create(&object).unwrap();
    let mut late = store.create(&object).unwrap();
    for piece in content.chunks(1_000_003) {
        writer.write(piece).unwrap();
    }
    late.write(&content[1..]).unwrap();
    assert_eq!(writer.finish().unwrap(), content.len() as u64);
    assert!(late.finish().unwrap_err().already_exists());
    assert!(store.leftovers().unwrap().is_empty());
    assert!(store.read(&object, content.len() as u64).unwrap() == content);
    let mut middle = vec![0; 2 * LARGE];
    store.read_exact(&object, 12_345, &mut middle).unwrap();
    assert!(middle == content[12_345..][..middle.len()]);
}

fn a_listing_of_many_is_complete(store: &dyn Store) {
    // More than an object store tells in one answer.
    let all: Vec<ObjectName> = (0..1234).map(|n| name(&format!("many/{n:05}"))).collect();
    std::thread::scope(|scope| {
        for part in all.chunks(160) {
            scope.spawn(move || part.iter().for_each(|object| store.put(object, b"x").unwrap()));
        }
    });
    assert_eq!(store.names("many/").unwrap(), all);
    store.delete(&all[1..]).unwrap();
    assert_eq!(store.names("many/").unwrap(), all[..1]);
}

fn listings_are_sorted_and_cut_by_prefix(store: &dyn Store) {
    for object in ["m/b", "m/a/2", "m/a/1", "mm", "m/c"] {
        store.put(&name(object), object.as_bytes()).unwrap();
    }
    assert_eq!(names(store, "m/"), ["m/a/1", "m/a/2", "m/b", "m/c"]);
    assert_eq!(names(store, "m/a/"), ["m/a/1", "m/a/2"]);
    assert!(names(store, "none/here/").is_empty());
    let all = store.list("").unwrap();
    assert!(all.iter().all(|entry| store.len(&entry.name).unwrap() == entry.bytes));
    assert!(all.len() >= 5);
}

fn deleting_is_idempotent(store: &dyn Store) {
    store.put(&name("d/1"), b"1").unwrap();
    store.put(&name("d/2"), b"2").unwrap();
    store.delete(&[name("d/1"), name("d/never"), name("no/such/place")]).unwrap();
    store.delete(&[name("d/1")]).unwrap();
    assert_eq!(names(store, "d/"), ["d/2"]);
    let error = store.read(&name("d/1"), 10).unwrap_err();
    assert!(error.is_not_found(), "{error}");
    assert!(error.to_string().contains("d/1"), "{error}");
    store.settle("d/").unwrap();
    store.settle("never/").unwrap();
}

fn an_empty_object_is_an_object(store: &dyn Store) {
    store.put(&name("empty"), b"").unwrap();
    assert!(store.read(&name("empty"), 0).unwrap().is_empty());
}

fn of_many_who_create_one_name_one_wins(store: &dyn Store) {
    let start = Barrier::new(8);
    let wins: usize = std::thread::scope(|scope| {
        let race = |who: u8| {
            let (start, object) = (&start, name("race"));
            scope.spawn(move || {
                start.wait();
                usize::from(store.put(&object, &[who; 100]).is_ok())
            })
        };
        let racers: Vec<_> = (0..8).map(race).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).sum()
    });
    assert_eq!(wins, 1);
    let content = store.read(&name("race"), 100).unwrap();
    assert!(content.iter().all(|&byte| byte == content[0]) && content.len() == 100);
}

fn nothing_is_left_over_in_a_fresh_store(store: &dyn Store) {
    assert_eq!(store.leftovers().unwrap(), Vec::<String>::new());
    store.put(&name("small"), b"in one request").unwrap();
    assert_eq!(store.leftovers().unwrap(), Vec::<String>::new());
}

/// A store, and the same place opened for reading only.
fn conforms(fresh: &mut dyn FnMut() -> (Box<dyn Store>, Box<dyn Store>)) {
    let suite: [fn(&dyn Store); 12] = [
        // First of all: some servers know no uploads before the first one.
        nothing_is_left_over_in_a_fresh_store,
        an_object_is_read_back_in_ranges,
        reads_beyond_the_end_and_of_large_objects_are_damage,
        a_name_is_created_once,
        an_abandoned_object_leaves_nothing,
        a_leftover_that_is_removed_fails_its_writer,
        a_large_object_is_whole_and_created_once,
        a_listing_of_many_is_complete,
        listings_are_sorted_and_cut_by_prefix,
        deleting_is_idempotent,
        an_empty_object_is_an_object,
        of_many_who_create_one_name_one_wins,
    ];
    for test in suite {
        test(fresh().0.as_ref());
    }
    let (writable, read_only) = fresh();
    writable.put(&name("a/b"), b"c").unwrap();
    assert_eq!(read_only.read(&name("a/b"), 1).unwrap(), b"c");
    let refused = [
        read_only.put(&name("a/c"), b"").unwrap_err(),
        read_only.delete(&[name("a/b")]).unwrap_err(),
    ];
    assert!(refused.iter().all(|error| error.kind() == StoreErrorKind::ReadOnly));
    assert_eq!(names(writable.as_ref(), ""), ["a/b"]);
}

#[test]
fn the_directory_store_conforms() {
    let mut kept = Vec::new();
    conforms(&mut || {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("repo");
        let writable = DirectoryStore::create(&root).unwrap();
        let read_only = DirectoryStore::open(&root, Access::ReadOnly).unwrap();
        kept.push(directory);
        (Box::new(writable), Box::new(read_only))
    });
}

#[test]
fn the_simulated_store_conforms() {
    conforms(&mut || {
        let fs = Arc::new(SimFileSystem::new());
        let store = |access| Box::new(DirectoryStore::on(fs.clone(), "sim", access));
        (store(Access::ReadWrite), store(Access::ReadOnly))
    });
}

/// A bucket of a real server.
fn conforms_at(server: ObjectServer) {
    let Some(server) = ObjectStore::start(server).unwrap() else { return };
    let variables = server.environment();
    let variable = |name: &str| {
        let found = variables.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.to_string_lossy().into_owned())
    };
    let mut number = 0;
    conforms(&mut || {
        number += 1;
        let address = S3Address::parse(&format!("conformance/run/{number}")).unwrap();
        let settings = S3Settings::from(&variable).unwrap();
        let writable = S3Store::create(&address, settings.clone(), Locking::NotWanted).unwrap();
        let read_only = S3Store::open(&address, settings, Access::ReadOnly).unwrap();
        (Box::new(writable), Box::new(read_only))
    });
}

/// It overwrites whatever it is asked: names are locked.
#[test]
fn the_store_at_rclone_conforms() {
    conforms_at(ObjectServer::Rclone);
}

#[test]
fn the_store_at_moto_conforms() {
    conforms_at(ObjectServer::Moto);
}

#[test]
fn the_store_at_ceph_conforms() {
    conforms_at(ObjectServer::Ceph);
}

#[test]
fn the_store_in_memory_conforms() {
    conforms(&mut || {
        let store = MemoryStore::new();
        (Box::new(store.reopened(Access::ReadWrite)), Box::new(store.reopened(Access::ReadOnly)))
    });
}

#[test]
fn the_sftp_store_conforms() {
    let server = SshServer::start().unwrap();
    let ssh = || sftp::Ssh::new(&server.command());
    let mut number = 0;
    conforms(&mut || {
        number += 1;
        let address = server.address(&format!("repo{number}"));
        let address = address.strip_prefix("sftp://").unwrap().parse().unwrap();
        let writable = sftp::create(ssh(), &address).unwrap();
        let read_only = sftp::open(ssh(), &address, Access::ReadOnly).unwrap();
        (Box::new(writable), Box::new(read_only))
    });
}

#[test]
fn the_store_on_a_repository_server_conforms() {
    let server = RepoServer::start(&icecore_binary().unwrap()).unwrap();
    let token = server.add_token("admin", "administer", "*").unwrap();
    let mut number = 0;
    conforms(&mut || {
        number += 1;
        let mut address: ServerAddress = server.address(&format!("repo{number}")).parse().unwrap();
        address.token_file = Some(token.clone());
        address.ca_file = Some(server.path("ca.pem"));
        let writable = ServedStore::create(&address).unwrap();
        let read_only = ServedStore::open(&address, Access::ReadOnly).unwrap();
        (Box::new(writable), Box::new(read_only))
    });
}

#[test]
fn files_and_directories_are_their_owners_only() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("repo");
    DirectoryStore::create(&root).unwrap().put(&name("x/y"), b"z").unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&root), 0o700);
    assert_eq!(mode(&root.join("x")), 0o700);
    assert_eq!(mode(&root.join("x/y")), 0o600);
}

#[test]
fn what_is_no_plain_file_is_never_read() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("repo");
    let store = DirectoryStore::create(&root).unwrap();
    std::fs::write(directory.path().join("secret"), b"secret").unwrap();
    std::os::unix::fs::symlink("../secret", root.join("link")).unwrap();
    assert!(store.read(&name("link"), 100).is_err());
    assert!(store.list("").unwrap().is_empty());
    assert!(DirectoryStore::open(&directory.path().join("none"), Access::ReadOnly).is_err());
}

#[test]
fn names_cannot_leave_the_store() {
    for bad in ["", "/", "a//b", "/a", "a/", "..", "a/../b", ".incomplete/x", "a\0", "ü", "a b"] {
        assert!(ObjectName::new(bad).is_err(), "{bad:?}");
    }
    assert!(ObjectName::new("x".repeat(201)).is_err());
}

/// Every object that `finish` reported is there after any crash, complete; no other one is, except
/// whole ones whose `finish` was under way.
#[test]
fn objects_are_complete_or_absent_after_a_crash_at_any_call() {
    use icecore_repository::store::{CallFault, Torn};
    let contents: Vec<Vec<u8>> = (1..=4u8).map(|n| vec![n; usize::from(n) * 100]).collect();
    let workload = |fs: &SimFileSystem| -> usize {
        let store = DirectoryStore::on(Arc::new(fs.clone()), "sim", Access::ReadWrite);
        let put = |(n, bytes): (usize, &Vec<u8>)| store.put(&name(&format!("d{n}/o")), bytes);
        contents.iter().enumerate().map(put).take_while(Result::is_ok).count()
    };
    let healthy = SimFileSystem::new();
    assert_eq!(workload(&healthy), contents.len());
    let faults = [CallFault::CrashBefore, CallFault::CrashTorn, CallFault::CrashAfter];
    let modes = [CrashMode::Process, CrashMode::PowerCut]
        .into_iter()
        .chain((0..8).map(|seed| CrashMode::TornPowerCut(Torn(seed))))
        .collect::<Vec<_>>();
    for call in 0..healthy.calls() {
        for fault in faults {
            let fs = SimFileSystem::new();
            fs.inject(call, fault);
            let reported = workload(&fs);
            assert!(fs.has_crashed());
            for &mode in &modes {
                let after = Arc::new(fs.after_crash(mode));
                let store = DirectoryStore::on(after, "sim", Access::ReadWrite);
                let listed = store.list("").unwrap();
                assert!(listed.len() >= reported, "call {call} {fault:?} {mode:?}");
                assert!(listed.len() <= reported + 1, "call {call} {fault:?} {mode:?}");
                for (entry, expected) in listed.iter().zip(&contents) {
                    assert_eq!(&store.read(&entry.name, 1000).unwrap(), expected);
                }
            }
        }
    }
}

/// FAULTS row 35: after a failed fsync nothing is trusted, whatever the next fsync says.
#[test]
fn one_failed_call_never_leaves_a_visible_object() {
    use icecore_repository::store::CallFault;
    use rustix::io::Errno;
    let store =
        |fs: &SimFileSystem| DirectoryStore::on(Arc::new(fs.clone()), "sim", Access::ReadWrite);
    let healthy = SimFileSystem::new();
    store(&healthy).put(&name("a/b"), b"content").unwrap();
    for errno in [Errno::IO, Errno::NOSPC, Errno::DQUOT] {
        for call in 0..healthy.calls() {
            let fs = SimFileSystem::new();
            fs.inject(call, CallFault::Fail(errno));
            let result = store(&fs).put(&name("a/b"), b"content");
            let visible = store(&fs).exists(&name("a/b")).unwrap();
            assert_eq!(result.is_ok(), visible, "call {call} {errno:?}: {result:?}");
        }
    }
}

#[test]
fn a_full_disk_says_so_and_takes_deletions() {
    let fs = SimFileSystem::new();
    let store = DirectoryStore::on(Arc::new(fs.clone()), "sim", Access::ReadWrite);
    store.put(&name("old"), &[1; 600]).unwrap();
    fs.set_capacity(Some(1000));
    let error = store.put(&name("new"), &[2; 500]).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace, "{error}");
    assert_eq!(fs.used_bytes(), 600, "the incomplete object still takes space");
    store.delete(&[name("old")]).unwrap();
    store.put(&name("new"), &[2; 500]).unwrap();
    fs.set_read_only(true);
    assert_eq!(store.put(&name("x"), b"").unwrap_err().kind(), StoreErrorKind::ReadOnly);
}
