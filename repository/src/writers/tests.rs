//! Announcing, revoking, deleting and protecting on the simulated file system.

use std::time::Duration;

use super::fate::Wish;
use super::*;
use crate::error::Error;
use crate::ids::RepositoryId;
use crate::store::{Access, CallFault, CrashMode, DirectoryStore, SimFileSystem};

fn coordination(fs: &SimFileSystem) -> Coordination {
    let store = DirectoryStore::on(Arc::new(fs.clone()), "sim", Access::ReadWrite);
    Coordination::new(Arc::new(store), Sealing::plain(RepositoryId::from_random(1)))
}

fn writer(number: u128) -> WriterId {
    WriterId::from_random(number)
}

fn point(number: u32) -> PointId {
    PointId::next(jiff::Timestamp::UNIX_EPOCH, None, number)
}

fn record(number: u128) -> WriterRecord {
    WriterRecord {
        writer: writer(number),
        host: "here".into(),
        purpose: "a test".into(),
        life: None,
    }
}

#[test]
fn an_announcement_lasts_until_it_is_ended() {
    let here = coordination(&SimFileSystem::new());
    let announced = here.announce(&record(1)).unwrap();
    assert_eq!(here.writers().unwrap(), [writer(1)]);
    assert_eq!(here.writer_record(&writer(1)).unwrap().host, "here");
    drop(here.announce(&record(2)).unwrap());
    assert_eq!(here.writers().unwrap().len(), 2, "a dropped announcement stays for gc");
    announced.end().unwrap();
    assert_eq!(here.writers().unwrap(), [writer(2)]);
}

#[test]
fn beats_replace_each_other() {
    let here = coordination(&SimFileSystem::new());
    for count in 0..3 {
        here.beat(&writer(1), count).unwrap();
    }
    here.beat(&writer(2), 0).unwrap();
    let mut beats = here.beats().unwrap();
    beats.sort();
    let mut expected = vec![(writer(1), 2), (writer(2), 0)];
    expected.sort();
    assert_eq!(beats, expected);
    here.forget_writer(&writer(1)).unwrap();
    assert_eq!(here.beats().unwrap(), [(writer(2), 0)]);
}

#[test]
fn generations_only_grow() {
    let here = coordination(&SimFileSystem::new());
    assert_eq!(here.generation().unwrap(), Generation(0));
    for expected in 1..12 {
        assert_eq!(here.next_generation().unwrap(), Generation(expected));
        assert_eq!(here.generation().unwrap(), Generation(expected));
    }
    assert!(here.last_parts(GENERATIONS).unwrap().len() <= 2);
}

#[test]
fn a_revoked_writer_is_told_and_only_the_verdict_counts() {
    let here = coordination(&SimFileSystem::new());
    let announced = here.announce(&record(1)).unwrap();
    announced.must_stand(&point(1)).unwrap();
    here.fence(&writer(1)).unwrap();
    let error = announced.must_stand(&point(1)).unwrap_err();
    assert!(matches!(error, Error::Revoked { .. }), "{error}");
    let undecided = here.standing().unwrap();
    assert_eq!(undecided.of(&point(1), &writer(1)), PointStanding::Undecided);
    assert!(undecided.sees(&point(1), &writer(2)));

    let first = BTreeSet::from([point(1)]);
    assert_eq!(here.judge(&writer(1), &first).unwrap(), first);
    let second = BTreeSet::from([point(1), point(2)]);
    assert_eq!(here.judge(&writer(1), &second).unwrap(), first, "the first verdict is final");
    let decided = here.standing().unwrap();
    assert_eq!(decided.of(&point(1), &writer(1)), PointStanding::Valid);
    assert_eq!(decided.of(&point(2), &writer(1)), PointStanding::Disowned);
}

#[test]
fn a_protected_point_is_not_deleted_and_a_deleted_one_not_protected() {
    let here = coordination(&SimFileSystem::new());
    here.wish(&point(1), Wish::Protect).unwrap();
    here.wish(&point(1), Wish::Protect).unwrap();
    let refused = here.wish(&point(1), Wish::Delete).unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    assert!(here.standing().unwrap().protected().contains(&point(1)));
    here.wish(&point(1), Wish::Unprotect).unwrap();
    here.wish(&point(1), Wish::Delete).unwrap();
    here.wish(&point(1), Wish::Delete).unwrap();
    assert!(matches!(here.wish(&point(1), Wish::Protect), Err(Error::NotFound { .. })));
    let standing = here.standing().unwrap();
    assert_eq!(standing.of(&point(1), &writer(1)), PointStanding::Deleted);
    here.forget_points(&BTreeSet::from([point(1)])).unwrap();
    assert_eq!(here.standing().unwrap(), Standing::default());
}

#[test]
fn of_a_deletion_and_a_protection_at_once_one_succeeds() {
    for round in 0..20 {
        let here = coordination(&SimFileSystem::new());
        let wishes = [Wish::Protect, Wish::Delete, Wish::Protect, Wish::Delete];
        let results: Vec<bool> = std::thread::scope(|scope| {
            let race = |wish| {
                let here = here.clone();
                scope.spawn(move || here.wish(&point(round), wish).is_ok())
            };
            let racers: Vec<_> = wishes.map(race).into_iter().collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        assert_eq!(results[0], results[2]);
        assert_ne!(results[0], results[1]);
        assert_eq!(here.standing().unwrap().is_deleted(&point(round)), results[1]);
    }
}

#[test]
fn a_damaged_fate_deletes_nothing() {
    let fs = SimFileSystem::new();
    let here = coordination(&fs);
    here.wish(&point(1), Wish::Delete).unwrap();
    let path = fs.paths().into_iter().find(|path| path.starts_with(FATES)).unwrap();
    let whole = fs.content(&path).unwrap();
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1;
        fs.overwrite(&path, bad);
        assert!(!here.standing().unwrap().is_deleted(&point(1)), "byte {at}");
    }
}

#[test]
fn a_full_disk_still_takes_a_deletion_from_the_reserve() {
    let fs = SimFileSystem::new();
    let here = coordination(&fs);
    here.refill_reserve().unwrap();
    fs.set_capacity(Some(fs.used_bytes()));
    here.wish(&point(1), Wish::Delete).unwrap();
    assert!(here.standing().unwrap().is_deleted(&point(1)));
    here.refill_reserve().unwrap();
    fs.set_capacity(None);
    here.refill_reserve().unwrap();
    assert_eq!(here.last_parts(RESERVE).unwrap().len(), 4);
}

#[test]
fn a_crash_inside_a_revocation_is_finished_by_the_next_gc() {
    let revoke = |fs: &SimFileSystem| -> Result<()> {
        let here = coordination(fs);
        drop(here.announce(&record(1))?);
        here.fence(&writer(1))?;
        here.judge(&writer(1), &BTreeSet::from([point(1)]))?;
        here.forget_writer(&writer(1))
    };
    let healthy = SimFileSystem::new();
    revoke(&healthy).unwrap();
    for call in 0..healthy.calls() {
        let fs = SimFileSystem::new();
        fs.inject(call, CallFault::CrashTorn);
        revoke(&fs).unwrap_err();
        let after = coordination(&fs.after_crash(CrashMode::PowerCut));
        let standing = after.standing().unwrap();
        let fenced = standing.is_revoked(&writer(1));
        let left = after.writers().unwrap() == [writer(1)];
        assert!(!fenced || left || standing.sees(&point(1), &writer(1)), "call {call}");
        after.fence(&writer(1)).unwrap();
        after.judge(&writer(1), &BTreeSet::from([point(1)])).unwrap();
        after.forget_writer(&writer(1)).unwrap();
        assert!(after.standing().unwrap().sees(&point(1), &writer(1)), "call {call}");
    }
}

const PATIENCE: Duration = Duration::from_secs(60);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_writer_is_silent_only_after_the_whole_patience() {
    let mut watch = Watch::new([writer(1), writer(2)], PATIENCE);
    let both = [writer(1), writer(2)];
    let seen = watch.observe(seconds(0), &both, &[(writer(1), 4)]);
    assert_eq!(seen.alive.len(), 2);
    assert_eq!(watch.observe(seconds(59), &both, &[(writer(1), 4)]).alive.len(), 2);
    let seen = watch.observe(seconds(60), &both, &[(writer(1), 5)]);
    assert_eq!((seen.alive, seen.silent), (vec![writer(1)], vec![writer(2)]));
    watch.forget(&writer(2));
    assert!(!watch.is_done());
    // A counter that goes back is no sign of life.
    let seen = watch.observe(seconds(120), &both, &[(writer(1), 3)]);
    assert_eq!(seen.silent, [writer(1)]);
    watch.observe(seconds(121), &[], &[]);
    assert!(watch.is_done());
}

#[test]
fn writers_announced_later_are_not_waited_for() {
    let mut watch = Watch::new([writer(1)], PATIENCE);
    let seen = watch.observe(seconds(1), &[writer(1), writer(2)], &[(writer(2), 1)]);
    assert_eq!(seen.alive, [writer(1)]);
}
