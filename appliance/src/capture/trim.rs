//! Gives scratch space back while a disk is read: what lies in durable packs is trimmed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::nbd::{self, Peer, Questions};

/// Less than this is not worth a request.
const STEP_BYTES: u64 = 64 << 20;
/// One request names at most this much, so that none takes long.
const REQUEST_BYTES_MAX: u64 = 1 << 30;
/// How often it looks how far the packs are.
const INTERVAL: Duration = Duration::from_millis(250);

/// Trims an export from its beginning up to a moving mark.
#[derive(Debug)]
pub struct Trimmer {
    mark: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Trimmer {
    /// Begins where the export takes TRIM; elsewhere there is nothing to give back.
    pub async fn start(peer: &Peer) -> Option<Self> {
        let control = nbd::control(peer, None, "give scratch space back").await.ok()?;
        if control.export().read_only() {
            return None;
        }
        let mark = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(follow(control, Arc::clone(&mark), stopped));
        Some(Self { mark, stop: Some(stop), task })
    }

    /// Everything below this byte is durable elsewhere.
    pub fn mark(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.mark)
    }

    /// Ends the trimming and closes its connection.
    pub async fn stop(mut self) {
        self.stop.take();
        // A task that failed has said so; nothing depends on it.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Trimmer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(mut control: Questions, mark: Arc<AtomicU64>, mut stopped: oneshot::Receiver<()>) {
    let mut done = 0;
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let upto = mark.load(Ordering::Relaxed);
        while upto.saturating_sub(done) >= STEP_BYTES {
            let length = REQUEST_BYTES_MAX.min(upto - done);
            if let Err(error) = control.trim(done, length).await {
                tracing::info!("scratch space is not given back: {error}");
                return;
            }
            done += length;
        }
    }
    // The connection is closed either way.
    let _ = control.disconnect().await;
}
