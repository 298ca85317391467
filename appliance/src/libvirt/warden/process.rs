//! The warden's process.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use icecore_qmp::guardian::leash::{Leash, receive_fds};

use super::watch::{Duty, Room, Watch};
use super::{Ended, JobWatch, Order};
use crate::libvirt::{Domain, Kind, State, Virsh};

/// How often it looks whether it has to act.
const TICK: Duration = Duration::from_millis(100);
/// How often it asks whether libvirt has stopped the domain over a failed write.
const STATE_INTERVAL: Duration = Duration::from_secs(2);
/// Between two tries of what has to succeed.
const RETRY: Duration = Duration::from_millis(500);
/// For so long a libvirt that does not answer is asked again; `doctor` finds what is left then.
const PATIENCE: Duration = Duration::from_secs(600);

/// Body of the process: works until the worker is gone and everything that it began has ended.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve() -> std::io::Result<()> {
    let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let (_, mut fds) = receive_fds(stream.as_fd())?;
    if fds.is_empty() {
        return Err(std::io::Error::other("the worker did not send a leash"));
    }
    let leash = Leash::new(UnixStream::from(fds.remove(0)))?;
    let (sender, orders) = mpsc::channel();
    let lines = BufReader::new(stream.try_clone()?);
    std::thread::Builder::new().name("orders".into()).spawn(move || {
        for line in lines.lines().map_while(Result::ok) {
            let Ok(order) = serde_json::from_str(&line) else { return };
            if sender.send(order).is_err() {
                return;
            }
        }
    })?;
    let Ok(Order::Domain { uri, uuid }) = orders.recv() else { return Ok(()) };
    let Ok(virsh) = Virsh::new(&uri) else { return Ok(()) };
    let domain = Domain { virsh, name: uuid.clone(), uuid };
    // The locks end with this process.
    let _locks = fds;
    let looked_at = Instant::now();
    Warden { domain, leash, stream, watch: Watch::default(), looked_at }.work(&orders);
    Ok(())
}

struct Warden {
    domain: Domain,
    leash: Leash,
    stream: UnixStream,
    watch: Watch,
    looked_at: Instant,
}

impl Warden {
    fn work(mut self, orders: &Receiver<Order>) {
        loop {
            match orders.recv_timeout(TICK) {
                Ok(order) => self.watch.told(order, Instant::now()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            // One that cannot be taken is cut with the worker's own end.
            let _ = self.leash.collect();
            let room = self.watch.job().and_then(room);
            match self.watch.duty(room, Instant::now()) {
                Duty::Nothing => self.look_at_domain(),
                Duty::Thaw => self.thaw_beside(),
                Duty::EndJob(why) => self.end_job(&why),
            }
        }
        self.undo();
    }

    /// The worker is gone: whatever it began ends.
    fn undo(&mut self) {
        self.leash.cut();
        if self.watch.frozen() {
            thaw(&self.domain);
        }
        if let Some(job) = self.watch.forget_job() {
            end(&self.domain, &job);
        }
    }

    /// A freeze that hangs keeps its thaw waiting; the job is watched meanwhile.
    fn thaw_beside(&mut self) {
        self.watch.forget_freeze();
        let domain = self.domain.clone();
        let spawned = std::thread::Builder::new().name("thaw".into()).spawn(move || thaw(&domain));
        if spawned.is_err() {
            thaw(&self.domain);
        }
    }

    fn end_job(&mut self, why: &str) {
        // The reason first: it is asked for when a read has failed.
        if let Ok(mut line) = serde_json::to_vec(&Ended { why: why.to_owned() }) {
            line.push(b'\n');
            // A worker that is gone needs no reason.
            let _ = self.stream.write_all(&line);
        }
        self.leash.cut();
        if let Some(job) = self.watch.forget_job() {
            end(&self.domain, &job);
        }
    }

    /// With its scratch full, QEMU stops the guest. Nothing but the end of the job helps.
    fn look_at_domain(&mut self) {
        if self.watch.job().is_none() || self.looked_at.elapsed() < STATE_INTERVAL {
            return;
        }
        self.looked_at = Instant::now();
        if self.domain.state() == Ok(State::IoError) {
            self.end_job("libvirt stopped the domain over a failed write");
            // It goes on where it stood; a disk of its own that fails stops it again.
            let _ = self.domain.resume();
        }
    }
}

/// Thaws until the guest says so, or is gone.
fn thaw(domain: &Domain) {
    persist(|| match domain.thaw() {
        Ok(_) => true,
        Err(e) => matches!(e.kind, Kind::NotRunning | Kind::NoDomain),
    });
}

/// Ends the job, if it is the one that is meant, and removes its directory.
fn end(domain: &Domain, job: &JobWatch) {
    let gone = persist(|| match domain.backup_job() {
        Ok(Some(Some(socket))) if socket == job.socket => {
            // Looked at again before it counts.
            let _ = domain.abort_job();
            false
        }
        Ok(_) => true,
        Err(e) => e.kind == Kind::NoDomain,
    });
    if gone {
        // One that stays is found by `doctor`.
        let _ = std::fs::remove_dir_all(&job.dir);
    }
}

/// Tries until it is done or patience ends.
fn persist(mut done: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if done() {
            return true;
        }
        std::thread::sleep(RETRY);
    }
    false
}

/// What the scratch takes, and what is left for it. `None` before its files are there.
fn room(job: &JobWatch) -> Option<Room> {
    let used = job.scratch.iter().filter_map(|path| std::fs::metadata(path).ok());
    // A block of `stat` has 512 bytes whatever the file system.
    let used_bytes = used.map(|meta| meta.blocks().saturating_mul(512)).sum();
    let system = rustix::fs::statfs(&job.dir).ok()?;
    let unit = u64::try_from(system.f_bsize).unwrap_or(4096);
    Some(Room { used_bytes, free_bytes: system.f_bavail.saturating_mul(unit) })
}
