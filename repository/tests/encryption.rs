//! What encryption promises: nothing is readable without a key, a wrong one is told from damage, and
//! nothing that was sealed for one place is believed in another. FAULTS rows 41, 43.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed

mod world;

use std::sync::Arc;

use icecore_repository::store::{SimFileSystem, Store};
use icecore_repository::{
    BlockSize, DamageKind, Error, InitOptions, KeyMaterial, KeyMethod, OpenOptions, Repository,
    ServiceId, ServiceRecord, ServiceState, scrub,
};
use world::{
    BLOCK, assert_points_are_right, assert_sound, backup, block, gc, initialised, restore, store,
};

fn file(fill: u8) -> KeyMaterial {
    KeyMaterial::from_key_file(vec![fill; 32].into()).unwrap()
}

fn passphrase(text: &str) -> KeyMaterial {
    KeyMaterial::from_passphrase(text.as_bytes().to_vec().into()).unwrap()
}

fn init(keys: Vec<KeyMaterial>) -> (SimFileSystem, Repository) {
    let fs = SimFileSystem::new();
    let block_size = BlockSize::new(BLOCK as u64).unwrap();
    let options = InitOptions { block_size, keys, ..InitOptions::default() };
    let repository = Repository::init_on(store(&fs), options, jiff::Timestamp::UNIX_EPOCH).unwrap();
    (fs, repository)
}

fn open(fs: &SimFileSystem, keys: Vec<KeyMaterial>) -> Result<Repository, Error> {
    Repository::open_on(store(fs), OpenOptions { keys, ..OpenOptions::default() })
}

/// Two points, encrypted.
fn small(key: u8) -> (SimFileSystem, Repository) {
    let (fs, repository) = init(vec![file(key)]);
    backup(&repository, 0).unwrap();
    backup(&repository, 1).unwrap();
    (fs, repository)
}

fn contents(fs: &SimFileSystem) -> Vec<(String, Vec<u8>)> {
    fs.paths().into_iter().map(|path| (path.clone(), fs.content(&path).unwrap())).collect()
}

fn has(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|part| part == needle)
}

#[test]
fn nothing_of_the_guest_or_its_name_or_ids_is_in_the_store() {
    let (fs, repository) = small(1);
    let plain = plain_small();
    let id = blake3::hash(&block(3));
    let secrets: [(&str, Vec<u8>); 5] = [
        ("a block's bytes", block(3)[..32].to_vec()),
        ("a block's id without a key", id.as_bytes().to_vec()),
        ("a block's id", repository.hasher().block_id(&block(3)).0.to_vec()),
        ("the VM's name", world::VM.as_bytes().to_vec()),
        ("what the manifest says", b"content_root".to_vec()),
    ];
    for (what, secret) in &secrets {
        let leaks: Vec<_> = contents(&fs).into_iter().filter(|(_, all)| has(all, secret)).collect();
        assert!(leaks.is_empty(), "{what} is in {:?}", leaks[0].0);
    }
    // The same search finds all but the keyed id where nothing is encrypted.
    for (what, secret) in secrets.iter().filter(|(what, _)| *what != "a block's id") {
        let raw = *what == "a block's bytes";
        let found = contents(&plain).iter().any(|(_, all)| has(all, secret));
        assert!(found || raw, "the search for {what} finds nothing at all");
    }
    assert_ne!(repository.hasher().block_id(&block(3)).0, *id.as_bytes());
}

#[test]
fn without_the_right_key_nothing_is_read_written_or_believed_empty() {
    let (fs, _) = small(1);
    let before = contents(&fs);
    let (_, other) = small(2);
    let kit_of_another = other.recovery_kit(&[file(2)]).unwrap();
    let kit_of_another =
        KeyMaterial::from_key_file(kit_of_another.text().as_bytes().to_vec().into()).unwrap();
    assert!(matches!(open(&fs, vec![]), Err(Error::KeyMissing { .. })));
    for wrong in [file(2), passphrase("not this one"), kit_of_another] {
        let error = open(&fs, vec![wrong]).unwrap_err();
        assert!(matches!(error, Error::KeyRefused { .. }), "{error}");
        assert!(error.damage().is_none() && error.to_string().contains("1 keys"), "{error}");
    }
    assert!(contents(&fs) == before, "something was written");
    let opened = open(&fs, vec![file(2), passphrase("not this one"), file(1)]).unwrap();
    assert_eq!(assert_points_are_right(&opened), [0, 1]);
}

#[test]
fn a_repository_that_is_not_encrypted_needs_no_key_and_takes_none() {
    let fs = initialised();
    backup(&world::open(&fs), 0).unwrap();
    let repository = open(&fs, vec![file(1)]).unwrap();
    assert!(!repository.is_encrypted() && !repository.info().unwrap().encrypted);
    assert_eq!(assert_points_are_right(&repository), [0]);
    assert!(repository.keys().unwrap().is_empty());
    let now = jiff::Timestamp::UNIX_EPOCH;
    let added = repository.add_key(&[file(1)], &file(2), None, now);
    assert!(matches!(added, Err(Error::Refused { .. })));
    assert!(matches!(repository.recovery_kit(&[file(1)]), Err(Error::Refused { .. })));
}

#[test]
fn keys_come_and_go_and_the_data_stay_as_they_are() {
    let (fs, repository) = small(1);
    let data = |fs: &SimFileSystem| {
        contents(fs).into_iter().filter(|(path, _)| !path.starts_with("keys/")).collect::<Vec<_>>()
    };
    let before = data(&fs);
    let now = jiff::Timestamp::from_second(9).unwrap();
    let first = repository.keys().unwrap().remove(0);
    assert_eq!(first.method, KeyMethod::File);
    let refused = repository.remove_key(&first.id).unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    let wrong = repository.add_key(&[file(9)], &file(2), None, now).unwrap_err();
    assert!(matches!(wrong, Error::KeyRefused { .. }), "{wrong}");
    let again = repository.add_key(&[file(1)], &file(1), None, now).unwrap_err();
    assert!(matches!(again, Error::Refused { .. }), "{again}");

    let label = Some("the safe".to_owned());
    let second = repository.add_key(&[file(1)], &passphrase("a long one"), label, now).unwrap();
    assert_eq!(repository.keys().unwrap(), [first.clone(), second.clone()]);
    repository.remove_key(&first.id).unwrap();
    assert!(matches!(repository.remove_key(&first.id), Err(Error::NotFound { .. })));
    assert!(matches!(open(&fs, vec![file(1)]), Err(Error::KeyRefused { .. })));
    assert!(data(&fs) == before, "data were rewritten");
    let opened = open(&fs, vec![passphrase("a long one\n")]).unwrap();
    assert_eq!(assert_points_are_right(&opened), [0, 1]);
    backup(&opened, 2).unwrap();
    assert_sound(&opened, "after the rotation");
}

#[test]
fn the_recovery_kit_opens_it_when_every_key_is_lost() {
    let (fs, repository) = small(1);
    let kit = repository.recovery_kit(&[file(1)]).unwrap();
    let text = kit.text().to_string();
    assert!(text.contains(repository.id().as_str()) && !format!("{kit:?}").contains("key"));
    let key = repository.keys().unwrap().remove(0);
    assert!(fs.vanish(&format!("keys/{}", key.id)));
    assert!(matches!(open(&fs, vec![file(1)]), Err(Error::KeyRefused { .. })));
    let typed = text.to_lowercase().replacen("icecore", "Icecore", 1);
    let kit = KeyMaterial::from_key_file(typed.into_bytes().into()).unwrap();
    let opened = open(&fs, vec![kit.clone()]).unwrap();
    assert_eq!(assert_points_are_right(&opened), [0, 1]);
    opened.add_key(&[kit], &file(7), None, jiff::Timestamp::UNIX_EPOCH).unwrap();
    open(&fs, vec![file(7)]).unwrap();
}

#[test]
fn a_damaged_key_is_in_nobodys_way_and_can_be_removed() {
    let (fs, repository) = small(1);
    let (donor, _) = init(vec![file(3)]);
    let foreign = donor.paths().into_iter().find(|path| path.starts_with("keys/")).unwrap();
    put(&fs, &foreign, &donor.content(&foreign).unwrap());
    let now = jiff::Timestamp::UNIX_EPOCH;
    let own = repository.keys().unwrap().remove(0);
    let damaged = repository.damaged_keys().unwrap();
    assert_eq!(damaged.len(), 1);
    assert_eq!(format!("keys/{}", damaged[0].0), foreign);
    // It does not count as one that opens the repository.
    assert!(matches!(repository.remove_key(&own.id), Err(Error::Refused { .. })));
    repository.add_key(&[file(1)], &file(2), None, now).unwrap();
    let report = repository.check(&Default::default(), |_| ()).unwrap();
    assert!(report.errors.iter().any(|error| error.object == foreign), "{report:?}");
    repository.remove_key(&damaged[0].0).unwrap();
    assert!(repository.damaged_keys().unwrap().is_empty());
    repository.remove_key(&own.id).unwrap();
    assert_sound(&repository, "after the foreign key");
}

#[test]
fn a_repository_that_no_key_opens_any_more_is_told_of() {
    let (fs, repository) = small(1);
    let key = repository.keys().unwrap().remove(0);
    assert!(fs.vanish(&format!("keys/{}", key.id)));
    let report = repository.check(&Default::default(), |_| ()).unwrap();
    assert!(report.errors.iter().any(|error| error.object == "keys/"), "{report:?}");
}

#[test]
fn nobody_has_to_try_endless_keys() {
    let (fs, repository) = small(1);
    for at in 2..=64 {
        let now = jiff::Timestamp::UNIX_EPOCH;
        repository.add_key(&[file(1)], &file(at), None, now).unwrap();
    }
    let more = repository.add_key(&[file(1)], &file(99), None, jiff::Timestamp::UNIX_EPOCH);
    assert!(matches!(more, Err(Error::Refused { .. })), "{more:?}");
    // What somebody puts there who may write to the store: well closed, and dear to try.
    let phrased = init(vec![passphrase("of the donor")]).0;
    let path = phrased.paths().into_iter().find(|path| path.starts_with("keys/")).unwrap();
    for number in 0..65 {
        let (id, forged) = forged_key(&phrased.content(&path).unwrap(), &fs, number);
        put(&fs, &format!("keys/{id}"), &forged);
    }
    let error = open(&fs, vec![passphrase("any of them")]).unwrap_err();
    assert_eq!(error.damage().unwrap().kind, DamageKind::Limit);
    // A key file is not kept out by it.
    assert_eq!(assert_points_are_right(&open(&fs, vec![file(1)]).unwrap()), [0, 1]);
}

/// A key object, put right for another id and the repository in `fs`, that asks for less memory.
fn forged_key(key: &[u8], fs: &SimFileSystem, number: u32) -> (String, Vec<u8>) {
    let id = format!("{number:016}");
    let mut forged = key[..key.len() - 32].to_vec();
    forged[16..32].copy_from_slice(&fs.content("config").unwrap()[16..32]);
    for (before, new) in [("\"id\":\"", &*id), ("\"memory_kib\":", "10000")] {
        let found = forged.windows(before.len()).position(|part| part == before.as_bytes());
        let at = found.unwrap() + before.len();
        forged[at..at + new.len()].copy_from_slice(new.as_bytes());
    }
    let sum = *blake3::hash(&forged).as_bytes();
    forged.extend_from_slice(&sum);
    (id, forged)
}

/// An attacker who writes to the store has whole, well closed objects of other places.
#[test]
fn objects_sealed_for_another_place_are_not_believed() {
    let (fs, repository) = small(1);
    let points = repository.points().unwrap();
    let (first, second) = (&points[0], &points[1]);
    let path = |kind: &str, id: &dyn std::fmt::Display| format!("{kind}/{id}");
    let find =
        |prefix: &str| fs.paths().into_iter().filter(|p| p.starts_with(prefix)).collect::<Vec<_>>();
    // An older manifest under a newer point's name, and a receipt likewise.
    for kind in ["points", "receipts"] {
        let (old, new) = (path(kind, &first.id), path(kind, &second.id));
        let whole = fs.content(&new).unwrap();
        fs.overwrite(&new, fs.content(&old).unwrap());
        let report = world::check(&open(&fs, vec![file(1)]).unwrap());
        let error = report.errors.iter().find(|error| error.object == new).unwrap();
        assert_eq!(error.kind, "foreign", "{kind}: {report:?}");
        fs.overwrite(&new, whole);
    }
    // A pack and a run whose header is put right, with the frames of another one.
    for kind in ["packs/", "runs/"] {
        let paths = find(kind);
        let (one, two) = (&paths[0], &paths[1]);
        let (whole, mut forged) = (fs.content(one).unwrap(), fs.content(two).unwrap());
        forged[..60].copy_from_slice(&whole[..60]);
        fs.overwrite(one, forged);
        let opened = open(&fs, vec![file(1)]).unwrap();
        assert!(!world::check(&opened).ok);
        for point in opened.points().unwrap() {
            let instant = point.meta.label.as_deref().unwrap().parse().unwrap();
            for (disk, expected) in world::disks_at(instant) {
                assert!(restore(&opened, &point, &disk).map_or(true, |bytes| bytes == expected));
            }
        }
        fs.overwrite(one, whole);
    }
    // The fate of one point as that of another: deleted by replay.
    repository.delete_point(&first.id).unwrap();
    let fate = find("coordination/fates/").remove(0);
    let replayed = fate.replace(first.id.as_str(), second.id.as_str());
    put(&fs, &replayed, &fs.content(&fate).unwrap());
    let left = open(&fs, vec![file(1)]).unwrap().points().unwrap();
    assert_eq!(left, std::slice::from_ref(second), "a replayed deletion counts");
    assert!(fs.vanish(&replayed));
    assert!(world::check(&open(&fs, vec![file(1)]).unwrap()).ok);
}

#[test]
fn what_is_in_clear_is_not_believed_in_an_encrypted_repository() {
    let (fs, repository) = small(1);
    let plain = initialised();
    let told = backup(&world::open(&plain), 0).unwrap();
    // A whole manifest in clear, made to look like one of this repository.
    let mut forged = plain.content(&format!("points/{}", told.id)).unwrap();
    forged[16..32].copy_from_slice(repository.id().as_str().as_bytes());
    let end = forged.len() - 32;
    let sum = *blake3::hash(&forged[..end]).as_bytes();
    forged[end..].copy_from_slice(&sum);
    put(&fs, &format!("points/{}", told.id), &forged);
    let opened = open(&fs, vec![file(1)]).unwrap();
    assert_eq!(opened.points().unwrap().len(), 2);
    assert!(opened.point(&told.id).unwrap_err().to_string().contains("not encrypted"));
    // And a config in clear that would have the next backup written in clear: another repository.
    fs.overwrite("config", plain.content("config").unwrap());
    let error = world::check(&opened);
    assert!(error.errors.iter().any(|error| error.object == "config"));
    assert!(open(&fs, vec![file(1)]).unwrap().points().unwrap().is_empty());
}

#[test]
fn a_config_that_was_changed_is_told_from_a_wrong_key() {
    let (fs, _) = small(1);
    let whole = fs.content("config").unwrap();
    let text = String::from_utf8_lossy(&whole[40..whole.len() - 32]).into_owned();
    let weaker = text.replace("zstd:1", "zstd:9");
    assert_ne!(weaker, text);
    let mut forged = whole[..40].to_vec();
    forged.extend_from_slice(weaker.as_bytes());
    let sum = *blake3::hash(&forged).as_bytes();
    forged.extend_from_slice(&sum);
    fs.overwrite("config", forged);
    let error = open(&fs, vec![file(1)]).unwrap_err();
    assert_eq!(error.damage().unwrap().object, "config", "{error}");
}

#[test]
fn whoever_has_no_key_can_scrub_all_but_not_read() {
    let (fs, repository) = small(1);
    repository.tell_of_service(&service()).unwrap();
    let plain = plain_small();
    world::open(&plain).tell_of_service(&service()).unwrap();
    for (fs, reference) in [(fs, "encrypted"), (plain, "plain")] {
        let look = || scrub(store(&fs), |_| ()).unwrap();
        let report = look();
        assert!(report.ok && report.points_checked == 2, "{reference}: {report:?}");
        for (path, whole) in contents(&fs).into_iter().filter(|(_, whole)| !whole.is_empty()) {
            let step = if whole.len() > 20_000 { 4099 } else { 7 };
            for at in (0..whole.len()).step_by(step).chain([whole.len() - 1]) {
                let mut bad = whole.clone();
                bad[at] ^= 1 << (at % 8);
                fs.overwrite(&path, bad);
                let named = match scrub(store(&fs), |_| ()) {
                    Ok(report) => report.errors.iter().any(|error| error.object == path),
                    Err(_) => path == "config",
                };
                assert!(named, "{reference}: byte {at} of {path}");
            }
            fs.overwrite(&path, whole[..whole.len() - 1].to_vec());
            let cut = scrub(store(&fs), |_| ());
            assert!(cut.map_or(true, |report| !report.ok), "{reference}: {path} cut");
            fs.overwrite(&path, whole);
        }
        assert!(look().ok);
    }
}

fn service() -> ServiceRecord {
    ServiceRecord {
        service: ServiceId::from_random(7),
        host: "host".to_owned(),
        version: "1".to_owned(),
        state: ServiceState::Up,
        at: jiff::Timestamp::UNIX_EPOCH,
        period_seconds: 60,
    }
}

fn plain_small() -> SimFileSystem {
    let fs = initialised();
    backup(&world::open(&fs), 0).unwrap();
    backup(&world::open(&fs), 1).unwrap();
    fs
}

#[test]
fn gc_of_an_encrypted_repository_frees_what_is_deleted() {
    let (fs, repository) = small(1);
    let first = repository.resolve("latest~1", None).unwrap();
    repository.delete_point(&first).unwrap();
    for _ in 0..2 {
        gc(&repository).unwrap();
    }
    assert_sound(&repository, "after gc");
    assert_eq!(assert_points_are_right(&open(&fs, vec![file(1)]).unwrap()), [1]);
}

#[test]
fn two_init_at_once_and_one_that_crashed_leave_one_repository() {
    let fs = SimFileSystem::new();
    let (_, done) = init(vec![file(3)]);
    drop(done);
    // What is left of an init that died after its first key.
    let (donor, _) = init(vec![file(3)]);
    let key = donor.paths().into_iter().find(|path| path.starts_with("keys/")).unwrap();
    put(&fs, &key, &donor.content(&key).unwrap());
    let options = InitOptions { keys: vec![file(4)], ..InitOptions::default() };
    Repository::init_on(store(&fs), options.clone(), jiff::Timestamp::UNIX_EPOCH).unwrap();
    assert_eq!(open(&fs, vec![file(4)]).unwrap().keys().unwrap().len(), 1);
    // A stranger's file of that name is none of ours.
    let stranger = SimFileSystem::new();
    put(&stranger, &key, b"my other key");
    let refused = Repository::init_on(store(&stranger), options, jiff::Timestamp::UNIX_EPOCH);
    assert!(matches!(refused, Err(Error::InitRefused { .. })));
    assert!(stranger.content(&key).is_some());
}

#[test]
fn of_two_init_that_race_one_wins_and_its_key_opens() {
    for _ in 0..50 {
        let fs = SimFileSystem::new();
        let made = std::thread::scope(|scope| {
            let racers = [1, 2].map(|fill| {
                let store = store(&fs);
                scope.spawn(move || {
                    let options = InitOptions { keys: vec![file(fill)], ..InitOptions::default() };
                    Repository::init_on(store, options, jiff::Timestamp::UNIX_EPOCH).is_ok()
                })
            });
            racers.map(|racer| racer.join().unwrap())
        });
        assert!(made[0] != made[1], "{made:?}");
        let winner = if made[0] { 1 } else { 2 };
        let repository = open(&fs, vec![file(winner)]).unwrap();
        assert_eq!(repository.keys().unwrap().len(), 1);
        assert!(repository.damaged_keys().unwrap().is_empty());
    }
}

fn put(fs: &SimFileSystem, path: &str, bytes: &[u8]) {
    let store: Arc<dyn Store> = store(fs);
    store.put(&icecore_repository::store::ObjectName::new(path).unwrap(), bytes).unwrap();
}
