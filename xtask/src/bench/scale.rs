//! What may not grow: eight disks beside one, the size of an unchanged disk, the points of a repository.

use std::path::{Path, PathBuf};

use icecore_repository::{
    BeginPoint, BlockIndex, ChainChoice, Consistency, ConsistencyLevel, DiskId, DiskMeta, DiskMode,
    DiskStart, DiskWriter, InitOptions, OpenOptions, ParentBlock, PointMeta, Repository, VmName,
    WriterInfo,
};

use super::Bench;
use super::lab::{Lab, blank_qcow2, overlay};
use super::measure::Children;
use super::server::Vm;
use crate::step::{Failure, Result, captured, program};

/// Disks that are read at once.
const DISKS: u64 = 8;
const FULL_DISKS: &str = "full: icecore, image off, 8 disks";
const SAME_DISKS: &str = "incremental 0 %: icecore, 8 disks";

/// Sizes of disks without data, of which nothing changed.
const SPARSE: [(u64, &str); 3] = [
    (64 << 30, "incremental 0 %: icecore, 64 GiB sparse"),
    (1 << 40, "incremental 0 %: icecore, 1 TiB sparse"),
    (16 << 40, "incremental 0 %: icecore, 16 TiB sparse"),
];

/// Points of a long-lived repository, and the VMs that they are of.
const POINTS: u32 = 10_000;
const VMS: u32 = 100;
const LIST: &str = "10,000 points: icecore point list";
const SAME_MANY: &str = "10,000 points: icecore incremental 0 %";
const GC: &str = "10,000 points: icecore gc --dry-run";

/// What is measured here.
pub fn rows() -> Vec<&'static str> {
    let sparse = SPARSE.iter().map(|(_, name)| *name);
    [FULL_DISKS, SAME_DISKS, LIST, SAME_MANY, GC].into_iter().chain(sparse).collect()
}

/// All rows, so many times.
pub fn rounds(bench: &mut Bench, rounds: u32) {
    if bench.wants([FULL_DISKS, SAME_DISKS])
        && let Some(images) = bench.prepare("8 disks", cut)
    {
        (0..rounds).for_each(|_| full(bench, &images));
        unchanged(bench, SAME_DISKS, &images, None, rounds);
    }
    for (size, name) in SPARSE {
        if bench.wants([name])
            && let Some(image) = bench.prepare(name, |lab| sparse(lab, size))
        {
            unchanged(bench, name, &[image], None, rounds);
        }
    }
    if bench.wants([LIST, SAME_MANY, GC])
        && let Some(repository) = bench.prepare("10,000 points", many)
    {
        for _ in 0..rounds {
            bench.row(LIST, |lab| measure(lab, &["point", "list"], &repository));
            bench.row(GC, |lab| measure(lab, &["gc", "--dry-run"], &repository));
        }
        if let Some(image) = bench.prepare(SAME_MANY, |lab| sparse(lab, 1 << 30)) {
            unchanged(bench, SAME_MANY, &[image], Some(&repository), rounds);
        }
    }
}

fn measure(lab: &Lab, subcommand: &[&str], repository: &Path) -> Result<super::Sample> {
    let mut command = lab.icecore(subcommand);
    command.arg("--repo").arg(repository);
    lab.measure(command, Children::Client, None, None)
}

/// The reference image in as many pieces as there are disks.
fn cut(lab: &Lab) -> Result<Vec<PathBuf>> {
    let piece = lab.size / DISKS;
    let one = |number: u64| {
        let image = lab.path(&format!("piece{number}.qcow2"));
        let mut command = program("qemu-img");
        command.args(["convert", "-q", "-O", "qcow2", "--image-opts"]);
        let file = lab.raw.display();
        command
            .arg(format!("driver=raw,offset={},size={piece},file.filename={file}", number * piece));
        captured(command.arg(&image))?;
        Ok(image)
    };
    (0..DISKS).map(one).collect()
}

fn full(bench: &mut Bench, images: &[PathBuf]) {
    bench.row(FULL_DISKS, |lab| {
        let repository = lab.repository("disks")?;
        let mut command = lab.icecore(&["backup", "--name", "disks", "--level", "full"]);
        for (number, image) in images.iter().enumerate() {
            command.arg("--image").arg(format!("vd{number}={}", image.display()));
        }
        command.arg("--repo").arg(&repository);
        lab.measure(command, Children::Server, None, Some(&repository))
    });
}

/// A blank disk.
fn sparse(lab: &Lab, size: u64) -> Result<PathBuf> {
    let image = lab.path(&format!("sparse-{}G.qcow2", size >> 30));
    blank_qcow2(&image, size)?;
    Ok(image)
}

/// Points of a live QEMU on whose disks nothing changes.
fn unchanged(bench: &mut Bench, name: &str, images: &[PathBuf], into: Option<&Path>, rounds: u32) {
    let started = bench.prepare(name, |lab| {
        let own = |(number, image): (usize, &PathBuf)| {
            let top = lab.path(&format!("top{number}.qcow2"));
            overlay(&top, image)?;
            Ok(top)
        };
        let images = images.iter().enumerate().map(own).collect::<Result<Vec<_>>>()?;
        let repository =
            into.map_or_else(|| lab.repository("unchanged"), |path| Ok(path.into()))?;
        let vm = Vm::start_on(&images, &lab.fresh("vm-unchanged")?)?;
        captured(lab.backup_live(&vm, &repository).args(["--level", "full"]))?;
        Ok((vm, repository))
    });
    let Some((vm, repository)) = started else { return };
    for _ in 0..rounds {
        bench.row(name, |lab| {
            let command = lab.backup_live(&vm, &repository);
            lab.measure(command, Children::Client, Some(vm.pid()), None)
        });
    }
}

/// A repository with many points, made without a VM.
fn many(lab: &Lab) -> Result<PathBuf> {
    let path = lab.path("many");
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", path.display()));
    Repository::init(&path, InitOptions::default()).map_err(|error| failed(&error))?;
    let repository =
        Repository::open(&path, OpenOptions::default()).map_err(|error| failed(&error))?;
    for number in 0..POINTS {
        add_point(&repository, number).map_err(|error| failed(&error))?;
    }
    Ok(path)
}

/// One more point of one block, in the chain of its VM.
fn add_point(
    repository: &Repository,
    number: u32,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (vm, disk) = (VmName::new(format!("vm{}", number % VMS))?, DiskId::new("vda")?);
    let parent = repository.newest_of(&vm, None)?;
    let chain = parent.as_ref().map(|point| ChainChoice::Existing(point.chain.clone()));
    let begin =
        BeginPoint { vm, chain: chain.unwrap_or(ChainChoice::New), now: jiff::Timestamp::now() };
    let writer = repository.begin_point(begin)?;
    let start =
        DiskStart { disk: disk.clone(), size_bytes: 1 << 20, parent: parent.map(|point| point.id) };
    let DiskWriter { encoders, mut sink, .. } = writer.disk(start)?;
    let block = number.to_le_bytes().repeat(1 << 14);
    let index = BlockIndex(u64::from(number / VMS) % 16);
    sink.push(index, encoders.encoder()?.encode(&block, ParentBlock::Absent))?;
    sink.finish()?;
    writer.commit(meta(disk, jiff::Timestamp::now()))?;
    Ok(())
}

fn meta(disk: DiskId, now: jiff::Timestamp) -> PointMeta {
    let disk = DiskMeta {
        disk,
        mode: DiskMode::Incremental,
        reason: None,
        dirty_bytes: 65536,
        read_bytes: 65536,
        zero_bytes: 0,
        sampled_blocks: 8,
        identity: "id=vda;file=/var/lib/images/vm.qcow2".into(),
        bitmap: Some("icecore:0123456789abcdef:1m7whzvdxscagj:1m7whzvdxscagj:vda".into()),
        granularity: Some(65536),
        seconds: 0.1,
        extra: serde_json::Map::new(),
    };
    let consistency = Consistency {
        level: ConsistencyLevel::Crash,
        frozen_filesystems: 0,
        freeze_ms: 0.0,
        pause_ms: 0.0,
        why: Some("made for a benchmark".into()),
    };
    PointMeta {
        created_at: now,
        captured_at: now,
        label: None,
        description: None,
        consistency,
        // As long as that of a small VM.
        capsule: serde_json::json!({ "source": "bench", "machine": "x".repeat(2000) }),
        disks: vec![disk],
        writer: WriterInfo { host: "bench".into(), version: "0".into() },
        parts: Vec::new(),
    }
}
