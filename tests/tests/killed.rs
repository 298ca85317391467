//! kill -9 at the system calls by which a run changes anything, one after the other (strace kills at
//! the nth of them): what is committed stays right, and the next run goes on from there.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;

use icecore_tests::{
    Disk, Failure, Icecore, MIB, Outcome, Reference, Result, Run, TestVm, VmSpec, icecore_binary,
    text,
};

/// Where a name comes or goes, or something becomes durable.
const CHANGES: &str = "fsync,fdatasync,linkat,unlink,unlinkat,rename,renameat,renameat2,mkdir";
/// A run that has not ended by itself at such a count would be one without end.
const CALLS_MAX: u32 = 200;

/// Runs of an icecore that dies at a system call of its own or of its guardian.
struct Killed {
    icecore: Icecore,
    known: BTreeSet<String>,
}

impl Killed {
    fn new() -> Result<Self> {
        let whole = Icecore::new()?;
        let script = whole.path("dies");
        // Without KILL_AT it lives.
        let text = format!(
            "#!/bin/sh\n[ -n \"$KILL_AT\" ] || exec {binary} \"$@\"\n\
             exec strace -f -qq -o /dev/null -e \"trace=$KILL_CALL\" \
             -e \"inject=$KILL_CALL:signal=SIGKILL:when=$KILL_AT\" {binary} \"$@\"\n",
            binary = icecore_binary()?.display(),
        );
        std::fs::write(&script, text)?;
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
        let icecore = Icecore::with_binary(script)?;
        // The script lies there for as long as the test runs.
        let _ = whole.keep();
        Ok(Self { icecore, known: BTreeSet::new() })
    }

    /// Dies at the nth of these calls of a thread; whether it has lived.
    fn run(&self, run: Run, calls: &str, at: u32) -> Result<(bool, Outcome)> {
        let outcome = run.env("KILL_CALL", calls).env("KILL_AT", at.to_string()).outcome()?;
        Ok((outcome.status == Some(0), outcome))
    }

    /// Every point that has come since shows what the disks held, and nothing is damaged.
    fn prove(&mut self, vm: &TestVm, reference: &Reference) -> Result<()> {
        let report = self.icecore.check()?;
        assert_eq!(report["ok"], true, "{report}");
        for point in self.icecore.points()? {
            let id = text(&point, "point")?;
            if self.known.insert(id.to_owned()) {
                self.icecore.prove_point(vm, id, reference)?;
            }
        }
        Ok(())
    }
}

fn vm() -> Result<TestVm> {
    VmSpec::new("killed").no_guest().disk(Disk::new("d0", 32 * MIB)).start()
}

fn image(icecore: &Icecore, vm: &TestVm) -> Result<Run> {
    let image = format!("d0={}", vm.image("d0")?.display());
    Ok(icecore.on_repository("backup").args(["--name", vm.name(), "--image", &image]))
}

#[test]
fn a_backup_of_images_is_killed_at_each_change() -> Result<()> {
    let mut vm = vm()?;
    vm.fill("d0", 7, 0, 4 * MIB)?;
    vm.quit()?;
    let reference = vm.reference()?;
    let mut killed = Killed::new()?;
    for at in 1..CALLS_MAX {
        let (lived, outcome) = killed.run(image(&killed.icecore, &vm)?, CHANGES, at)?;
        killed.prove(&vm, &reference)?;
        if lived {
            assert!(at > 10, "it was hardly ever killed: {outcome:?}");
            return Ok(());
        }
        assert_ne!(outcome.status, Some(1), "killed, not failed: {outcome:?}");
    }
    Err(Failure::new("it was killed at each of its calls and has still others"))
}

#[test]
fn a_backup_of_a_running_qemu_is_killed_in_icecore_and_in_its_guardian() -> Result<()> {
    let vm = vm()?;
    let mut killed = Killed::new()?;
    let mut deaths = 0;
    let sample = [
        (CHANGES, 2),
        (CHANGES, 5),
        (CHANGES, 9),
        ("execve", 2),
        ("connect", 1),
        ("sendto", 3),
        ("sendto", 30),
        ("sendto", 60),
        ("shutdown", 1),
        ("exit_group", 1),
    ];
    for (seed, (calls, at)) in sample.into_iter().enumerate() {
        let seed = seed as u8 + 1;
        vm.fill("d0", seed, u64::from(seed) * MIB, 65536)?;
        let reference = vm.reference()?;
        let (lived, _) = killed.run(killed.icecore.backup(&vm), calls, at)?;
        deaths += u32::from(!lived);
        killed.prove(&vm, &reference)?;
        // Where the guardian died, too, its work is still there: in nobody's way.
        vm.fill("d0", seed, u64::from(seed) * MIB + 65536, 65536)?;
        let reference = vm.reference()?;
        let next = killed.icecore.backup(&vm).json()?;
        killed.known.insert(text(&next, "point")?.to_owned());
        killed.icecore.prove_point(&vm, text(&next, "point")?, &reference)?;
        vm.require_no_trace()?;
    }
    assert!(deaths >= 6, "only {deaths} of {} runs died", sample.len());
    Ok(())
}
