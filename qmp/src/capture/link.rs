//! Both connections to one QEMU, and what is done over them one command at a time.

use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::agent_channel::AgentChannel;
use super::call::Call;
use super::observe::{Observed, QUERY_WAIT, SeenJob, seen_jobs};
use crate::errors::QmpError;
use crate::features::Features;
use crate::freeze::{Frozen, Owed};
use crate::monitor::Monitor;
use crate::place::Place;

/// Longest wait for one command that changes something. Some of them drain, and a drain waits for
/// the requests under way; a guest that is not ready after this is one we leave alone.
pub const CALL_WAIT: Duration = Duration::from_secs(5);

/// Longest wait for a greeting.
pub const CONNECT_WAIT: Duration = Duration::from_secs(5);

/// The monitor and, where there is one, the guest agent of a QEMU.
#[derive(Debug)]
pub struct Link {
    place: Place,
    monitor: Monitor,
    /// What the QEMU behind `monitor` can do, once that is known.
    features: Option<Features>,
    agent: Channel,
    has_agent: bool,
}

/// The agent's channel has one user at a time.
#[derive(Debug)]
enum Channel {
    Here(AgentChannel),
    Thawing(JoinHandle<AgentChannel>),
}

impl Default for Channel {
    fn default() -> Self {
        Self::Here(AgentChannel::default())
    }
}

impl Link {
    /// Connects to the monitor; the agent is connected to when it is needed.
    pub async fn connect(place: Place, agent: Option<Place>) -> Result<Self, QmpError> {
        let monitor = Monitor::reach(&place, CONNECT_WAIT).await?;
        let has_agent = agent.is_some();
        let agent = Channel::Here(AgentChannel::new(agent));
        Ok(Self { place, monitor, features: None, agent, has_agent })
    }

    /// What this QEMU can do; asked once a connection.
    pub async fn features(&mut self) -> Result<Features, QmpError> {
        let features = match self.features.take() {
            Some(known) => known,
            None => Features::query(&self.monitor, QUERY_WAIT).await?,
        };
        Ok(self.features.insert(features).clone())
    }

    /// This very QEMU was asked before; of another version nothing is believed.
    pub fn know(&mut self, features: Features) {
        self.features = Some(features).filter(|known| known.version == self.monitor.version());
    }

    /// The monitor.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// There is an agent's channel.
    pub fn has_agent(&self) -> bool {
        self.has_agent
    }

    /// QEMU has closed the monitor; it is connected again if QEMU still lives.
    pub async fn revive(&mut self) -> Result<(), QmpError> {
        if self.monitor.ended().is_some() {
            self.monitor = Monitor::reach(&self.place, CONNECT_WAIT).await?;
            // It may be another QEMU now.
            self.features = None;
        }
        Ok(())
    }

    /// Gives a device another node. The two must be in one context, or QEMU aborts: where the
    /// device's iothread serves `from`, a pin (an export of that name, for nobody) brings `to`
    /// there first. A device whose guest has not started its driver is not in its iothread yet,
    /// and then `from` cannot be pinned.
    pub async fn move_device(
        &self,
        qom_path: &str,
        (from, to): (&str, &str),
        iothread: Option<&str>,
        pin: &str,
    ) -> Result<(), QmpError> {
        let Some(iothread) = iothread else {
            return self.call(&Call::set_drive(qom_path, to), CALL_WAIT).await.map(drop);
        };
        let probed = self.call(&Call::add_pin(pin, from, iothread), CALL_WAIT).await;
        match probed {
            Ok(_) => {
                self.call(&Call::remove_export(pin), CALL_WAIT).await?;
                self.call(&Call::add_pin(pin, to, iothread), CALL_WAIT).await?;
                let moved = self.call(&Call::set_drive(qom_path, to), CALL_WAIT).await;
                self.call(&Call::remove_export(pin), CALL_WAIT).await?;
                moved.map(drop)
            }
            Err(QmpError::Refused { .. }) => {
                self.call(&Call::set_drive(qom_path, to), CALL_WAIT).await.map(drop)
            }
            Err(error) => Err(error),
        }
    }

    /// Runs a command.
    pub async fn call(&self, call: &Call, wait: Duration) -> Result<Value, QmpError> {
        tracing::debug!(command = call.name, arguments = %call.arguments, "to QEMU");
        self.monitor.execute_raw(call.name, call.arguments.clone(), wait).await
    }

    /// What of ours is seen.
    pub async fn observe(&self) -> Result<Observed, QmpError> {
        Observed::query(&self.monitor).await
    }

    /// One job, `None` when there is none of that id.
    pub async fn job(&self, id: &str) -> Result<Option<SeenJob>, QmpError> {
        let jobs = seen_jobs(&self.monitor).await?;
        Ok(jobs.into_iter().find(|job| job.id == id))
    }

    /// Freezes the guest within `deadline`, or says why not and what is owed.
    pub async fn freeze(&mut self, deadline: Duration) -> Frozen {
        match &mut self.agent {
            Channel::Here(agent) => agent.freeze(deadline).await,
            Channel::Thawing(_) => {
                let why = "an earlier freeze is not known to have ended".to_owned();
                Frozen::No { why, owed: Owed::Thaw }
            }
        }
    }

    /// Thaws the guest; whether the agent has said "thawed" within `patience`. If not, trying
    /// goes on beside whatever is done next.
    pub async fn thaw(&mut self, patience: Duration) -> bool {
        let mut thawing = match std::mem::take(&mut self.agent) {
            Channel::Here(agent) => tokio::spawn(agent.thaw()),
            Channel::Thawing(thawing) => thawing,
        };
        match timeout(patience, &mut thawing).await {
            Ok(agent) => {
                self.agent = Channel::Here(agent.unwrap_or_default());
                true
            }
            Err(_) => {
                self.agent = Channel::Thawing(thawing);
                false
            }
        }
    }
}
