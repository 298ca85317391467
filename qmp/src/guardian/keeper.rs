//! The guardian's state, and how it gives everything back.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::leash::Leash;
use super::probe::{Probe, ProbeCommand};
use super::protocol::{
    Connect, ErrorKind, Greeted, GuardianError, Inspection, Released, Request, SwapDisk,
};
use super::watch::Live;
use crate::bitmap::Granularity;
use crate::capture::guest_io::{DeviceIo, guest_io};
use crate::capture::link::{CALL_WAIT, Link};
use crate::capture::names::BITMAP_PREFIX;
use crate::capture::observe::{QUERY_WAIT, RunState, node_sizes};
use crate::capture::plan::{DiskPlan, Step};
use crate::capture::{Call, Observed, OurName, Role, RunId};
use crate::errors::QmpError;
use crate::features::Features;
use crate::inventory;
use crate::recover::{
    self, CommitState, FreezeIntent, Hands, Intents, RollbackIntent, ServerIntent, StopIntent,
};

/// How long the guardian tries to undo while a worker waits for the result.
const PATIENCE_WITH_WORKER: Duration = Duration::from_secs(20);

/// How long one further try takes while a worker may ask for something else.
const PATIENCE_AGAIN: Duration = Duration::from_secs(2);

/// First and longest pause before what could not be undone is tried again.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
/// See [`AGAIN_FIRST`].
const AGAIN_LONGEST: Duration = Duration::from_secs(60);

/// How long it tries when nobody waits. A QEMU that is stopped longer is left to the next start.
const PATIENCE_ALONE: Duration = Duration::from_secs(600);

/// Longest wait for the look that is taken while data move. A QEMU that is silent longer may be
/// waiting for one of our connections.
const LOOK_WAIT: Duration = Duration::from_secs(2);

/// How far a run has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing of the run is in QEMU.
    Idle,
    /// Nodes and bitmaps are.
    Prepared,
    /// The instant is taken.
    Captured,
    /// Data can be read.
    Exposed,
    /// A rollback has swapped the drives away.
    Swapped,
    /// It was all undone before its time, for this reason.
    Cut(GuardianError),
}

/// When what could not be undone is tried again.
#[derive(Debug, Clone, Copy)]
struct Again {
    at: Instant,
    pause: Duration,
}

impl Again {
    fn after(earlier: Option<Self>) -> Self {
        let pause = earlier.map_or(AGAIN_FIRST, |earlier| earlier.pause * 2).min(AGAIN_LONGEST);
        Self { at: Instant::now() + pause, pause }
    }
}

/// The guardian.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) link: Option<Link>,
    pub(super) intents: Intents,
    pub(super) disks: Vec<DiskPlan>,
    pub(super) swapped: Vec<SwapDisk>,
    pub(super) hands: Hands,
    pub(super) phase: Phase,
    /// The guest is held stopped for a rollback.
    pub(super) held: bool,
    probe: Probe,
    pub(super) leash: Leash,
    again: Option<Again>,
}

pub(super) type Reply = Result<Value, GuardianError>;

impl Keeper {
    pub(super) fn new(leash: Leash, probe: ProbeCommand) -> Self {
        Self {
            link: None,
            intents: Intents::new(RunId(0)),
            disks: Vec::new(),
            swapped: Vec::new(),
            hands: Hands::default(),
            phase: Phase::Idle,
            held: false,
            probe: Probe::new(probe),
            leash,
            again: None,
        }
    }

    /// What depends on the worker now.
    pub(super) fn live(&self) -> Live {
        match self.phase {
            Phase::Idle | Phase::Cut(_) if !self.held => Live::Nothing,
            Phase::Exposed | Phase::Swapped => Live::Data,
            _ => Live::Graph,
        }
    }

    pub(super) async fn handle(&mut self, request: Request) -> Reply {
        if let (Phase::Cut(why), false) = (&self.phase, allowed_after_cut(&request)) {
            return Err(why.clone());
        }
        match request {
            Request::Connect(to) => reply(self.connect(to).await),
            Request::Features => reply(self.features().await),
            Request::Know(features) => reply(self.know(features)),
            Request::Inspect => reply(self.inspect().await),
            Request::Prepare(prepare) => reply(self.prepare(prepare).await),
            Request::Instant(plan) => reply(self.instant(plan).await),
            Request::Expose(expose) => reply(self.expose(expose).await),
            Request::Push(push) => reply(self.push(push).await),
            Request::PushStatus(disk) => reply(self.push_status(disk).await),
            Request::Sizes => reply(self.sizes().await),
            Request::GuestIo => reply(self.guest_io().await),
            Request::Release => reply(self.release().await),
            Request::Retire(old) => reply(self.settle(CommitState::Committed, old).await),
            Request::DropNew => reply(self.settle(CommitState::NotCommitted, Vec::new()).await),
            Request::SwapAway(swap) => reply(self.swap_away(swap).await),
            Request::ExposeWritable(bases) => reply(self.expose_writable(bases).await),
            Request::BeginWriting => reply(self.begin_writing()),
            Request::SwapBack => reply(self.swap_back().await),
            Request::Restart(how) => reply(self.restart(how).await),
            Request::Abort => reply(self.abort().await),
            Request::Recover(intents, socket) => reply(self.recover(*intents, socket).await),
            Request::Forget(bitmaps) => reply(self.forget(bitmaps).await),
        }
    }

    /// A failure ends nothing: the next look at the sizes tells what it means.
    async fn guest_io(&mut self) -> Result<Vec<DeviceIo>, GuardianError> {
        Ok(guest_io(self.link()?.monitor()).await?)
    }

    async fn connect(&mut self, to: Connect) -> Result<Greeted, GuardianError> {
        let link = Link::connect(to.monitor, to.agent).await?;
        let greeted = Greeted { version: link.monitor().version(), peer: link.monitor().peer() };
        self.link = Some(link);
        Ok(greeted)
    }

    async fn features(&mut self) -> Result<Features, GuardianError> {
        Ok(self.link()?.features().await?)
    }

    fn know(&mut self, features: Features) -> Result<(), GuardianError> {
        self.link()?.know(features);
        Ok(())
    }

    async fn inspect(&mut self) -> Result<Inspection, GuardianError> {
        let link = self.link()?;
        let features = link.features().await?;
        let (seen, inventory) =
            tokio::try_join!(link.observe(), inventory::inventory(link.monitor(), QUERY_WAIT))?;
        Ok(Inspection {
            features,
            inventory,
            running: seen.state == RunState::Running,
            leftovers: seen.runs(),
            peer: link.monitor().peer(),
        })
    }

    pub(super) fn link(&mut self) -> Result<&mut Link, GuardianError> {
        self.link.as_mut().ok_or_else(not_connected)
    }

    /// Undoes what `intents` say of the connected QEMU.
    async fn recover_run(
        &mut self,
        intents: &mut Intents,
        hands: &Hands,
    ) -> Result<Released, GuardianError> {
        let link = self.link.as_mut().ok_or_else(not_connected)?;
        let patience = PATIENCE_WITH_WORKER;
        let report = recover::run(link, intents, hands, &mut self.probe, patience).await;
        Ok(Released { left: report.left })
    }

    pub(super) async fn observe(&mut self) -> Result<Observed, GuardianError> {
        Ok(self.link()?.observe().await?)
    }

    pub(super) async fn call(&mut self, call: &Call, wait: Duration) -> Result<(), GuardianError> {
        self.link()?.call(call, wait).await?;
        Ok(())
    }

    /// Runs steps of the capture plan. The result of each bitmap added, in order.
    pub(super) async fn steps(&mut self, steps: &[Step]) -> Result<Vec<bool>, GuardianError> {
        let mut persistent = Vec::new();
        for step in steps {
            match step {
                Step::Run(call) => self.call(call, CALL_WAIT).await?,
                Step::AddBitmap { node, bitmap } => {
                    persistent.push(self.add_bitmap(node, &bitmap.name, bitmap.granularity).await?);
                }
                Step::Expect { node, bitmap, dirty_bytes_min } => {
                    self.expect_dirty(node, bitmap, *dirty_bytes_min).await?;
                }
            }
        }
        Ok(persistent)
    }

    async fn add_bitmap(
        &mut self,
        node: &str,
        name: &str,
        granularity: Granularity,
    ) -> Result<bool, GuardianError> {
        let persistent = Call::add_bitmap(node, name, granularity, true);
        match self.link()?.call(&persistent, CALL_WAIT).await {
            Ok(_) => Ok(true),
            // Raw and old qcow2 nodes store none; any other reason refuses the second one too.
            Err(QmpError::Refused { .. }) => {
                let transient = Call::add_bitmap(node, name, granularity, false);
                self.call(&transient, CALL_WAIT).await?;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn expect_dirty(
        &mut self,
        node: &str,
        bitmap: &str,
        least: u64,
    ) -> Result<(), GuardianError> {
        let seen = self.observe().await?;
        let dirty = seen.bitmap(node, bitmap).map_or(0, |bitmap| bitmap.dirty_bytes);
        if dirty >= least {
            return Ok(());
        }
        Err(GuardianError {
            kind: ErrorKind::Qemu,
            message: format!(
                "bitmap {bitmap} on {node} shows {dirty} dirty bytes where at least {least} were \
                 put in: this QEMU's monitor has no working qemu-io command"
            ),
        })
    }

    /// Whether a disk that is being read or about to be has changed its size.
    pub(super) async fn size_change(&mut self) -> Result<Option<String>, GuardianError> {
        let run = self.intents.run;
        let sizes = node_sizes(self.link()?.monitor(), LOOK_WAIT).await?;
        let changed = (0u16..).zip(&self.disks).find_map(|(index, disk)| {
            let filter = run.name(index, Role::Cbw);
            let size = sizes.iter().find(|node| node.name == filter)?.size_bytes;
            (size != disk.size_bytes).then(|| {
                format!("{} changed from {} to {size} bytes", disk.qom_path, disk.size_bytes)
            })
        });
        Ok(changed)
    }

    /// While data move: a disk read past a new end aborts QEMU, and a QEMU that does not answer
    /// may be waiting for our own connections. Either ends the run; the worker learns of it with
    /// its next request.
    pub(super) async fn look(&mut self) {
        match self.size_change().await {
            Ok(None) => {}
            Ok(Some(message)) => {
                self.cut(GuardianError { kind: ErrorKind::SizeChanged, message }).await;
            }
            Err(error) => {
                self.cut(error).await;
            }
        }
    }

    /// Takes everything out of QEMU, keeps what is known of the point, and remembers why.
    pub(super) async fn cut(&mut self, why: GuardianError) -> GuardianError {
        tracing::warn!(%why, "undoing the run");
        let report = self.undo(PATIENCE_WITH_WORKER).await;
        let mut why = why;
        if !report.left.is_empty() {
            why.message = format!("{}; left in QEMU: {}", why.message, report.left.join("; "));
        }
        self.phase = Phase::Cut(why.clone());
        why
    }

    /// The worker is gone.
    pub(super) async fn finish_alone(&mut self) {
        if self.phase != Phase::Idle || self.held || self.owes_thaw() || self.again.is_some() {
            self.undo(PATIENCE_ALONE).await;
        }
    }

    pub(super) fn owes_thaw(&self) -> bool {
        self.intents.freeze == FreezeIntent::Sent
    }

    async fn undo(&mut self, patience: Duration) -> Released {
        // Without a word to QEMU: it may be waiting for these, and deaf.
        self.leash.cut();
        let Some(link) = &mut self.link else { return Released::default() };
        let (intents, hands, probe) = (&mut self.intents, &self.hands, &mut self.probe);
        let report = recover::run(link, intents, hands, probe, patience).await;
        self.held = false;
        self.again = (!report.left.is_empty()).then(|| Again::after(self.again));
        Released { left: report.left }
    }

    /// Tries again, ever more rarely, what an earlier attempt left undone: the worker may live for
    /// hours, and the guest waits. A guest that is held is frozen until its rollback ends.
    pub(super) async fn pay_debts(&mut self) {
        if self.again.is_some_and(|again| Instant::now() >= again.at) {
            let left = self.undo(PATIENCE_AGAIN).await.left;
            tracing::info!(?left, "tried again to undo the run");
        } else if let (true, false, Some(link)) = (self.owes_thaw(), self.held, &mut self.link)
            && link.has_agent()
            && link.thaw(Duration::ZERO).await
        {
            self.intents.freeze = FreezeIntent::None;
        }
    }

    /// Another run begins: what is left of an earlier one is the next start's.
    pub(super) fn forget_debts(&mut self) {
        self.again = None;
    }

    async fn abort(&mut self) -> Result<Released, GuardianError> {
        let released = self.undo(PATIENCE_WITH_WORKER).await;
        self.phase = Phase::Idle;
        Ok(released)
    }

    /// Exports end, the graph comes out; the bitmaps stay until the point's fate is told.
    pub(super) async fn release(&mut self) -> Result<Released, GuardianError> {
        self.leash.cut();
        let mut keep = self.intents.clone();
        keep.commit = CommitState::Unknown;
        if self.held {
            // The rollback goes on with the guest as it is.
            keep.stop = StopIntent::None;
            keep.freeze = FreezeIntent::None;
        }
        let released = self.recover_run(&mut keep, &self.hands.clone()).await?;
        self.intents.server = keep.server;
        if !self.held {
            self.intents.freeze = keep.freeze;
            self.intents.stop = keep.stop;
        }
        self.phase = Phase::Idle;
        Ok(released)
    }

    /// The point's fate is known: bitmaps go accordingly. A rollback's guest stays as it is.
    async fn settle(
        &mut self,
        commit: CommitState,
        old: Vec<String>,
    ) -> Result<Released, GuardianError> {
        if old.iter().any(|name| !name.starts_with(BITMAP_PREFIX)) {
            return Err(out_of_order(format!("bitmaps not all ours: {old:?}")));
        }
        if self.phase != Phase::Idle && !matches!(self.phase, Phase::Cut(_)) {
            return Err(out_of_order("the graph has to be released first".into()));
        }
        let mut bitmaps_only = Intents { commit, ..Intents::new(self.intents.run) };
        bitmaps_only.disks.clone_from(&self.intents.disks);
        if let (Some(first), CommitState::Committed) = (bitmaps_only.disks.first_mut(), commit) {
            first.old_bitmaps = old;
        }
        let released = self.recover_run(&mut bitmaps_only, &self.hands.clone()).await?;
        self.intents.commit = CommitState::Unknown;
        Ok(released)
    }

    /// Undoes a run of another worker from its journal.
    async fn recover(
        &mut self,
        mut intents: Intents,
        server_socket: Option<PathBuf>,
    ) -> Result<Released, GuardianError> {
        // The scratch directory of another run is asked of QEMU.
        let hands = Hands { server_socket, scratch_dir: None };
        let orphaned = intents.server != ServerIntent::None && self.serves_only_ours().await;
        let released = self.recover_run(&mut intents, &hands).await?;
        if orphaned && released.left.is_empty() {
            // Its socket may be gone with the directory that held it. One that was stopped already
            // says that it does not run.
            let _ = self.link()?.call(&Call::stop_server(), CALL_WAIT).await;
        }
        Ok(released)
    }

    /// Whether QEMU's NBD server has exports of ours and of nobody else: then it is ours.
    async fn serves_only_ours(&mut self) -> bool {
        // A QEMU that does not answer yet is asked again while it is undone.
        let Ok(seen) = self.observe().await else { return false };
        let ours = |id: &String| OurName::parse(id).is_some();
        !seen.exports.is_empty() && seen.exports.iter().all(ours)
    }

    /// Removes bitmaps of ours by name, wherever they are. QEMU keeps one on a read-only node, as
    /// below an external snapshot; then its file is named, too.
    async fn forget(&mut self, bitmaps: Vec<String>) -> Result<Released, GuardianError> {
        if let Some(foreign) = bitmaps.iter().find(|name| !name.starts_with(BITMAP_PREFIX)) {
            return Err(out_of_order(format!("bitmap {foreign} is not ours")));
        }
        let seen = self.observe().await?;
        let mut left = Vec::new();
        for bitmap in seen.bitmaps.iter().filter(|bitmap| bitmaps.contains(&bitmap.name)) {
            let remove = Call::remove_bitmap(&bitmap.node, &bitmap.name);
            if let Err(error) = self.call(&remove, CALL_WAIT).await {
                let file = seen.node(&bitmap.node).map_or("", |node| &node.filename);
                left.push(format!("bitmap {} on {} ({file}): {error}", bitmap.name, bitmap.node));
            }
        }
        Ok(Released { left })
    }

    pub(super) fn expect(&self, phase: &Phase, request: &str) -> Result<(), GuardianError> {
        if self.phase == *phase {
            return Ok(());
        }
        Err(out_of_order(format!("{request} is asked for in the wrong order: {:?}", self.phase)))
    }

    pub(super) fn writing(&self) -> bool {
        self.intents.rollback == RollbackIntent::Writing
    }
}

fn allowed_after_cut(request: &Request) -> bool {
    matches!(
        request,
        Request::Features
            | Request::Inspect
            | Request::Retire(_)
            | Request::DropNew
            | Request::Abort
            | Request::Recover(..)
            | Request::Forget(_)
    )
}

fn reply<T: Serialize>(result: Result<T, GuardianError>) -> Reply {
    let value = serde_json::to_value(result?);
    value.map_err(|error| out_of_order(format!("cannot be said in JSON: {error}")))
}

fn not_connected() -> GuardianError {
    out_of_order("not connected to a QEMU yet".into())
}

pub(super) fn out_of_order(message: String) -> GuardianError {
    GuardianError { kind: ErrorKind::OutOfOrder, message }
}

impl From<QmpError> for GuardianError {
    fn from(error: QmpError) -> Self {
        let kind = match &error {
            QmpError::Timeout { .. } | QmpError::AgentSilent { .. } => ErrorKind::Timeout,
            QmpError::Closed { .. } => ErrorKind::QemuGone,
            QmpError::Refused { .. } | QmpError::Content { .. } | QmpError::Busy { .. } => {
                ErrorKind::Qemu
            }
            QmpError::NoSocket { .. } | QmpError::NobodyListens { .. } => ErrorKind::Unreachable,
            QmpError::Connect { .. } | QmpError::NotQmp { .. } => ErrorKind::NotConnected,
            _ => ErrorKind::Refused,
        };
        Self { kind, message: error.to_string() }
    }
}

/// Milliseconds since `start`.
pub(super) fn millis(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}
