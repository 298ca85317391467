//! Objects that were made to harm: whole, well sealed, and lying. All of them are refused before
//! memory is taken, and none of them makes a path.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::block::BlockHasher;
use crate::envelope::{self, Kind};
use crate::error::{DamageKind, Error};
use crate::geometry::{BlockIndex, BlockSize};
use crate::ids::{BlockId, DiskId, PackId, PointId, VmName};
use crate::pack::PackWriter;
use crate::point::{
    Codec, Consistency, ConsistencyLevel, Entry, Frame, Location, Point, PointMeta, WriterInfo,
};
use crate::store::{Access, DirectoryStore, SimFileSystem};
use crate::{BeginPoint, ChainChoice, DiskStart, InitOptions, OpenOptions, Repository};

const BLOCK: usize = 4096;

struct Rig {
    fs: Arc<SimFileSystem>,
    repo: Repository,
    point: Point,
}

fn store(fs: &Arc<SimFileSystem>) -> Arc<DirectoryStore> {
    Arc::new(DirectoryStore::on(Arc::clone(fs) as _, "memory", Access::ReadWrite))
}

fn vda() -> DiskId {
    DiskId::new("vda").unwrap()
}

fn meta() -> PointMeta {
    let level = ConsistencyLevel::Crash;
    let why = None;
    let (frozen_filesystems, freeze_ms, pause_ms) = (0, 0.0, 0.0);
    PointMeta {
        created_at: jiff::Timestamp::UNIX_EPOCH,
        captured_at: jiff::Timestamp::UNIX_EPOCH,
        label: None,
        description: None,
        consistency: Consistency { level, frozen_filesystems, freeze_ms, pause_ms, why },
        capsule: Value::Null,
        disks: Vec::new(),
        writer: WriterInfo { host: "h".into(), version: "1".into() },
        parts: Vec::new(),
    }
}

impl Rig {
    /// A repository with one point: a disk of ten blocks, three of them data.
    fn new() -> Self {
        let fs = Arc::new(SimFileSystem::new());
        let block_size = BlockSize::new(BLOCK as u64).unwrap();
        let options = InitOptions { block_size, ..InitOptions::default() };
        let repo = Repository::init_on(store(&fs), options, jiff::Timestamp::UNIX_EPOCH).unwrap();
        let vm = VmName::new("web").unwrap();
        let begin = BeginPoint { vm, chain: ChainChoice::New, now: jiff::Timestamp::UNIX_EPOCH };
        let writer = repo.begin_point(begin).unwrap();
        let start = DiskStart { disk: vda(), size_bytes: 10 * BLOCK as u64, parent: None };
        let mut disk = writer.disk(start).unwrap();
        let mut encoder = disk.encoders.encoder().unwrap();
        for at in 1..=3 {
            let block = encoder.encode(&[at as u8; BLOCK], crate::ParentBlock::Absent);
            disk.sink.push(BlockIndex(at), block).unwrap();
        }
        disk.sink.finish().unwrap();
        let point = writer.commit(meta()).unwrap();
        Self { fs, repo, point }
    }

    fn manifest(&self) -> String {
        format!("points/{}", self.point.id)
    }

    /// The point's manifest with its JSON changed and sealed again.
    fn forge(&self, change: impl FnOnce(&mut Value)) {
        let mut json = serde_json::to_value(&self.point).unwrap();
        change(&mut json);
        self.forge_json(&serde_json::to_vec(&json).unwrap());
    }

    fn forge_json(&self, json: &[u8]) {
        let mut payload = (json.len() as u64).to_le_bytes().to_vec();
        payload.extend_from_slice(json);
        self.forge_payload(&payload);
    }

    fn forge_payload(&self, payload: &[u8]) {
        let sealed = envelope::seal(Kind::MANIFEST, self.repo.id(), payload);
        self.fs.overwrite(&self.manifest(), sealed);
    }

    /// How the forged point fails: wherever that is, as damage.
    fn refusal(&self) -> DamageKind {
        let fresh = Repository::open_on(store(&self.fs), OpenOptions::default()).unwrap();
        let started = Instant::now();
        let error = read_all(&fresh, &self.point.id).expect_err("a forged point was read");
        assert!(started.elapsed() < Duration::from_secs(2), "it took too long to say {error}");
        let damage = error.damage().unwrap_or_else(|| panic!("no damage: {error}"));
        assert!(!damage.detail.contains('\x1b') && !damage.detail.contains('\0'));
        damage.kind
    }
}

fn read_all(repo: &Repository, id: &PointId) -> Result<(), Error> {
    let point = repo.point(id)?;
    for disk in &point.disks {
        let reader = repo.disk_reader(&point, &disk.disk)?;
        let mut decoder = reader.decoder()?;
        for entry in reader.entries(BlockIndex(0)) {
            decoder.read(&entry?, &mut [0; BLOCK])?;
        }
    }
    Ok(())
}

#[test]
fn the_rig_itself_is_right() {
    let rig = Rig::new();
    rig.forge(|_| ());
    let fresh = Repository::open_on(store(&rig.fs), OpenOptions::default()).unwrap();
    read_all(&fresh, &rig.point.id).unwrap();
}

#[test]
fn sizes_and_counts_beyond_any_disk_are_refused() {
    for change in [
        (|json| json["disks"][0]["size_bytes"] = json!(1_u64 << 63)) as fn(&mut Value),
        |json| json["disks"][0]["size_bytes"] = json!(u64::MAX),
        |json| {
            let disk = json["disks"][0].clone();
            json["disks"] = Value::Array(vec![disk; 1025]);
        },
        |json| {
            let disk = json["disks"][0].clone();
            json["disks"].as_array_mut().unwrap().push(disk);
        },
        |json| {
            let run = json["disks"][0]["runs"][0].clone();
            json["disks"][0]["runs"].as_array_mut().unwrap().push(run);
        },
        |json| json["disks"][0]["parent"] = json!("zzzzzzzzzzzzzz"),
        |json| json["parent"] = json["id"].clone(),
        |json| {
            json["parts"] = json!([{"name": "n", "bytes": u64::MAX, "checksum": "0".repeat(64)}])
        },
    ] {
        let rig = Rig::new();
        rig.forge(change);
        assert_eq!(rig.refusal(), DamageKind::Inconsistent);
    }
}

#[test]
fn names_that_would_leave_a_folder_or_a_line_are_refused() {
    for name in ["../../etc/passwd", "/etc/passwd", "a\0b", "a\x1b[2Jb", "..", ""] {
        for field in ["/disks/0/disk", "/disks/0/runs/0/run", "/vm", "/chain", "/writer_id"] {
            let rig = Rig::new();
            rig.forge(|json| *json.pointer_mut(field).unwrap() = json!(name));
            // A VM may have a slashless name that is strange; everything else is an id.
            assert_eq!(rig.refusal(), DamageKind::Inconsistent, "{field} {name:?}");
        }
    }
}

#[test]
fn json_that_is_endless_deep_or_cut_off_is_refused() {
    let rig = Rig::new();
    rig.forge_payload(&u64::MAX.to_le_bytes());
    assert_eq!(rig.refusal(), DamageKind::Limit);
    rig.forge_payload(&100_u64.to_le_bytes());
    assert_eq!(rig.refusal(), DamageKind::Length);
    rig.forge_payload(b"1234");
    assert_eq!(rig.refusal(), DamageKind::Length);
    rig.forge_json(&b"[".repeat(1 << 20));
    assert_eq!(rig.refusal(), DamageKind::Inconsistent);
    rig.forge_json(&vec![b' '; (8 << 20) + 1]);
    assert_eq!(rig.refusal(), DamageKind::Limit);
}

#[test]
fn another_points_or_repositorys_manifest_is_refused() {
    let (rig, other) = (Rig::new(), Rig::new());
    let foreign = other.fs.content(&other.manifest()).unwrap();
    rig.fs.overwrite(&rig.manifest(), foreign);
    assert_eq!(rig.refusal(), DamageKind::Foreign);
    // Another point's, resealed for this repository: a replay under this name.
    rig.forge(|json| json["id"] = json!("00000000000000"));
    assert_eq!(rig.refusal(), DamageKind::Foreign);
}

#[test]
fn a_map_that_is_not_the_manifests_is_refused() {
    let rig = Rig::new();
    rig.forge(|json| json["disks"][0]["runs"][0]["trailer"] = json!("0".repeat(64)));
    assert_eq!(rig.refusal(), DamageKind::Checksum);
    rig.forge(|json| json["disks"][0]["runs"][0]["bytes"] = json!(u64::MAX));
    assert_eq!(rig.refusal(), DamageKind::Length);
    rig.forge(|json| json["disks"][0]["runs"][0]["run"] = json!("0".repeat(32)));
    assert_eq!(rig.refusal(), DamageKind::Missing);
    // A whole map with data beyond the end of a disk that claims to be smaller.
    rig.forge(|json| json["disks"][0]["size_bytes"] = json!(2 * BLOCK));
    assert_eq!(rig.refusal(), DamageKind::Inconsistent);
}

/// Stores a pack with one frame and reads it as block 0 of the rig's disk.
fn read_frame(frame: &Frame, id: BlockId, slot: u32) -> DamageKind {
    let rig = Rig::new();
    let inner = &rig.repo.inner;
    let mut pack = PackWriter::create(&*inner.store, &inner.sealing, PackId([5; 16])).unwrap();
    pack.push(&id, frame).unwrap();
    pack.finish().unwrap();
    let reader = rig.repo.disk_reader(&rig.point, &vda()).unwrap();
    let location = Location { pack: PackId([5; 16]), slot };
    let entry = Entry { index: BlockIndex(0), id, location };
    let mut decoder = reader.decoder().unwrap();
    let one = decoder.read(&entry, &mut [0; BLOCK]).unwrap_err().damage().unwrap().kind;
    let many = decoder.read_many(BlockIndex(0), &[entry], &mut [0; 2 * BLOCK]);
    assert_eq!(many.unwrap_err().damage().unwrap().kind, one);
    one
}

#[test]
fn bombs_and_frames_of_a_wrong_length_stop_at_the_block() {
    let id = BlockHasher::plain().block_id(&[1; BLOCK]);
    let bomb = zstd::bulk::compress(&vec![1; 8 << 20], 1).unwrap();
    assert!(bomb.len() < BLOCK);
    let frame = |raw_bytes, bytes: &[u8], codec| Frame { codec, raw_bytes, bytes: bytes.to_vec() };
    let block = BLOCK as u32;
    let check = |frame: &Frame, slot| read_frame(frame, id, slot);
    assert_eq!(check(&frame(block, &bomb, Codec::Zstd), 0), DamageKind::Content);
    assert_eq!(check(&frame(8 << 20, &bomb, Codec::Zstd), 0), DamageKind::Inconsistent);
    assert_eq!(check(&frame(block, &[1; BLOCK - 1], Codec::Raw), 0), DamageKind::Content);
    assert_eq!(check(&frame(block, &[1; BLOCK + 1], Codec::Raw), 0), DamageKind::Inconsistent);
    assert_eq!(check(&frame(block, &[2; BLOCK], Codec::Raw), 0), DamageKind::Content);
    assert_eq!(check(&frame(block, &[1; BLOCK], Codec::Raw), 1), DamageKind::Inconsistent);
}
