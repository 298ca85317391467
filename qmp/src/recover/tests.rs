//! The whole input space: every effect of every kind of run, crashed before and after it, with an
//! error and without an answer; each with what others may have done meanwhile; and undoing itself
//! crashed after every one of its effects. The oracle is a model QEMU that refuses what the real
//! one refuses.

use super::*;
use crate::capture::observe::{DeviceNode, RunState, SeenBitmap, SeenJob, SeenNode};
use crate::capture::{Observed, Role};

const RUN: RunId = RunId(7);
const OTHER: RunId = RunId(8);
const ROUNDS_MAX: usize = 12;

#[derive(Debug, Clone, PartialEq)]
struct Model {
    state: RunState,
    frozen: bool,
    server: Option<&'static str>,
    nodes: Vec<String>,
    edges: Vec<(String, String)>,
    devices: Vec<String>,
    exports: Vec<String>,
    jobs: Vec<(String, bool)>,
    bitmaps: Vec<(String, String)>,
    /// Exports and jobs that were told to end, and do so a little later.
    ending: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    Scratch(u16),
    Filter(u16),
    Bitmap(u16),
    Freeze,
    Stop,
    Insert(u16),
    Cont,
    Thaw,
    Snap(u16),
    Server,
    Export(u16),
    Push(u16),
    PushEnds(u16),
    Readable,
    Commit,
    Retire(u16),
    Null(u16),
    Swap(u16),
    Writable(u16),
    Writing,
}

/// What others do between the crash and the recovery.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Meanwhile {
    Nothing,
    /// An external snapshot goes in below each filter.
    Snapshot,
    /// An operator continues the guest.
    Continued,
    /// Another tool has an export, and so a use for the server.
    ForeignExport,
    /// The scratch's storage hangs.
    Hang,
}

fn disk(index: u16) -> String {
    format!("disk{index}")
}

fn device(index: usize) -> String {
    format!("/machine/peripheral/d{index}")
}

fn bitmap(generation: &str, index: u16) -> String {
    format!("icecore:r:c:{generation}:d{index}")
}

fn start(state: RunState) -> (Model, Intents) {
    let model = Model {
        state,
        frozen: false,
        server: None,
        nodes: vec![disk(0), disk(1), OTHER.name(0, Role::Map), "ic-like".into()],
        edges: Vec::new(),
        devices: vec![disk(0), disk(1)],
        exports: Vec::new(),
        jobs: vec![("foreign".into(), false)],
        bitmaps: vec![
            (disk(0), bitmap("p0", 0)),
            (disk(1), bitmap("p0", 1)),
            (disk(0), "x".into()),
            (disk(0), "icecore:other:c:p:d0".into()),
        ],
        ending: Vec::new(),
    };
    let intent = |index: u16| DiskIntent {
        qom_path: device(index.into()),
        node: disk(index),
        new_bitmap: Some(bitmap("p1", index)),
        old_bitmaps: vec![bitmap("p0", index)],
        iothread: (index == 1).then(|| "io0".into()),
    };
    (model, Intents { disks: vec![intent(0), intent(1)], ..Intents::new(RUN) })
}

impl Model {
    fn node(&mut self, index: u16, role: Role, child: Option<String>) {
        let name = RUN.name(index, role);
        if let Some(child) = child {
            self.edges.push((name.clone(), child));
        }
        self.nodes.push(name);
    }

    fn device_to(&mut self, index: u16, node: String) {
        self.devices[usize::from(index)] = node;
    }

    fn perform(&mut self, step: Step) {
        match step {
            Step::Scratch(i) => {
                self.node(i, Role::File, None);
                self.node(i, Role::Raw, Some(RUN.name(i, Role::File)));
                self.node(i, Role::Tmp, Some(RUN.name(i, Role::Raw)));
            }
            Step::Filter(i) => {
                self.node(i, Role::Cbw, Some(disk(i)));
                self.edges.push((RUN.name(i, Role::Cbw), RUN.name(i, Role::Tmp)));
            }
            Step::Bitmap(i) => self.bitmaps.push((disk(i), bitmap("p1", i))),
            Step::Freeze => self.frozen = true,
            Step::Stop if self.state == RunState::Running => self.state = RunState::Paused,
            Step::Insert(i) => self.device_to(i, RUN.name(i, Role::Cbw)),
            Step::Cont => self.state = RunState::Running,
            Step::Thaw => self.frozen = false,
            Step::Snap(i) => self.node(i, Role::Snap, Some(RUN.name(i, Role::Cbw))),
            Step::Server => self.server = Some("ours"),
            Step::Export(i) | Step::Writable(i) => self.exports.push(RUN.name(i, Role::Export)),
            Step::Push(i) => {
                self.node(i, Role::Push, None);
                self.jobs.push((RUN.name(i, Role::Job), false));
            }
            Step::PushEnds(i) => {
                let id = RUN.name(i, Role::Job);
                self.jobs.iter_mut().filter(|job| job.0 == id).for_each(|job| job.1 = true);
            }
            Step::Retire(i) => self.bitmaps.retain(|b| b.1 != bitmap("p0", i)),
            Step::Null(i) => {
                self.node(i, Role::Null, None);
                self.node(i, Role::Keep, Some(disk(i)));
            }
            Step::Swap(i) => self.device_to(i, RUN.name(i, Role::Null)),
            Step::Stop | Step::Readable | Step::Commit | Step::Writing => {}
        }
    }

    fn meanwhile(&mut self, what: Meanwhile) {
        match what {
            Meanwhile::Nothing | Meanwhile::Hang => {}
            Meanwhile::Continued if self.state == RunState::Paused => {
                self.state = RunState::Running;
            }
            Meanwhile::Continued => {}
            Meanwhile::ForeignExport => self.exports.push("theirs".into()),
            Meanwhile::Snapshot => {
                for index in 0..2 {
                    let filter = RUN.name(index, Role::Cbw);
                    if self.devices[usize::from(index)] == filter {
                        let over = format!("over{index}");
                        let below = (filter.clone(), disk(index));
                        self.edges.retain(|edge| *edge != below);
                        self.edges.insert(0, (filter, over.clone()));
                        self.edges.push((over.clone(), disk(index)));
                        self.nodes.push(over);
                    }
                }
            }
        }
    }

    fn seen(&self) -> Observed {
        let seen_node =
            |name: &String| SeenNode { name: name.clone(), size_bytes: 1, filename: String::new() };
        let target = |edge: &(String, String)| edge.1.ends_with("-tmp");
        let edge = |edge: &(String, String)| {
            let kind = if target(edge) { "target" } else { "file" };
            (edge.0.clone(), edge.1.clone(), kind.to_owned())
        };
        let devices = self.devices.iter().enumerate();
        Observed {
            state: self.state,
            nodes: self.nodes.iter().map(seen_node).collect(),
            edges: self.edges.iter().map(edge).collect(),
            devices: devices
                .map(|(i, node)| DeviceNode { qom_path: device(i), node: node.clone() })
                .collect(),
            exports: self.exports.clone(),
            jobs: self.jobs.iter().map(|(id, concluded)| job(id, *concluded)).collect(),
            bitmaps: self.bitmaps.iter().map(|(node, name)| seen_bitmap(node, name)).collect(),
        }
    }

    /// Data of ours may be waiting for a dead client: what drains would wait with it.
    fn may_drain(&self) -> bool {
        let ours = |id: &String| id.starts_with(&format!("ic-{RUN}-"));
        !self.exports.iter().any(ours) && !self.jobs.iter().any(|job| ours(&job.0) && !job.1)
    }

    fn end(&mut self) {
        let ending = std::mem::take(&mut self.ending);
        self.exports.retain(|id| !ending.contains(id));
        self.jobs.retain(|job| !ending.contains(&job.0));
    }

    fn undo(&mut self, effect: &Effect, hang: bool) {
        match effect {
            Effect::DeleteExport(id) => {
                assert!(id.starts_with(&format!("ic-{RUN}-")), "a foreign export: {id}");
                self.ending.push(id.clone());
            }
            Effect::Yank(node) => assert!(self.nodes.contains(node), "no such node {node}"),
            Effect::CancelJob(id) | Effect::DismissJob(id) => {
                assert_ne!(id, "foreign");
                self.ending.push(id.clone());
            }
            Effect::StopServer => {
                assert_eq!(self.server, Some("ours"));
                assert!(!self.exports.contains(&"theirs".into()), "somebody uses it");
                self.server = None;
            }
            Effect::Cont => {
                assert_eq!(self.state, RunState::Paused);
                self.state = RunState::Running;
            }
            Effect::Halt => {
                assert!(self.may_drain() || !hang);
                self.state = RunState::Paused;
            }
            Effect::Thaw => self.frozen = false,
            Effect::RestoreDrive { qom_path, node, pin } => {
                assert!(self.may_drain() && !hang, "it would wait for us");
                let index = usize::from(*qom_path == device(1));
                let from_null = self.devices[index].ends_with("-null");
                assert_eq!(pin.is_some(), from_null && index == 1, "else QEMU aborts");
                assert!(pin.is_none() || self.server.is_some(), "a pin is an export");
                // The filter is read-only above a snapshot that is still attached.
                let snap = RUN.name(u16::try_from(index).expect("small"), Role::Snap);
                assert!(!self.nodes.contains(&snap));
                self.devices[index].clone_from(node);
            }
            Effect::DeleteNode(name) => {
                assert!(self.may_drain() && !hang, "it would wait for us");
                assert!(name.starts_with(&format!("ic-{RUN}-")), "a foreign node: {name}");
                let away =
                    name.ends_with("-keep") && self.devices.iter().any(|n| n.ends_with("-null"));
                assert!(!away, "the disk would go with it");
                let used = self.devices.contains(name) || self.edges.iter().any(|e| e.1 == *name);
                if !used {
                    self.nodes.retain(|node| node != name);
                    self.edges.retain(|edge| edge.0 != *name);
                }
            }
            Effect::RemoveBitmap { name, .. } => self.bitmaps.retain(|b| b.1 != *name),
        }
    }
}

fn job(id: &str, concluded: bool) -> SeenJob {
    SeenJob { id: id.into(), concluded, error: None, done: 0, total: 1 }
}

fn seen_bitmap(node: &str, name: &str) -> SeenBitmap {
    SeenBitmap { node: node.into(), name: name.into(), busy: false, dirty_bytes: 1 }
}

/// What is on record before a step, and after it is known to be done.
fn intend(intents: &mut Intents, step: Step, was: RunState) {
    match step {
        Step::Freeze => intents.freeze = FreezeIntent::Sent,
        Step::Stop if was == RunState::Running => intents.stop = StopIntent::RanBefore,
        Step::Server => intents.server = ServerIntent::Asked,
        Step::Readable => intents.commit = CommitState::Unknown,
        Step::Retire(_) => intents.commit = CommitState::Committed,
        Step::Writing => intents.rollback = RollbackIntent::Writing,
        _ => {}
    }
}

fn settle(intents: &mut Intents, step: Step) {
    match step {
        Step::Thaw => intents.freeze = FreezeIntent::None,
        Step::Cont => intents.stop = StopIntent::None,
        Step::Server => intents.server = ServerIntent::Ours,
        _ => {}
    }
}

fn runs() -> Vec<Vec<Step>> {
    let prepare = [0, 1].into_iter().flat_map(|i| [Step::Scratch(i), Step::Filter(i)]);
    let bitmaps = [Step::Bitmap(0), Step::Bitmap(1), Step::Freeze, Step::Stop];
    let instant = [Step::Insert(0), Step::Insert(1), Step::Cont, Step::Thaw];
    let snaps = [Step::Snap(0), Step::Snap(1), Step::Server, Step::Readable];
    let captured: Vec<_> = prepare.chain(bitmaps).chain(instant).chain(snaps).collect();
    let end = [Step::Commit, Step::Retire(0), Step::Retire(1)];
    let pull = [Step::Export(0), Step::Export(1)];
    let push = [Step::Push(0), Step::Export(1), Step::Push(1), Step::PushEnds(0)];
    let away = [Step::Readable, Step::Stop, Step::Server, Step::Null(0), Step::Swap(0)];
    let write = [Step::Null(1), Step::Swap(1), Step::Writable(0), Step::Writing, Step::Writable(1)];
    vec![
        [&captured[..], &pull, &end].concat(),
        [&captured[..], &push, &end].concat(),
        [&away[..], &write].concat(),
    ]
}

/// Undoes with the journal as it was at the crash, crashing again after `budget` effects.
fn undo_some(model: &mut Model, intents: &Intents, hang: bool, mut budget: usize) -> bool {
    for _ in 0..ROUNDS_MAX {
        let seen = model.seen();
        let has_scratch = seen.nodes.iter().any(|node| node.name.ends_with("-tmp"));
        let hangs = hang && has_scratch;
        let situation = Situation {
            seen: &seen,
            guest: if model.frozen { GuestFs::FrozenOrUnknown } else { GuestFs::Thawed },
            our_socket_exists: model.server == Some("ours"),
            scratch: if hangs { ScratchHealth::Hangs } else { ScratchHealth::Answers },
        };
        let effects = plan(intents, &situation);
        if effects.is_empty() {
            return true;
        }
        for effect in effects {
            if intents.rollback == RollbackIntent::Writing {
                assert_ne!(effect, Effect::Cont, "its memory does not know its disks");
            }
            if budget == 0 {
                model.end();
                return false;
            }
            budget -= 1;
            model.undo(&effect, hangs);
        }
        model.end();
    }
    panic!("undoing {intents:?} does not end: {model:?}");
}

fn check(model: &Model, before: &Model, intents: &Intents, was: RunState, what: Meanwhile) {
    let hung = what == Meanwhile::Hang && model.nodes.iter().any(|node| node.ends_with("-tmp"));
    let left = remains(intents, &model.seen());
    if hung {
        assert!(left.iter().all(|name| !name.ends_with("-exp") && !name.ends_with("-job")));
    } else {
        assert_eq!(left, Vec::<String>::new());
        for (index, node) in (0u16..).zip(&model.devices) {
            assert!(*node == disk(index) || *node == format!("over{index}"), "{node}");
        }
    }
    assert!(model.nodes.contains(&OTHER.name(0, Role::Map)) && model.nodes.len() >= 4);
    assert!(model.jobs.contains(&("foreign".into(), false)));
    if !model.exports.contains(&"theirs".into()) {
        assert_eq!(model.server, None, "our server is stopped");
    }
    if intents.rollback == RollbackIntent::Writing {
        assert_ne!(model.state, RunState::Running);
        return;
    }
    let expected = if what == Meanwhile::Continued { before.state } else { was };
    let freed = if intents.stop == StopIntent::RanBefore { RunState::Running } else { expected };
    assert_eq!(model.state, freed, "the guest runs as it did");
    assert!(!model.frozen || intents.freeze == FreezeIntent::None, "thawed");
    check_bitmaps(model, before, intents);
}

/// I1: `p0` goes only after the commit; `p1` only when it is known that there was none.
fn check_bitmaps(model: &Model, before: &Model, intents: &Intents) {
    let has = |model: &Model, name: &str| model.bitmaps.iter().any(|b| b.1 == name);
    assert!(has(model, "x") && has(model, "icecore:other:c:p:d0"), "foreign bitmaps stay");
    for index in 0..2 {
        let (p0, p1) = (bitmap("p0", index), bitmap("p1", index));
        match intents.commit {
            CommitState::NotCommitted => assert!(has(model, &p0) && !has(model, &p1)),
            CommitState::Unknown => {
                assert_eq!(has(model, &p0), has(before, &p0));
                assert_eq!(has(model, &p1), has(before, &p1));
            }
            CommitState::Committed => {
                assert!(!has(model, &p0));
                assert_eq!(has(model, &p1), has(before, &p1));
            }
        }
    }
}

#[test]
fn every_crash_of_every_run_is_undone() {
    use Meanwhile::{Continued, ForeignExport, Hang, Nothing, Snapshot};
    let mut cases = 0;
    for was in [RunState::Running, RunState::Paused] {
        for script in runs() {
            // Before, with an error, after, without an answer (done or not): what differs for a
            // recovery is whether the effect took place.
            for (position, done) in (0..script.len()).flat_map(|at| [(at, false), (at, true)]) {
                for what in [Nothing, Snapshot, Continued, ForeignExport, Hang] {
                    cases += crash(&script, position, done, was, what);
                }
            }
        }
    }
    assert!(cases > 5000, "only {cases} cases");
}

fn crash(script: &[Step], position: usize, done: bool, was: RunState, what: Meanwhile) -> usize {
    let (mut model, mut intents) = start(was);
    let skipped = |step: Step| step == Step::Cont && was != RunState::Running;
    for step in &script[..position] {
        if !skipped(*step) {
            intend(&mut intents, *step, was);
            model.perform(*step);
            settle(&mut intents, *step);
        }
    }
    let step = script[position];
    intend(&mut intents, step, was);
    if done && !skipped(step) {
        model.perform(step);
    }
    model.meanwhile(what);
    let before = model.clone();
    for budget in 0..40 {
        let mut model = before.clone();
        let complete = undo_some(&mut model, &intents, what == Meanwhile::Hang, budget);
        assert!(undo_some(&mut model, &intents, what == Meanwhile::Hang, usize::MAX));
        check(&model, &before, &intents, was, what);
        if complete {
            return budget + 1;
        }
    }
    panic!("more effects than any run needs");
}

#[test]
fn what_is_not_known_is_not_guessed() {
    let (mut model, _) = start(RunState::Paused);
    model.frozen = true;
    model.server = Some("ours");
    let before = model.clone();
    assert!(undo_some(&mut model, &Intents::unknown(RUN), false, usize::MAX));
    assert_eq!(model, before, "nothing of the run is seen, so nothing is done");
}

#[test]
fn a_journal_survives_its_file() {
    let (_, intents) = start(RunState::Running);
    let text = serde_json::to_string(&intents).expect("in JSON");
    assert_eq!(serde_json::from_str::<Intents>(&text).expect("and back"), intents);
}
