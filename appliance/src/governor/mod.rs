//! Protects a running guest from its own backup.
//!
//! [`core`] decides; this module asks QEMU for the guest's counters through the guardian and sets
//! the pace of the data plane, which holds requests back and never a reply.

mod core;
#[cfg(test)]
mod simulation;
mod window;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use icecore_io_engine::{Pace, Pacing};
use icecore_qmp::guardian::GuardianClient;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use utoipa::ToSchema;

use self::core::{Governor, Order};
use self::window::Window;
use crate::failure::Failure;

/// How often the guest is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// While the guest cannot be seen nobody knows how it fares, so the pace is the least. It is never a
/// pause: that QEMU is gone only a request finds out.
const UNSEEN: Pace = Pace {
    bytes_per_second: Some(core::RATE_MIN),
    in_flight: 1,
    request_bytes: core::REQUEST_BYTES,
};
/// Longest wait for an answer of the guardian, which waits 500 ms for QEMU's. A guest that is not
/// seen in time is looked at again.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// A way to the counters of a running guest.
#[derive(Debug, Clone)]
pub struct Guest {
    guardian: GuardianClient,
    /// As early in the run as could be: until the instant the guest is seen without a backup.
    first: Option<Window>,
}

impl Guest {
    /// Looks at the guest behind `guardian` for the first time.
    pub async fn meet(guardian: GuardianClient) -> Self {
        let mut guest = Self { guardian, first: None };
        guest.first = guest.counted().await;
        guest
    }

    async fn counted(&self) -> Option<Window> {
        match tokio::time::timeout(ANSWER_WAIT, self.guardian.guest_io()).await {
            Ok(Ok(devices)) => Some(Window::total(&devices)),
            Ok(Err(error)) => {
                tracing::debug!(%error, "the guest's counters are not known now");
                None
            }
            Err(_) => None,
        }
    }
}

/// What a governor did, in a backup's report.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GovernorReport {
    /// Mean latency of the guest's requests before the instant; none of an idle guest.
    pub baseline_latency_ms: Option<f64>,
    /// The worst mean while data were read.
    pub worst_latency_ms: f64,
    /// How long the backup was held back.
    pub slowed_seconds: f64,
    /// The least rate that was set, in bytes per second; none without any limit.
    pub least_rate_bytes: Option<u64>,
}

/// How a guest fares beside its backup at this moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestNow {
    /// Mean latency of the guest's requests before the instant; none of an idle guest.
    pub baseline_latency_ms: Option<f64>,
    /// The last mean while data are read; none of an idle guest.
    pub latency_ms: Option<f64>,
    /// The rate that is set for the guest's sake, in bytes per second; none without any limit.
    pub rate_limit_bytes: Option<u64>,
}

/// A look at the guest for whoever shows progress.
#[derive(Debug, Clone, Default)]
pub struct GuestView(Arc<Mutex<Shared>>);

impl GuestView {
    /// How the guest fares; none while no data are read.
    pub fn now(&self) -> Option<GuestNow> {
        let shared = locked(&self.0);
        let governor = shared.governor.as_ref()?;
        let figures = governor.figures();
        Some(GuestNow {
            baseline_latency_ms: figures.baseline_latency_ms,
            latency_ms: figures.latest_latency_ms,
            rate_limit_bytes: governor.pace().bytes_per_second,
        })
    }
}

/// The governor of one run. Without a guest to be seen it does nothing.
#[derive(Debug)]
pub struct Watch {
    guest: Option<Guest>,
    pacing: Arc<Pacing>,
    before: Window,
    shared: Arc<Mutex<Shared>>,
    task: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    governor: Option<Governor>,
    gave_up: Option<String>,
}

impl Watch {
    /// Watches `guest` and sets `pacing`.
    pub fn new(guest: Option<Guest>, pacing: &Arc<Pacing>) -> Self {
        Self {
            guest,
            pacing: Arc::clone(pacing),
            before: Window::default(),
            shared: Arc::default(),
            task: None,
        }
    }

    /// For whoever shows how the guest fares.
    pub fn view(&self) -> GuestView {
        GuestView(Arc::clone(&self.shared))
    }

    /// To be called right before the instant is taken: so far the guest was alone.
    pub async fn before_instant(&mut self) {
        let Some(guest) = &self.guest else { return };
        if let (Some(first), Some(now)) = (&guest.first, guest.counted().await) {
            self.before = now.since(first);
        }
    }

    /// To be called right before data are read.
    pub fn begin(&mut self) {
        let Some(guest) = self.guest.clone() else { return };
        let governor = Governor::new(Duration::ZERO, &self.before);
        self.pacing.govern(governor.pace());
        locked(&self.shared).governor = Some(governor);
        let (pacing, shared) = (Arc::clone(&self.pacing), Arc::clone(&self.shared));
        self.task = Some(tokio::spawn(govern(guest, pacing, shared)));
    }

    /// To be called when no more data are read.
    pub fn end(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    /// What it did; none where there was no guest to be seen.
    pub fn report(&self) -> Option<GovernorReport> {
        let shared = locked(&self.shared);
        let figures = shared.governor.as_ref()?.figures();
        Some(GovernorReport {
            baseline_latency_ms: figures.baseline_latency_ms,
            worst_latency_ms: figures.worst_latency_ms,
            slowed_seconds: figures.slowed.as_secs_f64(),
            least_rate_bytes: figures.least_rate_bytes,
        })
    }

    /// A failure of the reading, which may be this governor's doing.
    pub fn explained(&self, failure: Failure) -> Failure {
        match &locked(&self.shared).gave_up {
            Some(why) => {
                Failure { unclean: failure.unclean, ..Failure::failed(failure.tried, why) }.next(
                    "take the point when the guest has less to do, put scratch and repository on \
                     another disk than the guest's, or decline this care with --governor off",
                )
            }
            None => failure,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

fn locked(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at the guest again and again and sets the pace, until the backup is given up.
async fn govern(guest: Guest, pacing: Arc<Pacing>, shared: Arc<Mutex<Shared>>) {
    let started = Instant::now();
    let mut pace = None;
    loop {
        let order = match guest.counted().await {
            None => Order::Pace(UNSEEN),
            Some(counted) => match &mut locked(&shared).governor {
                Some(governor) => governor.look(started.elapsed(), counted, pacing.asked_bytes()),
                None => return,
            },
        };
        match order {
            Order::Pace(now) if pace != Some(now) => {
                tracing::info!(
                    bytes_per_second = now.bytes_per_second,
                    in_flight = now.in_flight,
                    "pace for the guest's sake"
                );
                pacing.govern(now);
                pace = Some(now);
            }
            Order::Pace(_) => {}
            Order::GiveUp(why) => {
                locked(&shared).gave_up = Some(why);
                pacing.close();
                return;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
