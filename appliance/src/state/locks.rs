//! One run at a time on a VM, on a QEMU and on an image: advisory locks that die with their run.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::{JobId, State};
use crate::failure::{Failure, Outcome};

/// A guardian needs seconds to take its graph out; after this long something is wrong with it.
const GUARDIAN_WAIT_MAX: Duration = Duration::from_secs(25);
/// How often a lock that is waited for is tried.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// What is locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockKey(String);

impl LockKey {
    /// The VM of this name: held by the run that works on it.
    pub fn vm(name: &str) -> Self {
        Self(format!("vm-{}", hashed(name.as_bytes())))
    }

    /// The look at the schedules: two would begin the same runs.
    pub fn schedules() -> Self {
        Self("schedules".into())
    }

    /// A run itself: free when its process is gone.
    pub fn job(job: &JobId) -> Self {
        Self(format!("job-{job}"))
    }

    /// A file that stands for a VM: its QMP socket or an image.
    pub fn file(path: &Path) -> Self {
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Self(format!("file-{}", hashed(path.as_os_str().as_encoded_bytes())))
    }

    /// Copying into the repository with this id: two would copy the same points.
    pub fn copy_into(repository: &str) -> Self {
        Self(format!("copy-{}", hashed(repository.as_bytes())))
    }

    /// The domain of libvirt with this UUID.
    pub fn domain(uuid: &str) -> Self {
        Self(format!("domain-{}", hashed(uuid.as_bytes())))
    }

    /// The warden at work on it.
    pub fn warden(uuid: &str) -> Self {
        Self(Self::domain(uuid).0.replacen("domain-", "warden-", 1))
    }

    /// Its name as a file's.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The guardian at work on a QMP socket.
    pub fn guardian(path: &Path) -> Self {
        Self(Self::file(path).0.replacen("file-", "guardian-", 1))
    }
}

fn hashed(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

/// A lock that is held until it is dropped (or, for a guardian's, until the last process that
/// inherited it ends).
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock, or refuses with the job that holds it.
    pub fn take(state: &State, key: &LockKey, job: &JobId, tried: &str) -> Outcome<Self> {
        let mut file = open(state, key, tried)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                note_holder(&mut file, job).map_err(|e| Failure::failed(tried, e))?;
                Ok(Self { file })
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Err(busy(&mut file, tried)),
            Err(e) => Err(Failure::failed(tried, e)),
        }
    }

    /// Takes the lock, waiting for a guardian that is still undoing an earlier run. It may be one
    /// that this process has just let go of, so its connection has to be served meanwhile.
    pub async fn wait_for_guardian(state: &State, key: &LockKey, tried: &str) -> Outcome<Self> {
        let file = open(state, key, tried)?;
        let started = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { file }),
                Err(rustix::io::Errno::WOULDBLOCK) if started.elapsed() < GUARDIAN_WAIT_MAX => {
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(Failure::refused(
                        tried,
                        "the guardian of an earlier run is still at work on this VM",
                    )
                    .next("look at the VM with 'icecore doctor'; its QEMU may hang")
                    .transient());
                }
                Err(e) => return Err(Failure::failed(tried, e)),
            }
        }
    }

    /// Takes the lock of a whole host's daemon; none when another holds it.
    pub fn of_daemon(state: &State, tried: &str) -> Outcome<Option<Self>> {
        let file = open(state, &LockKey("daemon".into()), tried)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(Failure::failed(tried, e)),
        }
    }

    /// Removes the file of a lock that nobody will ask for again.
    pub fn forget(state: &State, key: &LockKey) {
        // A file that stays is only untidy: its lock died with its holder.
        let _ = std::fs::remove_file(state.root().join("locks").join(&key.0));
    }

    /// The lock's file, to be inherited by a process that must hold it, too.
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

/// True when nobody holds the lock (asked of runs that may be dead).
pub fn is_free(state: &State, key: &LockKey) -> bool {
    let path = state.root().join("locks").join(&key.0);
    match File::open(path) {
        Ok(file) => flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok(),
        Err(_) => true,
    }
}

fn open(state: &State, key: &LockKey, tried: &str) -> Outcome<File> {
    let path = state.dir("locks")?.join(&key.0);
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Failure::failed(tried, format!("{}: {e}", path.display())))
}

fn note_holder(file: &mut File, job: &JobId) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(job.as_str().as_bytes())
}

fn busy(file: &mut File, tried: &str) -> Failure {
    let mut holder = String::new();
    // The holder's name only makes the message better.
    let _ = file.read_to_string(&mut holder);
    Failure::refused(tried, format!("job {holder} is at work on it"))
        .next(format!("wait for it, or see 'icecore job show {holder}'"))
        .transient()
}
