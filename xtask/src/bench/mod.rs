//! `cargo xtask bench`: Icecore beside what a user would otherwise take, in one run.
//!
//! Every row is measured once per round, so that a drift of the machine meets all of them. The page
//! cache is warm, what others have left to be written is written before each row, and nothing is
//! timed without being made durable where the tool can do that.

mod dirty;
mod durability;
mod files;
mod full;
mod goals;
mod guest;
mod image;
mod incremental;
mod instructions;
mod lab;
mod libvirt;
mod map;
mod measure;
mod peers;
mod random;
mod restore;
mod scale;
mod server;
mod stores;
mod table;
mod text;

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use self::lab::Lab;
use self::measure::Sample;
use self::table::{Table, YARDSTICK};
use crate::apt::{self, Source};
use crate::step::{Failure, Result, captured, cargo, program, shown, timed};

const DRY: &str = "dry run: icecore, image off";
const FULL: &str = "full: icecore, image off";
const FULL_THREADS: &str = "full: icecore, image off, threads";
const FULL_URING: &str = "full: icecore, image off, io_uring";
const FULL_LIVE: &str = "full: icecore, live QEMU";
const FULL_ZSTD: &str = "full: nbdcopy | zstd -1 -T2";
const FULL_CONVERT: &str = "full: qemu-img convert -c (zstd)";
const FULL_VIRT: &str = "full: virtnbdbackup copy";
const FULL_VIRT_LZ4: &str = "full: virtnbdbackup copy --compress";
const FULL_BORG: &str = "full: borg zstd,1";
const FULL_RESTIC: &str = "full: restic";
const RESTORE: &str = "restore: icecore to qcow2 over NBD";
const RESTORE_UNPROVEN: &str = "restore: icecore to qcow2 over NBD, --verify none";
const RESTORE_COPY: &str = "restore: nbdcopy of the raw file to the same";
const RESTORE_FILE: &str = "restore: icecore to a qcow2 file";
const ROLLBACK: &str = "rollback of 1 %: icecore, live QEMU";
const MAP: &str = "map of a million extents: icecore's client";
const MAP_LIBNBD: &str = "map of a million extents: nbdinfo (libnbd)";
const MILLION: &str = "incremental of a million extents on 1 TiB: icecore";

/// What the peers are in Debian.
const PEERS: [&str; 10] = [
    "libnbd-bin",
    "zstd",
    "borgbackup",
    "restic",
    "fio",
    "virtnbdbackup",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
    "libvirt-clients",
];

/// Measure Icecore beside other tools on the reference image
#[derive(Args)]
pub struct Options {
    /// Size of the reference image
    #[arg(long, default_value = "8G", value_parser = bytes)]
    size: u64,
    /// Data in it
    #[arg(long, default_value = "4G", value_parser = bytes)]
    data: u64,
    /// How often each row is measured
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Only rows whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Also write everything as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Install the Debian packages of the peers
    #[arg(long)]
    install: bool,
    /// Take the release binaries as they are
    #[arg(long)]
    no_build: bool,
    /// Instead: what extent algebra, blocks, packs and maps cost, each by itself
    #[arg(long)]
    micro: bool,
    /// Instead: count the instructions of the parsers and compare them with the kept counts
    #[arg(long)]
    instructions: bool,
    /// Keep the counts of --instructions
    #[arg(long, requires = "instructions")]
    save: bool,
}

/// The client that `bench` measures for the map of a million extents
#[derive(Args)]
pub struct MapClient {
    uri: String,
    context: String,
}

impl MapClient {
    /// Fetches the map.
    pub fn run(&self) -> Result<()> {
        map::client(&self.uri, &self.context)
    }
}

/// A run: where it happens, and what it has found.
struct Bench {
    lab: Lab,
    table: Table,
    guest: guest::Table,
    only: Option<String>,
}

impl Options {
    /// Makes the image, measures, prints.
    pub fn run(&self) -> Result<()> {
        if self.micro {
            let packages = ["bench", "-p", "icecore-nbd-client", "-p", "icecore-repository"];
            return shown(cargo(&packages).args(["--bench", "extents", "--bench", "data"]));
        }
        if self.instructions {
            return instructions::run(self.save);
        }
        if self.install {
            apt::install_missing(&PEERS, Source::Configured)?;
        }
        if !self.no_build {
            let mut build = cargo(&["build", "--release", "-p", "icecore", "-p", "xtask"]);
            timed("build", || shown(&mut build))?;
        }
        if self.only.is_none() {
            lab::require_room(self.data, self.rounds)?;
        }
        let lab = Lab::new(self.size, self.data)?;
        let mut bench = Bench {
            lab,
            table: Table::default(),
            guest: guest::Table::default(),
            only: self.only.clone(),
        };
        let load = std::fs::read_to_string("/proc/loadavg")?;
        let durable = durability::prove(&bench.lab);
        bench.measure(self.rounds)?;
        let goals = goals::verdicts(&bench.table, &bench.guest, self.size, self.data);
        let durable = durable.unwrap_or_else(|error| format!("DURABILITY NOT PROVEN: {error}"));
        println!("{durable}\n\n{}", bench.table);
        if !bench.guest.is_empty() {
            println!("{}", bench.guest.text());
        }
        println!("| goal | must | aim | found | |\n|---|---|---|---|---|\n{}", goals.join("\n"));
        if let Some(path) = &self.json {
            let document = json!({
                "size": self.size, "data": self.data, "rounds": self.rounds,
                "machine": machine(), "load_before": load.trim(), "durability": durable,
                "table": bench.table.json(), "guest": bench.guest.json(), "goals": goals,
            });
            std::fs::write(path, format!("{document:#}\n"))?;
        }
        Ok(())
    }
}

impl Bench {
    fn measure(&mut self, rounds: u32) -> Result<()> {
        if self.wants(full::ROWS) {
            // Into the page cache, for everyone.
            let mut cat = program("sh");
            cat.args(["-c", "cat \"$@\" >/dev/null", "sh"]).arg(&self.lab.raw);
            captured(cat.arg(&self.lab.qcow2))?;
            full::rounds(self, rounds);
            self.lab.sweep()?;
        }
        if self.wants(restore::ROWS)
            && let Some(repository) = restore::prepare(self)
        {
            (0..rounds).for_each(|_| restore::round(self, &repository));
            self.lab.sweep()?;
        }
        if self.wants(incremental::rows()) {
            let mut disks = incremental::Disks::new(self)?;
            for _ in 0..rounds {
                disks.round(self)?;
            }
            drop(disks);
            self.lab.sweep()?;
        }
        if self.wants(guest::ROWS) {
            guest::rounds(self, rounds);
            self.lab.sweep()?;
        }
        if self.wants(scale::rows()) {
            scale::rounds(self, rounds);
            self.lab.sweep()?;
        }
        if self.wants(stores::rows()) {
            stores::rounds(self, rounds);
            self.lab.sweep()?;
        }
        if self.wants(map::ROWS)
            && let Some(mut wide) = map::Wide::new(self)
        {
            for _ in 0..rounds {
                wide.round(self)?;
            }
        }
        Ok(())
    }

    /// Whether any of these rows is asked for.
    fn wants(&self, rows: impl IntoIterator<Item = impl AsRef<str>>) -> bool {
        let only = self.only.as_deref().unwrap_or_default();
        rows.into_iter().any(|row| row.as_ref().contains(only))
    }

    /// Measures one row, or notes why that cannot be.
    fn row(&mut self, name: &str, work: impl FnOnce(&Lab) -> Result<Sample>) {
        if !self.wants([name]) && name != YARDSTICK {
            return;
        }
        match work(&self.lab) {
            Ok(sample) => {
                eprintln!("xtask: {name}: {:.2} s", sample.wall_s);
                self.table.add(name, sample);
            }
            Err(error) => self.without(name, &error),
        }
    }

    /// Prepares a group of rows, or notes why that cannot be.
    fn prepare<T>(&mut self, name: &str, work: impl FnOnce(&Lab) -> Result<T>) -> Option<T> {
        eprintln!("xtask: {name}: preparing");
        work(&self.lab).map_err(|error| self.without(name, &error)).ok()
    }

    fn without(&mut self, name: &str, error: &Failure) {
        eprintln!("xtask: {name}: not measured: {error}");
        self.table.skip(name, error.to_string());
    }
}

/// Processors, memory, kernel, versions: what a figure means nothing without.
fn machine() -> serde_json::Value {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = text("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let version = |name: &str, argument: &str| {
        let said = captured(program(name).arg(argument)).unwrap_or_default();
        said.lines().next().unwrap_or("not installed").to_owned()
    };
    json!({
        "processor": model.map(|(_, name)| name),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": text("/proc/meminfo").lines().next(),
        "kernel": text("/proc/version").trim(),
        "qemu": version("qemu-img", "--version"),
        "nbdcopy": version("nbdcopy", "--version"),
        "zstd": version("zstd", "--version"),
        "borg": version("borg", "--version"),
        "restic": version("restic", "version"),
        "virtnbdbackup": version("virtnbdbackup", "--version"),
    })
}

/// `512M`, `8G` or plain bytes.
fn bytes(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{text} is no size: write 512M or 8G")),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{text} is no size: {error}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!((bytes("8G"), bytes("512M"), bytes("7")), (Ok(8 << 30), Ok(512 << 20), Ok(7)));
        assert!(bytes("8GG").is_err() && bytes("G").is_err() && bytes("99999999T").is_err());
    }
}
