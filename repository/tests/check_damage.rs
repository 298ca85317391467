//! check names what is damaged: every flipped byte, every deleted, truncated and swapped object of a
//! small repository. FAULTS rows 39, 40, 41.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed

mod world;

use icecore_repository::store::{CrashMode, SimFileSystem};
use icecore_repository::{CheckOptions, CheckReport, Error, Repository};
use world::{
    VM, assert_points_are_right, backup, block, check, disks_at, gc, initialised, open,
    prepare_disks, restore,
};

/// Large and of one kind: a few of its bytes stand for all.
const RESERVE: &str = "coordination/reserve/";
const RESERVE_STEP: usize = 16_381;

/// Two points, one of them protected, and a deleted one.
fn small() -> SimFileSystem {
    let fs = initialised();
    let repository = open(&fs);
    for instant in 0..3 {
        backup(&repository, instant).unwrap();
    }
    let resolve = |spec| repository.resolve(spec, None).unwrap();
    repository.protect(&resolve("latest")).unwrap();
    repository.delete_point(&resolve("latest~1")).unwrap();
    gc(&repository).unwrap();
    let report = check(&repository);
    assert!(report.ok && report.points_checked == 2 && report.blocks_checked > 10, "{report:?}");
    fs
}

fn copy(fs: &SimFileSystem) -> SimFileSystem {
    fs.after_crash(CrashMode::Process)
}

fn names(report: &CheckReport, path: &str) -> bool {
    !report.ok && report.errors.iter().any(|error| error.object == path)
}

/// Objects with content: beats and generations say all by their names.
fn objects(fs: &SimFileSystem) -> Vec<(String, Vec<u8>)> {
    let paths = fs.paths().into_iter();
    let all = paths.map(|path| (path.clone(), fs.content(&path).unwrap()));
    all.filter(|(_, content)| !content.is_empty()).collect()
}

/// A restore of damaged points fails or is right; it never is wrong.
fn assert_restores_no_lie(repository: &Repository, path: &str) {
    for point in repository.points().unwrap_or_default() {
        let instant: u64 = point.meta.label.as_deref().unwrap().parse().unwrap();
        for (disk, expected) in disks_at(instant) {
            if let Ok(bytes) = restore(repository, &point, &disk) {
                assert!(bytes == expected, "a wrong restore with damage in {path}");
            }
        }
    }
}

#[test]
fn every_flipped_byte_is_named() {
    let fs = small();
    let repository = open(&fs);
    for (path, whole) in objects(&fs) {
        let step = if path.starts_with(RESERVE) { RESERVE_STEP } else { 1 };
        for at in (0..whole.len()).step_by(step) {
            let mut bad = whole.clone();
            bad[at] ^= 1 << (at % 8);
            fs.overwrite(&path, bad);
            let report = check(&repository);
            assert!(names(&report, &path), "byte {at} of {path}: {:?}", report.errors);
            if at % 16 == 0 && opens_without(&path) {
                assert_restores_no_lie(&open(&fs), &path);
            }
        }
        fs.overwrite(&path, whole);
    }
    assert!(check(&repository).ok);
}

#[test]
fn every_deleted_and_every_truncated_object_is_named() {
    let fs = small();
    let repository = open(&fs);
    for (path, whole) in objects(&fs) {
        for length in [0, 1, whole.len() / 2, whole.len() - 1] {
            fs.overwrite(&path, whole[..length].to_vec());
            let report = check(&repository);
            assert!(names(&report, &path), "{path} cut to {length}: {:?}", report.errors);
            if opens_without(&path) {
                assert_restores_no_lie(&open(&fs), &path);
            }
        }
        fs.overwrite(&path, [whole.clone(), vec![0]].concat());
        assert!(names(&check(&repository), &path), "{path} with a byte more");
        fs.overwrite(&path, whole);
        // What was decided about a point, and the reserve as a whole, may be taken back.
        if path.starts_with("coordination/fates/") {
            continue;
        }
        let without = copy(&fs);
        assert!(without.vanish(&path));
        if !opens_without(&path) {
            let error = open_error(&without);
            let clear = matches!(error, Error::NotARepository { .. } | Error::KeyRefused { .. });
            assert!(clear, "{error}");
            continue;
        }
        let report = check(&open(&without));
        assert!(names(&report, &path), "{path} deleted: {:?}", report.errors);
        assert_restores_no_lie(&open(&without), &path);
    }
}

/// Whether a repository can be opened without an object.
fn opens_without(path: &str) -> bool {
    path != "config" && !path.starts_with("keys/")
}

fn open_error(fs: &SimFileSystem) -> Error {
    Repository::open_on(world::store(fs), world::open_options()).err().unwrap()
}

#[test]
fn swapped_objects_are_both_named() {
    let fs = small();
    let all = objects(&fs);
    let mut swaps = 0;
    for (n, (one, content_one)) in all.iter().enumerate() {
        for (two, content_two) in &all[n + 1..] {
            let same_place = one.split('/').next() == two.split('/').next();
            if !same_place || one.starts_with("coordination/") {
                continue;
            }
            fs.overwrite(one, content_two.clone());
            fs.overwrite(two, content_one.clone());
            let report = check(&open(&fs));
            assert!(names(&report, one) && names(&report, two), "{one} {two}: {report:?}");
            assert_restores_no_lie(&open(&fs), one);
            fs.overwrite(one, content_one.clone());
            fs.overwrite(two, content_two.clone());
            swaps += 1;
        }
    }
    assert!(swaps > 5, "{swaps}");
}

#[test]
fn a_vanished_manifest_is_told_from_a_deleted_point() {
    let fs = initialised();
    let repository = open(&fs);
    backup(&repository, 0).unwrap();
    let gone = backup(&repository, 1).unwrap();
    let path = format!("points/{}", gone.id);
    let without = copy(&fs);
    without.vanish(&path);
    let report = check(&open(&without));
    let error = report.errors.iter().find(|error| error.object == path).unwrap();
    assert_eq!(error.kind, "vanished");
    // gc does not make it worse: nothing of it is a reason to stop.
    gc(&open(&without)).unwrap();
    assert_eq!(assert_points_are_right(&open(&without)), [0]);

    repository.delete_point(&gone.id).unwrap();
    assert!(check(&repository).ok, "deleted, not yet collected");
    for _ in 0..3 {
        gc(&repository).unwrap();
        assert!(check(&repository).ok);
    }
    assert!(repository.point(&gone.id).is_err());
}

#[test]
fn objects_of_another_repository_are_refused() {
    let (ours, theirs) = (small(), small());
    let point = open(&theirs).points().unwrap().pop().unwrap();
    let path = format!("points/{}", point.id);
    let manifest = theirs.content(&path).unwrap();
    // Under the name of one of ours, and under its own.
    let victim = ours.paths().into_iter().find(|path| path.starts_with("points/")).unwrap();
    ours.overwrite(&victim, manifest);
    let repository = open(&ours);
    assert_eq!(repository.points().unwrap().len(), 1);
    let report = check(&repository);
    let error = report.errors.iter().find(|error| error.object == victim).unwrap();
    assert_eq!(error.kind, "foreign");
}

#[test]
fn shallow_checks_see_what_is_missing_and_samples_see_some_flips() {
    let fs = small();
    let repository = open(&fs);
    let shallow = CheckOptions::default();
    let report = repository.check(&shallow, |_| ()).unwrap();
    assert!(report.ok && report.blocks_checked == 0);
    for (path, _) in objects(&fs).iter().filter(|(path, _)| path.starts_with("packs/")) {
        let without = copy(&fs);
        without.vanish(path);
        assert!(names(&open(&without).check(&shallow, |_| ()).unwrap(), path));
    }
    let sample = |percent| CheckOptions { sample: Some(percent), ..CheckOptions::default() };
    let blocks = |percent| repository.check(&sample(percent), |_| ()).unwrap().blocks_checked;
    assert_eq!(blocks(100.0), check(&repository).blocks_checked);
    assert_eq!(blocks(0.0), 0);
    assert!((0..50).map(|_| blocks(20.0)).collect::<std::collections::BTreeSet<_>>().len() > 1);
}

#[test]
fn a_check_of_one_point_ignores_the_others() {
    let fs = initialised();
    let repository = open(&fs);
    let first = backup(&repository, 0).unwrap();
    let mut other = disks_at(1);
    other.insert("alone".to_owned(), block(4242));
    let second = prepare_disks(&repository, VM, 1, &other).unwrap().commit().unwrap();
    let run = &second.disk(&icecore_repository::DiskId::new("alone").unwrap()).unwrap().runs[0];
    let path = fs.paths().into_iter().find(|path| path.ends_with(&run.run.to_string())).unwrap();
    fs.vanish(&path);
    let of = |id: &icecore_repository::PointId| {
        let point = Some(id.clone());
        let options = CheckOptions { read_data: true, point, ..CheckOptions::default() };
        open(&fs).check(&options, |_| ())
    };
    assert!(of(&first.id).unwrap().ok);
    assert!(names(&of(&second.id).unwrap(), &path));
    repository.delete_point(&first.id).unwrap();
    assert!(matches!(of(&first.id), Err(Error::NotFound { .. })));
}

/// FAULTS row 39: a damaged block is healed by the next backup that reads the disk whole.
#[test]
fn the_next_whole_read_heals_what_was_damaged_or_lost() {
    type Harm = fn(&SimFileSystem, &str);
    let flip: Harm = |fs, path| {
        let mut bytes = fs.content(path).unwrap();
        bytes[70] ^= 1;
        fs.overwrite(path, bytes);
    };
    let lose: Harm = |fs, path| assert!(fs.vanish(path));
    for harm in [flip, lose] {
        let fs = initialised();
        let repository = open(&fs);
        let first = backup(&repository, 0).unwrap();
        let system = icecore_repository::DiskId::new("system").unwrap();
        let path = fs.paths().into_iter().find(|path| path.starts_with("packs/")).unwrap();
        let whole = fs.content(&path).unwrap();
        harm(&fs, &path);
        assert!(!repository.disk_is_damaged(&first, &system).unwrap(), "nobody has looked yet");
        assert!(names(&check(&repository), &path));
        assert!(repository.disk_is_damaged(&first, &system).unwrap());
        // gc in between forgets nothing that is needed.
        gc(&repository).unwrap();

        let second = backup(&open(&fs), 1).unwrap();
        assert!(!repository.disk_is_damaged(&second, &system).unwrap());
        let of_second = CheckOptions {
            read_data: true,
            point: Some(second.id.clone()),
            ..CheckOptions::default()
        };
        for (disk, expected) in disks_at(1) {
            assert!(restore(&open(&fs), &second, &disk).unwrap() == expected);
        }
        assert!(open(&fs).check(&of_second, |_| ()).unwrap().ok);
        assert!(names(&check(&open(&fs)), &path), "the first point stays damaged");

        // A good copy put back is recognised.
        assert!(fs.content(&path).is_none() || fs.vanish(&path));
        world::store(&fs)
            .put(&icecore_repository::store::ObjectName::new(path.as_str()).unwrap(), &whole)
            .unwrap();
        assert!(check(&open(&fs)).ok);
        assert!(!repository.disk_is_damaged(&first, &system).unwrap());
        assert_eq!(assert_points_are_right(&open(&fs)), [0, 1]);
    }
}
