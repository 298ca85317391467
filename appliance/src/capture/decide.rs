//! How each disk is read: pure.
//!
//! A disk has a parent when the chain holds it; what its bitmap says is trusted only when nothing
//! speaks against it ([`icecore_qmp::bitmap::verdict`]).

use icecore_qmp::bitmap::{
    Doubt, Expectation, Granularity, Observation, ParentDisk, ParentState, Verdict, verdict,
};
use icecore_repository::{DiskId, DiskMode, Point, PointId};

use super::{Base, SeenDisk};

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
    let expected = Expectation {
        parent: state,
        whole_requested: false,
        restored_since: false,
        contradicted: false,
    };
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
    let parent = parent.map(|point| point.id.clone());
    match judged {
        Verdict::Whole(doubt) => Decision { parent, base: None, doubt: Some(doubt) },
        Verdict::Incremental { bitmap, .. } => {
            let base =
                Base { bitmap, granularity: found.granularity, size_bytes: found.size_bytes };
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
