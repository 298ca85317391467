//! What the figures are meant to reach: ratios of rows of one run, and what came of them.

use super::incremental::name;
use super::measure::Sample;
use super::table::{Table, YARDSTICK};
use super::{DRY, FULL, FULL_BORG, FULL_CONVERT, FULL_RESTIC, FULL_VIRT_LZ4, MAP, MAP_LIBNBD};
use super::{FULL_THREADS, FULL_URING, MILLION, RESTORE, RESTORE_COPY, RESTORE_UNPROVEN, ROLLBACK};
use super::{guest, stores};

/// A figure and its bounds. Less is better in all of them.
struct Goal {
    what: &'static str,
    found: Option<f64>,
    must: f64,
    aim: f64,
}

/// The list, with what this run has found. `size` and `data` are the image's, in bytes.
pub fn verdicts(table: &Table, guests: &guest::Table, size: u64, data: u64) -> Vec<String> {
    let goals = full(table, data).into_iter().chain(later(table, size)).chain(of_guest(guests));
    let goals = goals.chain(of_stores(table));
    goals.map(|goal| goal.verdict()).collect()
}

fn full(table: &Table, data: u64) -> Vec<Goal> {
    let wall = |one: &str, other: &str| Some(table.wall(one)? / table.wall(other)?);
    let median = |row: &str, figure: fn(&Sample) -> Option<f64>| {
        table.spread(row, figure).map(|spread| spread.median)
    };
    let gib = data as f64 / f64::from(1 << 30);
    let cpu = median(FULL, |sample| Some(sample.client_cpu_s)).map(|cpu| cpu / gib);
    let server = median(FULL, |sample| sample.server_cpu_s)
        .zip(median(YARDSTICK, |sample| sample.server_cpu_s))
        .map(|(own, y)| own / y);
    let stored = median(FULL, |sample| sample.stored_mib)
        .zip(median(FULL_RESTIC, |sample| sample.stored_mib))
        .map(|(own, restic)| own / restic);
    let compressing =
        [FULL_CONVERT, FULL_BORG].into_iter().filter_map(|row| table.wall(row)).reduce(f64::min);
    let best = table.wall(FULL).zip(compressing).map(|(own, best)| own / best);
    let engines = wall(FULL_THREADS, FULL_URING).map(|ratio| (ratio - 1.0).abs());
    let memory = median(FULL, |sample| Some(sample.peak_mib));
    vec![
        goal("full / Y", wall(FULL, YARDSTICK), 3.6, 3.0),
        goal("full / best compressing peer", best, 0.50, 0.40),
        goal("full / virtnbdbackup, compressed", wall(FULL, FULL_VIRT_LZ4), 0.30, 0.22),
        goal("full / restic", wall(FULL, FULL_RESTIC), 0.25, 0.17),
        goal("dry run / Y", wall(DRY, YARDSTICK), 1.5, 1.0),
        goal("full: client CPU s per GiB of data", cpu, 1.6, 1.3),
        goal("full: server CPU / that of Y", server, 1.5, 1.1),
        goal("full: stored / restic's", stored, 1.0, 0.95),
        goal("full: peak memory, MiB", memory, 64.0, 24.0),
        goal("threads beside io_uring, difference", engines, 0.15, 0.15),
    ]
}

fn later(table: &Table, size: u64) -> Vec<Goal> {
    let wall = |one: &str, other: &str| Some(table.wall(one)? / table.wall(other)?);
    let times = |percent, tool| wall(&name(percent, "icecore"), &name(percent, tool));
    let one = table.spread(&name(1, "icecore"), |sample| sample.stored_mib);
    let dirty_mib = size as f64 / 100.0 / f64::from(1 << 20);
    let growth = one.map(|grown| grown.median / dirty_mib);
    let million = table.spread(MILLION, |sample| Some(sample.peak_mib)).map(|peak| peak.median);
    vec![
        goal("incremental 0 %, s", table.wall(&name(0, "icecore")), 0.1, 0.03),
        goal("incremental 1 % / virtnbdbackup", times(1, "virtnbdbackup"), 1.0 / 4.0, 1.0 / 8.0),
        goal("incremental 1 % / restic", times(1, "restic"), 1.0 / 25.0, 1.0 / 50.0),
        goal("incremental 1 % / borg", times(1, "borg"), 1.0 / 25.0, 1.0 / 50.0),
        goal("incremental 10 % / virtnbdbackup", times(10, "virtnbdbackup"), 1.0 / 1.8, 1.0 / 2.3),
        goal("incremental 10 % / borg", times(10, "borg"), 1.0 / 8.0, 1.0 / 10.0),
        goal("repository growth / dirty bytes, 1 %", growth, 0.80, 0.72),
        goal("restore, root proven / nbdcopy", wall(RESTORE, RESTORE_COPY), 1.45, 1.25),
        goal("restore, not proven / nbdcopy", wall(RESTORE_UNPROVEN, RESTORE_COPY), 1.30, 1.15),
        goal("rollback of 1 % / whole restore", wall(ROLLBACK, RESTORE), 0.05, 0.03),
        goal("map of a million extents / libnbd", wall(MAP, MAP_LIBNBD), 2.0, 1.0),
        goal("a million extents: peak memory, MiB", million, 96.0, 32.0),
    ]
}

fn of_guest(table: &guest::Table) -> Vec<Goal> {
    let (lost, p99) = table.governed();
    vec![
        goal("guest: share of its writes/s lost, governor on", lost, 0.20, 0.10),
        goal("guest: p99 / p99 without a backup, governor on", p99, 2.0, 2.0),
    ]
}

/// Of the server's own throughput 80 % has to be left.
fn of_stores(table: &Table) -> Vec<Goal> {
    let ratio = |(own, raw)| Some(table.wall(own)? / table.wall(raw)?);
    let one = |(own, raw)| goal(own, ratio((own, raw)), 1.25, 1.0);
    let first = |row| goal(row, table.wall(row), 1.0, 0.5);
    stores::ratios().map(one).chain(stores::first_bytes().map(first)).collect()
}

const fn goal(what: &'static str, found: Option<f64>, must: f64, aim: f64) -> Goal {
    Goal { what, found, must, aim }
}

impl Goal {
    fn verdict(&self) -> String {
        let Self { what, found, must, aim } = self;
        let (found, word) = match *found {
            None => ("-".to_owned(), "not measured"),
            Some(value) if value <= *aim => (format!("{value:.3}"), "aim reached"),
            Some(value) if value <= *must => (format!("{value:.3}"), "met"),
            Some(value) => (format!("{value:.3}"), "missed"),
        };
        format!("| {what} | {must:.3} | {aim:.3} | {found} | {word} |")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_tell_missed_from_not_measured() {
        let word = |found| goal("x", found, 2.0, 1.0).verdict();
        assert_eq!(word(None), "| x | 2.000 | 1.000 | - | not measured |");
        assert!(word(Some(1.0)).ends_with("aim reached |"));
        assert!(word(Some(1.5)).ends_with("| met |"));
        assert!(word(Some(2.5)).ends_with("missed |"));
    }
}
