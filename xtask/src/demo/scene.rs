//! The guest, the repository, and what happens to them.

use icecore_tests::{Disk, Failure, Fs, Icecore, MIB, TestVm, VmSpec};
use serde_json::Value;

use crate::demo::figures::Figures;
use crate::step::{Result, cargo_target};

/// The user's data beside what the writer writes.
const DOCUMENTS: &str = "/mnt/data/documents";
/// One checksum over all documents, names included.
const CHECKSUM: &str =
    "cd /mnt/data/documents && find . -type f | sort | xargs sha256sum | sha256sum | cut -c 1-64";
const COUNT: &str = "ls /mnt/data/documents | wc -l";
/// What the ordered writer gets through between two steps.
const ROUNDS: u64 = 12;

/// A guest at work and a repository for it.
pub struct Scene {
    vm: TestVm,
    icecore: Icecore,
    before: String,
    incremental: String,
}

impl Scene {
    /// Boots the guest on two disks with the writer over both, and gives it documents.
    pub fn set() -> Result<Self> {
        let icecore = Icecore::with_binary(release_binary()?)?;
        let vm = VmSpec::new("demo")
            .disk(Disk::new("system", 512 * MIB).fs(Fs::Ext4))
            .disk(Disk::new("data", 1024 * MIB).fs(Fs::Xfs))
            .writer(&["system", "data"])
            .boot()?;
        vm.guest(&format!(
            "mkdir {DOCUMENTS} && cd {DOCUMENTS} && \
             for n in $(seq 40); do dd if=/dev/urandom of=$n bs=1M count=1 || exit 1; done; sync"
        ))?;
        Ok(Self { vm, icecore, before: String::new(), incremental: String::new() })
    }

    /// The first point, while the guest writes.
    pub fn full_point(&mut self, figures: &mut Figures) -> Result<()> {
        self.vm.wait_writer(ROUNDS)?;
        let report = self.icecore.backup(&self.vm).arg("--level").arg("full").json()?;
        figures.backup("full", &report);
        Ok(())
    }

    /// The second point, after some documents have changed.
    pub fn incremental_point(&mut self, figures: &mut Figures) -> Result<()> {
        self.vm.wait_writer(ROUNDS)?;
        self.vm.guest(&format!(
            "cd {DOCUMENTS} && rm 7 && dd if=/dev/urandom of=41 bs=1M count=3 && sync"
        ))?;
        self.before = self.vm.guest(CHECKSUM)?;
        let report = self.icecore.backup(&self.vm).arg("--level").arg("incremental").json()?;
        figures.backup("incremental", &report);
        self.incremental = report["point"].as_str().unwrap_or_default().to_owned();
        Ok(())
    }

    /// Deletes every document and the writer's own files, and writes over the space.
    pub fn destroy(&mut self, figures: &mut Figures) -> Result<()> {
        self.vm.guest(&format!(
            "ordered-writer stop; rm -rf {DOCUMENTS}/* /mnt/*/writer; \
             dd if=/dev/urandom of=/mnt/data/rubbish bs=1M count=20; sync"
        ))?;
        let left = self.vm.guest(COUNT)?;
        figures.row("documents before", self.before.clone());
        figures.row("after the accident", format!("{left} documents left"));
        Ok(())
    }

    /// Rolls back to the incremental point; the guest starts again from it.
    pub fn roll_back(&mut self, figures: &mut Figures) -> Result<()> {
        let report = self.icecore.rollback(&self.vm, &self.incremental).json()?;
        figures.rollback(&report);
        self.vm.wait_ready()?;
        let after = self.vm.guest(CHECKSUM)?;
        figures.row("documents after", format!("{after} ({} documents)", self.vm.guest(COUNT)?));
        if after != self.before {
            let before = &self.before;
            return Err(Failure::new(format!("the documents were {before} and are {after}")));
        }
        self.vm.wait_writer(1)?;
        let verdict = self
            .vm
            .guest("ordered-writer stop; check-writer /mnt/system /mnt/data")?
            .replace('\n', ", ");
        figures.row("writer's order in the guest", verdict);
        Ok(())
    }

    /// Reads every block of the repository.
    pub fn check(&mut self, figures: &mut Figures) -> Result<()> {
        let report: Value = self.icecore.check()?;
        let blocks = &report["blocks_checked"];
        let points = &report["points_checked"];
        figures.row("repository", format!("{points} points, {blocks} blocks read and right"));
        Ok(())
    }

    /// Ends the guest, or leaves everything and says how to use it.
    pub fn end(mut self, keep: bool) -> Result<()> {
        if keep {
            return self.keep();
        }
        self.vm.power_off()?;
        println!(
            "Where to look next:\n  \
             cargo xtask demo --keep   leaves guest and repository to play with\n  \
             icecore backup --help     your own VM; README.md has the steps\n  \
             docs/ARCHITECTURE.md      how it is built and what always holds"
        );
        Ok(())
    }

    fn keep(self) -> Result<()> {
        let (qmp, qga) = (self.vm.qmp(), self.vm.qga());
        let binary = self.icecore.binary().display().to_string();
        let repository = self.icecore.repository().display().to_string();
        let state = self.icecore.path("state").display().to_string();
        let kept = self.icecore.keep();
        let (pid, folder) = self.vm.leave_running()?;
        let (qmp, qga) = (qmp.display(), qga.display());
        let (folder, kept) = (folder.display(), kept.display());
        println!(
            "The guest goes on as process {pid}, its files are in {folder}:\n\n  \
             export ICECORE_REPO={repository}\n  \
             export ICECORE_STATE_DIR={state}\n  \
             {binary} point list demo\n  \
             {binary} backup --qmp {qmp} --qga {qga} --name demo\n  \
             {binary} rollback --qmp {qmp} --qga {qga} --name demo --to latest~1\n\n\
             End it with: kill {pid}; rm -rf {folder} {kept}"
        );
        Ok(())
    }
}

/// The release binary that the demo has just had built.
fn release_binary() -> Result<std::path::PathBuf> {
    let binary = cargo_target().join("release/icecore");
    let missing = || Failure::new(format!("{} was not built", binary.display()));
    binary.is_file().then_some(binary.clone()).ok_or_else(missing)
}
