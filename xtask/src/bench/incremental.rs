//! Incremental points and a rollback on a live QEMU, beside peers that find changes their own way.

use std::path::PathBuf;

use super::lab::{Lab, overlay};
use super::libvirt::Libvirt;
use super::measure::{Children, Sample};
use super::server::Vm;
use super::{Bench, ROLLBACK, dirty, peers};
use crate::step::{Result, captured, program};

/// Percent of the disk that change before each point of a round.
const CHANGES: [u64; 3] = [0, 1, 10];

const TOOLS: [&str; 4] = ["icecore", "virtnbdbackup", "borg", "restic"];

/// The name of a row.
pub fn name(percent: u64, tool: &str) -> String {
    format!("incremental {percent} %: {tool}")
}

/// What is measured here.
pub fn rows() -> Vec<String> {
    let points = |percent| TOOLS.map(|tool| name(percent, tool));
    CHANGES.into_iter().flat_map(points).chain([ROLLBACK.to_owned()]).collect()
}

/// Whether a row of this tool is asked for.
fn wanted(bench: &Bench, tool: &str) -> bool {
    bench.wants(CHANGES.map(|percent| name(percent, tool)))
}

/// A disk per tool, each with its first point.
pub struct Disks {
    vm: Option<(Vm, PathBuf)>,
    libvirt: Option<Libvirt>,
    raw: PathBuf,
    /// So that no two changes are alike.
    seed: u64,
}

impl Disks {
    /// Takes the first points; a tool that cannot is left out with a word.
    pub fn new(bench: &mut Bench) -> Result<Self> {
        let raw = bench.lab.path("changing.raw");
        captured(program("cp").arg("--sparse=auto").arg(&bench.lab.raw).arg(&raw))?;
        let vm = if wanted(bench, "icecore") || bench.wants([ROLLBACK]) {
            bench.prepare("incremental: icecore", first_icecore)
        } else {
            None
        };
        let libvirt = if wanted(bench, "virtnbdbackup") {
            bench.prepare("incremental: virtnbdbackup", first_virtnbdbackup)
        } else {
            None
        };
        if wanted(bench, "borg") {
            bench.prepare("incremental: borg", |lab| {
                peers::borg_init(lab)?;
                captured(&mut peers::borg_create(lab, &raw, "first")).map(drop)
            });
        }
        if wanted(bench, "restic") {
            bench.prepare("incremental: restic", |lab| {
                peers::restic_init(lab)?;
                captured(&mut peers::restic_backup(lab, &raw)).map(drop)
            });
        }
        Ok(Self { vm, libvirt, raw, seed: 100 })
    }

    /// All rows, once.
    pub fn round(&mut self, bench: &mut Bench) -> Result<()> {
        for percent in CHANGES {
            self.change(&bench.lab, percent)?;
            self.points(bench, percent);
            if percent == 1 {
                self.roll_back(bench)?;
            }
        }
        Ok(())
    }

    fn change(&mut self, lab: &Lab, percent: u64) -> Result<()> {
        self.seed += 1;
        let (size, seed, file) = (lab.size, self.seed, lab.path("block"));
        if let Some((vm, _)) = &mut self.vm {
            dirty::scatter(size, percent, seed, &file, |at, block| vm.write_block(at, block))?;
        }
        if let Some(libvirt) = &mut self.libvirt {
            dirty::scatter(size, percent, seed, &file, |at, block| libvirt.write_block(at, block))?;
        }
        dirty::scatter_raw(&self.raw, size, percent, seed, &file)
    }

    fn points(&mut self, bench: &mut Bench, percent: u64) {
        if let Some((vm, repository)) = &self.vm {
            bench.row(&name(percent, "icecore"), |lab| {
                let command = lab.backup_live(vm, repository);
                lab.measure(command, Children::Client, Some(vm.pid()), Some(repository))
            });
        }
        if let Some(libvirt) = &mut self.libvirt {
            bench.row(&name(percent, "virtnbdbackup"), |lab| libvirt.online(lab, "inc"));
        }
        let (raw, archive) = (&self.raw, format!("a{}", self.seed));
        bench.row(&name(percent, "borg"), |lab| {
            super::lab::require("borg")?;
            let command = peers::borg_create(lab, raw, &archive);
            lab.measure(command, Children::Client, None, Some(&lab.path("borg")))
        });
        bench.row(&name(percent, "restic"), |lab| {
            super::lab::require("restic")?;
            let command = peers::restic_backup(lab, raw);
            lab.measure(command, Children::Client, None, Some(&lab.path("restic")))
        });
    }

    /// One more percent of changes, taken back in place.
    fn roll_back(&mut self, bench: &mut Bench) -> Result<()> {
        self.seed += 1;
        let Some((vm, repository)) = &mut self.vm else { return Ok(()) };
        let (size, file) = (bench.lab.size, bench.lab.path("block"));
        dirty::scatter(size, 1, self.seed, &file, |at, block| vm.write_block(at, block))?;
        bench.row(ROLLBACK, |lab| {
            let mut command = lab.icecore(&["rollback", "--name", "bench", "--to", "latest"]);
            command.args(["--no-safety-point", "--restart", "none", "--qmp"]).arg(vm.qmp());
            command.arg("--repo").arg(&*repository);
            lab.measure(command, Children::Client, Some(vm.pid()), None)
        });
        Ok(())
    }
}

fn first_icecore(lab: &Lab) -> Result<(Vm, PathBuf)> {
    let image = lab.path("live.qcow2");
    overlay(&image, &lab.qcow2)?;
    let repository = lab.repository("incremental")?;
    let vm = Vm::start(&image, &lab.fresh("vm")?)?;
    let _: Sample = lab.measure(
        lab.backup_live(&vm, &repository),
        Children::Client,
        Some(vm.pid()),
        Some(&repository),
    )?;
    Ok((vm, repository))
}

fn first_virtnbdbackup(lab: &Lab) -> Result<Libvirt> {
    let image = lab.path("libvirt.qcow2");
    overlay(&image, &lab.qcow2)?;
    let mut libvirt = Libvirt::start(lab, &image)?;
    libvirt.boot()?;
    libvirt.online(lab, "full")?;
    Ok(libvirt)
}
