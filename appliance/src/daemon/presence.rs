//! This daemon leaves word in its repositories that it is there, for the other hosts' service lists.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use icecore_repository::{ServiceId, ServiceRecord, ServiceState};
use jiff::Timestamp;

use super::supervisor::Supervisor;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::state::{State, replace_file};

/// From one beat to the next: a few small objects in each repository, and their fsyncs.
const BEAT: Duration = Duration::from_secs(300);
/// A repository that has not answered by then does not keep the daemon from ending.
const LEAVE_WAIT: Duration = Duration::from_secs(2);
/// In the daemon's part of the state directory.
const ID_FILE: &str = "service-id";

/// Beats for as long as the daemon runs.
pub async fn run(supervisor: Arc<Supervisor>) {
    loop {
        tell_all(&supervisor, ServiceState::Up).await;
        tokio::time::sleep(BEAT).await;
    }
}

/// Tells that the daemon was told to end, as far as that is quickly done.
pub async fn leave(supervisor: &Arc<Supervisor>) {
    let told = tell_all(supervisor, ServiceState::Stopped);
    // Who does not hear it sees that the beats have ended.
    let _ = tokio::time::timeout(LEAVE_WAIT, told).await;
}

/// One at a time, in their order: a beat that comes after the farewell would be believed.
static TELLING: Mutex<()> = Mutex::new(());

async fn tell_all(supervisor: &Arc<Supervisor>, state: ServiceState) {
    let settings = supervisor.settings();
    let tell = move || {
        let _telling = TELLING.lock().unwrap_or_else(PoisonError::into_inner);
        match record(&settings.context, state) {
            Ok(record) => tell(&settings.context, &record),
            Err(failure) => tracing::warn!("other hosts do not see this daemon: {failure}"),
        }
    };
    // A panic in there has been told of.
    let _ = tokio::task::spawn_blocking(tell).await;
}

fn tell(context: &Context, record: &ServiceRecord) {
    for name in context.config.repository.keys() {
        let told = context.open(name).and_then(|repository| {
            let tried = format!("tell {name} of this daemon");
            repository.tell_of_service(record).map_err(|e| Failure::from_repository(tried, e))
        });
        // One that is away, or that this host may only read, is no reason to worry here.
        if let Err(failure) = told {
            tracing::debug!("{failure}");
        }
    }
}

fn record(context: &Context, state: ServiceState) -> Outcome<ServiceRecord> {
    Ok(ServiceRecord {
        service: own_id(&context.state)?,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        version: env!("CARGO_PKG_VERSION").into(),
        state,
        at: Timestamp::now(),
        period_seconds: BEAT.as_secs(),
    })
}

/// The id that stays with the state directory.
fn own_id(state: &State) -> Outcome<ServiceId> {
    let path = state.dir("daemon")?.join(ID_FILE);
    let known = std::fs::read_to_string(&path).ok();
    if let Some(id) = known.and_then(|text| text.trim().parse().ok()) {
        return Ok(id);
    }
    let tried = format!("write {}", path.display());
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|e| Failure::failed(&tried, e))?;
    let id = ServiceId::from_random(u128::from_le_bytes(random));
    replace_file(&path, id.as_str().as_bytes()).map_err(|e| Failure::failed(tried, e))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_keeps_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        let id = own_id(&state).unwrap();
        assert_eq!(own_id(&state).unwrap(), id);
        std::fs::write(dir.path().join("daemon").join(ID_FILE), "../x").unwrap();
        assert_ne!(own_id(&state).unwrap(), id);
    }
}
