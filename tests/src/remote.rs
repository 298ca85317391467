//! What tests of repositories on other machines have in common: a small VM whose copy takes a while,
//! and the life of a repository up to a backup that is killed.

use rustix::process::Signal;
use serde_json::Value;

use crate::MIB;
use crate::disk::Disk;
use crate::failure::{Failure, Result};
use crate::icecore::{Icecore, Run, Started};
use crate::proof::{count, require_mode, text};
use crate::spec::VmSpec;
use crate::vm::TestVm;

/// Several pieces of an upload, and seconds of a slow backup.
const NOISE_BYTES: u64 = 16 * MIB;

/// Bytes that do not compress and that no other seed gives.
fn noise(seed: u64) -> Vec<u8> {
    let mut word = seed;
    let step = || {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (word ^ (word >> 29)).to_le_bytes()
    };
    std::iter::repeat_with(step).take(NOISE_BYTES as usize / 8).flatten().collect()
}

impl VmSpec {
    /// A VM without a guest: `large` with 16 MiB of noise, and `small`.
    pub fn start_noisy(name: &str) -> Result<TestVm> {
        let vm = Self::new(name)
            .no_guest()
            .disk(Disk::new("large", 64 * MIB))
            .disk(Disk::new("small", 16 * MIB))
            .start()?;
        vm.fill("small", 8, MIB, MIB)?;
        vm.renew_noise(1)?;
        Ok(vm)
    }
}

impl TestVm {
    /// Replaces the noise on the disk `large`.
    pub fn renew_noise(&self, seed: u64) -> Result<()> {
        let file = self.dir().join("noise");
        std::fs::write(&file, noise(seed))?;
        self.qemu_io("large", &format!("write -s {} 0 {NOISE_BYTES}", file.display())).map(drop)
    }

    /// Takes the noise away.
    pub fn drop_noise(&self) -> Result<()> {
        self.zero("large", 0, NOISE_BYTES)
    }
}

impl Icecore {
    /// A subcommand that has a word of its own, on this user's repository: `point list`.
    pub fn word_on_repository(&self, subcommand: &str, word: &str) -> Run {
        let run = self.command(subcommand).arg(word).arg("--json");
        run.env("ICECORE_REPO", self.repository())
    }

    /// Makes the repository.
    pub fn init_repository(&self) -> Result<()> {
        self.word_on_repository("repo", "init").succeed().map(drop)
    }

    /// The points in it that can be restored.
    pub fn points(&self) -> Result<Vec<Value>> {
        let listed = self.word_on_repository("point", "list").json()?;
        let all = listed.as_array().cloned().unwrap_or_default();
        Ok(all.into_iter().filter(|point| point["status"] == "available").collect())
    }

    /// A backup in the middle of its copy, of new noise.
    pub fn start_noisy_backup(&self, vm: &TestVm, seed: u64) -> Result<Started> {
        vm.renew_noise(seed)?;
        self.start_slow_backup(vm)
    }

    /// A full point, an incremental one, a backup that is killed and one more point, all of them
    /// proven; the first and the last one's ids.
    pub fn live_through_a_kill(&self, vm: &TestVm) -> Result<[String; 2]> {
        let first = self.prove_next_point(vm)?;
        require_mode(&first, "large", "full")?;
        vm.fill("large", 9, 20 * MIB, MIB)?;
        let second = self.prove_next_point(vm)?;
        require_mode(&second, "large", "incremental")?;
        let killed = self.start_noisy_backup(vm, 2)?;
        killed.signal(Signal::KILL);
        killed.finish()?;
        vm.require_no_trace()?;
        let third = self.prove_next_point(vm)?;
        let points = self.points()?;
        if points.len() != 3 {
            return Err(Failure::new(format!("three points were proven, not these: {points:?}")));
        }
        Ok([text(&first, "point")?.to_owned(), text(&third, "point")?.to_owned()])
    }

    /// Deletes a point and collects what it and a killed backup left; what stays is whole.
    pub fn collect_after_a_kill(&self, deleted: &str) -> Result<()> {
        self.word_on_repository("point", "delete").arg(deleted).succeed()?;
        let collected = self.on_repository("gc").json()?;
        for (field, wanted) in [("writers_revoked", 1), ("points_removed", 1)] {
            if count(&collected, field)? != wanted {
                return Err(Failure::new(format!("{field} is not {wanted} in {collected}")));
            }
        }
        if count(&collected, "leftovers_removed")? == 0 {
            return Err(Failure::new(format!("the killed backup left nothing: {collected}")));
        }
        self.check().map(drop)
    }
}
