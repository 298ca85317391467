//! A model of disks, and how tests write and prove points. A model block is a number from which its
//! bytes follow, so that a terabyte costs as much as its blocks in use.
#![allow(dead_code, reason = "each test uses its part")]

#[path = "../keys/mod.rs"]
mod keys;

use std::collections::{BTreeMap, BTreeSet};

use icecore_repository::{
    BeginPoint, BlockId, BlockIndex, BlockSize, ChainChoice, Consistency, ConsistencyLevel,
    ContentHasher, DiskId, DiskMeta, DiskMode, DiskStart, DiskWriter, Encoded, ParentBlock, Point,
    PointId, PointMeta, PointWriter, Repository, VmName, WriterInfo,
};

#[allow(unused_imports, reason = "each test uses its part")]
pub use keys::{init_options, open_options};

pub fn now() -> jiff::Timestamp {
    jiff::Timestamp::from_second(1_800_000_000).unwrap()
}

pub fn vm() -> VmName {
    VmName::new("web").unwrap()
}

pub fn disk(name: &str) -> DiskId {
    DiskId::new(name).unwrap()
}

pub fn meta(disks: &[DiskId]) -> PointMeta {
    let disk_meta = |disk: &DiskId| DiskMeta {
        disk: disk.clone(),
        mode: DiskMode::Incremental,
        reason: None,
        dirty_bytes: 1,
        read_bytes: 2,
        zero_bytes: 3,
        sampled_blocks: 4,
        identity: "virtio-disk0".into(),
        bitmap: Some("icecore:a:b".into()),
        granularity: Some(65_536),
        seconds: 0.5,
        extra: serde_json::Map::new(),
    };
    PointMeta {
        created_at: now(),
        captured_at: now(),
        label: Some("nightly".into()),
        description: None,
        consistency: Consistency {
            level: ConsistencyLevel::Filesystem,
            frozen_filesystems: 2,
            freeze_ms: 12.5,
            pause_ms: 0.25,
            why: None,
        },
        capsule: serde_json::json!({"machine": "q35", "memory": 268_435_456}),
        disks: disks.iter().map(disk_meta).collect(),
        writer: WriterInfo { host: "host1".into(), version: "0.1.0".into() },
        parts: Vec::new(),
    }
}

/// The bytes of a model block: they compress or not, depending on the number.
pub fn block_bytes(value: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    if value.is_multiple_of(2) {
        bytes.iter_mut().zip(value.to_le_bytes().iter().cycle()).for_each(|(b, v)| *b = *v | 1);
    } else {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&value.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes[0] |= 1;
    }
    bytes
}

/// A disk: what is not in `blocks` is zero.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Model {
    pub size_bytes: u64,
    pub blocks: BTreeMap<u64, u64>,
}

impl Model {
    pub fn of_blocks(size: BlockSize, blocks: u64) -> Self {
        Self { size_bytes: blocks * u64::from(size.bytes()), blocks: BTreeMap::new() }
    }

    pub fn block(&self, size: BlockSize, index: u64) -> Vec<u8> {
        let length = size.block_bytes(self.size_bytes, BlockIndex(index)) as usize;
        self.blocks.get(&index).map_or_else(|| vec![0; length], |v| block_bytes(*v, length))
    }

    pub fn resize(&mut self, size: BlockSize, size_bytes: u64) {
        self.size_bytes = size_bytes;
        let blocks = size.blocks(size_bytes).unwrap();
        self.blocks.retain(|index, _| *index < blocks);
    }
}

/// Blocks and zero ranges that a reader hands over.
#[derive(Clone, Debug, Default)]
pub struct Dirty {
    pub blocks: BTreeSet<u64>,
    pub zero_ranges: Vec<(u64, u64)>,
}

pub fn begin(repo: &Repository, chain: ChainChoice) -> PointWriter {
    repo.begin_point(BeginPoint { vm: vm(), chain, now: now() }).unwrap()
}

/// Writes one disk: the dirty blocks as they are in `model`, compared with the parent.
pub fn write_disk(
    writer: &PointWriter,
    repo: &Repository,
    name: &DiskId,
    parent: Option<&PointId>,
    model: &Model,
    dirty: &Dirty,
) {
    let size = repo.block_size();
    let start =
        DiskStart { disk: name.clone(), size_bytes: model.size_bytes, parent: parent.cloned() };
    let DiskWriter { mut cursor, encoders, mut sink } = writer.disk(start).unwrap();
    let mut encoder = encoders.encoder().unwrap();
    let mut ranges = dirty.zero_ranges.iter().peekable();
    for &index in &dirty.blocks {
        while let Some(&(first, count)) = ranges.next_if(|(first, _)| *first < index) {
            sink.push_zero_range(BlockIndex(first), count).unwrap();
        }
        let at = BlockIndex(index);
        let parent = cursor.parent_blocks(at, 1).unwrap()[0];
        let encoded = encoder.encode(&model.block(size, index), parent);
        sink.push(at, encoded).unwrap();
    }
    for &(first, count) in ranges {
        sink.push_zero_range(BlockIndex(first), count).unwrap();
    }
    sink.finish().unwrap();
}

/// A point of one disk.
pub fn write_point(
    repo: &Repository,
    chain: ChainChoice,
    name: &DiskId,
    parent: Option<&PointId>,
    model: &Model,
    dirty: &Dirty,
) -> Point {
    let writer = begin(repo, chain);
    write_disk(&writer, repo, name, parent, model, dirty);
    writer.commit(meta(std::slice::from_ref(name))).unwrap()
}

/// All blocks in use.
pub fn all(model: &Model) -> Dirty {
    Dirty { blocks: model.blocks.keys().copied().collect(), zero_ranges: Vec::new() }
}

/// Proves that a disk of a point is the model: entries, bytes, root.
pub fn prove(repo: &Repository, point: &Point, name: &DiskId, model: &Model) {
    let size = repo.block_size();
    let reader = repo.disk_reader(point, name).unwrap();
    assert_eq!(reader.size_bytes(), model.size_bytes);
    let mut decoder = reader.decoder().unwrap();
    let mut root = ContentHasher::new(model.size_bytes, size);
    let mut found = BTreeSet::new();
    for entry in reader.entries(BlockIndex(0)) {
        let entry = entry.unwrap();
        let wanted = model.block(size, entry.index.0);
        let mut bytes = vec![0; wanted.len()];
        decoder.read(&entry, &mut bytes).unwrap();
        assert!(bytes == wanted, "{} of {name} in {}", entry.index, point.id);
        root.push(entry.index, &entry.id);
        assert!(found.insert(entry.index.0));
    }
    let wanted: BTreeSet<u64> = model.blocks.keys().copied().collect();
    assert_eq!(found, wanted, "{name} in {}", point.id);
    assert_eq!(root.finish(), reader.content_root());
}

pub fn encode_one(repo: &Repository, writer: &DiskWriter, data: &[u8]) -> (BlockId, Encoded) {
    let encoded = writer.encoders.encoder().unwrap().encode(data, ParentBlock::Absent);
    (repo.hasher().block_id(data), encoded)
}
