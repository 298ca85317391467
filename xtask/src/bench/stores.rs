//! Repositories in object stores on this machine, beside curl that puts and gets objects of the same
//! sizes. Without compression, so that the store is measured and not the compressor.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use icecore_tests::{ACCESS_KEY, Background, ObjectServer, ObjectStore, SECRET_KEY, wait_until};

use super::Bench;
use super::lab::{Lab, forget_bitmaps};
use super::measure::{Children, Sample};
use crate::object_stores;
use crate::step::{Failure, Result, captured, program};

/// The servers, and what their rows are called.
const SERVERS: [(ObjectServer, Rows); 2] = [
    (
        ObjectServer::Rclone,
        Rows {
            put: "s3: curl puts the packs to rclone",
            full: "s3: icecore full to rclone",
            get: "s3: curl gets the packs from rclone",
            restore: "s3: icecore restore from rclone to null",
            first_byte: "s3: first MiB of a point exported from rclone",
        },
    ),
    (
        ObjectServer::Ceph,
        Rows {
            put: "s3: curl puts the packs to radosgw",
            full: "s3: icecore full to radosgw",
            get: "s3: curl gets the packs from radosgw",
            restore: "s3: icecore restore from radosgw to null",
            first_byte: "s3: first MiB of a point exported from radosgw",
        },
    ),
];
/// Of the reference image this part is stored: Ceph keeps it in memory, twice.
const PART: u64 = 8;
/// As many transfers at a time as Icecore has.
const TRANSFERS: &str = "4";
const BUCKET: &str = "bench";

/// Runs what follows its first two arguments, a socket and an offset, and reads there.
const FIRST_BYTE: &str = r#"socket=$1; at=$2; shift 2; "$@" & export=$!
while [ ! -S "$socket" ]; do kill -0 $export || exit 1; sleep 0.005; done
qemu-io -r -c "read $at 1M" --image-opts \
    "driver=nbd,server.type=unix,server.path=$socket,export=vda"; read=$?
kill -TERM $export; wait $export; exit $read"#;

#[derive(Clone, Copy)]
struct Rows {
    put: &'static str,
    full: &'static str,
    get: &'static str,
    restore: &'static str,
    first_byte: &'static str,
}

impl Rows {
    const fn all(&self) -> [&'static str; 5] {
        [self.put, self.full, self.get, self.restore, self.first_byte]
    }
}

/// All rows.
pub fn rows() -> impl Iterator<Item = &'static str> {
    SERVERS.iter().flat_map(|(_, rows)| rows.all())
}

/// Time from the start of an export to the first byte that a client has read.
pub fn first_bytes() -> impl Iterator<Item = &'static str> {
    SERVERS.iter().map(|(_, rows)| rows.first_byte)
}

/// Time of Icecore by that of curl, to and from each server: how much of the server's own
/// throughput is left.
pub fn ratios() -> impl Iterator<Item = (&'static str, &'static str)> {
    SERVERS.iter().flat_map(|(_, rows)| [(rows.full, rows.put), (rows.restore, rows.get)])
}

/// Measures all rows, so many times.
pub fn rounds(bench: &mut Bench, rounds: u32) {
    object_stores::provision();
    let Some((image, packs)) = bench.prepare("s3: packs", packs) else { return };
    for (server, names) in SERVERS {
        if !bench.wants(names.all()) {
            continue;
        }
        let started = bench.prepare(names.put, |_| {
            let none = || Failure::new(format!("{server:?} is not installed"));
            ObjectStore::start(server)?.ok_or_else(none)
        });
        let Some(store) = started else { continue };
        for number in 0..rounds {
            let site = Site { store: &store, address: format!("s3://{BUCKET}/{number}") };
            bench.row(names.full, |lab| site.full(lab, &image));
            bench.row(names.put, |lab| site.curl(lab, &packs, "upload-file"));
            bench.row(names.get, |lab| site.curl(lab, &packs, "output"));
            bench.row(names.restore, |lab| site.restore(lab));
            bench.row(names.first_byte, |lab| site.first_byte(lab));
        }
    }
}

/// A part of the reference image, and the packs of its point in a directory.
fn packs(lab: &Lab) -> Result<(PathBuf, Vec<PathBuf>)> {
    let image = lab.path("part.qcow2");
    let part = format!("driver=raw,size={},file.filename={}", lab.size / PART, lab.raw.display());
    let mut convert = program("qemu-img");
    convert.args(["convert", "-q", "-O", "qcow2", "--image-opts"]);
    captured(convert.arg(part).arg(&image))?;
    let repository = lab.path("packs");
    captured(lab.icecore(&["repo", "init", "--compression", "none"]).arg(&repository))?;
    captured(&mut lab.backup_image(&image, &repository))?;
    forget_bitmaps(&image)?;
    let mut packs = Vec::new();
    for folder in std::fs::read_dir(repository.join("packs"))? {
        for pack in std::fs::read_dir(folder?.path())? {
            packs.push(pack?.path());
        }
    }
    Ok((image, packs))
}

/// A repository in a running server.
struct Site<'a> {
    store: &'a ObjectStore,
    address: String,
}

impl Site<'_> {
    fn full(&self, lab: &Lab, image: &Path) -> Result<Sample> {
        let mut init = lab.icecore(&["repo", "init", "--compression", "none"]);
        captured(init.arg(&self.address).envs(self.store.environment()))?;
        let mut command = lab.backup_image(image, Path::new(&self.address));
        command.envs(self.store.environment());
        let sample = lab.measure(command, Children::Server, None, None);
        forget_bitmaps(image)?;
        sample
    }

    /// To a target that takes everything and keeps nothing.
    fn restore(&self, lab: &Lab) -> Result<Sample> {
        let socket = lab.path("null.sock");
        let _ = std::fs::remove_file(&socket);
        let mut null = Command::new("nbdkit");
        null.args(["-f", "-U"]).arg(&socket).args(["null", &(lab.size / PART).to_string()]);
        let null = Background::spawn(&mut null)?;
        wait_until("nbdkit", std::time::Duration::from_secs(10), || Ok(socket.exists()))?;
        let mut command = lab.icecore(&["restore", "latest", "--disk", "vda", "--verify", "none"]);
        command.arg("--to").arg(super::server::uri(&socket, "")).args(["--repo", &self.address]);
        command.envs(self.store.environment());
        lab.measure(command, Children::Client, Some(null.pid()), None)
    }

    /// From the start of `icecore export` until a client has read a MiB of the middle, and its end.
    fn first_byte(&self, lab: &Lab) -> Result<Sample> {
        let socket = lab.path("point.sock");
        let _ = std::fs::remove_file(&socket);
        let export = lab.icecore(&["export", "latest", "--disk", "vda"]);
        let mut command = program("sh");
        command.args(["-c", FIRST_BYTE, "sh"]).arg(&socket).arg((lab.size / PART / 2).to_string());
        command.arg(export.get_program()).args(export.get_args());
        command.args(["--repo", &self.address, "--socket"]).arg(&socket);
        command.env_remove("ICECORE_REPO").env_remove("ICECORE_CACHE_DIR");
        command.envs(self.store.environment());
        lab.measure(command, Children::Client, None, None)
    }

    /// The packs as objects of their own: sent from their files, or fetched to nowhere.
    fn curl(&self, lab: &Lab, packs: &[PathBuf], what: &str) -> Result<Sample> {
        let mut transfers = String::new();
        for (number, pack) in packs.iter().enumerate() {
            let file = if what == "output" { Path::new("/dev/null") } else { pack.as_path() };
            // Writing to a String never fails.
            let _ = writeln!(transfers, "{what} = \"{}\"", file.display());
            let endpoint = self.store.endpoint();
            let _ = writeln!(transfers, "url = \"{endpoint}/{BUCKET}/raw/{number}\"");
        }
        let list = lab.path("transfers");
        std::fs::write(&list, transfers)?;
        let mut command = program("curl");
        command.args(["--silent", "--show-error", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3"]);
        command.args(["--user", &format!("{ACCESS_KEY}:{SECRET_KEY}")]);
        // Ceph wants to be told, and it spares curl the sum.
        command.args(["--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
        command.args(["--parallel", "--parallel-max", TRANSFERS, "--config"]).arg(&list);
        lab.measure(command, Children::Client, None, None)
    }
}
