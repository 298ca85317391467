//! A three-point workload on the simulated file system, crashed at every call; deletion and gc
//! likewise; and every call failing once. FAULTS rows 3, 4, 34, 35.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed

mod world;

use icecore_repository::store::{CallFault, CrashMode, SimFileSystem, Torn};
use icecore_repository::{Error, Repository, Result};
use rustix::io::Errno;
use world::{
    assert_points_are_right, assert_sound, backup, gc, init_options, initialised, open,
    open_options, store,
};

const CRASHES: [CallFault; 3] =
    [CallFault::CrashBefore, CallFault::CrashTorn, CallFault::CrashAfter];

fn modes(call: u64) -> [CrashMode; 4] {
    [
        CrashMode::Process,
        CrashMode::PowerCut,
        CrashMode::TornPowerCut(Torn(call)),
        CrashMode::TornPowerCut(Torn(!call)),
    ]
}

/// What holds after any crash: what is visible is right, work goes on, gc leaves no rest.
fn assert_recovers(after: &SimFileSystem, context: &str) -> Vec<u64> {
    let repository = open(after);
    let found = assert_points_are_right(&repository);
    let further = backup(&repository, 7).unwrap_or_else(|error| panic!("{context}: {error}"));
    gc(&repository).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_sound(&repository, context);
    let again = open(after);
    let mut expected = found.clone();
    expected.push(7);
    assert_eq!(assert_points_are_right(&again), expected, "{context}");
    assert!(after.paths().iter().all(|path| !path.starts_with(".incomplete/")), "{context}");
    again.delete_point(&further.id).unwrap();
    found
}

/// Runs `work` on copies of `base`, crashing at each of its calls in each way.
fn crash_everywhere(
    base: &SimFileSystem,
    calls_min: u64,
    work: impl Fn(&SimFileSystem) -> Result<Vec<u64>, Vec<u64>>,
    verify: impl Fn(&[u64], &SimFileSystem, &str),
) {
    let mut calls = 0;
    for fault in CRASHES {
        for call in 0.. {
            let fs = base.after_crash(CrashMode::PowerCut);
            let first = fs.calls();
            fs.inject(first + call, fault);
            let done = work(&fs).unwrap_or_else(|done| done);
            for mode in modes(call) {
                let context = format!("call {call} {fault:?} {mode:?}");
                verify(&done, &fs.after_crash(mode), &context);
            }
            calls = calls.max(call);
            if !fs.has_crashed() {
                break;
            }
        }
    }
    assert!(calls > calls_min, "only {calls} calls: this is not the workload it should be");
}

#[test]
fn a_crash_at_any_call_of_init_leaves_a_repository_or_room_for_one() {
    let init = |fs: &SimFileSystem| {
        let options = init_options();
        Repository::init_on(store(fs), options, jiff::Timestamp::UNIX_EPOCH).map(drop)
    };
    for fault in CRASHES {
        for call in 0.. {
            let fs = SimFileSystem::new();
            fs.inject(call, fault);
            let done = init(&fs).is_ok();
            for mode in modes(call) {
                let after = fs.after_crash(mode);
                match Repository::open_on(store(&after), open_options()) {
                    Ok(_) => (),
                    Err(Error::NotARepository { .. }) if !done => init(&after).unwrap(),
                    Err(error) => panic!("call {call} {fault:?} {mode:?}: {error}"),
                }
                gc(&open(&after)).unwrap();
                assert_sound(&open(&after), "after init");
            }
            if !fs.has_crashed() {
                break;
            }
        }
    }
}

/// Takes the points of instants 0, 1, 2; those that were reported as committed.
fn three_points(repository: &Repository) -> Result<Vec<u64>, Vec<u64>> {
    let mut reported = Vec::new();
    for instant in 0..3 {
        match backup(repository, instant) {
            Ok(_) => reported.push(instant),
            Err(_) => return Err(reported),
        }
    }
    Ok(reported)
}

#[test]
fn a_crash_at_any_call_leaves_whole_points_and_garbage() {
    let base = initialised();
    crash_everywhere(
        &base,
        100,
        |fs| three_points(&open(fs)),
        |reported, after, context| {
            let found = assert_recovers(after, context);
            // At most the one under way may be there in addition.
            assert!(found.len() <= reported.len() + 1, "{context}");
            assert!(found.starts_with(reported), "{context}: {found:?} lacks {reported:?}");
        },
    );
}

#[test]
fn a_crash_at_any_call_of_a_deletion_and_gc_loses_nothing_else() {
    let base = initialised();
    three_points(&open(&base)).unwrap();
    let work = |fs: &SimFileSystem| {
        let repository = open(fs);
        let middle = repository.resolve("latest~1", None).unwrap();
        let deleted = repository.delete_point(&middle).is_ok();
        let done = if deleted { vec![1] } else { vec![] };
        if gc(&repository).is_ok() { Ok(done) } else { Err(done) }
    };
    crash_everywhere(&base, 30, work, |deleted, after, context| {
        let found = assert_recovers(after, context);
        assert!(found == [0, 2] || (deleted.is_empty() && found == [0, 1, 2]), "{context}");
    });
}

#[test]
fn a_call_that_fails_once_fails_the_backup_or_does_no_harm() {
    let base = initialised();
    backup(&open(&base), 0).unwrap();
    for errno in [Errno::IO, Errno::NOSPC] {
        for call in 0.. {
            let fs = base.after_crash(CrashMode::Process);
            fs.inject(fs.calls() + call, CallFault::Fail(errno));
            let repository = open(&fs);
            let result = backup(&repository, 1);
            let context = format!("call {call} {errno:?}: {:?}", result.as_ref().err());
            let found = assert_points_are_right(&repository);
            match &result {
                Ok(_) => assert_eq!(found, [0, 1], "{context}"),
                Err(Error::CommitUnknown { .. }) => (),
                Err(_) => assert_eq!(found, [0], "{context}"),
            }
            // A success must survive a power cut: no second fsync was trusted.
            let found = assert_recovers(&fs.after_crash(CrashMode::PowerCut), &context);
            assert!(result.is_err() || found == [0, 1], "{context}");
            if call >= fs.calls() {
                break;
            }
        }
    }
}

#[test]
fn a_full_disk_fails_the_backup_and_nothing_else() {
    let fs = initialised();
    let repository = open(&fs);
    three_points(&repository).unwrap();
    let full = fs.used_bytes();
    for spare in [0, 300, 1000, 3000] {
        fs.set_capacity(Some(full + spare));
        let error = backup(&repository, 3).err().unwrap_or_else(|| panic!("{spare} was enough"));
        let text = error.to_string();
        assert!(text.contains("space"), "{text}");
        assert_eq!(assert_points_are_right(&repository), [0, 1, 2]);
    }
    // At no free byte at all, what frees space must work.
    fs.set_capacity(Some(fs.used_bytes()));
    repository.delete_point(&repository.resolve("latest~2", None).unwrap()).unwrap();
    gc(&repository).unwrap();
    fs.set_capacity(None);
    backup(&repository, 3).unwrap();
    gc(&repository).unwrap();
    assert_eq!(assert_points_are_right(&repository), [1, 2, 3]);
    assert_sound(&repository, "after a full disk");
}
