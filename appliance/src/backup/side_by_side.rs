//! The disks of one point are read side by side, as many at a time as the memory carries.
//!
//! The first failure ends them all; nothing is left running when this returns.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use icecore_io_engine::{Pacing, Progress as Counted};
use icecore_repository::{PointWriter, Repository};
use tokio::sync::Mutex;

use super::disk::DiskResult;
use super::{Backup, Chosen, Request};
use crate::capture::Capture;
use crate::context::Context;
use crate::data::{Activity, SharedMemory};
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::progress::{Meter, Progress};

/// Disks that are read at one time. Two keep the processors busy while one waits for its device;
/// more help where disks lie on different devices, and each costs memory, connections and threads.
pub const DISKS_AT_ONCE: usize = 4;

/// How often an interruption is looked for while disks are read.
const INTERRUPT_POLL: Duration = Duration::from_millis(100);

/// What the disks of one point share while they are read.
pub(super) struct Reading<'a, C> {
    pub(super) context: &'a Context,
    pub(super) repository: &'a Repository,
    pub(super) request: &'a Request,
    pub(super) writer: Option<&'a PointWriter>,
    /// Opened for one disk at a time.
    pub(super) capture: Mutex<&'a mut C>,
    pub(super) activity: Activity,
    pub(super) pacing: Arc<Pacing>,
    pub(super) memory: SharedMemory,
    /// How far each disk is.
    pub(super) counted: Vec<Arc<Counted>>,
    pub(super) tried: String,
    interrupt: &'a Interrupt,
}

impl<C: Capture> Backup<'_, C> {
    /// Reads all disks; the results are in their order.
    pub(super) async fn read_disks(
        &mut self,
        chosen: &[Chosen],
        writer: Option<&PointWriter>,
    ) -> Outcome<Vec<DiskResult>> {
        let counted: Vec<Arc<Counted>> = chosen.iter().map(|_| Arc::default()).collect();
        let label = match chosen {
            [only] => format!("{} {}", self.request.vm, only.seen.id),
            _ => self.request.vm.to_string(),
        };
        let total = chosen.iter().map(|disk| disk.seen.size_bytes).sum();
        let meter = Meter::of_all(total, counted.clone());
        let _shown = Progress::show(label, meter, self.context);
        let reading = Reading {
            context: self.context,
            repository: self.repository,
            request: self.request,
            writer,
            tried: self.tried(),
            capture: Mutex::new(&mut *self.capture),
            activity: self.job.activity(),
            pacing: Arc::clone(&self.pacing),
            memory: SharedMemory::for_pipelines(
                self.context,
                self.repository,
                chosen.len().min(DISKS_AT_ONCE),
            ),
            counted,
            interrupt: self.interrupt,
        };
        reading.all(chosen).await
    }
}

impl<C: Capture> Reading<'_, C> {
    async fn all(&self, chosen: &[Chosen]) -> Outcome<Vec<DiskResult>> {
        let mut waiting = chosen.iter().enumerate();
        let mut under_way = FuturesUnordered::new();
        let mut results = Vec::with_capacity(chosen.len());
        let mut failure: Option<Failure> = None;
        loop {
            while failure.is_none()
                && under_way.len() < self.memory.pipelines()
                && let Some((at, disk)) = waiting.next()
            {
                under_way.push(async move { (at, self.disk(at, disk).await) });
            }
            let ended = tokio::select! {
                ended = under_way.next() => ended,
                () = tokio::time::sleep(INTERRUPT_POLL) => {
                    if self.interrupt.is_set() {
                        self.activity.stop.store(true, Ordering::Relaxed);
                    }
                    continue;
                }
            };
            match ended {
                None => break,
                Some((at, Ok(result))) => results.push((at, result)),
                Some((_, Err(first))) => {
                    self.activity.stop.store(true, Ordering::Relaxed);
                    // What the others say then is only that they were told to end.
                    failure.get_or_insert(first);
                }
            }
        }
        results.sort_by_key(|(at, _)| *at);
        failure.map_or_else(|| Ok(results.into_iter().map(|(_, result)| result).collect()), Err)
    }

    /// An error once the disks were told to end.
    pub(super) fn check(&self) -> Outcome<()> {
        if self.activity.stop.load(Ordering::Relaxed) {
            return Err(Failure::interrupted(&self.tried));
        }
        self.interrupt.check(&self.tried)
    }
}
