//! The capture of one instant as data: what is done, in which order.
//!
//! A step carries no undo of its own. Everything it makes has a name of the run, so
//! [`crate::recover::plan`] takes it away again from whatever is seen, also when a step's answer
//! never came.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::call::Call;
use super::names::{DIRTY_BITMAP, DiskIndex, Role, RunId};
use crate::bitmap::{Granularity, Sentinels};
use crate::inventory::Disk;

/// Name of the bitmap with the sentinels, on the [`Role::Map`] node.
const SENTINELS: &str = "ic-sentinels";

/// Name of the bitmap with the samples, on the [`Role::Map`] node.
const SAMPLES: &str = "ic-samples";

/// Most bytes marked by one command. The monitor's `qemu-io` refuses 2 GiB (QEMU
/// include/block/block-common.h, `BDRV_REQUEST_MAX_BYTES`).
const MARK_BYTES_MAX: u64 = 1 << 30;

/// A disk to capture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// QOM path of the object whose `drive` property names the node.
    pub qom_path: String,
    /// The node that the device uses, and over which the filter goes.
    pub node: String,
    /// The node that holds the disk's bitmaps.
    pub bitmap_node: String,
    /// The disk's size.
    pub size_bytes: u64,
    /// The device's iothread, if it has one.
    pub iothread: Option<String>,
    /// Where overwritten data go.
    pub scratch: Scratch,
    /// The bitmap that records from this point on; none for a safety point without one.
    pub bitmap: Option<NewBitmap>,
}

impl DiskPlan {
    /// The plan for a disk of the inventory.
    pub fn new(disk: &Disk, scratch: Scratch, bitmap: Option<NewBitmap>) -> Self {
        Self {
            qom_path: disk.drive_path.clone(),
            node: disk.node.clone(),
            bitmap_node: disk.bitmap_node.clone(),
            size_bytes: disk.size_bytes,
            iothread: disk.iothread.clone(),
            scratch,
            bitmap,
        }
    }
}

/// The scratch of one disk: a local file that QEMU can open, made with
/// [`super::scratch::format`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scratch {
    /// The file, already extended to `cap_bytes`.
    pub path: PathBuf,
    /// It never grows past this.
    pub cap_bytes: u64,
}

/// A bitmap to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewBitmap {
    /// Its name, `icecore:…`.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: Granularity,
}

/// A disk's recorded changes, and where they are to be found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Name of the bitmap on the disk's node.
    pub bitmap: String,
    /// Its granularity.
    pub granularity: Granularity,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// A command.
    Run(Call),
    /// A persistent bitmap where the node can store one, else a transient one.
    AddBitmap {
        /// Its node.
        node: String,
        /// It.
        bitmap: NewBitmap,
    },
    /// At least so many bytes must be dirty in a bitmap.
    Expect {
        /// Its node.
        node: String,
        /// Its name.
        bitmap: String,
        /// So many.
        dirty_bytes_min: u64,
    },
}

/// All that can be done before the guest is touched: scratch, new bitmap with sentinels, and the
/// filter, if it may be put over the disk of a guest that runs.
pub fn prepare(run: RunId, disk: DiskIndex, plan: &DiskPlan, with_filter: bool) -> Vec<Step> {
    let [file, raw] = Call::scratch_nodes(run, disk, &plan.scratch.path, plan.scratch.cap_bytes);
    let mut steps =
        vec![Step::Run(file), Step::Run(raw), Step::Run(Call::scratch_image(run, disk))];
    if with_filter {
        steps.push(Step::Run(Call::filter(run, disk, &plan.node)));
    }
    if let Some(bitmap) = &plan.bitmap {
        steps.push(Step::AddBitmap { node: plan.bitmap_node.clone(), bitmap: bitmap.clone() });
        steps.extend(sentinels(run, disk, plan, bitmap));
    }
    steps
}

/// The first and the last granule are called dirty, so that a bitmap that somebody cleared, or
/// whose disk shrank and grew back, is known by their absence.
fn sentinels(run: RunId, disk: DiskIndex, plan: &DiskPlan, bitmap: &NewBitmap) -> Vec<Step> {
    let granules = Sentinels::new(plan.size_bytes, bitmap.granularity).ranges();
    let map = run.name(disk, Role::Map);
    let mut steps = marked_map(&map, plan.size_bytes, bitmap.granularity, SENTINELS, &granules);
    steps.push(Step::Run(Call::merge_bitmap(&plan.bitmap_node, &bitmap.name, &map, SENTINELS)));
    steps.push(Step::Expect {
        node: plan.bitmap_node.clone(),
        bitmap: bitmap.name.clone(),
        dirty_bytes_min: dirty_bytes_min(&granules, plan.size_bytes, bitmap.granularity),
    });
    steps.push(Step::Run(Call::remove_node(&map)));
    steps
}

/// What a bitmap of a disk of `size_bytes` shows at least once `ranges` are marked: every granule
/// that they touch, once. A short last granule may be counted in full or not: of it only one byte
/// is certain.
fn dirty_bytes_min(ranges: &[Range<u64>], size_bytes: u64, granularity: Granularity) -> u64 {
    let granule = granularity.bytes();
    let touched = |range: &Range<u64>| (range.start / granule, range.end.div_ceil(granule));
    let mut spans: Vec<_> = ranges.iter().filter(|r| !r.is_empty()).map(touched).collect();
    spans.sort_unstable();
    let (mut granules, mut counted) = (0, 0);
    for (first, end) in spans {
        granules += end.saturating_sub(first.max(counted));
        counted = counted.max(end);
    }
    let short_last =
        !size_bytes.is_multiple_of(granule) && counted.saturating_mul(granule) > size_bytes;
    granules.saturating_mul(granule) - if short_last { granule - 1 } else { 0 }
}

fn marked_map(
    map: &str,
    size_bytes: u64,
    granularity: Granularity,
    bitmap: &str,
    marks: &[Range<u64>],
) -> Vec<Step> {
    let mut steps = vec![
        Step::Run(Call::null_node(map, size_bytes)),
        Step::Run(Call::add_bitmap(map, bitmap, granularity, false)),
    ];
    steps.extend(marked(map, marks));
    steps
}

/// Marks each range, in pieces that one command takes.
fn marked(map: &str, ranges: &[Range<u64>]) -> impl Iterator<Item = Step> {
    let piece = |from: u64, end: u64| from..end.min(from.saturating_add(MARK_BYTES_MAX));
    let pieces = ranges.iter().flat_map(move |range| {
        let starts = range.clone().step_by(MARK_BYTES_MAX as usize);
        starts.map(move |from| piece(from, range.end))
    });
    pieces.map(|piece| Step::Run(Call::mark(map, &piece)))
}

/// Makes the disk's changes readable through an export of the snapshot: a copy of `base`, with
/// the name [`DIRTY_BITMAP`]. Without a base nothing is needed.
pub fn dirty_copy(run: RunId, disk: DiskIndex, node: &str, base: Option<&Base>) -> Vec<Step> {
    let snap = run.name(disk, Role::Snap);
    base.map_or_else(Vec::new, |base| copy_of(&snap, node, base))
}

fn copy_of(holder: &str, node: &str, base: &Base) -> Vec<Step> {
    vec![
        Step::Run(Call::add_disabled_bitmap(holder, DIRTY_BITMAP, base.granularity)),
        Step::Run(Call::merge_bitmap(holder, DIRTY_BITMAP, node, &base.bitmap)),
    ]
}

/// Makes a disk's changes readable without an export of the disk: a node without data holds them.
pub fn dirty_map(
    run: RunId,
    disk: DiskIndex,
    node: &str,
    size_bytes: u64,
    base: &Base,
) -> Vec<Step> {
    let map = run.name(disk, Role::Map);
    let mut steps = vec![Step::Run(Call::null_node(&map, size_bytes))];
    steps.extend(copy_of(&map, node, base));
    steps
}

/// What a push needs on the snapshot node: the copy of `base` and the samples in one bitmap. The
/// map node with the readable copy stays until the graph goes.
pub fn push_bitmap(
    run: RunId,
    disk: DiskIndex,
    plan: &DiskPlan,
    base: &Base,
    samples: &[Range<u64>],
) -> Vec<Step> {
    let (snap, map) = (run.name(disk, Role::Snap), run.name(disk, Role::Map));
    let mut steps = copy_of(&snap, &plan.bitmap_node, base);
    // The copy that the worker has read decides, not the disk's own, which records on.
    steps.push(Step::Run(Call::merge_bitmap(&snap, DIRTY_BITMAP, &map, DIRTY_BITMAP)));
    if !samples.is_empty() {
        steps.push(Step::Run(Call::add_bitmap(&map, SAMPLES, base.granularity, false)));
        steps.extend(marked(&map, samples));
        steps.push(Step::Expect {
            node: map.clone(),
            bitmap: SAMPLES.into(),
            dirty_bytes_min: dirty_bytes_min(samples, plan.size_bytes, base.granularity),
        });
        steps.push(Step::Run(Call::merge_bitmap(&snap, DIRTY_BITMAP, &map, SAMPLES)));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_not_touched_by_preparing() {
        let plan = DiskPlan {
            qom_path: "/machine/peripheral/sd0".into(),
            node: "disk0".into(),
            bitmap_node: "disk0".into(),
            size_bytes: 1 << 20,
            iothread: None,
            scratch: Scratch { path: "/s".into(), cap_bytes: 1 << 20 },
            bitmap: Some(NewBitmap { name: "icecore:x".into(), granularity: Granularity::DEFAULT }),
        };
        let touching = ["stop", "cont", "qom-set", "system_reset"];
        for step in prepare(RunId(1), 0, &plan, true) {
            if let Step::Run(call) = step {
                assert!(!touching.contains(&call.name), "{}", call.name);
            }
        }
    }

    #[test]
    fn large_ranges_are_marked_in_pieces() {
        const GIB: u64 = 1 << 30;
        let steps: Vec<_> = marked("m", &[4096..8192, GIB..3 * GIB + 512]).collect();
        let lines = steps.iter().map(|step| match step {
            Step::Run(call) => call.arguments["command-line"].as_str().unwrap_or_default(),
            _ => "",
        });
        let wanted = [(4096, 4096), (GIB, GIB), (2 * GIB, GIB), (3 * GIB, 512)]
            .map(|(at, length)| format!("qemu-io m \"write -q -z {at} {length}\""));
        assert_eq!(lines.collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn each_granule_counts_once() {
        let granularity = Granularity::DEFAULT;
        let g = granularity.bytes();
        let bytes = |ranges: &[Range<u64>], size| dirty_bytes_min(ranges, size, granularity);
        assert_eq!(bytes(&[], 10 * g), 0);
        assert_eq!(bytes(&[0..1, 0..g, g - 1..g + 1], 10 * g), 2 * g, "overlaps");
        assert_eq!(bytes(&[5 * g..8 * g, 0..g], 10 * g), 4 * g, "in any order");
        assert_eq!(bytes(&[0..g, 9 * g..9 * g + 512], 9 * g + 512), g + 1, "a short last one");
        assert_eq!(bytes(&[0..g, g..2 * g], 9 * g + 512), 2 * g);
    }
}
