//! Ctrl-C and its kin: noted once, seen by every loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::failure::{Failure, Outcome};

/// How soon an interrupt is noticed by what does not look by itself.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Set when the user wants the command to end.
#[derive(Debug, Clone)]
pub struct Interrupt {
    flag: Arc<AtomicBool>,
}

/// Lets a write past RLIMIT_FSIZE fail with an error instead of ending the process by a signal.
pub fn survive_file_size_limit() -> Outcome<()> {
    let kind = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    // Having asked for it once is enough; nobody needs to be told.
    signal(kind).map(drop).map_err(|e| Failure::failed("listen for signals", e))
}

impl Interrupt {
    /// Listens for SIGINT, SIGTERM and SIGHUP from now on.
    pub fn listen() -> Outcome<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            let mut stream = signal(kind).map_err(|e| Failure::failed("listen for signals", e))?;
            let flag = Arc::clone(&flag);
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    flag.store(true, Ordering::Relaxed);
                }
            });
        }
        Ok(Self { flag })
    }

    /// The flag, for the data plane.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.flag)
    }

    /// Whether it was asked to end.
    pub fn is_set(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// Returns when it was asked to end.
    pub async fn wait(&self) {
        while !self.is_set() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Runs `work` in a thread of its own and leaves it behind when it is asked to end: only for
    /// what may be cut off anywhere, in a process that ends right afterwards.
    pub async fn race<T: Send + 'static>(
        &self,
        tried: &str,
        work: impl FnOnce() -> Outcome<T> + Send + 'static,
    ) -> Outcome<T> {
        let (send, mut done) = tokio::sync::oneshot::channel();
        std::thread::Builder::new()
            .name("work".into())
            // Nobody listens any more after an interrupt.
            .spawn(move || drop(send.send(work())))
            .map_err(|e| Failure::failed(tried, e))?;
        loop {
            tokio::select! {
                ended = &mut done => {
                    return ended.unwrap_or_else(|_| Err(Failure::failed(tried, "it panicked")));
                }
                () = tokio::time::sleep(LOOK_INTERVAL) => self.check(tried)?,
            }
        }
    }

    /// An error once it was asked to end.
    pub fn check(&self, tried: &str) -> Outcome<()> {
        if self.is_set() { Err(Failure::interrupted(tried)) } else { Ok(()) }
    }
}
