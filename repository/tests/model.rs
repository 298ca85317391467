//! Random histories of a VM against a model that is nothing but a map of blocks.

#![allow(clippy::unwrap_used)] // a test that panics has failed

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use icecore_repository::store::{Access, DirectoryStore, SimFileSystem};
use icecore_repository::{
    BlockIndex, BlockSize, ChainChoice, DiskId, InitOptions, OpenOptions, Point, Repository,
};
use proptest::prelude::*;
use support::*;

const BLOCK: u64 = 4096;
const REGION: u64 = 65_536;

#[derive(Clone, Debug)]
enum Change {
    Set(u64, u64),
    Zero(u64),
    ZeroRange(u64, u64),
    Resize(u64),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Incremental,
    Rehash,
    NewChain,
}

#[derive(Clone, Debug)]
struct Step {
    mode: Mode,
    /// Per disk: taken into the point, and what the guest did before.
    disks: Vec<(bool, Vec<Change>)>,
    reopen: bool,
    delete: Option<usize>,
}

/// Places where spans, regions and disks begin and end.
fn place() -> impl Strategy<Value = u64> {
    let page = prop_oneof![Just(0_u64), Just(1), Just(255)];
    let block = prop_oneof![Just(0_u64), Just(1), Just(255), 0..256_u64];
    (0..3_u64, page, block).prop_map(|(region, page, block)| region * REGION + page * 256 + block)
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (place(), 1..40_u64).prop_map(|(at, value)| Change::Set(at, value)),
        2 => place().prop_map(Change::Zero),
        1 => (place(), prop_oneof![1..600_u64, Just(REGION), Just(2 * REGION)])
            .prop_map(|(first, count)| Change::ZeroRange(first, count)),
        1 => (place(), prop_oneof![Just(0), Just(1), 0..BLOCK])
            .prop_map(|(blocks, tail)| Change::Resize(blocks * BLOCK + tail)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let mode = prop_oneof![
        6 => Just(Mode::Incremental), 2 => Just(Mode::Rehash), 1 => Just(Mode::NewChain)
    ];
    let disk = (prop::bool::weighted(0.8), prop::collection::vec(change(), 0..12));
    let delete = prop::option::weighted(0.3, 0..8_usize);
    (mode, prop::collection::vec(disk, 2), any::<bool>(), delete)
        .prop_map(|(mode, disks, reopen, delete)| Step { mode, disks, reopen, delete })
}

struct Disk {
    id: DiskId,
    model: Model,
    /// What changed since the last point that holds the disk.
    dirty: BTreeSet<u64>,
    zeroed: Vec<(u64, u64)>,
    /// The point that its bitmap grew from is gone.
    doubt: bool,
}

impl Disk {
    fn apply(&mut self, change: &Change) {
        let size = BlockSize::new(BLOCK).unwrap();
        let blocks = size.blocks(self.model.size_bytes).unwrap();
        match *change {
            Change::Set(at, value) if at < blocks => {
                self.model.blocks.insert(at, value);
                self.dirty.insert(at);
            }
            Change::Zero(at) if at < blocks => {
                self.model.blocks.remove(&at);
                self.dirty.insert(at);
            }
            Change::ZeroRange(first, count) if first < blocks => {
                let count = count.min(blocks - first);
                self.model.blocks.retain(|at, _| !(first..first + count).contains(at));
                self.zeroed.push((first, count));
            }
            Change::Resize(size_bytes) => self.resize(size, blocks, size_bytes),
            _ => (),
        }
    }

    /// The blocks at the old and the new end have another length now, so they are other blocks.
    fn resize(&mut self, size: BlockSize, blocks: u64, size_bytes: u64) {
        self.model.resize(size, size_bytes);
        let now = size.blocks(size_bytes).unwrap();
        let ends = [blocks.saturating_sub(1), now.saturating_sub(1)];
        self.dirty.extend(ends);
        self.dirty.retain(|at| *at < now);
        for (first, count) in &mut self.zeroed {
            *count = (*count).min(now.saturating_sub(*first));
        }
        if now > blocks {
            self.zeroed.push((blocks, now - blocks));
        }
    }

    fn take_dirty(&mut self, mode: Mode, known: &BTreeSet<u64>) -> Dirty {
        let zeroed: BTreeSet<u64> =
            self.zeroed.drain(..).flat_map(|(first, count)| first..first + count).collect();
        let mut blocks = std::mem::take(&mut self.dirty);
        if mode != Mode::Incremental {
            blocks.extend(self.model.blocks.keys());
            blocks.extend(known);
        }
        // Written over after it was zeroed: the bitmap knows both, the reader sees data.
        blocks.extend(self.model.blocks.keys().filter(|at| zeroed.contains(at)));
        let size = BlockSize::new(BLOCK).unwrap();
        let end = size.blocks(self.model.size_bytes).unwrap();
        blocks.retain(|at| *at < end);
        let mut zero_ranges: Vec<(u64, u64)> = Vec::new();
        for at in zeroed.difference(&blocks).filter(|at| **at < end) {
            match zero_ranges.last_mut() {
                Some((first, count)) if *first + *count == *at => *count += 1,
                _ => zero_ranges.push((*at, 1)),
            }
        }
        Dirty { blocks, zero_ranges }
    }
}

struct History {
    store: Arc<DirectoryStore>,
    cache: tempfile::TempDir,
    repo: Repository,
    disks: Vec<Disk>,
    points: Vec<(Point, BTreeMap<DiskId, Model>)>,
    first_of_chain: Option<Point>,
}

impl History {
    fn new() -> Self {
        let fs = Arc::new(SimFileSystem::new());
        let store = Arc::new(DirectoryStore::on(fs, "memory", Access::ReadWrite));
        let size = BlockSize::new(BLOCK).unwrap();
        let options = InitOptions { block_size: size, ..init_options() };
        let repo = Repository::init_on(store.clone(), options, now()).unwrap();
        // Enough for a base that small deltas do not swallow at once.
        let mut model = Model::of_blocks(size, 2 * REGION + 300);
        model.blocks.extend((0..200).map(|n| (n * 257 % 60_000, n % 39 + 1)));
        let new_disk = |name| Disk {
            id: disk(name),
            dirty: model.blocks.keys().copied().collect(),
            model: model.clone(),
            zeroed: Vec::new(),
            doubt: false,
        };
        let disks = vec![new_disk("vda"), new_disk("vdb")];
        let cache = tempfile::tempdir().unwrap();
        Self { store, cache, repo, disks, points: Vec::new(), first_of_chain: None }
    }

    fn run(&mut self, step: &Step) {
        if step.reopen {
            let cache_dir = Some(self.cache.path().to_owned());
            let options = OpenOptions { cache_dir, ..open_options() };
            self.repo = Repository::open_on(self.store.clone(), options).unwrap();
        }
        for (disk, (_, changes)) in self.disks.iter_mut().zip(&step.disks) {
            changes.iter().for_each(|change| disk.apply(change));
        }
        let chain = match &self.first_of_chain {
            Some(first) if step.mode != Mode::NewChain => {
                ChainChoice::Existing(first.chain.clone())
            }
            _ => ChainChoice::New,
        };
        let writer = begin(&self.repo, chain);
        let mut models = BTreeMap::new();
        for (disk, (taken, _)) in self.disks.iter_mut().zip(&step.disks) {
            if !taken {
                continue;
            }
            let found = self.repo.newest_with_disk(&vm(), Some(writer.chain()), &disk.id).unwrap();
            let newest = self.points.iter().rev().find(|(point, models)| {
                &point.chain == writer.chain() && models.contains_key(&disk.id)
            });
            assert_eq!(found.as_ref(), newest.map(|(point, _)| point));
            // A deleted parent leaves an older one, whose bitmap is gone: all is read again.
            let trusted = found.is_some() && step.mode == Mode::Incremental && !disk.doubt;
            let mode = if trusted { Mode::Incremental } else { Mode::Rehash };
            let known = newest.map(|(_, models)| models[&disk.id].blocks.keys().copied().collect());
            disk.doubt = false;
            let dirty = disk.take_dirty(mode, &known.unwrap_or_default());
            let parent = found.map(|point| point.id);
            write_disk(&writer, &self.repo, &disk.id, parent.as_ref(), &disk.model, &dirty);
            models.insert(disk.id.clone(), disk.model.clone());
        }
        if models.is_empty() {
            return writer.abort();
        }
        let names: Vec<DiskId> = models.keys().cloned().collect();
        let point = writer.commit(meta(&names)).unwrap();
        if step.mode == Mode::NewChain || self.first_of_chain.is_none() {
            self.first_of_chain = Some(point.clone());
        }
        self.points.push((point, models));
        self.delete(step.delete);
    }

    fn delete(&mut self, which: Option<usize>) {
        let Some(which) = which.filter(|which| *which < self.points.len()) else { return };
        let chain = &self.points[which].0.chain;
        if self.points.iter().filter(|(point, _)| &point.chain == chain).count() < 2 {
            return;
        }
        let (point, _) = self.points.remove(which);
        self.repo.delete_point(&point.id).unwrap();
        // Whoever was to grow from it must be read whole now.
        self.disks.iter_mut().for_each(|disk| disk.doubt = true);
    }

    fn prove(&self) {
        let ids = |points: Vec<Point>| points.into_iter().map(|point| point.id).collect::<Vec<_>>();
        let wanted = self.points.iter().map(|(point, _)| point.clone()).collect();
        assert_eq!(ids(self.repo.points().unwrap()), ids(wanted));
        for (point, models) in &self.points {
            let again = self.repo.point(&point.id).unwrap();
            assert_eq!(again.meta.captured_at, point.meta.captured_at);
            for (name, model) in models {
                prove(&self.repo, &again, name, model);
            }
        }
        self.prove_differences();
    }

    fn prove_differences(&self) {
        let size = BlockSize::new(BLOCK).unwrap();
        for (one, two) in self.points.iter().zip(self.points.iter().skip(1)) {
            for (name, left) in &one.1 {
                let Some(right) = two.1.get(name) else { continue };
                let readers = [&one.0, &two.0].map(|p| self.repo.disk_reader(p, name).unwrap());
                let found: Result<Vec<BlockIndex>, _> = readers[0].diff(&readers[1]).collect();
                let touched: BTreeSet<u64> =
                    left.blocks.keys().chain(right.blocks.keys()).copied().collect();
                let hasher = self.repo.hasher();
                let id = |m: &Model, at| hasher.block_id(&m.block(size, at));
                let differs = |at: &u64| id(left, *at) != id(right, *at);
                let wanted: Vec<BlockIndex> =
                    touched.into_iter().filter(differs).map(BlockIndex).collect();
                assert_eq!(found.unwrap(), wanted);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_point_of_every_history_is_right(steps in prop::collection::vec(step(), 1..9)) {
        let mut history = History::new();
        for step in &steps {
            history.run(step);
        }
        history.prove();
    }
}
