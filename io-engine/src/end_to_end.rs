//! Whole ways: an image into a repository and out again, over files and streams, both engines.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use icecore_repository::{
    BeginPoint, BlockIndex, BlockSize, ChainChoice, Compression, Consistency, ConsistencyLevel,
    DiskId, DiskReader, DiskStart, InitOptions, Point, PointMeta, PointWriter, Repository, VmName,
    WriterInfo,
};
use proptest::prelude::*;

use crate::backend::conformance::engines;
use crate::backend::toy::{Script, ToyDisk};
use crate::*;

const BLOCK: u64 = 4096;

fn disk() -> DiskId {
    DiskId::new("vda").unwrap()
}

fn options() -> Options {
    Options {
        workers: 2,
        priority: Priority::Normal,
        ..Options::new(Budget::new(16 << 20), 8 << 20)
    }
}

fn meta() -> PointMeta {
    let now = jiff::Timestamp::now();
    PointMeta {
        created_at: now,
        captured_at: now,
        label: None,
        description: None,
        consistency: Consistency {
            level: ConsistencyLevel::Crash,
            frozen_filesystems: 0,
            freeze_ms: 0.0,
            pause_ms: 0.0,
            why: None,
        },
        capsule: serde_json::Value::Null,
        disks: vec![],
        writer: WriterInfo { host: "test".into(), version: "0".into() },
        parts: vec![],
    }
}

struct Rig {
    _dir: tempfile::TempDir,
    repo: Repository,
    chain: ChainChoice,
    parent: Option<Point>,
    choice: EngineChoice,
}

impl Rig {
    fn new(choice: EngineChoice) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let init = InitOptions {
            block_size: BlockSize::new(BLOCK).unwrap(),
            compression: Compression::Zstd(1),
            ..InitOptions::default()
        };
        let repo = Repository::init(dir.path().join("repo"), init).unwrap();
        Self { _dir: dir, repo, chain: ChainChoice::New, parent: None, choice }
    }

    fn begin(&self) -> PointWriter {
        let vm = VmName::new("vm").unwrap();
        let now = jiff::Timestamp::now();
        self.repo.begin_point(BeginPoint { vm, chain: self.chain.clone(), now }).unwrap()
    }

    fn run(
        &self,
        point: &PointWriter,
        lanes: Vec<Lane>,
        size: u64,
        plan: Vec<ReadItem>,
        options: &Options,
    ) -> Result<BackupStats, EngineError> {
        let parent = self.parent.as_ref().map(|point| point.id.clone());
        let start = DiskStart { disk: disk(), size_bytes: size, parent };
        let writer = point.disk(start).unwrap();
        let mut set = LaneSet::new(lanes, self.choice).unwrap();
        let plan = plan.into_iter().map(Ok);
        let mut durable = BlockIndex(0);
        let outcome =
            backup(&mut set, size, self.repo.block_size(), writer, plan, options, |below| {
                assert!(below > durable);
                durable = below;
            });
        if outcome.is_err() {
            assert!(set.into_lanes().is_empty(), "closed after a failure");
        }
        outcome
    }

    /// A committed point of `plan`.
    fn point(&mut self, lanes: Vec<Lane>, size: u64, plan: Vec<ReadItem>) -> BackupStats {
        let writer = self.begin();
        let stats = self.run(&writer, lanes, size, plan, &options()).unwrap();
        let point = writer.commit(meta()).unwrap();
        self.chain = ChainChoice::Existing(point.chain.clone());
        self.parent = Some(point);
        stats
    }

    fn reader(&self) -> DiskReader {
        self.repo.disk_reader(self.parent.as_ref().unwrap(), &disk()).unwrap()
    }

    fn restore(
        &self,
        lanes: Vec<Lane>,
        state: TargetState,
        only: Option<RangesOf<'_>>,
    ) -> Result<RestoreStats, EngineError> {
        let mut set = LaneSet::new(lanes, self.choice)?;
        let hasher = self.repo.hasher();
        restore(&self.reader(), hasher, &mut set, state, only, Verify::ReadBack, &options())
    }
}

fn file_with(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn content(file: &File, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(file.metadata().unwrap().len(), size as u64, "no longer than the disk");
    bytes
}

fn whole(size: usize) -> Vec<ReadItem> {
    vec![ReadItem::Data(Span::new(0, size as u64))]
}

/// Random, text-like and zero stretches.
fn image(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = vec![0; size];
    for (index, chunk) in out.chunks_mut(3000).enumerate() {
        for byte in chunk {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = match (index / 5) % 4 {
                0 => (state >> 56) as u8,
                1 => b"icecore "[index % 8],
                2 => 0,
                _ => (state >> 62) as u8,
            };
        }
    }
    out
}

fn lanes_of(bytes: &[u8], streams: bool) -> Vec<Lane> {
    match streams {
        true => {
            ToyDisk::new(bytes.to_vec()).lanes(3, &Script { reversed: true, ..Script::default() })
        }
        false => Lane::files(file_with(bytes), 2).unwrap(),
    }
}

#[test]
fn a_full_point_comes_back_byte_for_byte() {
    let size = (3 << 20) + 1234;
    let bytes = image(size, 42);
    for choice in engines() {
        for streams in [false, true] {
            let mut rig = Rig::new(choice);
            let stats = rig.point(lanes_of(&bytes, streams), size as u64, whole(size));
            assert_eq!(stats.read_bytes, size as u64);
            assert!(stats.latency.count() > 0);
            let dirty = vec![0xA5; size];
            let target = file_with(&dirty);
            let lanes = Lane::files(target.try_clone().unwrap(), 2).unwrap();
            let done = rig.restore(lanes, TargetState::Unknown, None).unwrap();
            assert_eq!(done.root, Some(stats.summary.content_root));
            assert_eq!((done.written_bytes, done.verified_bytes), (size as u64, size as u64));
            assert!(content(&target, size) == bytes, "{choice:?} {streams}");
            let disk = ToyDisk::new(dirty);
            rig.restore(disk.lanes(2, &Script::default()), TargetState::Unknown, None).unwrap();
            assert!(*disk.bytes.lock().unwrap() == bytes);
            assert_eq!(*disk.flushes.lock().unwrap(), 2, "each lane was flushed");
            assert!(*disk.zeroed.lock().unwrap() > 0, "zeroes travel without payload");
        }
    }
}

#[test]
fn a_blank_file_stays_sparse_and_a_wrong_blank_is_found_out() {
    let size = 8 << 20;
    let mut bytes = vec![0; size];
    bytes[5 << 20..(5 << 20) + 100_000].fill(7);
    for choice in engines() {
        let mut rig = Rig::new(choice);
        rig.point(lanes_of(&bytes, false), size as u64, whole(size));
        let target = tempfile::tempfile().unwrap();
        target.set_len(size as u64).unwrap();
        let lanes = Lane::files(target.try_clone().unwrap(), 1).unwrap();
        let done = rig.restore(lanes, TargetState::Blank, None).unwrap();
        assert_eq!(done.zeroed_bytes, 0);
        assert!(content(&target, size) == bytes);
        use std::os::unix::fs::MetadataExt;
        assert!(target.metadata().unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
        let lie = file_with(&vec![9; size]);
        let outcome = rig.restore(Lane::files(lie, 1).unwrap(), TargetState::Blank, None);
        assert!(matches!(outcome, Err(EngineError::RootDiffers { .. })), "{outcome:?}");
    }
}

#[test]
fn increments_with_zero_ranges() {
    let size = (2 << 20) + 100;
    for choice in engines() {
        let mut rig = Rig::new(choice);
        let mut bytes = image(size, 7);
        rig.point(lanes_of(&bytes, false), size as u64, whole(size));
        bytes[100_000..130_000].fill(0xEE);
        bytes[700_000..900_000].fill(0);
        let plan = vec![
            ReadItem::Data(Span::new(100_000, 30_000)),
            ReadItem::Zero(Span::new(700_000, 200_000)),
        ];
        let stats = rig.point(lanes_of(&bytes, true), size as u64, plan);
        assert!(stats.read_bytes < 60_000 && stats.zero_range_bytes > 180_000, "{stats:?}");
        let target = file_with(&vec![1; size]);
        let lanes = Lane::files(target.try_clone().unwrap(), 1).unwrap();
        rig.restore(lanes, TargetState::Unknown, None).unwrap();
        assert!(content(&target, size) == bytes, "{choice:?}");
    }
}

#[test]
fn nothing_is_stored_twice_by_a_rehash() {
    let size = 1 << 20;
    let bytes = image(size, 3);
    let mut rig = Rig::new(EngineChoice::Auto);
    rig.point(lanes_of(&bytes, false), size as u64, whole(size));
    let again = rig.point(lanes_of(&bytes, false), size as u64, whole(size));
    assert_eq!((again.summary.blocks_new, again.summary.new_bytes), (0, 0));
}

#[test]
fn only_some_blocks_are_written_and_each_is_verified() {
    let size = 2 << 20;
    let bytes = image(size, 11);
    for choice in engines() {
        let mut rig = Rig::new(choice);
        rig.point(lanes_of(&bytes, false), size as u64, whole(size));
        let before = vec![0x33; size];
        let ranges = [(0, 3), (10, 1), (200, 250), (size as u64 / BLOCK - 1, 1)];
        let only = || -> BlockRanges<'_> {
            let range = |(first, count)| Ok(BlockRange { first, count });
            Box::new(ranges.into_iter().map(range))
        };
        let mut want = before.clone();
        for (first, count) in ranges {
            let part = (first * BLOCK) as usize..((first + count) * BLOCK) as usize;
            want[part.clone()].copy_from_slice(&bytes[part]);
        }
        let target = ToyDisk::new(before);
        let lanes = target.lanes(2, &Script::default());
        let done = rig.restore(lanes, TargetState::Unknown, Some(&only)).unwrap();
        assert_eq!((done.written_bytes, done.verified_bytes), (255 * BLOCK, 255 * BLOCK));
        assert!(*target.bytes.lock().unwrap() == want, "{choice:?}");
        target.bytes.lock().unwrap()[201 * BLOCK as usize] ^= 1;
        let mut set = LaneSet::new(target.lanes(1, &Script::default()), choice).unwrap();
        let (mut found, hasher, options) = (Vec::new(), rig.repo.hasher(), options());
        let differs = |index| found.push(index);
        compare_blocks(&mut set, &rig.reader(), hasher, &only, differs, &options).unwrap();
        assert_eq!(found, [BlockIndex(201)]);
        let outcome = require_blocks(&mut set, &rig.reader(), hasher, &only, &options);
        assert!(matches!(outcome, Err(EngineError::BlocksDiffer { count: 1, first: 201 })));
        let beyond = || -> BlockRanges<'_> {
            Box::new(std::iter::once(Ok(BlockRange { first: size as u64 / BLOCK, count: 1 })))
        };
        let outcome =
            rig.restore(target.lanes(1, &Script::default()), TargetState::Unknown, Some(&beyond));
        assert!(matches!(outcome, Err(EngineError::Plan(_))), "{outcome:?}");
    }
}

#[test]
fn a_read_error_never_becomes_a_point() {
    let size = 4 << 20;
    let bytes = image(size, 5);
    for choice in engines() {
        let rig = Rig::new(choice);
        let faults = [
            Script { error_at: Some(3 << 20), ..Script::default() },
            Script { die_at_read: Some(2), ..Script::default() },
            Script { short_at_read: Some(1), ..Script::default() },
        ];
        for script in faults {
            let writer = rig.begin();
            let lanes = ToyDisk::new(bytes.clone()).lanes(2, &script);
            let outcome = rig.run(&writer, lanes, size as u64, whole(size), &options());
            assert!(outcome.is_err(), "{script:?}");
            writer.abort();
        }
        assert!(rig.repo.points().unwrap().is_empty());
    }
}

#[test]
fn a_failing_target_fails_the_restore() {
    let size = 2 << 20;
    let mut rig = Rig::new(EngineChoice::Auto);
    rig.point(lanes_of(&image(size, 5), false), size as u64, whole(size));
    let script = Script { error_at: Some(5000), ..Script::default() };
    let target = ToyDisk::new(vec![0; size]);
    let outcome = rig.restore(target.lanes(2, &script), TargetState::Blank, None);
    let Err(EngineError::Io { op: Op::Write, span, .. }) = outcome else { panic!("{outcome:?}") };
    assert!(span.offset <= 5000 && span.offset + span.len > 5000);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let outcome = rig.restore(Lane::files(full, 1).unwrap(), TargetState::Blank, None);
    assert!(matches!(outcome, Err(EngineError::Io { op: Op::Write, .. })), "{outcome:?}");
}

#[test]
fn cancelling_and_too_little_memory() {
    let size = 2 << 20;
    let rig = Rig::new(EngineChoice::Auto);
    let writer = rig.begin();
    let options = options();
    options.control.cancel.store(true, Relaxed);
    let outcome =
        rig.run(&writer, lanes_of(&image(size, 1), true), size as u64, whole(size), &options);
    assert!(matches!(outcome, Err(EngineError::Cancelled)), "{outcome:?}");
    assert_eq!(options.budget.used(), 0, "the memory is given back");
    let poor = Options { memory: 1 << 20, ..self::options() };
    let mut set = LaneSet::new(lanes_of(&[1; 100], false), EngineChoice::Auto).unwrap();
    let (size, hasher) = (BlockSize::new(BLOCK).unwrap(), rig.repo.hasher());
    let outcome = dry_run(&mut set, 100, size, hasher, whole_disk(100), &poor);
    assert!(matches!(outcome, Err(EngineError::Budget(_))), "{outcome:?}");
}

#[test]
fn a_stalled_source_of_the_plan_keeps_no_reply_waiting() {
    let size = 4 << 20;
    let bytes = image(size, 9);
    for choice in engines() {
        let rig = Rig::new(choice);
        let options = options();
        let (pulse, release) = (Arc::clone(&options.control.pulse), AtomicBool::new(false));
        let read = || options.control.progress.read_bytes.load(Relaxed);
        let plan = (0..4u64).map(|part| {
            while part == 2 && !release.load(Relaxed) {
                std::thread::yield_now();
            }
            Ok(ReadItem::Data(Span::new(part << 20, 1 << 19)))
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while read() < 1 << 19 {
                    std::thread::yield_now();
                }
                let before = pulse.load(Relaxed);
                std::thread::sleep(std::time::Duration::from_millis(700));
                let beats = pulse.load(Relaxed) - before;
                release.store(true, Relaxed);
                assert!(beats >= 2, "the data threads live: {beats}");
            });
            let disk = BlockSize::new(BLOCK).unwrap();
            let mut set = LaneSet::new(lanes_of(&bytes, true), choice).unwrap();
            dry_run(&mut set, size as u64, disk, rig.repo.hasher(), plan, &options).unwrap();
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn any_chain_of_changes_is_restored(
        size in 0usize..600_000,
        seed in any::<u64>(),
        changes in prop::collection::vec(
            prop::collection::vec((0u64..600_000, 1u64..50_000, any::<bool>()), 1..5), 1..4),
        uring in any::<bool>(),
    ) {
        let choice = if uring { EngineChoice::Auto } else { EngineChoice::Threads };
        let mut rig = Rig::new(choice);
        let mut bytes = image(size, seed);
        rig.point(lanes_of(&bytes, uring), size as u64, whole(size));
        for (round, mut change) in changes.into_iter().enumerate() {
            change.sort_unstable();
            let (mut plan, mut after) = (Vec::new(), 0);
            for (offset, len, zero) in change {
                let start = offset.max(after).min(size as u64);
                let end = (start + len).min(size as u64);
                after = end;
                let fill = if zero { 0 } else { round as u8 + 1 };
                bytes[start as usize..end as usize].fill(fill);
                let span = Span::new(start, end - start);
                plan.push(if zero { ReadItem::Zero(span) } else { ReadItem::Data(span) });
            }
            rig.point(lanes_of(&bytes, !uring), size as u64, plan);
        }
        let target = file_with(&vec![0x77; size]);
        let lanes = Lane::files(target.try_clone().unwrap(), 2).unwrap();
        rig.restore(lanes, TargetState::Unknown, None).unwrap();
        prop_assert!(content(&target, size) == bytes);
    }
}
