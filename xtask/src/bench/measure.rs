//! One measured run of a program: wall time, processor time, memory.
//!
//! Not by `wait4`: its figures mix a program's own time with that of the servers that it starts.
//! `/proc` keeps both apart, also for a process that has ended and was not waited for yet.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::step::{Failure, Result};

/// USER_HZ, the unit of processor time in /proc: 100 on every architecture of Linux.
const TICKS_PER_SECOND: f64 = 100.0;
const MEMORY_POLL: Duration = Duration::from_millis(10);

/// What one run took.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    pub wall_s: f64,
    pub client_cpu_s: f64,
    /// The server's, where there is one.
    pub server_cpu_s: Option<f64>,
    /// Largest sum of the peaks of the client processes there at one time.
    pub peak_mib: f64,
    /// What it left in its repository.
    pub stored_mib: Option<f64>,
}

/// Whose the processor time of a program's child processes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Children {
    /// Helpers: the client's.
    Client,
    /// Servers that it starts for itself.
    Server,
}

/// A run to be measured.
pub struct Job<'a> {
    pub command: Command,
    pub children: Children,
    /// The process that serves it.
    pub server: Option<u32>,
    /// Where its output goes, which a failure shows.
    pub log: &'a Path,
}

impl Job<'_> {
    /// Runs it; standard output is left in the log.
    pub fn run(mut self) -> Result<Sample> {
        // Nothing that others have left to be written may be waited for.
        rustix::fs::sync();
        let log = File::create(self.log)?;
        self.command.stdin(Stdio::null()).stderr(log.try_clone()?).stdout(log);
        let before = self.server.map(|pid| processor_time(pid).map(|time| time.own)).transpose()?;
        let started = Instant::now();
        let mut child = self.command.spawn().map_err(|error| {
            Failure::new(format!("cannot start {:?}: {error}", self.command.get_program()))
        })?;
        let (peak_mib, wall_s) = watch(&child, started)?;
        let time = processor_time(child.id());
        let status = child.wait()?;
        if !status.success() {
            let said = std::fs::read_to_string(self.log).unwrap_or_default();
            return Err(Failure::new(format!("{:?} ended with {status}:\n{said}", self.command)));
        }
        let time = time?;
        let (client_cpu_s, mut server_cpu_s) = match self.children {
            Children::Client => (time.own + time.children, None),
            Children::Server => (time.own, Some(time.children)),
        };
        if let (Some(pid), Some(before)) = (self.server, before) {
            server_cpu_s = Some(processor_time(pid)?.own - before);
        }
        Ok(Sample { wall_s, client_cpu_s, server_cpu_s, peak_mib, stored_mib: None })
    }
}

/// Waits for the end, and leaves the process to be looked at.
fn watch(child: &Child, started: Instant) -> Result<(f64, f64)> {
    let pid = Pid::from_child(child);
    let (over, id) = (AtomicBool::new(false), child.id());
    std::thread::scope(|scope| {
        let memory = scope.spawn(|| {
            let mut peak = 0;
            while !over.load(Ordering::Relaxed) {
                peak = peak.max(memory_of(id, ""));
                std::thread::sleep(MEMORY_POLL);
            }
            peak as f64 / 1024.0
        });
        let ended = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let wall = started.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        ended.map_err(std::io::Error::from)?;
        Ok((memory.join().unwrap_or_default(), wall))
    })
}

/// The peaks, in KiB, of a process and of all below it that are there now and are no servers.
fn memory_of(pid: u32, parent_size: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let size = field(&status, "VmSize:").unwrap_or_default();
    let name = field(&status, "Name:").unwrap_or_default();
    // A child that has not become another program yet still has its parent's memory.
    let child = !parent_size.is_empty();
    if child && (size == parent_size || name.starts_with("qemu-")) {
        return 0;
    }
    let peak = field(&status, "VmHWM:").and_then(|text| text.split(' ').next()?.parse().ok());
    let mut total: u64 = peak.unwrap_or_default();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for task in tasks {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|text| text.parse().ok());
        total += children.map(|child| memory_of(child, size)).sum::<u64>();
    }
    total
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// Processor time, in seconds.
struct Time {
    own: f64,
    /// That of the children that it has waited for.
    children: f64,
}

fn processor_time(pid: u32) -> Result<Time> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&stat).ok_or_else(|| Failure::new(format!("/proc/{pid}/stat is not understood")))
}

/// Fields 14 to 17; the second one is a name in brackets that may hold anything.
fn parse_stat(stat: &str) -> Option<Time> {
    let rest = &stat[stat.rfind(')')? + 1..];
    let ticks: Vec<f64> =
        rest.split_whitespace().skip(11).take(4).filter_map(|text| text.parse().ok()).collect();
    let [user, system, children_user, children_system] = ticks.try_into().ok()?;
    Some(Time {
        own: (user + system) / TICKS_PER_SECOND,
        children: (children_user + children_system) / TICKS_PER_SECOND,
    })
}

/// What lies below a folder on disk, in MiB.
pub fn disk_usage(path: &Path) -> Result<f64> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::symlink_metadata(path)?;
    let mut total = meta.blocks() as f64 * 512.0 / (1 << 20) as f64;
    if meta.is_dir() {
        for entry in std::fs::read_dir(path)? {
            total += disk_usage(&entry?.path())?;
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 150 50 30 20 20 0";
        let time = parse_stat(stat).unwrap();
        assert_eq!((time.own, time.children), (2.0, 0.5));
    }
}
