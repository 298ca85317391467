//! `icecore service`: the daemons that share a repository.

use icecore_repository::{ServiceRecord, ServiceState};
use jiff::Timestamp;
use serde::Serialize;

use crate::cli::OK;
use crate::cli::args::ServiceCommand;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Rows, age, when};

/// Beats that a daemon may miss: a repository is slow now and then, and clocks differ a little.
const BEATS_MISSED_MAX: u64 = 2;

/// How things stand with a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Standing {
    /// It has beaten lately.
    Up,
    /// It has not, and was not told to end.
    Down,
    /// It was told to end.
    Stopped,
}

#[derive(Debug, Serialize)]
struct ServiceRow {
    service: String,
    host: String,
    version: String,
    state: Standing,
    /// Its last word, by its own clock.
    last_seen_at: Timestamp,
    /// By this host's clock.
    last_seen_age_seconds: u64,
}

/// Runs `icecore service …`.
pub fn run(context: &Context, command: &ServiceCommand) -> Outcome<u8> {
    let ServiceCommand::List { repo } = command;
    let repository = context.open_read_only(repo)?;
    let services = repository.services();
    let services = services
        .map_err(|e| Failure::from_repository(format!("list the services of {repo}"), e))?;
    let now = Timestamp::now();
    let mut rows: Vec<ServiceRow> = services.iter().map(|one| row(one, now)).collect();
    rows.sort_by(|a, b| (&a.host, &a.service).cmp(&(&b.host, &b.service)));
    if context.json {
        output::json(&rows)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["host", "state", "version", "last seen", "ago", "service"]);
    for row in rows {
        let state = format!("{:?}", row.state).to_lowercase();
        let seen = (when(row.last_seen_at), age(row.last_seen_age_seconds));
        table.add(vec![row.host, state, row.version, seen.0, seen.1, row.service]);
    }
    table.print("no daemon has this repository in its configuration")?;
    Ok(OK)
}

fn row(service: &ServiceRecord, now: Timestamp) -> ServiceRow {
    ServiceRow {
        service: service.service.to_string(),
        host: service.host.clone(),
        version: service.version.clone(),
        state: standing(service, now),
        last_seen_at: service.at,
        last_seen_age_seconds: silence(service, now),
    }
}

/// Seconds since its last word. A clock that is ahead of ours is as good as none.
fn silence(service: &ServiceRecord, now: Timestamp) -> u64 {
    u64::try_from(now.as_second().saturating_sub(service.at.as_second())).unwrap_or(0)
}

fn standing(service: &ServiceRecord, now: Timestamp) -> Standing {
    let patience = service.period_seconds.saturating_mul(BEATS_MISSED_MAX + 1);
    match service.state {
        ServiceState::Stopped => Standing::Stopped,
        ServiceState::Up if silence(service, now) <= patience => Standing::Up,
        ServiceState::Up => Standing::Down,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_down_when_it_missed_more_than_two_beats() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut service = ServiceRecord {
            service: icecore_repository::ServiceId::from_random(1),
            host: "a".into(),
            version: "1".into(),
            state: ServiceState::Up,
            at: at(1000),
            period_seconds: 300,
        };
        assert_eq!(standing(&service, at(1900)), Standing::Up);
        assert_eq!(standing(&service, at(1901)), Standing::Down);
        assert_eq!(standing(&service, at(0)), Standing::Up, "its clock is ahead");
        service.state = ServiceState::Stopped;
        assert_eq!(standing(&service, at(1001)), Standing::Stopped);
        service.period_seconds = u64::MAX;
        assert_eq!(row(&service, at(5000)).last_seen_age_seconds, 4000);
    }
}
