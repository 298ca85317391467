//! What the disks held at an instant, read by other means than Icecore's.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::agent::{AgentProxy, Answers};
use crate::disk::Disk;
use crate::failure::{Failure, Result};
use crate::icecore::{Icecore, Run};
use crate::image::{compare, image_to_raw};
use crate::monitor::Monitor;
use crate::mount::check_writer_in_images;
use crate::place::Scratch;
use crate::vm::{TestVm, lock};

/// Raw copies of all disks of a VM at one instant.
#[derive(Debug)]
pub struct Reference {
    scratch: Scratch,
    disks: Vec<Disk>,
}

impl Reference {
    /// Stops the VM (which makes QEMU write out what it holds), reads, and lets it go on.
    pub(crate) fn read(monitor: &Mutex<Monitor>, dir: &Path, disks: &[Disk]) -> Result<Self> {
        let mut monitor = lock(monitor);
        let ran = monitor.status()? == "running";
        // Of a VM that is stopped already this is only the flush.
        monitor.execute("stop", json!({}))?;
        let reference = Self::read_images(dir, disks);
        if ran {
            monitor.execute("cont", json!({}))?;
        }
        reference
    }

    pub(crate) fn read_images(dir: &Path, disks: &[Disk]) -> Result<Self> {
        let scratch = Scratch::new()?;
        for disk in disks {
            let raw = scratch.join(format!("{}.raw", disk.id));
            image_to_raw(&disk.file(dir), disk.format(), &raw)?;
        }
        Ok(Self { scratch, disks: disks.to_vec() })
    }

    /// The raw copy of a disk.
    pub fn raw(&self, disk: &str) -> PathBuf {
        self.scratch.join(format!("{disk}.raw"))
    }

    /// Compares a restored raw disk with it, byte for byte.
    pub fn compare(&self, disk: &str, restored: &Path) -> Result<()> {
        compare(&self.raw(disk), restored)
    }

    /// Compares all disks, restored as `DIR/<disk>.raw`.
    pub fn compare_all(&self, restored: &Path) -> Result<()> {
        let mut disks = self.disks.iter();
        disks
            .try_for_each(|disk| self.compare(&disk.id, &restored.join(format!("{}.raw", disk.id))))
    }

    /// Compares with another reference.
    pub fn same_as(&self, other: &Self) -> Result<()> {
        self.disks.iter().try_for_each(|disk| self.compare(&disk.id, &other.raw(&disk.id)))
    }
}

/// Takes a reference while the guest is frozen by its agent.
///
/// It stands between Icecore and the agent: when Icecore asks for the thaw, its instant is fixed
/// and the file systems still stand, so the disks are read before the request goes on. With it the
/// writer may run all through the test, and the point must still be equal byte for byte. (Disks
/// without a file system do not freeze: leave them alone during the backup.)
#[derive(Debug)]
pub struct FreezeWatch {
    proxy: AgentProxy,
    taken: Arc<Mutex<Option<Result<Reference>>>>,
}

impl FreezeWatch {
    /// The socket to give to Icecore instead of the agent's own.
    pub fn socket(&self) -> &Path {
        self.proxy.socket()
    }

    /// The reference of the last freeze; each is handed out once.
    pub fn take(&self) -> Result<Reference> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.unwrap_or_else(|| Err(Failure::new("nobody froze and thawed the guest")))
    }
}

impl Icecore {
    /// Takes a point of which a reference exists, whatever the guest is doing: with an agent at the
    /// instant of its freeze; else the test freezes the file systems itself, through its own
    /// channel, for as long as the backup runs.
    pub fn backup_quietly(
        &self,
        vm: &TestVm,
        with: impl FnOnce(Run) -> Run,
    ) -> Result<(Value, Reference)> {
        if vm.has_agent() {
            let watch = vm.watch_freeze()?;
            let report = with(self.backup_through(vm, watch.socket())).json()?;
            return Ok((report, watch.take()?));
        }
        vm.freeze_by_hand()?;
        let taken = with(self.backup(vm)).json().and_then(|report| Ok((report, vm.reference()?)));
        vm.thaw_by_hand()?;
        taken
    }
}

impl TestVm {
    /// Stands between Icecore and the guest agent from now on.
    pub fn watch_freeze(&self) -> Result<FreezeWatch> {
        let taken = Arc::new(Mutex::new(None));
        let (slot, monitor) = (Arc::clone(&taken), self.shared_monitor()?);
        let (dir, disks) = (self.dir().to_path_buf(), self.disks().to_vec());
        let at_thaw = move || {
            let reference = Reference::read(&monitor, &dir, &disks);
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(reference);
        };
        let proxy = self.agent_proxy(Answers::All, at_thaw)?;
        Ok(FreezeWatch { proxy, taken })
    }

    /// Stands between Icecore and the guest agent, and does something before each thaw.
    pub fn agent_proxy(
        &self,
        answers: Answers,
        at_thaw: impl FnMut() + Send + 'static,
    ) -> Result<AgentProxy> {
        AgentProxy::start(&self.dir().join("watch.sock"), &self.qga(), answers, at_thaw)
    }

    /// Freezes the file systems from within the guest, which no agent knows of.
    pub fn freeze_by_hand(&self) -> Result<()> {
        self.on_filesystems("fsfreeze --freeze")
    }

    /// Ends [`TestVm::freeze_by_hand`].
    pub fn thaw_by_hand(&self) -> Result<()> {
        self.on_filesystems("fsfreeze --unfreeze")
    }

    fn on_filesystems(&self, command: &str) -> Result<()> {
        self.spec
            .filesystems()
            .try_for_each(|disk| self.guest(&format!("{command} /mnt/{}", disk.id)).map(drop))
    }

    /// Judges a restored folder of this VM's disks: file systems clean, the writer's order kept.
    pub fn judge_restored(&self, restored: &Path) -> Result<()> {
        let written = self.spec.filesystems().filter(|disk| self.spec.writer.contains(&disk.id));
        let images: Vec<_> =
            written.map(|disk| (restored.join(format!("{}.raw", disk.id)), disk.fs)).collect();
        check_writer_in_images(&images)
    }
}
