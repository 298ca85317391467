//! Full backups of the reference image, beside reading alone.

use super::Bench;
use super::lab::{Lab, forget_bitmaps};
use super::libvirt::Libvirt;
use super::measure::{Children, Sample};
use super::server::{NbdServer, Vm};
use super::table::YARDSTICK;
use super::{DRY, FULL, FULL_LIVE, FULL_THREADS, FULL_URING};
use super::{FULL_BORG, FULL_CONVERT, FULL_RESTIC, FULL_VIRT, FULL_VIRT_LZ4, FULL_ZSTD, peers};
use crate::step::Result;

/// What is measured here.
pub const ROWS: [&str; 12] = [
    YARDSTICK,
    DRY,
    FULL,
    FULL_THREADS,
    FULL_URING,
    FULL_LIVE,
    FULL_ZSTD,
    FULL_CONVERT,
    FULL_VIRT,
    FULL_VIRT_LZ4,
    FULL_BORG,
    FULL_RESTIC,
];

/// All rows, in each round.
pub fn rounds(bench: &mut Bench, rounds: u32) {
    let libvirt = bench
        .wants([FULL_VIRT, FULL_VIRT_LZ4])
        .then(|| bench.prepare("full: virtnbdbackup", |lab| Libvirt::start(lab, &lab.qcow2)));
    let libvirt = libvirt.flatten();
    (0..rounds).for_each(|_| round(bench, libvirt.as_ref()));
}

fn round(bench: &mut Bench, libvirt: Option<&Libvirt>) {
    bench.row(YARDSTICK, |lab| {
        let server = NbdServer::start(&lab.qcow2, lab.path("nbd.sock"), false)?;
        let command = peers::read_all(&server.uri());
        lab.measure(command, Children::Client, Some(server.pid()), None)
    });
    bench.row(DRY, |lab| image(lab, &["--dry-run"]));
    bench.row(FULL, |lab| image(lab, &[]));
    bench.row(FULL_THREADS, |lab| image(lab, &["--io-engine", "threads"]));
    bench.row(FULL_URING, |lab| image(lab, &["--io-engine", "uring"]));
    bench.row(FULL_LIVE, live);
    others(bench, libvirt);
}

fn others(bench: &mut Bench, libvirt: Option<&Libvirt>) {
    bench.row(FULL_ZSTD, |lab| {
        let out = lab.fresh("zstd")?;
        let server = NbdServer::start(&lab.qcow2, lab.path("nbd.sock"), false)?;
        let command = peers::piped_to_zstd(&server.uri(), &out.join("disk.zst"))?;
        lab.measure(command, Children::Client, Some(server.pid()), Some(&out))
    });
    bench.row(FULL_CONVERT, |lab| {
        let out = lab.fresh("convert")?;
        let command = peers::convert(&lab.qcow2, &out.join("disk.qcow2"));
        lab.measure(command, Children::Client, None, Some(&out))
    });
    if let Some(libvirt) = libvirt {
        bench.row(FULL_VIRT, |lab| libvirt.copy(lab, false));
        bench.row(FULL_VIRT_LZ4, |lab| libvirt.copy(lab, true));
    }
    bench.row(FULL_BORG, |lab| {
        peers::borg_init(lab)?;
        let command = peers::borg_create(lab, &lab.raw, "first");
        lab.measure(command, Children::Client, None, Some(&lab.path("borg")))
    });
    bench.row(FULL_RESTIC, |lab| {
        peers::restic_init(lab)?;
        let command = peers::restic_backup(lab, &lab.raw);
        lab.measure(command, Children::Client, None, Some(&lab.path("restic")))
    });
}

/// Icecore on the powered-off image; the storage daemon that it starts is the server.
fn image(lab: &Lab, arguments: &[&str]) -> Result<Sample> {
    let repository = lab.repository("full")?;
    let mut command = lab.backup_image(&lab.qcow2, &repository);
    command.args(arguments);
    let sample = lab.measure(command, Children::Server, None, Some(&repository));
    forget_bitmaps(&lab.qcow2)?;
    sample
}

/// Icecore on a live QEMU, which is killed before it could keep a bitmap in the image.
fn live(lab: &Lab) -> Result<Sample> {
    let repository = lab.repository("full")?;
    let vm = Vm::start(&lab.qcow2, &lab.fresh("vm")?)?;
    let command = lab.backup_live(&vm, &repository);
    lab.measure(command, Children::Client, Some(vm.pid()), Some(&repository))
}
