//! Writing to the disks of a guest that stands still.
//!
//! The device is given a stand-in, because its own permissions keep everyone else from writing to
//! its node; then the node is exported, written, and given back. From the first write on the
//! guest is never continued: its memory does not know its disks any more.

use super::flow::{dirty_context, refused};
use super::keeper::{Keeper, Phase, out_of_order};
use super::protocol::{
    ErrorKind, GuardianError, Released, Restart, SwapAway, SwapDisk, WritableDisk,
};
use crate::capture::link::CALL_WAIT;
use crate::capture::names::{DIRTY_BITMAP, DiskIndex};
use crate::capture::observe::RunState;
use crate::capture::plan::{self, Base, Step};
use crate::capture::{Call, Role};
use crate::features::SAFE_IOTHREAD_EXPORTS;
use crate::recover::{FreezeIntent, Hands, Intents, RollbackIntent, StopIntent};

impl Keeper {
    pub(super) async fn swap_away(&mut self, swap: SwapAway) -> Result<(), GuardianError> {
        self.expect(&Phase::Idle, "swap away")?;
        if !self.held {
            return Err(out_of_order("the guest has to be held stopped first".into()));
        }
        let version = self.link()?.monitor().version();
        let in_iothread = swap.disks.iter().find(|disk| disk.iothread.is_some());
        if let (Some(disk), true) = (in_iothread, version < SAFE_IOTHREAD_EXPORTS) {
            return Err(refused(format!(
                "{} is in an iothread, and QEMU {version} would not survive writing to it: roll \
                 back with the VM off, or with QEMU {SAFE_IOTHREAD_EXPORTS} or later",
                disk.qom_path
            )));
        }
        self.begin_swap(&swap);
        match self.try_swap_away(&swap.disks).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.cut(error).await),
        }
    }

    fn begin_swap(&mut self, swap: &SwapAway) {
        let (stop, freeze) = (self.intents.stop, self.intents.freeze);
        self.intents = Intents { stop, freeze, ..Intents::before_swap(swap) };
        self.forget_debts();
        self.swapped.clone_from(&swap.disks);
        self.disks.clear();
        self.hands = Hands { server_socket: Some(swap.server_socket.clone()), scratch_dir: None };
        self.phase = Phase::Swapped;
    }

    async fn try_swap_away(&mut self, disks: &[SwapDisk]) -> Result<(), GuardianError> {
        self.must_stand_still().await?;
        self.start_server().await?;
        let run = self.intents.run;
        for (index, disk) in (0u16..).zip(disks) {
            let null = run.name(index, Role::Null);
            self.call(&Call::null_node(&null, disk.size_bytes), CALL_WAIT).await?;
            let keep = run.name(index, Role::Keep);
            self.call(&Call::keep_node(&keep, &disk.node), CALL_WAIT).await?;
            let (iothread, pin) = (disk.iothread.as_deref(), run.name(index, Role::Pin));
            let nodes = (disk.node.as_str(), null.as_str());
            self.link()?.move_device(&disk.qom_path, nodes, iothread, &pin).await?;
        }
        let seen = self.observe().await?;
        for (index, disk) in (0u16..).zip(disks) {
            if seen.device_node(&disk.qom_path) != Some(run.name(index, Role::Null).as_str()) {
                return Err(refused(format!("{} kept its disk", disk.qom_path)));
            }
        }
        Ok(())
    }

    async fn must_stand_still(&mut self) -> Result<(), GuardianError> {
        if self.observe().await?.state != RunState::Running {
            return Ok(());
        }
        Err(refused("somebody continued the guest while it was held for a rollback".into()))
    }

    pub(super) async fn expose_writable(
        &mut self,
        bases: Vec<Option<Base>>,
    ) -> Result<Vec<WritableDisk>, GuardianError> {
        self.expect(&Phase::Swapped, "expose writable")?;
        if bases.len() != self.swapped.len() {
            return Err(out_of_order("another number of disks than were swapped away".into()));
        }
        let mut disks = Vec::new();
        for (index, (disk, base)) in (0u16..).zip(self.swapped.clone().iter().zip(&bases)) {
            match self.expose_one(index, disk, base.as_ref()).await {
                Ok(exposed) => disks.push(exposed),
                Err(error) => return Err(self.cut(error).await),
            }
        }
        Ok(disks)
    }

    async fn expose_one(
        &mut self,
        index: DiskIndex,
        disk: &SwapDisk,
        base: Option<&Base>,
    ) -> Result<WritableDisk, GuardianError> {
        let run = self.intents.run;
        let mut map_export = None;
        if let Some(base) = base {
            let map = run.name(index, Role::Map);
            let steps = plan::dirty_map(run, index, &disk.bitmap_node, disk.size_bytes, base);
            self.steps(&steps).await?;
            let export = Step::Run(Call::add_export(&map, &map, false, &[DIRTY_BITMAP]));
            self.steps(&[export]).await?;
            map_export = Some(map);
        }
        let export = run.name(index, Role::Export);
        self.call(&Call::add_export(&export, &disk.node, true, &[]), CALL_WAIT).await?;
        let dirty_context = map_export.is_some().then(dirty_context);
        Ok(WritableDisk { export, map_export, dirty_context })
    }

    pub(super) fn begin_writing(&mut self) -> Result<(), GuardianError> {
        self.expect(&Phase::Swapped, "begin writing")?;
        self.intents.rollback = RollbackIntent::Writing;
        Ok(())
    }

    pub(super) async fn swap_back(&mut self) -> Result<Released, GuardianError> {
        self.expect(&Phase::Swapped, "swap back")?;
        let released = self.release().await?;
        let seen = self.observe().await?;
        for disk in &self.swapped {
            if seen.device_node(&disk.qom_path) != Some(disk.node.as_str()) {
                return Err(GuardianError {
                    kind: ErrorKind::Qemu,
                    message: format!("{} did not take {} back", disk.qom_path, disk.node),
                });
            }
        }
        Ok(released)
    }

    pub(super) async fn restart(&mut self, how: Restart) -> Result<(), GuardianError> {
        self.expect(&Phase::Idle, "restart")?;
        if !self.held {
            return Err(out_of_order("the guest is not held".into()));
        }
        if self.writing() && self.observe().await?.state == RunState::Running {
            self.call(&Call::stop(), CALL_WAIT).await?;
        }
        if how == Restart::Reset {
            self.call(&Call::system_reset(), CALL_WAIT).await?;
            self.call(&Call::cont(), CALL_WAIT).await?;
        }
        // A guest that was reset, or will be, is neither frozen nor ours to continue.
        self.intents.freeze = FreezeIntent::None;
        self.intents.stop = StopIntent::None;
        self.intents.rollback = RollbackIntent::NotWriting;
        self.held = false;
        Ok(())
    }
}
