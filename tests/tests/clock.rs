//! The wall clock jumps by a year, there and back: what is the newest point, and what a restore and a
//! rollback give, does not depend on it.

use icecore_tests::{Disk, Icecore, MIB, Result, Run, VmSpec, require_mode, text};

const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// A run at another time of day; deadlines and timers see the true passing of time.
fn at(run: Run, offset: &str) -> Run {
    let run = run.env("LD_PRELOAD", FAKETIME).env("FAKETIME", offset);
    run.env("DONT_FAKE_MONOTONIC", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
}

#[test]
fn a_clock_that_jumps_by_a_year_confuses_no_restore_and_no_rollback() -> Result<()> {
    assert!(std::path::Path::new(FAKETIME).exists(), "install the package faketime");
    let vm = VmSpec::new("clock").no_guest().disk(Disk::new("d0", 32 * MIB)).start()?;
    let icecore = Icecore::new()?;
    let (mut points, mut years) = (Vec::new(), Vec::new());
    for (n, offset) in ["+0d", "+370d", "-370d", "-370d"].into_iter().enumerate() {
        vm.fill("d0", n as u8 + 1, n as u64 * 2 * MIB, 3 * MIB)?;
        let reference = vm.reference()?;
        let report = at(icecore.backup(&vm), offset).json()?;
        require_mode(&report, "d0", if n == 0 { "full" } else { "incremental" })?;
        years.push(text(&report, "created_at")?[..4].to_owned());
        points.push((text(&report, "point")?.to_owned(), reference));
    }
    assert!(years[1] > years[0] && years[2] < years[0], "the clock did jump: {years:?}");
    assert!(points.windows(2).all(|pair| pair[0].0 < pair[1].0), "ids ascend");
    for (n, (point, reference)) in points.iter().enumerate() {
        let folder = icecore.path(&format!("restored{n}"));
        std::fs::create_dir_all(&folder)?;
        let restore = icecore.on_repository("restore").arg(point).arg("--to").arg(&folder);
        at(restore, "+370d").succeed()?;
        reference.compare_all(&folder)?;
    }
    let latest = icecore.on_repository("restore").arg("latest").args(["--disk", "d0", "--to"]);
    let report = at(latest.arg(icecore.path("latest.raw")), "-370d").json()?;
    assert_eq!(text(&report, "point")?, points[3].0);
    for (offset, (point, reference)) in ["-370d", "+370d"].into_iter().zip(&points) {
        let rollback = icecore.rollback(&vm, point).args(["--restart", "none"]);
        at(rollback, offset).succeed()?;
        vm.reference()?.same_as(reference)?;
        vm.require_no_trace()?;
    }
    icecore.prove_next_point(&vm).map(drop)
}
