//! From what was intended and what is seen in QEMU to what must be done to leave no trace.
//!
//! One pure function, [`plan`], serves the guardian when it undoes a run, the next start of any
//! command after a crash, and `doctor`. It is asked again after its effects were carried out,
//! until it has nothing more to say: so a crash in the middle of undoing is no special case.

mod drive;
mod plan;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use drive::{Hands, Report, run};
pub use plan::{plan, remains};

use crate::capture::RunId;
use crate::capture::plan::DiskPlan;
use crate::guardian::protocol::{InstantReport, Prepare, SwapAway, SwapDisk};

/// What a run recorded before it did it. All else is told by names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intents {
    /// The run.
    pub run: RunId,
    /// Whether the guest may be halted by us.
    pub stop: StopIntent,
    /// Whether the guest's filesystems may be frozen by us.
    pub freeze: FreezeIntent,
    /// Whether QEMU's NBD server may be ours.
    pub server: ServerIntent,
    /// How far a rollback has come.
    pub rollback: RollbackIntent,
    /// What is known of the point.
    pub commit: CommitState,
    /// The disks, in the order of their indexes.
    pub disks: Vec<DiskIntent>,
}

/// Whether we halted the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopIntent {
    /// We did not, or have continued it: its state is somebody else's.
    None,
    /// We halted (or are about to halt) a guest that ran.
    RanBefore,
}

/// Whether we froze the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FreezeIntent {
    /// We did not, or a thaw was confirmed.
    None,
    /// A freeze was sent, and the agent has not said "thawed" since.
    Sent,
}

/// Whether QEMU's one NBD server is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerIntent {
    /// It is not: it is never stopped.
    None,
    /// We asked for it and do not know the answer.
    Asked,
    /// We started it.
    Ours,
}

/// How far a rollback has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RollbackIntent {
    /// There is none, or nothing was written yet: the guest may go on as it was.
    NotWriting,
    /// Something may have been written: the guest's memory and its disks differ, so it is never
    /// continued, only reset.
    Writing,
}

/// What is known of the run's point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommitState {
    /// Known not committed: the new bitmaps go.
    NotCommitted,
    /// Committed and read back: the old bitmaps go.
    Committed,
    /// Only the repository knows: both stay.
    Unknown,
}

/// One disk of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIntent {
    /// QOM path of the object whose `drive` property is set.
    pub qom_path: String,
    /// The node that the device used before the run.
    pub node: String,
    /// The bitmap that the run adds; it records from the new point on.
    pub new_bitmap: Option<String>,
    /// The bitmaps that the new point makes superfluous.
    pub old_bitmaps: Vec<String>,
    /// The device's iothread: nodes that change places must be in its context.
    pub iothread: Option<String>,
}

/// Whether a write to the scratch's storage came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScratchHealth {
    /// It did, or no scratch is in the graph.
    Answers,
    /// It did not: whatever drains would hang the guest.
    Hangs,
    /// It could not be tried: whatever drains might.
    NotKnown,
}

/// What the agent says of the guest's filesystems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestFs {
    /// Thawed.
    Thawed,
    /// Frozen, or the agent does not answer.
    FrozenOrUnknown,
}

/// All that a decision is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Situation<'a> {
    /// What QEMU shows.
    pub seen: &'a crate::capture::Observed,
    /// What the agent says.
    pub guest: GuestFs,
    /// Whether QEMU's server listens on our own socket path.
    pub our_socket_exists: bool,
    /// The scratch's storage.
    pub scratch: ScratchHealth,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Delete an export, hard: nothing may wait for its client.
    DeleteExport(String),
    /// Shut the connection of a push node down.
    Yank(String),
    /// End a job.
    CancelJob(String),
    /// Let go of a job that has ended.
    DismissJob(String),
    /// Stop QEMU's NBD server, which is ours.
    StopServer,
    /// Let the guest run on.
    Cont,
    /// Halt a guest that somebody continued in the middle of a rollback.
    Halt,
    /// Thaw until the agent says so.
    Thaw,
    /// Put the device back on a node.
    RestoreDrive {
        /// The device's object.
        qom_path: String,
        /// The node.
        node: String,
        /// Its iothread, when the node has to be brought there first.
        pin: Option<String>,
    },
    /// Remove a node.
    DeleteNode(String),
    /// Remove a bitmap of ours.
    RemoveBitmap {
        /// Its node.
        node: String,
        /// Its name.
        name: String,
    },
}

impl Intents {
    /// A run that has done nothing yet.
    pub fn new(run: RunId) -> Self {
        Self {
            run,
            stop: StopIntent::None,
            freeze: FreezeIntent::None,
            server: ServerIntent::None,
            rollback: RollbackIntent::NotWriting,
            commit: CommitState::NotCommitted,
            disks: Vec::new(),
        }
    }

    /// To be on record before [`crate::guardian::GuardianClient::prepare`].
    pub fn before_prepare(prepare: &Prepare) -> Self {
        let intent = |disk: &DiskPlan| DiskIntent {
            qom_path: disk.qom_path.clone(),
            node: disk.node.clone(),
            new_bitmap: disk.bitmap.as_ref().map(|bitmap| bitmap.name.clone()),
            old_bitmaps: Vec::new(),
            iothread: disk.iothread.clone(),
        };
        Self { disks: prepare.disks.iter().map(intent).collect(), ..Self::new(prepare.run) }
    }

    /// To be on record before the instant of a guest that `runs` or does not.
    #[must_use]
    pub fn with_instant(mut self, runs: bool, freezes: bool) -> Self {
        self.stop = if runs { StopIntent::RanBefore } else { StopIntent::None };
        self.freeze = if freezes { FreezeIntent::Sent } else { FreezeIntent::None };
        self
    }

    /// To be on record after the instant: the guest is free again, or still owed a thaw.
    #[must_use]
    pub fn after_instant(mut self, report: &InstantReport) -> Self {
        self.stop = StopIntent::None;
        self.freeze = if report.thaw_owed { FreezeIntent::Sent } else { FreezeIntent::None };
        self
    }

    /// To be on record before anything is exposed.
    #[must_use]
    pub fn with_server_asked(mut self) -> Self {
        self.server = ServerIntent::Asked;
        self
    }

    /// To be on record before the drives of a held guest are swapped away.
    pub fn before_swap(swap: &SwapAway) -> Self {
        let intent = |disk: &SwapDisk| DiskIntent {
            qom_path: disk.qom_path.clone(),
            node: disk.node.clone(),
            new_bitmap: None,
            old_bitmaps: Vec::new(),
            iothread: disk.iothread.clone(),
        };
        let disks = swap.disks.iter().map(intent).collect();
        Self { disks, commit: CommitState::Unknown, ..Self::new(swap.run) }
    }

    /// To be on record before a rollback's first byte is written.
    #[must_use]
    pub fn with_writing(mut self) -> Self {
        self.rollback = RollbackIntent::Writing;
        self
    }

    /// A run of which nothing is known but what its names tell: nothing is continued, thawed or
    /// stopped on a guess, and no bitmap goes.
    pub fn unknown(run: RunId) -> Self {
        Self { commit: CommitState::Unknown, ..Self::new(run) }
    }
}
