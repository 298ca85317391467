//! The data plane as commands use it: its options, its threads, its figures.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use icecore_io_engine::{Budget, EngineError, Options};
use icecore_repository::Repository;

use crate::context::Context;
use crate::report::Latency;

/// What the rest of the process takes beside the data plane: code, stacks, the repository's caches.
pub const OVERHEAD_BYTES: u64 = 24 << 20;
/// What a server's connections, TLS and packs that wait take beside (measured).
pub const SERVER_OVERHEAD_BYTES: u64 = 20 << 20;
/// Requests in flight: more gains nothing (measured, as is the next).
const IN_FLIGHT_BYTES: u64 = 12 << 20;
/// What one worker has in hand: a request's blocks and what became of them.
const WORKER_BYTES: u64 = 2 << 20;
/// A pipeline never has more than this, however many processors there are.
const PIPELINE_BYTES_MAX: u64 = 64 << 20;

/// Whether data are being moved, and the sign of life of the threads that move them.
#[derive(Debug, Clone, Default)]
pub struct Activity {
    /// Raised by each data thread whenever it wakes.
    pub pulse: Arc<AtomicU64>,
    /// Set to end all data threads of the run.
    pub stop: Arc<AtomicBool>,
    running: Arc<AtomicUsize>,
}

impl Activity {
    /// Whether a run of the data plane is under way.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed) > 0
    }
}

/// Counts a run of the data plane for as long as it lasts.
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Options of one run of the data plane on a repository within the process's memory, ended by
/// `cancel`.
pub fn options(context: &Context, repository: &Repository, cancel: &Arc<AtomicBool>) -> Options {
    SharedMemory::for_pipelines(context, repository, 1).options(cancel)
}

/// The least that a pipeline gets: a few requests under way, a few being compressed.
const PIPELINE_BYTES_MIN: u64 = 8 << 20;
/// All pipelines of a run together: beyond two that have all they can use, memory only lies there.
const PIPELINES_FULL: u64 = 2;

/// What one pipeline can use on this machine.
fn pipeline_bytes() -> u64 {
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    IN_FLIGHT_BYTES.saturating_add(WORKER_BYTES.saturating_mul(workers)).min(PIPELINE_BYTES_MAX)
}

/// The process's memory for data, shared by pipelines that run side by side.
#[derive(Debug)]
pub struct SharedMemory {
    budget: Arc<Budget>,
    pipelines: usize,
}

impl SharedMemory {
    /// For so many pipelines, or as many of them as `--memory` carries; at least one.
    pub fn for_pipelines(context: &Context, repository: &Repository, wanted: usize) -> Self {
        let beside = match repository.transfer_bytes() {
            0 => OVERHEAD_BYTES,
            transfer => OVERHEAD_BYTES + SERVER_OVERHEAD_BYTES + transfer,
        };
        let usable = pipeline_bytes();
        let all = context.memory.saturating_sub(beside).min(PIPELINES_FULL * usable);
        let carried = usize::try_from(all / PIPELINE_BYTES_MIN).unwrap_or(usize::MAX);
        let pipelines = wanted.min(carried).max(1);
        Self { budget: Budget::new(all.min(usable * pipelines as u64)), pipelines }
    }

    /// How many pipelines may run at one time.
    pub fn pipelines(&self) -> usize {
        self.pipelines
    }

    /// Options of one of the pipelines, ended by `cancel`.
    pub fn options(&self, cancel: &Arc<AtomicBool>) -> Options {
        let share = self.budget.total() / self.pipelines as u64;
        let mut options = Options::new(Arc::clone(&self.budget), share);
        options.control.cancel = Arc::clone(cancel);
        options
    }
}

/// As [`blocking`], on connections whose guardian watches the pulse of the data threads.
pub async fn watched<T: Send + 'static>(
    activity: &Activity,
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    activity.running.fetch_add(1, Ordering::Relaxed);
    let running = Running(Arc::clone(&activity.running));
    blocking(move || {
        let _running = running;
        work()
    })
    .await
}

/// Runs the data plane in a thread of its own, so that signals are heard.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panicked) => Err(EngineError::Lanes(format!("the data plane failed: {panicked}"))),
    }
}

/// Percentiles for a report.
pub fn latency(measured: &icecore_io_engine::Latency) -> Latency {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    Latency { p50: ms(measured.p50()), p99: ms(measured.p99()), max: ms(measured.max()) }
}
