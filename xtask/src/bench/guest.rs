//! What a backup costs the guest: a live one writes 4 KiB at random places, each write followed by
//! fsync, while its disk is backed up.
//!
//! Emulated: the processor's time counts twice here, once for the guest and once against it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use icecore_tests::{Disk, Layout, TestVm, VmSpec, wait_until};
use serde_json::{Value, json};

use super::Bench;
use super::lab::Lab;
use super::table::Spread;
use crate::step::{Failure, Result, captured, program};

const ALONE: &str = "guest: no backup";
const GOVERNED: &str = "guest: icecore, governor on";
const UNGOVERNED: &str = "guest: icecore, governor off";
const BLOCKDEV: &str = "guest: blockdev-backup to a qcow2 on the repository's disk";
/// All rows.
pub const ROWS: [&str; 4] = [ALONE, GOVERNED, UNGOVERNED, BLOCKDEV];

/// What the guest writes to: a database's files, not the whole disk.
const WORKING_SET: u64 = 256 << 20;
/// How long the guest is watched without a backup; its cache of the host is warm by then.
const WATCH: Duration = Duration::from_secs(15);
/// Longest backup.
const BACKUP: Duration = Duration::from_secs(1800);
/// Where the writer lies on its disk: behind what the guest's kernel has read and keeps.
const WRITER_AT: u64 = 1 << 20;

/// What the guest got done in one run.
#[derive(Debug, Clone, Copy)]
struct Sample {
    per_second: f64,
    p99_ms: f64,
    longest_ms: f64,
    /// Of the backup.
    seconds: f64,
}

/// What was measured, by row.
#[derive(Debug, Default)]
pub struct Table(Vec<(&'static str, Sample)>);

/// A guest with a copy of the reference image.
struct Rig {
    vm: TestVm,
}

/// Measures all rows that are asked for.
pub fn rounds(bench: &mut Bench, rounds: u32) {
    if let Some(mut rig) = bench.prepare("guest", Rig::boot) {
        for _ in 0..rounds {
            for name in ROWS {
                // Without the first there is nothing to compare with.
                if name == ALONE || bench.wants([name]) {
                    match rig.measure(&bench.lab, name) {
                        Ok(sample) => bench.guest.0.push((name, sample)),
                        Err(error) => bench.without(name, &error),
                    }
                }
            }
        }
    }
    let none = Failure::new("this bench's libvirt boots no guest");
    bench.without("guest: virtnbdbackup", &none);
}

impl Rig {
    fn boot(lab: &Lab) -> Result<Self> {
        let writer = build_writer(lab)?;
        let vm = VmSpec::new("bench")
            .disk(Disk::new("vda", lab.size).content_of(&lab.qcow2))
            .disk(Disk::new("tool", 16 << 20).layout(Layout::Raw))
            .no_agent()
            .boot()?;
        let bytes = std::fs::metadata(&writer)?.len().next_multiple_of(4096);
        std::fs::File::options().write(true).open(&writer)?.set_len(bytes)?;
        vm.qemu_io("tool", &format!("write -s {} {WRITER_AT} {bytes}", writer.display()))?;
        let (skip, count) = (WRITER_AT / 4096, bytes / 4096);
        vm.guest(&format!(
            "dd if=/dev/lab/tool of=/tmp/writer bs=4096 skip={skip} count={count} && \
             chmod +x /tmp/writer"
        ))?;
        Ok(Self { vm })
    }

    fn measure(&mut self, lab: &Lab, name: &str) -> Result<Sample> {
        rustix::fs::sync();
        self.vm.guest(&format!(
            "rm -f /tmp/stop /tmp/done; (/tmp/writer /dev/lab/vda {WORKING_SET} /tmp/stop \
             > /tmp/result 2>&1; touch /tmp/done) > /dev/null 2>&1 < /dev/null 3>&- &"
        ))?;
        // The first writes meet a cold guest.
        std::thread::sleep(Duration::from_secs(2));
        let started = Instant::now();
        let ended = self.back_up(lab, name);
        let seconds = started.elapsed().as_secs_f64();
        let said = self.vm.guest(
            "touch /tmp/stop; while [ ! -f /tmp/done ]; do sleep 0.1; done; cat /tmp/result",
        )?;
        ended?;
        let sample = parse(&said, seconds)?;
        eprintln!("xtask: {name}: {:.0} writes/s, p99 {:.1} ms", sample.per_second, sample.p99_ms);
        Ok(sample)
    }

    fn back_up(&mut self, lab: &Lab, name: &str) -> Result<()> {
        match name {
            GOVERNED => self.icecore(lab, "on"),
            UNGOVERNED => self.icecore(lab, "off"),
            BLOCKDEV => self.blockdev_backup(&lab.path("blockdev-backup.qcow2"), lab.size),
            _ => {
                std::thread::sleep(WATCH);
                Ok(())
            }
        }
    }

    fn icecore(&self, lab: &Lab, governor: &str) -> Result<()> {
        let repository = lab.repository("guest")?;
        let mut command: Command = lab.icecore(&["backup", "--name", "bench", "--level", "full"]);
        command.args(["--governor", governor, "--disk", "vda", "--qmp"]).arg(self.vm.qmp());
        let said = captured(command.arg("--repo").arg(repository))?;
        let report: Value = serde_json::from_str(&said)
            .map_err(|error| Failure::new(format!("the report is not understood: {error}")))?;
        eprintln!("xtask: governor {governor}: {}", report["governor"]);
        Ok(())
    }

    fn blockdev_backup(&mut self, target: &Path, size: u64) -> Result<()> {
        super::lab::blank_qcow2(target, size)?;
        let node = json!({"driver": "qcow2", "node-name": "copy",
            "file": {"driver": "file", "filename": target}});
        let source = self.vm.node("vda")?;
        let job = json!({"job-id": "copy", "device": source, "target": "copy", "sync": "full"});
        self.vm.monitor()?.execute("blockdev-add", node)?;
        self.vm.monitor()?.execute("blockdev-backup", job)?;
        wait_until("blockdev-backup", BACKUP, || {
            let jobs = self.vm.monitor()?.execute("query-block-jobs", json!({}))?;
            Ok(jobs.as_array().is_some_and(Vec::is_empty))
        })?;
        self.vm.monitor()?.execute("blockdev-del", json!({"node-name": "copy"}))?;
        Ok(std::fs::remove_file(target)?)
    }
}

/// The writer as a program that needs no library.
fn build_writer(lab: &Lab) -> Result<PathBuf> {
    let out = lab.path("random-writer");
    let source = icecore_tests::workspace_root().join("images/guest/bench/random-writer.rs");
    let mut command = program("rustc");
    command.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static"]);
    command.args(["-C", "strip=symbols", "-o"]).arg(&out).arg(source);
    captured(&mut command)?;
    Ok(out)
}

/// `WRITES SECONDS P50 P99 LONGEST`, the last three in microseconds.
fn parse(said: &str, seconds: f64) -> Result<Sample> {
    let words = said.split_whitespace().map(str::parse::<f64>);
    match words.collect::<std::result::Result<Vec<_>, _>>().as_deref() {
        Ok([writes, watched, _, p99, longest]) => Ok(Sample {
            per_second: writes / watched,
            p99_ms: p99 / 1000.0,
            longest_ms: longest / 1000.0,
            seconds,
        }),
        _ => Err(Failure::new(format!("the guest's writer said: {said}"))),
    }
}

impl Table {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn spread(&self, row: &str, figure: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.0.iter().filter(|(name, _)| *name == row).map(|(_, one)| figure(one)))
    }

    /// What the guest kept of its pace without a backup, and how many times its p99 grew.
    fn kept(&self, row: &str) -> Option<(f64, f64)> {
        let median = |row, figure: fn(&Sample) -> f64| Some(self.spread(row, figure)?.median);
        let pace = |row| median(row, |sample| sample.per_second);
        let p99 = |row| median(row, |sample| sample.p99_ms);
        Some((pace(row)? / pace(ALONE)?, p99(row)? / p99(ALONE)?))
    }

    /// What a guest loses under Icecore's governor, and how its p99 grows: less is better in both.
    pub fn governed(&self) -> (Option<f64>, Option<f64>) {
        let kept = self.kept(GOVERNED);
        (kept.map(|(pace, _)| 1.0 - pace), kept.map(|(_, p99)| p99))
    }

    /// As Markdown.
    pub fn text(&self) -> String {
        let mut text = String::from(
            "| row | writes/s: median (min-max) | of no backup | p99 ms | x no backup | longest ms \
             | backup s |\n|---|---|---|---|---|---|---|\n",
        );
        for row in ROWS {
            let all = |figure: fn(&Sample) -> f64| self.spread(row, figure);
            let (Some(pace), Some(p99), Some(longest), Some(took), Some((kept, times))) = (
                all(|sample| sample.per_second),
                all(|sample| sample.p99_ms),
                all(|sample| sample.longest_ms),
                all(|sample| sample.seconds),
                self.kept(row),
            ) else {
                continue;
            };
            // Writing to a String never fails.
            let _ = writeln!(
                text,
                "| {row} | {:.0} ({:.0}-{:.0}) | {kept:.2} | {:.2} | {times:.2} | {:.0} | {:.1} |",
                pace.median, pace.min, pace.max, p99.median, longest.median, took.median
            );
        }
        text
    }

    /// As JSON, every run.
    pub fn json(&self) -> Value {
        let runs = self.0.iter().map(|(row, one)| {
            json!({"row": row, "writes_per_second": one.per_second, "p99_ms": one.p99_ms,
                "longest_ms": one.longest_ms, "backup_seconds": one.seconds})
        });
        runs.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_writers_figures_are_read_and_compared() {
        assert!(parse("cannot open", 1.0).is_err());
        let mut table = Table::default();
        table.0.push((ALONE, parse("1000 10.0 900 2000 9000", 10.0).unwrap()));
        table.0.push((GOVERNED, parse("1700 20.0 900 3000 9000", 20.0).unwrap()));
        let (lost, p99) = table.governed();
        assert!((lost.unwrap() - 0.15).abs() < 1e-9 && (p99.unwrap() - 1.5).abs() < 1e-9);
        assert!(table.text().contains("| 85 (85-85) | 0.85 | 3.00 | 1.50 | 9 | 20.0 |"));
    }
}
