//! Freezing and thawing a guest, as machines without IO or clock.
//!
//! A freeze has a deadline that lies outside the call, because the call itself can block for
//! hours in the guest. Once a freeze was *sent*, a thaw is owed until the agent itself says
//! "thawed"; before that nothing is owed, so that a guest without a working agent costs nothing.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest wait for the agent to come into step before a freeze is tried at all.
pub const SYNC_WAIT: Duration = Duration::from_secs(2);

/// Longest wait for one thaw or status. A thaw takes 15-64 ms; a slow guest a second.
pub const THAW_WAIT: Duration = Duration::from_secs(3);

/// First and longest pause between two attempts to thaw.
pub const THAW_PAUSE_FIRST: Duration = Duration::from_millis(50);
/// See [`THAW_PAUSE_FIRST`].
pub const THAW_PAUSE_LONGEST: Duration = Duration::from_secs(2);

/// What a driver does next, and then reports as an [`Event`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Ask for the freeze status, resynchronising first, for so long.
    Status(Duration),
    /// Freeze, for so long.
    Freeze(Duration),
    /// Thaw over a fresh connection where there can be one, for so long.
    Thaw(Duration),
    /// Wait for so long.
    Wait(Duration),
}

/// What came of an [`Action`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The status is "frozen".
    IsFrozen,
    /// The status is "thawed".
    IsThawed,
    /// A freeze returned, with this number of filesystems.
    Froze(u64),
    /// A thaw returned.
    Thawed,
    /// A pause is over.
    Waited,
    /// The agent refused, with these words.
    Refused(String),
    /// No answer in time, or the connection ended: what was asked may still happen.
    Silent(String),
}

/// Whether a thaw is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owed {
    /// No freeze of ours was sent, or it is known to be undone.
    Nothing,
    /// A freeze of ours was sent.
    Thaw,
}

/// How an attempt to freeze ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frozen {
    /// So many filesystems are frozen.
    Yes(u64),
    /// None is, as far as is known.
    No {
        /// Why not.
        why: String,
        /// Whether a thaw has to follow all the same.
        owed: Owed,
    },
}

/// Freezes a guest, once.
#[derive(Debug)]
pub struct Freezer {
    deadline: Duration,
    sent: bool,
}

impl Freezer {
    /// `deadline`: how long the freeze may take, the asking included.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline, sent: false }
    }

    /// The first action: nothing is frozen while the agent's state is unknown.
    pub fn start(&self) -> Action {
        Action::Status(SYNC_WAIT.min(self.deadline))
    }

    /// `elapsed` since the start. Gives the next action or the end.
    pub fn handle(&mut self, event: Event, elapsed: Duration) -> Result<Action, Frozen> {
        let owed = if self.sent { Owed::Thaw } else { Owed::Nothing };
        let no = |why: String| Err(Frozen::No { why, owed });
        match event {
            Event::IsThawed if !self.sent => match self.deadline.checked_sub(elapsed) {
                Some(left) if !left.is_zero() => {
                    self.sent = true;
                    Ok(Action::Freeze(left))
                }
                _ => no("the freeze deadline passed before the agent answered".into()),
            },
            Event::IsFrozen if !self.sent => no("the guest is frozen already, not by us".into()),
            Event::Froze(0) => no("the guest has no filesystem that can be frozen".into()),
            Event::Froze(count) if elapsed <= self.deadline => Err(Frozen::Yes(count)),
            Event::Froze(_) => no("the freeze came after its deadline".into()),
            Event::Refused(why) | Event::Silent(why) => no(why),
            other => no(format!("the guest agent gave an unexpected answer: {other:?}")),
        }
    }
}

/// Thaws a guest for as long as it takes.
#[derive(Debug)]
pub struct Thawer {
    pause: Duration,
}

impl Default for Thawer {
    fn default() -> Self {
        Self { pause: THAW_PAUSE_FIRST }
    }
}

impl Thawer {
    /// The first action: thaw at once, ask afterwards.
    pub fn start(&self) -> Action {
        Action::Thaw(THAW_WAIT)
    }

    /// The next action; `None` once the agent has said "thawed".
    pub fn handle(&mut self, event: &Event) -> Option<Action> {
        match event {
            Event::IsThawed => None,
            // An answer proves nothing: it may be the late one of an earlier call.
            Event::Thawed | Event::Refused(_) => Some(Action::Status(THAW_WAIT)),
            Event::Waited => Some(Action::Thaw(THAW_WAIT)),
            Event::IsFrozen | Event::Froze(_) | Event::Silent(_) => {
                let pause = self.pause;
                self.pause = (pause * 2).min(THAW_PAUSE_LONGEST);
                Some(Action::Wait(pause))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEADLINE: Duration = Duration::from_secs(5);

    fn events() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::IsFrozen),
            Just(Event::IsThawed),
            (0..3u64).prop_map(Event::Froze),
            Just(Event::Thawed),
            Just(Event::Waited),
            Just(Event::Refused("no".into())),
            Just(Event::Silent("late".into())),
        ]
    }

    #[test]
    fn freezes_after_the_agent_answered() {
        let mut freezer = Freezer::new(DEADLINE);
        assert_eq!(freezer.start(), Action::Status(SYNC_WAIT));
        let second = Duration::from_secs(1);
        let next = freezer.handle(Event::IsThawed, second);
        assert_eq!(next, Ok(Action::Freeze(DEADLINE - second)));
        assert_eq!(freezer.handle(Event::Froze(2), second * 2), Err(Frozen::Yes(2)));
    }

    #[test]
    fn a_silent_agent_costs_no_thaw_and_a_silent_freeze_does() {
        let silent = || Event::Silent("x".into());
        let end = Freezer::new(DEADLINE).handle(silent(), SYNC_WAIT);
        assert_eq!(end, Err(Frozen::No { why: "x".into(), owed: Owed::Nothing }));
        let mut freezer = Freezer::new(DEADLINE);
        freezer.handle(Event::IsThawed, Duration::ZERO).expect("freeze");
        let end = freezer.handle(silent(), DEADLINE);
        assert_eq!(end, Err(Frozen::No { why: "x".into(), owed: Owed::Thaw }));
    }

    #[test]
    fn what_another_froze_is_not_ours_to_thaw() {
        let end = Freezer::new(DEADLINE).handle(Event::IsFrozen, Duration::ZERO);
        assert!(matches!(end, Err(Frozen::No { owed: Owed::Nothing, .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Whatever the agent says: a sent freeze is either reported or owed a thaw, and no
        /// action outlasts the deadline.
        #[test]
        fn a_sent_freeze_is_never_forgotten(
            script in proptest::collection::vec((events(), 0..7000u64), 1..6)
        ) {
            let mut freezer = Freezer::new(DEADLINE);
            let mut sent = false;
            for (event, millis) in script {
                match freezer.handle(event, Duration::from_millis(millis)) {
                    Ok(Action::Freeze(within)) => {
                        prop_assert!(!sent && within <= DEADLINE);
                        sent = true;
                    }
                    Ok(other) => prop_assert!(false, "unexpected {other:?}"),
                    Err(Frozen::Yes(count)) => { prop_assert!(count > 0); break }
                    Err(Frozen::No { owed, .. }) => {
                        prop_assert_eq!(owed == Owed::Thaw, sent);
                        break;
                    }
                }
            }
        }

        /// Nothing but the status "thawed" ends a thaw, and the pauses are bounded.
        #[test]
        fn only_the_status_ends_a_thaw(script in proptest::collection::vec(events(), 0..40)) {
            let mut thawer = Thawer::default();
            for event in script {
                match thawer.handle(&event) {
                    None => prop_assert_eq!(event, Event::IsThawed),
                    Some(Action::Wait(pause)) => prop_assert!(pause <= THAW_PAUSE_LONGEST),
                    Some(action) => {
                        prop_assert!(matches!(action, Action::Thaw(_) | Action::Status(_)));
                    }
                }
            }
        }
    }
}
