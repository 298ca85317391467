//! Runs the freeze and thaw machines over a guest agent's channel.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::agent::{Agent, FreezeStatus};
use crate::errors::QmpError;
use crate::freeze::{Action, Event, Freezer, Frozen, Thawer};
use crate::place::Place;

/// A guest agent's channel, connected to when it is needed.
#[derive(Debug, Default)]
pub(super) struct AgentChannel {
    place: Option<Place>,
    agent: Option<Agent>,
}

impl AgentChannel {
    pub(super) fn new(place: Option<Place>) -> Self {
        Self { place, agent: None }
    }

    /// Freezes the guest within `deadline`, or says why not and what is owed.
    pub(super) async fn freeze(&mut self, deadline: Duration) -> Frozen {
        let started = Instant::now();
        let mut freezer = Freezer::new(deadline);
        let mut action = freezer.start();
        loop {
            let event = self.act(action).await;
            match freezer.handle(event, started.elapsed()) {
                Ok(next) => action = next,
                Err(end) => return end,
            }
        }
    }

    /// Thaws the guest, however long it takes, and gives the channel back.
    pub(super) async fn thaw(mut self) -> Self {
        let mut thawer = Thawer::default();
        let mut action = thawer.start();
        loop {
            let event = self.act(action).await;
            match thawer.handle(&event) {
                None => return self,
                Some(next) => action = next,
            }
        }
    }

    async fn act(&mut self, action: Action) -> Event {
        let (wait, done) = match action {
            Action::Wait(pause) => {
                sleep(pause).await;
                return Event::Waited;
            }
            Action::Status(wait) | Action::Freeze(wait) | Action::Thaw(wait) => {
                (wait, self.ask(action, wait).await)
            }
        };
        match done {
            Ok(event) => event,
            Err(QmpError::Refused { desc, .. }) => Event::Refused(desc),
            Err(error) => {
                tracing::debug!(?action, ?wait, %error, "no answer from the guest agent");
                // The second path: a new connection begins in step.
                self.agent = None;
                Event::Silent(error.to_string())
            }
        }
    }

    async fn ask(&mut self, action: Action, wait: Duration) -> Result<Event, QmpError> {
        let until = Instant::now() + wait;
        let agent = self.connected(wait).await?;
        let left = until.saturating_duration_since(Instant::now());
        Ok(match action {
            Action::Freeze(_) => Event::Froze(agent.freeze(left).await?),
            Action::Thaw(_) => agent.thaw(left).await.map(|_| Event::Thawed)?,
            Action::Status(_) | Action::Wait(_) => match agent.freeze_status(left).await? {
                FreezeStatus::Frozen => Event::IsFrozen,
                FreezeStatus::Thawed => Event::IsThawed,
            },
        })
    }

    async fn connected(&mut self, wait: Duration) -> Result<&mut Agent, QmpError> {
        if self.agent.is_none() {
            let none = || QmpError::AgentSilent { path: "(none)".into(), waited: Duration::ZERO };
            let place = self.place.as_ref().ok_or_else(none)?;
            self.agent = Some(Agent::reach(place, wait).await?);
        }
        let closed = || QmpError::AgentSilent { path: "(none)".into(), waited: wait };
        self.agent.as_mut().ok_or_else(closed)
    }
}
