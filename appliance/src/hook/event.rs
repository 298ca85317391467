//! What an event means for what is known of a domain: pure.

use jiff::Timestamp;

use super::Known;
use super::register::DomainState;
use crate::libvirt::xml;

/// An event as libvirt tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub name: String,
    pub uuid: String,
    pub operation: String,
}

impl Event {
    /// Reads `NAME OPERATION SUBOPERATION EXTRA` and the domain's XML. `None` where it names no
    /// domain.
    pub fn read(words: &[String], text: &str) -> Option<Self> {
        let [name, operation, ..] = words else { return None };
        let uuid = xml::uuid(text)?;
        Some(Self { name: name.clone(), uuid, operation: operation.clone() })
    }

    /// The state that the domain is in after it; `None` where it says nothing about that.
    fn state(&self) -> Option<DomainState> {
        match self.operation.as_str() {
            "prepare" | "start" => Some(DomainState::Starting),
            "started" | "reconnect" | "attach" => Some(DomainState::Running),
            "migrate" | "restore" => Some(DomainState::Arriving),
            "stopped" => Some(DomainState::Stopped),
            "release" => Some(DomainState::Released),
            _ => None,
        }
    }
}

/// What is known after an event. A domain is told by its UUID: a new name keeps its history, and so
/// does a migration, after which the other host knows it by the same UUID.
pub fn follow(known: Option<Known>, event: Event, now: Timestamp) -> Known {
    let state = event.state();
    let first_seen = known.as_ref().map_or(now, |known| known.first_seen);
    let before = known.map_or(DomainState::Stopped, |known| known.state);
    Known {
        name: event.name,
        uuid: event.uuid,
        state: state.unwrap_or(before),
        last_event: event.operation,
        last_event_at: now,
        first_seen,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, operation: &str) -> Event {
        let words: Vec<String> =
            [name, operation, "begin", "-"].iter().map(ToString::to_string).collect();
        let xml = format!(
            "<domain><name>{name}</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid></domain>"
        );
        Event::read(&words, &xml).unwrap()
    }

    #[test]
    fn a_domain_is_followed_from_start_to_release() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let mut known = None;
        let steps = [
            ("prepare", DomainState::Starting),
            ("start", DomainState::Starting),
            ("started", DomainState::Running),
            ("reconnect", DomainState::Running),
            ("something-new", DomainState::Running),
            ("stopped", DomainState::Stopped),
            ("release", DomainState::Released),
        ];
        for (second, (operation, state)) in steps.into_iter().enumerate() {
            let now = at(i64::try_from(second).unwrap());
            let next = follow(known.take(), event("a", operation), now);
            assert_eq!((next.state, next.last_event_at), (state, now), "{operation}");
            known = Some(next);
        }
        let renamed = follow(known, event("b", "migrate"), at(9));
        assert_eq!((renamed.name.as_str(), renamed.state), ("b", DomainState::Arriving));
        assert_eq!(renamed.first_seen, at(0));
    }

    #[test]
    fn what_names_no_domain_is_no_event() {
        assert_eq!(Event::read(&["a".into()], "<domain><uuid>u</uuid></domain>"), None);
        assert_eq!(Event::read(&["a".into(), "start".into()], "nonsense"), None);
        let path = "<domain><uuid>../../etc/x</uuid></domain>";
        assert_eq!(Event::read(&["a".into(), "start".into()], path).map(|e| e.uuid), None);
    }
}
