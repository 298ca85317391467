//! A model VM with two small disks, its backups, and the proof of every point against the model.

#![allow(dead_code)] // each test file uses its part

#[path = "../keys/mod.rs"]
mod keys;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use icecore_repository::store::{Access, DirectoryStore, SimFileSystem, Store};
use icecore_repository::{
    BeginPoint, BlockIndex, BlockSize, ChainChoice, CheckOptions, CheckReport, Consistency,
    ConsistencyLevel, ContentHasher, DiskId, DiskStart, GcOptions, InitOptions, Pace, ParentBlock,
    Point, PointMeta, PointWriter, Repository, Result, VmName, WriterInfo,
};

#[allow(unused_imports, reason = "each test file uses its part")]
pub use keys::{init_options, open_options};

pub const BLOCK: usize = 4096;

/// The disks of a VM: name and bytes.
pub type Disks = BTreeMap<String, Vec<u8>>;

pub fn store(fs: &SimFileSystem) -> Arc<dyn Store> {
    Arc::new(DirectoryStore::on(Arc::new(fs.clone()), "sim", Access::ReadWrite))
}

/// A file system with an empty repository, all of it durable.
pub fn initialised() -> SimFileSystem {
    let fs = SimFileSystem::new();
    let block_size = BlockSize::new(BLOCK as u64).unwrap();
    let options = InitOptions { block_size, ..init_options() };
    Repository::init_on(store(&fs), options, jiff::Timestamp::UNIX_EPOCH).unwrap();
    fs
}

pub fn open(fs: &SimFileSystem) -> Repository {
    Repository::open_on(store(fs), open_options()).unwrap()
}

/// A block whose content is told by its tag.
pub fn block(tag: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    blake3::Hasher::new().update(&tag.to_le_bytes()).finalize_xof().fill(&mut bytes[..64]);
    bytes
}

/// The model's disks at instant 0, 1, 2…: rewritten, zeroed, trimmed and untouched blocks, a disk
/// whose last block is short, and one that grows.
pub fn disks_at(instant: u64) -> Disks {
    let mut system: Vec<u8> = (0..9).flat_map(block).collect();
    system.extend_from_slice(&block(77)[..700]);
    for step in 1..=instant {
        let at = (step as usize * 2) % 9;
        system[at * BLOCK..(at + 1) * BLOCK].copy_from_slice(&block(1000 + step));
        let zeroed = (step as usize * 5) % 9;
        system[zeroed * BLOCK..(zeroed + 1) * BLOCK].fill(0);
    }
    let data: Vec<u8> = (0..4 + instant).flat_map(|n| block(500 + n % 3 + instant / 2)).collect();
    Disks::from([("system".to_owned(), system), ("data".to_owned(), data)])
}

/// The VM, unless a test has several.
pub const VM: &str = "model";

fn meta(label: &str) -> PointMeta {
    PointMeta {
        created_at: jiff::Timestamp::UNIX_EPOCH,
        captured_at: jiff::Timestamp::UNIX_EPOCH,
        label: Some(label.to_owned()),
        description: None,
        consistency: Consistency {
            level: ConsistencyLevel::Crash,
            frozen_filesystems: 0,
            freeze_ms: 0.0,
            pause_ms: 0.0,
            why: Some("a model has no guest agent".to_owned()),
        },
        capsule: serde_json::json!({"machine": "model"}),
        disks: Vec::new(),
        writer: WriterInfo { host: "here".to_owned(), version: "0".to_owned() },
        parts: Vec::new(),
    }
}

/// A point that is written up to its commit.
pub struct Pending {
    writer: PointWriter,
    label: String,
}

impl Pending {
    pub fn commit(self) -> Result<Point> {
        self.writer.commit(meta(&self.label))
    }
}

/// Writes the disks at an instant as the next point of the newest chain (or of a new one).
pub fn prepare(repository: &Repository, instant: u64) -> Result<Pending> {
    prepare_disks(repository, VM, instant, &disks_at(instant))
}

pub fn prepare_disks(
    repository: &Repository,
    vm: &str,
    instant: u64,
    disks: &Disks,
) -> Result<Pending> {
    let vm = VmName::new(vm).unwrap();
    let newest = repository.points()?.into_iter().rfind(|point| point.vm == vm);
    let chain = newest.map_or(ChainChoice::New, |point| ChainChoice::Existing(point.chain));
    let seconds = i64::try_from(instant).unwrap() + 1;
    let now = jiff::Timestamp::from_second(seconds).unwrap();
    let writer = repository.begin_point(BeginPoint { vm: vm.clone(), chain, now })?;
    for (name, bytes) in disks {
        write_disk(repository, &vm, &writer, &DiskId::new(name.as_str()).unwrap(), bytes)?;
    }
    Ok(Pending { writer, label: instant.to_string() })
}

fn write_disk(
    repository: &Repository,
    vm: &VmName,
    writer: &PointWriter,
    disk: &DiskId,
    bytes: &[u8],
) -> Result<()> {
    let parent = repository.newest_with_disk(vm, Some(writer.chain()), disk)?;
    let parent = parent.map(|point| point.id);
    let size_bytes = bytes.len() as u64;
    let mut parts = writer.disk(DiskStart { disk: disk.clone(), size_bytes, parent })?;
    let mut encoder = parts.encoders.encoder()?;
    for (index, data) in bytes.chunks(BLOCK).enumerate() {
        let index = BlockIndex(index as u64);
        let of_parent = parts.cursor.parent_blocks(index, 1)?;
        let of_parent = of_parent.first().copied().unwrap_or(ParentBlock::Absent);
        parts.sink.push(index, encoder.encode(data, of_parent))?;
    }
    parts.sink.finish()?;
    Ok(())
}

pub fn backup(repository: &Repository, instant: u64) -> Result<Point> {
    prepare(repository, instant)?.commit()
}

/// Restores a disk of a point and proves its content root.
pub fn restore(repository: &Repository, point: &Point, disk: &str) -> Result<Vec<u8>> {
    let reader = repository.disk_reader(point, &DiskId::new(disk).unwrap())?;
    let mut bytes = vec![0; usize::try_from(reader.size_bytes()).unwrap()];
    let mut decoder = reader.decoder()?;
    let mut hasher = ContentHasher::new(reader.size_bytes(), reader.block_size());
    for entry in reader.entries(BlockIndex(0)) {
        let entry = entry?;
        let start = usize::try_from(entry.index.0).unwrap() * BLOCK;
        let stop = (start + BLOCK).min(bytes.len());
        decoder.read(&entry, &mut bytes[start..stop])?;
        hasher.push(entry.index, &entry.id);
    }
    assert_eq!(hasher.finish(), reader.content_root());
    Ok(bytes)
}

/// Every visible point is what the model was at the instant of its label; returns the instants.
pub fn assert_points_are_right(repository: &Repository) -> Vec<u64> {
    let points = repository.points().unwrap();
    let instants = points.iter().map(|point| {
        let instant: u64 = point.meta.label.as_deref().unwrap().parse().unwrap();
        for (disk, expected) in disks_at(instant) {
            let restored = restore(repository, point, &disk).unwrap();
            assert!(restored == expected, "disk {disk} of point {instant} is not the model's");
        }
        instant
    });
    instants.collect()
}

/// Time that passes only where gc lies still, and what happens meanwhile.
#[derive(Default)]
pub struct VirtualPace<'a> {
    elapsed: Duration,
    pub at_first_pause: Option<Box<dyn FnOnce() + 'a>>,
}

impl Pace for VirtualPace<'_> {
    fn elapsed(&self) -> Duration {
        self.elapsed
    }

    fn pause(&mut self, duration: Duration) {
        self.elapsed += duration;
        if let Some(happening) = self.at_first_pause.take() {
            happening();
        }
    }
}

pub fn gc(repository: &Repository) -> Result<icecore_repository::GcReport> {
    repository.gc_at_pace(&GcOptions::default(), &mut VirtualPace::default())
}

pub fn check(repository: &Repository) -> CheckReport {
    let options = CheckOptions { read_data: true, ..CheckOptions::default() };
    repository.check(&options, |_| ()).unwrap()
}

pub fn assert_sound(repository: &Repository, context: &str) {
    let report = check(repository);
    assert!(report.ok, "{context}: {:?}", report.errors);
}
