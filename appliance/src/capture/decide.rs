//! How each disk is read: pure.
//!
//! A disk has a parent when the chain holds it; what its bitmap says is trusted only when nothing
//! speaks against it ([`icecore_qmp::bitmap::verdict`]).

use icecore_qmp::bitmap::{
    Doubt, Expectation, Granularity, Observation, ParentDisk, ParentState, Verdict, verdict,
};
use icecore_repository::{DiskId, DiskMode, Point, PointId};

use super::{Base, Recorder, SeenDisk};

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Auto,
    Full,
    Incremental,
}

/// How one disk will be read.
#[derive(Debug, Clone)]
pub struct Decision {
    pub parent: Option<PointId>,
    pub base: Option<Base>,
    pub doubt: Option<Doubt>,
}

impl Decision {
    /// The mode that the point will show.
    pub fn mode(&self) -> DiskMode {
        match (&self.parent, &self.base, self.doubt) {
            (Some(_), Some(_), _) => DiskMode::Incremental,
            // A damaged parent is nothing to compare with, but the chain goes on.
            (None, _, Some(Doubt::ParentCorrupt)) | (Some(_), None, _) => DiskMode::Rehash,
            (None, _, _) => DiskMode::Full,
        }
    }

    /// The same disk read whole, for a reason that was found later.
    pub fn whole(self, doubt: Doubt) -> Self {
        Self { base: None, doubt: Some(doubt), ..self }
    }

    /// Whether the disk is read whole although it was to be incremental.
    pub fn is_fallback(&self) -> bool {
        self.doubt.is_some_and(|doubt| !matches!(doubt, Doubt::FirstPoint | Doubt::Requested))
    }
}

/// Decides for one disk. `parent` is the newest point of the chain that holds it; `damaged` when
/// what it holds of the disk is known not to be sound.
pub fn decide(level: Level, disk: &SeenDisk, parent: Option<&Point>, damaged: bool) -> Decision {
    let state = match parent.filter(|_| level != Level::Full) {
        None => ParentState::None,
        Some(_) if damaged => ParentState::Corrupt,
        Some(point) => match parent_disk(point, &disk.id) {
            Some(parent) => ParentState::Found(parent),
            None => ParentState::Corrupt,
        },
    };
    let expected = Expectation { parent: state };
    let identity = match &expected.parent {
        ParentState::Found(parent) => disk.identity_beside(&parent.identity),
        _ => &disk.identity,
    };
    let observed = Observation { bitmaps: &disk.bitmaps, size_bytes: disk.size_bytes, identity };
    let judged = verdict(&expected, observed);
    let ParentState::Found(found) = expected.parent else {
        let doubt = match (judged, level) {
            (Verdict::Whole(Doubt::FirstPoint), Level::Full) => Some(Doubt::Requested),
            (Verdict::Whole(doubt), _) => Some(doubt),
            (Verdict::Incremental { .. }, _) => None,
        };
        return Decision { parent: None, base: None, doubt };
    };
    let recorder = parent.map_or(Recorder::Icecore, |point| recorder(point, &disk.id));
    let parent = parent.map(|point| point.id.clone());
    match judged {
        Verdict::Whole(doubt) => Decision { parent, base: None, doubt: Some(doubt) },
        Verdict::Incremental { bitmap, .. } => {
            let base = Base {
                bitmap,
                granularity: found.granularity,
                size_bytes: found.size_bytes,
                recorder,
            };
            Decision { parent, base: Some(base), doubt: None }
        }
    }
}

fn parent_disk(point: &Point, id: &DiskId) -> Option<ParentDisk> {
    let disk = point.disk(id)?;
    let meta = point.meta.disks.iter().find(|meta| &meta.disk == id)?;
    Some(ParentDisk {
        bitmap: meta.bitmap.as_ref().and_then(|name| name.parse().ok()),
        granularity: meta.granularity.and_then(Granularity::new).unwrap_or(Granularity::DEFAULT),
        size_bytes: disk.size_bytes,
        identity: icecore_qmp::inventory::Identity(meta.identity.clone()),
    })
}

/// Where a point remembers that libvirt made the bitmap of a disk.
const RECORDER: &str = "recorder";
const LIBVIRT: &str = "libvirt";

/// What a point remembers of who made its bitmap.
pub fn remembered(recorder: Recorder) -> serde_json::Map<String, serde_json::Value> {
    let entry = (recorder == Recorder::Libvirt).then(|| (RECORDER.to_owned(), LIBVIRT.into()));
    entry.into_iter().collect()
}

fn recorder(point: &Point, id: &DiskId) -> Recorder {
    let meta = point.meta.disks.iter().find(|meta| &meta.disk == id);
    match meta.and_then(|meta| meta.extra.get(RECORDER)).and_then(|value| value.as_str()) {
        Some(LIBVIRT) => Recorder::Libvirt,
        _ => Recorder::Icecore,
    }
}

#[cfg(test)]
mod tests {
    use icecore_qmp::bitmap::Bitmap;
    use icecore_qmp::inventory::Identity;
    use serde_json::json;

    use super::*;

    const BITMAP: &str = "icecore:repo:chain:point:vda";

    fn seen(bitmaps: Vec<Bitmap>) -> SeenDisk {
        SeenDisk {
            id: "vda".parse().unwrap(),
            size_bytes: 1 << 20,
            identity: Identity("id=vda;file=/a".into()),
            partial_identity: false,
            bitmaps,
            records: true,
            recorder: Recorder::Icecore,
            refusal: None,
            read_only: false,
        }
    }

    fn bitmap() -> Bitmap {
        Bitmap {
            name: BITMAP.into(),
            granularity_bytes: 65536,
            dirty_bytes: 131_072,
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: false,
        }
    }

    fn parent() -> Point {
        let zero = "0".repeat(64);
        let summary = json!({"content_root": zero, "new_bytes": 0, "stored_bytes": 0,
            "zero_bytes": 0, "data_bytes": 0, "blocks_new": 0, "blocks_known": 0,
            "blocks_same": 0, "map_bytes": 0});
        serde_json::from_value(json!({
            "id": "00000000000000", "vm": "vm", "chain": "00000000000000",
            "writer_id": "0000000000000000", "new_bytes": 0, "stored_bytes": 0,
            "object_count": 0,
            "disks": [{"disk": "vda", "size_bytes": 1 << 20, "content_root": zero, "runs": [],
                "summary": summary}],
            "meta": {"created_at": "2026-01-01T00:00:00Z", "captured_at": "2026-01-01T00:00:00Z",
                "consistency": {"level": "crash", "frozen_filesystems": 0, "freeze_ms": 0.0,
                    "pause_ms": 0.0},
                "capsule": null, "writer": {"host": "h", "version": "0"},
                "disks": [{"disk": "vda", "mode": "full", "dirty_bytes": 0, "read_bytes": 0,
                    "zero_bytes": 0, "sampled_blocks": 0, "identity": "id=vda;file=/a",
                    "bitmap": BITMAP, "granularity": 65536, "seconds": 0.0}]},
        }))
        .unwrap()
    }

    #[test]
    fn a_sound_bitmap_of_the_parent_makes_an_incremental() {
        let decision = decide(Level::Auto, &seen(vec![bitmap()]), Some(&parent()), false);
        assert_eq!(decision.mode(), DiskMode::Incremental);
        assert_eq!(decision.base.unwrap().bitmap.to_string(), BITMAP);
    }

    #[test]
    fn every_doubt_reads_the_disk_whole_in_the_same_chain() {
        let inconsistent = Bitmap { inconsistent: true, ..bitmap() };
        let coarser = Bitmap { granularity_bytes: 1 << 20, ..bitmap() };
        let cases = [
            (vec![], "BitmapMissing"),
            (vec![inconsistent], "BitmapInconsistent"),
            (vec![coarser], "GranularityChanged"),
        ];
        for (bitmaps, reason) in cases {
            let decision = decide(Level::Incremental, &seen(bitmaps), Some(&parent()), false);
            assert_eq!(decision.doubt.map(Doubt::name), Some(reason));
            assert_eq!(decision.mode(), DiskMode::Rehash);
            assert!(decision.parent.is_some() && decision.is_fallback());
        }
    }

    #[test]
    fn a_damaged_parent_is_not_compared_with_and_the_chain_goes_on() {
        let decision = decide(Level::Auto, &seen(vec![bitmap()]), Some(&parent()), true);
        assert_eq!(decision.doubt.map(Doubt::name), Some("ParentCorrupt"));
        assert_eq!((decision.mode(), decision.parent), (DiskMode::Rehash, None));
    }

    #[test]
    fn a_first_point_and_a_full_one_have_no_parent() {
        let first = decide(Level::Auto, &seen(vec![]), None, false);
        let full = decide(Level::Full, &seen(vec![bitmap()]), Some(&parent()), false);
        let reasons = [first.doubt, full.doubt].map(|doubt| doubt.map(Doubt::name));
        assert_eq!(reasons, [Some("FirstPoint"), Some("Requested")]);
        assert!(!first.is_fallback() && !full.is_fallback());
        assert_eq!((first.mode(), full.mode()), (DiskMode::Full, DiskMode::Full));
    }

    #[test]
    fn an_image_is_the_vms_disk_when_the_parents_identity_holds_all_of_its() {
        let image = SeenDisk { partial_identity: true, ..seen(vec![bitmap()]) };
        let mut of_vm = parent();
        of_vm.meta.disks[0].identity = "id=vda;serial=7;file=/a".into();
        assert!(decide(Level::Auto, &image, Some(&of_vm), false).base.is_some());
        of_vm.meta.disks[0].identity = "id=vda;serial=7;file=/b".into();
        let other = decide(Level::Auto, &image, Some(&of_vm), false);
        assert_eq!(other.doubt.map(Doubt::name), Some("DiskReplaced"));
    }
}
