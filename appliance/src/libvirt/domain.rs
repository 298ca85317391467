//! One domain, by its UUID: everything that is asked of libvirt about it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::checkpoint::{self, Checkpoint, CheckpointName};
use super::virsh::QUICK;
use super::xml::{self, Description};
use super::{Kind, Virsh, VirshError, job};
use crate::failure::{Failure, Outcome};

/// QEMU makes the scratch images and opens them while this runs.
const BACKUP_BEGIN: Duration = Duration::from_secs(60);
/// A domain that is destroyed first gets the chance to flush its images.
const DESTROY: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(120);

/// A domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    pub virsh: Virsh,
    pub uuid: String,
    pub name: String,
}

/// Whether a domain runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Running,
    /// Stopped by somebody.
    Paused,
    /// Stopped by libvirt over a failed write.
    IoError,
    ShutOff,
    /// On its way from one state to another, or hanging.
    Other,
}

impl State {
    /// Reads the answer of `domstate --reason`.
    fn of(answer: &str) -> Self {
        let answer = answer.trim();
        match answer.split('(').next().map(str::trim) {
            Some("running") => Self::Running,
            Some("paused") if answer.contains("I/O error") => Self::IoError,
            Some("paused") => Self::Paused,
            Some("shut off" | "crashed") => Self::ShutOff,
            _ => Self::Other,
        }
    }
}

impl Domain {
    /// Finds a domain by its name or its UUID. A name wins over the same text as a UUID.
    pub fn find(virsh: Virsh, wanted: &str, tried: &str) -> Outcome<Self> {
        let list = virsh.run(&["list", "--all", "--uuid", "--name"], QUICK);
        let list = list.map_err(|e| e.failure(tried))?;
        match pick(&list, wanted) {
            Some((uuid, name)) => Ok(Self { virsh, uuid, name }),
            None => {
                let why = format!("{} has no domain {wanted}", virsh.uri());
                Err(Failure::usage(tried, why).next("see 'virsh list --all'"))
            }
        }
    }

    /// Whether there is a domain of this name.
    pub fn is_known(virsh: &Virsh, name: &str) -> Result<bool, VirshError> {
        let list = virsh.run(&["list", "--all", "--uuid", "--name"], QUICK)?;
        Ok(pick(&list, name).is_some())
    }

    /// Defines a domain; it stays off.
    pub fn define(virsh: &Virsh, definition: &Path) -> Result<(), VirshError> {
        virsh.run(&["define", "--file", &definition.to_string_lossy()], QUICK).map(drop)
    }

    fn call(&self, command: &str, more: &[&str], deadline: Duration) -> Result<String, VirshError> {
        let mut arguments = vec![command, "--domain", &self.uuid];
        arguments.extend(more);
        self.virsh.run(&arguments, deadline)
    }

    /// The names of all domains, running or not.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub fn names(virsh: &Virsh) -> Result<Vec<String>, VirshError> {
        let list = virsh.run(&["list", "--all", "--name"], QUICK)?;
        let names = list.lines().map(str::trim).filter(|name| !name.is_empty());
        Ok(names.map(ToOwned::to_owned).collect())
    }

    /// Whether it runs.
    pub fn state(&self) -> Result<State, VirshError> {
        self.call("domstate", &["--reason"], QUICK).map(|answer| State::of(&answer))
    }

    /// Its XML as it runs (or would, when it is off).
    pub fn live_xml(&self) -> Result<String, VirshError> {
        self.call("dumpxml", &[], QUICK)
    }

    /// Its XML as it starts the next time.
    pub fn inactive_xml(&self) -> Result<String, VirshError> {
        self.call("dumpxml", &["--inactive"], QUICK)
    }

    /// What its XML says.
    pub fn describe(&self, tried: &str) -> Outcome<Description> {
        let text = self.live_xml().map_err(|e| e.failure(tried))?;
        xml::parse(&text).map_err(|e| Failure::failed(tried, e))
    }

    /// The size of each disk in bytes, by its target.
    pub fn capacities(&self) -> Result<BTreeMap<String, u64>, VirshError> {
        let answer = self.virsh.run(&["domstats", "--block", &self.uuid], QUICK)?;
        Ok(capacities(&answer))
    }

    /// Freezes the guest's file systems; gives their number.
    pub fn freeze(&self, deadline: Duration) -> Result<u32, VirshError> {
        self.call("domfsfreeze", &[], deadline).map(|answer| count(&answer))
    }

    /// Thaws them; gives their number.
    pub fn thaw(&self) -> Result<u32, VirshError> {
        self.call("domfsthaw", &[], QUICK).map(|answer| count(&answer))
    }

    /// Begins a backup job, and a checkpoint with it.
    pub fn begin_backup(&self, job: &Path, checkpoint: Option<&Path>) -> Result<(), VirshError> {
        let (job, checkpoint) = (job.to_string_lossy(), checkpoint.map(Path::to_string_lossy));
        let mut more = vec!["--backupxml", &job];
        if let Some(checkpoint) = &checkpoint {
            more.extend(["--checkpointxml", checkpoint]);
        }
        self.call("backup-begin", &more, BACKUP_BEGIN).map(drop)
    }

    /// The socket of the backup job that runs: none without a job, `Some(None)` for a job that
    /// serves none.
    pub fn backup_job(&self) -> Result<Option<Option<PathBuf>>, VirshError> {
        match self.call("backup-dumpxml", &[], QUICK) {
            Ok(text) => Ok(Some(job::socket(&text).unwrap_or_default())),
            Err(e) if matches!(e.kind, Kind::NoJob | Kind::NotRunning) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Ends the job of the domain, whatever it is: see whose it is first.
    pub fn abort_job(&self) -> Result<(), VirshError> {
        self.call("domjobabort", &[], QUICK).map(drop)
    }

    /// A job of libvirt's or of QEMU's at work on it that is not ours: a migration, a dump, a
    /// backup, the copying or merging of an image.
    pub fn job_of_others(&self) -> Result<Option<String>, VirshError> {
        let said = self.call("domjobinfo", &[], QUICK)?;
        if let Some(job) = job::domain_job(&said) {
            return Ok(Some(job));
        }
        let command = r#"{"execute":"query-jobs"}"#;
        let said = self.call("qemu-monitor-command", &["--cmd", command], QUICK)?;
        Ok(job::block_job(&said))
    }

    /// The names of all its checkpoints.
    pub fn checkpoint_names(&self) -> Result<Vec<String>, VirshError> {
        let names = self.call("checkpoint-list", &["--name"], QUICK)?;
        Ok(names
            .lines()
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect())
    }

    /// Its checkpoints of ours, with the sizes of their bitmaps where it runs.
    pub fn our_checkpoints(&self, running: bool, tried: &str) -> Outcome<Vec<Checkpoint>> {
        let names = self.checkpoint_names().map_err(|e| e.failure(tried))?;
        let ours = names.iter().filter(|name| name.parse::<CheckpointName>().is_ok());
        let described = ours.map(|name| {
            let mut more = vec!["--checkpointname", name.as_str(), "--no-domain"];
            more.extend(running.then_some("--size"));
            let text =
                self.call("checkpoint-dumpxml", &more, QUICK).map_err(|e| e.failure(tried))?;
            checkpoint::parse(&text).map_err(|e| Failure::failed(tried, e))
        });
        described.collect()
    }

    /// Removes a checkpoint with its bitmaps. Where a bitmap is gone already (libvirt then refuses)
    /// only what libvirt remembers of it is removed.
    pub fn delete_checkpoint(&self, name: &str) -> Result<(), VirshError> {
        let deleted = self.call("checkpoint-delete", &["--checkpointname", name], QUICK);
        match deleted {
            Err(e) if e.said.contains("not found in backing chain") => self.forget_checkpoint(name),
            Err(e) if e.said.contains("checkpoint not found") => Ok(()),
            other => other.map(drop),
        }
    }

    /// Removes what libvirt remembers of a checkpoint; its bitmaps stay.
    pub fn forget_checkpoint(&self, name: &str) -> Result<(), VirshError> {
        self.call("checkpoint-delete", &["--checkpointname", name, "--metadata"], QUICK).map(drop)
    }

    /// Has libvirt remember a checkpoint whose bitmaps are there already.
    pub fn remember_checkpoint(&self, definition: &Path) -> Result<(), VirshError> {
        let path = definition.to_string_lossy();
        self.call("checkpoint-create", &["--xmlfile", &path, "--redefine"], QUICK).map(drop)
    }

    /// Whether it stays defined when it stops.
    pub fn is_persistent(&self) -> Result<bool, VirshError> {
        let list = self.virsh.run(&["list", "--all", "--persistent", "--uuid"], QUICK)?;
        Ok(list.lines().any(|line| line.trim() == self.uuid))
    }

    /// Starts it.
    pub fn start(&self) -> Result<(), VirshError> {
        self.call("start", &[], START).map(drop)
    }

    /// Continues it.
    pub fn resume(&self) -> Result<(), VirshError> {
        self.call("resume", &[], QUICK).map(drop)
    }

    /// Ends its QEMU, which flushes its images and stores their bitmaps. One that does not end of
    /// itself is killed.
    pub fn destroy(&self) -> Result<(), VirshError> {
        match self.call("destroy", &["--graceful"], DESTROY) {
            Err(e) if e.kind == Kind::NotRunning => Ok(()),
            Err(e) if e.kind == Kind::Unreachable => Err(e),
            Err(_) => self.call("destroy", &[], DESTROY).map(drop),
            Ok(_) => Ok(()),
        }
    }
}

/// The line of a list of `UUID NAME` that is meant.
fn pick(list: &str, wanted: &str) -> Option<(String, String)> {
    let lines = list.lines().filter_map(|line| line.trim_end().split_once(' '));
    let all: Vec<(&str, &str)> = lines.map(|(uuid, name)| (uuid, name.trim_start())).collect();
    let by_name = all.iter().find(|(_, name)| *name == wanted);
    let found = by_name.or_else(|| all.iter().find(|(uuid, _)| uuid.eq_ignore_ascii_case(wanted)));
    found.map(|(uuid, name)| ((*uuid).to_owned(), (*name).to_owned()))
}

/// Reads `block.N.name` and `block.N.capacity` of `domstats --block`.
fn capacities(answer: &str) -> BTreeMap<String, u64> {
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let mut sizes = BTreeMap::new();
    for line in answer.lines() {
        let Some((key, value)) = line.trim().split_once('=') else { continue };
        let Some((number, field)) = key.strip_prefix("block.").and_then(|k| k.split_once('.'))
        else {
            continue;
        };
        match field {
            "name" => drop(names.insert(number, value)),
            "capacity" => {
                if let (Some(name), Ok(size)) = (names.get(number), value.parse()) {
                    sizes.insert((*name).to_owned(), size);
                }
            }
            _ => {}
        }
    }
    sizes
}

/// The number in "Froze 2 filesystem(s)".
pub(super) fn count(answer: &str) -> u32 {
    answer.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_are_found_by_name_first() {
        let list = "u-1 lab one\nu-2 u-1\nu-3                  three\n\n";
        let found = |wanted| pick(list, wanted).map(|(uuid, _)| uuid);
        assert_eq!(found("lab one").as_deref(), Some("u-1"));
        assert_eq!(found("u-1").as_deref(), Some("u-2"));
        assert_eq!(found("U-3").as_deref(), Some("u-3"));
        assert_eq!((found("lab"), found("1"), found("")), (None, None, None));
    }

    #[test]
    fn answers_are_read() {
        assert_eq!(State::of("running (booted)\n\n"), State::Running);
        assert_eq!(State::of("paused (I/O error)"), State::IoError);
        assert_eq!(State::of("paused (user)"), State::Paused);
        assert_eq!(State::of("shut off (crashed)"), State::ShutOff);
        assert_eq!(State::of("in shutdown"), State::Other);
        assert_eq!(count("Froze 2 filesystem(s)\n"), 2);
        let stats = "Domain: 'a'\n  block.count=1\n  block.0.name=vda\n  block.0.capacity=1024\n";
        assert_eq!(capacities(stats), BTreeMap::from([("vda".to_owned(), 1024)]));
    }
}
