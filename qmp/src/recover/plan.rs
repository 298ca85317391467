//! The decision itself: no IO, no clock, no randomness.

use super::{
    CommitState, Effect, FreezeIntent, GuestFs, Intents, RollbackIntent, ScratchHealth,
    ServerIntent, Situation, StopIntent,
};
use crate::capture::names::DIRTY_BITMAP;
use crate::capture::observe::{RunState, SeenNode};
use crate::capture::{Observed, OurName, Role, RunId};

/// What to do now, in this order. Empty: nothing of the run is left, or nothing more can be done
/// (then [`remains`] says what).
///
/// Exports go first, since an unread reply makes everything else wait; then the guest is set
/// free; the graph comes out only when no export and no job of ours is seen any more.
pub fn plan(intents: &Intents, now: &Situation<'_>) -> Vec<Effect> {
    let mut effects = exports(intents.run, now.seen);
    effects.extend(jobs(intents.run, now.seen));
    let in_use = !effects.is_empty();
    effects.extend(server(intents, now));
    effects.extend(guest(intents, now));
    if !in_use && now.scratch == ScratchHealth::Answers {
        effects.extend(drives(intents, now.seen));
        effects.extend(nodes(intents.run, now.seen));
    }
    effects.extend(bitmaps(intents, now.seen));
    effects
}

/// Names of what is of this run and still in QEMU.
pub fn remains(intents: &Intents, seen: &Observed) -> Vec<String> {
    let run = intents.run;
    let nodes = seen.nodes.iter().map(|node| &node.name);
    let all = nodes.chain(&seen.exports).chain(seen.jobs.iter().map(|job| &job.id));
    all.filter(|name| role(run, name).is_some()).cloned().collect()
}

fn role(run: RunId, name: &str) -> Option<Role> {
    OurName::parse(name).filter(|ours| ours.run == run).map(|ours| ours.role)
}

fn exports(run: RunId, seen: &Observed) -> Vec<Effect> {
    let ours = seen.exports.iter().filter(|id| role(run, id).is_some());
    ours.map(|id| Effect::DeleteExport(id.clone())).collect()
}

fn jobs(run: RunId, seen: &Observed) -> Vec<Effect> {
    let mut effects = Vec::new();
    for job in &seen.jobs {
        let Some(ours) = OurName::parse(&job.id).filter(|ours| ours.run == run) else { continue };
        if job.concluded {
            effects.push(Effect::DismissJob(job.id.clone()));
            continue;
        }
        let push = run.name(ours.disk, Role::Push);
        if seen.node(&push).is_some() {
            effects.push(Effect::Yank(push));
        }
        effects.push(Effect::CancelJob(job.id.clone()));
    }
    effects
}

fn server(intents: &Intents, now: &Situation<'_>) -> Option<Effect> {
    let ours = match intents.server {
        ServerIntent::None => false,
        ServerIntent::Asked => now.our_socket_exists,
        // The socket's file goes with the server, so one that is gone was stopped already.
        ServerIntent::Ours => now.our_socket_exists,
    };
    let foreign_exports = now.seen.exports.iter().any(|id| role(intents.run, id).is_none());
    let needed_for_pins = now.scratch == ScratchHealth::Answers
        && drives(intents, now.seen)
            .iter()
            .any(|effect| matches!(effect, Effect::RestoreDrive { pin: Some(_), .. }));
    (ours && !foreign_exports && !needed_for_pins).then_some(Effect::StopServer)
}

fn guest(intents: &Intents, now: &Situation<'_>) -> Vec<Effect> {
    if intents.rollback == RollbackIntent::Writing {
        // Its memory knows nothing of what was written: only a reset may follow, by the
        // rollback that finishes or undoes this one.
        let halt = now.seen.state == RunState::Running;
        return halt.then_some(Effect::Halt).into_iter().collect();
    }
    let mut effects = Vec::new();
    let halted = now.seen.state == RunState::Paused;
    if intents.stop == StopIntent::RanBefore && halted {
        effects.push(Effect::Cont);
    }
    if intents.freeze == FreezeIntent::Sent && now.guest == GuestFs::FrozenOrUnknown {
        effects.push(Effect::Thaw);
    }
    effects
}

/// Devices that use a node of ours go back: from the filter to its present child (an external
/// snapshot may have gone in below), from a stand-in to the node on record.
fn drives(intents: &Intents, seen: &Observed) -> Vec<Effect> {
    let mut effects = Vec::new();
    for device in &seen.devices {
        let disk = intents.disks.iter().find(|disk| disk.qom_path == device.qom_path);
        let (node, pin) = match role(intents.run, &device.node) {
            Some(Role::Cbw) => (seen.file_child(&device.node).map(str::to_owned), None),
            Some(Role::Null) => {
                (disk.map(|disk| disk.node.clone()), disk.and_then(|d| d.iothread.clone()))
            }
            _ => continue,
        };
        if let Some(node) = node {
            let qom_path = device.qom_path.clone();
            effects.push(Effect::RestoreDrive { qom_path, node, pin });
        }
    }
    // The snapshot refuses to share writing, so it leaves before the device does.
    if !effects.is_empty() {
        let snaps = with_role(intents.run, seen, |role| role == Role::Snap);
        effects.splice(0..0, snaps.map(|node| Effect::DeleteNode(node.name.clone())));
    }
    effects
}

/// Parents before children, as QEMU wants it.
const REMOVAL_ORDER: [Role; 9] = [
    Role::Snap,
    Role::Push,
    Role::Cbw,
    Role::Map,
    Role::Null,
    Role::Keep,
    Role::Tmp,
    Role::Raw,
    Role::File,
];

fn nodes(run: RunId, seen: &Observed) -> Vec<Effect> {
    let leaves_with_device = seen.devices.iter().any(|device| role(run, &device.node).is_some());
    let mut effects = Vec::new();
    for wanted in REMOVAL_ORDER {
        // A snapshot leaves before its device does, above; a kept disk is let go after.
        if matches!(wanted, Role::Snap | Role::Keep) && leaves_with_device {
            continue;
        }
        let found = with_role(run, seen, |role| role == wanted);
        effects.extend(found.map(|node| Effect::DeleteNode(node.name.clone())));
    }
    effects
}

fn with_role(
    run: RunId,
    seen: &Observed,
    wanted: impl Fn(Role) -> bool,
) -> impl Iterator<Item = &SeenNode> {
    seen.nodes.iter().filter(move |node| role(run, &node.name).is_some_and(&wanted))
}

fn bitmaps(intents: &Intents, seen: &Observed) -> Vec<Effect> {
    let doomed = |name: &String| match intents.commit {
        CommitState::Unknown => false,
        CommitState::NotCommitted => {
            intents.disks.iter().any(|disk| disk.new_bitmap.as_ref() == Some(name))
        }
        CommitState::Committed => intents.disks.iter().any(|disk| disk.old_bitmaps.contains(name)),
    };
    let free = seen.bitmaps.iter().filter(|bitmap| !bitmap.busy && bitmap.name != DIRTY_BITMAP);
    free.filter(|bitmap| doomed(&bitmap.name))
        .map(|bitmap| Effect::RemoveBitmap { node: bitmap.node.clone(), name: bitmap.name.clone() })
        .collect()
}
