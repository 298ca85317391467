//! Carries the plan out, again and again, until nothing of the run is seen any more.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::plan::{plan, remains};
use super::{
    Effect, FreezeIntent, GuestFs, Intents, ScratchHealth, ServerIntent, Situation, StopIntent,
};
use crate::capture::link::{CALL_WAIT, Link};
use crate::capture::observe::{Observed, SeenNode};
use crate::capture::{Call, OurName, Role, RunId};
use crate::errors::QmpError;
use crate::guardian::probe::Probe;

/// One attempt to thaw before the rest of the plan goes on; the next round tries again.
const THAW_PATIENCE: Duration = Duration::from_secs(4);

/// First and longest pause between two rounds that did not end it.
const ROUND_PAUSE_FIRST: Duration = Duration::from_millis(5);
/// See [`ROUND_PAUSE_FIRST`].
const ROUND_PAUSE_LONGEST: Duration = Duration::from_secs(2);

/// Rounds that follow each other at once as long as nothing failed: exports, graph, bitmaps, and the
/// last look. More come only where QEMU needs time to end something.
const ROUNDS_WITHOUT_PAUSE: u32 = 4;

/// What undoing has to know beside what QEMU shows.
#[derive(Debug, Clone, Default)]
pub struct Hands {
    /// The socket path that QEMU's NBD server was told.
    pub server_socket: Option<PathBuf>,
    /// The directory of the run's scratch files; without it, QEMU is asked.
    pub scratch_dir: Option<PathBuf>,
}

/// How undoing ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Names of what is still there, and why, for people.
    pub left: Vec<String>,
    /// QEMU is gone, and all that was ours with it.
    pub qemu_gone: bool,
}

/// Undoes what `intents` says and the run's names show, for at most `patience`. `intents` is
/// updated as its debts are paid.
pub async fn run(
    link: &mut Link,
    intents: &mut Intents,
    hands: &Hands,
    probe: &mut Probe,
    patience: Duration,
) -> Report {
    let until = Instant::now() + patience;
    let mut pause = ROUND_PAUSE_FIRST;
    let mut rushed = 0;
    probe.forget();
    loop {
        let round = round(link, intents, hands, probe).await;
        match round {
            Round::Over(report) => return report,
            Round::Again(left) if Instant::now() >= until => {
                return Report { left, qemu_gone: false };
            }
            // All was carried out; what is next is seen at once.
            Round::Again(left) if left.is_empty() && rushed < ROUNDS_WITHOUT_PAUSE => {
                rushed += 1;
                continue;
            }
            Round::Again(_) => sleep(pause).await,
        }
        pause = (pause * 2).min(ROUND_PAUSE_LONGEST);
    }
}

enum Round {
    Over(Report),
    Again(Vec<String>),
}

async fn round(link: &mut Link, intents: &mut Intents, hands: &Hands, probe: &mut Probe) -> Round {
    if let Err(error) = link.revive().await {
        return if error.nobody_there() {
            Round::Over(Report { left: Vec::new(), qemu_gone: true })
        } else {
            Round::Again(vec![error.to_string()])
        };
    }
    let seen = match link.observe().await {
        Ok(seen) => seen,
        Err(error) => return Round::Again(vec![error.to_string()]),
    };
    let scratch = scratch_health(intents.run, hands, &seen, probe).await;
    let situation = situation(link, intents, hands, &seen, scratch);
    let effects = plan(intents, &situation);
    if effects.is_empty() {
        return Round::Over(Report { left: left_over(intents, &situation), qemu_gone: false });
    }
    Round::Again(carry_out(link, intents, &effects).await)
}

fn situation<'a>(
    link: &Link,
    intents: &Intents,
    hands: &Hands,
    seen: &'a Observed,
    scratch: ScratchHealth,
) -> Situation<'a> {
    // A thaw that is owed is tried, not asked about: the answer could be older than the freeze.
    let guest = match intents.freeze {
        FreezeIntent::Sent if link.has_agent() => GuestFs::FrozenOrUnknown,
        _ => GuestFs::Thawed,
    };
    let socket = hands.server_socket.as_ref();
    let our_socket_exists = intents.server != ServerIntent::None
        && socket.is_some_and(|path| path.symlink_metadata().is_ok());
    Situation { seen, guest, our_socket_exists, scratch }
}

/// Only a scratch in the graph can hang what drains.
async fn scratch_health(
    run: RunId,
    hands: &Hands,
    seen: &Observed,
    probe: &mut Probe,
) -> ScratchHealth {
    let ours = |node: &&SeenNode| {
        OurName::parse(&node.name).is_some_and(|name| {
            name.run == run && matches!(name.role, Role::File | Role::Raw | Role::Tmp)
        })
    };
    let nodes: Vec<_> = seen.nodes.iter().filter(ours).collect();
    if nodes.is_empty() {
        return ScratchHealth::Answers;
    }
    let file = |node: &&SeenNode| Some(PathBuf::from(&node.filename)).filter(|f| f.is_absolute());
    let in_qemu = || nodes.iter().find_map(file).and_then(|file| Some(file.parent()?.to_owned()));
    match hands.scratch_dir.clone().or_else(in_qemu) {
        Some(directory) => probe.run(&directory).await,
        None => ScratchHealth::NotKnown,
    }
}

fn left_over(intents: &Intents, situation: &Situation<'_>) -> Vec<String> {
    let why = match situation.scratch {
        ScratchHealth::Answers => "QEMU still uses it",
        ScratchHealth::Hangs => {
            "its scratch storage does not answer, and removing it would hang the guest"
        }
        ScratchHealth::NotKnown => {
            "whether its scratch storage answers is not known, and removing it could hang the guest"
        }
    };
    let names = remains(intents, situation.seen);
    names.into_iter().map(|name| format!("{name}: {why}")).collect()
}

/// Runs each effect; a failed one is reported and does not keep the others, except that after a
/// missing answer nothing more is asked of a QEMU that may hang.
async fn carry_out(link: &mut Link, intents: &mut Intents, effects: &[Effect]) -> Vec<String> {
    let mut failed = BTreeSet::new();
    for effect in effects {
        tracing::info!(?effect, "undoing");
        let Err(error) = apply(link, intents, effect).await else { continue };
        failed.insert(format!("{effect:?}: {error}"));
        if error.outcome_unknown() {
            break;
        }
    }
    failed.into_iter().collect()
}

async fn apply(link: &mut Link, intents: &mut Intents, effect: &Effect) -> Result<(), QmpError> {
    let call = match effect {
        Effect::Thaw => {
            if link.thaw(THAW_PATIENCE).await {
                intents.freeze = FreezeIntent::None;
                return Ok(());
            }
            let path = link.monitor().path().to_owned();
            return Err(QmpError::AgentSilent { path, waited: THAW_PATIENCE });
        }
        Effect::RestoreDrive { qom_path, node, pin: Some(iothread) } => {
            return restore_pinned(link, intents, qom_path, node, iothread).await;
        }
        other => command(other),
    };
    let Some(call) = call else { return Ok(()) };
    match (link.call(&call, CALL_WAIT).await, effect) {
        (Ok(_), _) => {}
        // It went below an external snapshot: no second try will help, and it records nothing there.
        (Err(QmpError::Refused { desc, .. }), Effect::RemoveBitmap { node, name })
            if desc.contains("readonly") =>
        {
            tracing::warn!(node, name, "a bitmap stays on a read-only node: {desc}");
            forget_bitmap(intents, name);
        }
        (Err(error), _) => return Err(error),
    }
    match effect {
        Effect::Cont => intents.stop = StopIntent::None,
        Effect::StopServer => intents.server = ServerIntent::None,
        _ => {}
    }
    Ok(())
}

fn forget_bitmap(intents: &mut Intents, name: &str) {
    for disk in &mut intents.disks {
        disk.old_bitmaps.retain(|old| old != name);
        disk.new_bitmap = disk.new_bitmap.take().filter(|new| new != name);
    }
}

fn command(effect: &Effect) -> Option<Call> {
    Some(match effect {
        Effect::DeleteExport(id) => Call::remove_export(id),
        Effect::Yank(node) => Call::yank(node),
        Effect::CancelJob(id) => Call::cancel_job(id),
        Effect::DismissJob(id) => Call::dismiss_job(id),
        Effect::StopServer => Call::stop_server(),
        Effect::Cont => Call::cont(),
        Effect::Halt => Call::stop(),
        Effect::RestoreDrive { qom_path, node, .. } => Call::set_drive(qom_path, node),
        Effect::DeleteNode(name) => Call::remove_node(name),
        Effect::RemoveBitmap { node, name } => Call::remove_bitmap(node, name),
        Effect::Thaw => return None,
    })
}

/// The disk's node may have left the iothread's context with its device; it has to be back there
/// before the device is, or QEMU aborts.
async fn restore_pinned(
    link: &Link,
    intents: &Intents,
    qom_path: &str,
    node: &str,
    iothread: &str,
) -> Result<(), QmpError> {
    let index = intents.disks.iter().position(|disk| disk.qom_path == qom_path).unwrap_or(0);
    let index = u16::try_from(index).unwrap_or(0);
    let [pin, null] = [Role::Pin, Role::Null].map(|role| intents.run.name(index, role));
    link.move_device(qom_path, (&null, node), Some(iothread), &pin).await
}
