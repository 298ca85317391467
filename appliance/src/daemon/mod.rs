//! `icecore serve`: the daemon of a host.
//!
//! It queues jobs and starts each as a process of its own, the same binary with the same flags as
//! typed by hand. So one job's crash, memory or stall harms no other, and the daemon may end, crash
//! or be replaced while jobs run: they go on, and the next daemon adopts them by their records.

pub mod access;
mod api;
pub mod client;
mod metrics;
mod presence;
mod queue;
pub mod request;
mod retry;
mod schedule;
mod settings;
mod supervisor;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::args::Global;
use crate::config::ApiConfig;
use crate::failure::{Failure, Outcome};
use crate::state::State;
use crate::state::locks::Lock;
pub use api::Health;
use metrics::Seen;
use settings::Settings;
use supervisor::Supervisor;

/// How often repositories are looked at for the metrics.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// At least so long between two looks, however many jobs end: each lists every repository.
const LOOK_PAUSE: Duration = Duration::from_secs(5);

/// Runs the daemon until it is told to end.
pub async fn serve(global: &Global) -> Outcome<()> {
    let tried = "start the daemon";
    let mut signals = Signals::listen(tried)?;
    let state = State::new(&global.state_dir);
    let Some(_lock) = Lock::of_daemon(&state, tried)? else {
        let why = format!("one runs with the state directory {}", state.root().display());
        return Err(Failure::refused(tried, why).next("one daemon a host is enough"));
    };
    let settings = Settings::load(global, 0)?;
    let supervisor = Supervisor::new(global.clone(), settings);
    supervisor.adopt().await;
    listen(&supervisor).await?;
    tokio::spawn(Arc::clone(&supervisor).run());
    tokio::spawn(schedule::run(Arc::clone(&supervisor)));
    tokio::spawn(look_at_repositories(Arc::clone(&supervisor)));
    let beating = tokio::spawn(presence::run(Arc::clone(&supervisor)));
    tell(&[NotifyState::Ready]);
    signals.obey(&supervisor).await;
    tell(&[NotifyState::Stopping]);
    supervisor.stop();
    // The socket goes at once, so that clients see that nobody listens.
    let _ = std::fs::remove_file(&supervisor.settings().context.config.api.socket);
    beating.abort();
    presence::leave(&supervisor).await;
    Ok(())
}

/// Binds what the configuration names and serves it from now on.
async fn listen(supervisor: &Arc<Supervisor>) -> Outcome<()> {
    let settings = supervisor.settings();
    let api = &settings.context.config.api;
    let router = api::router(Arc::clone(supervisor));
    let group = settings.access.group().map(|group| group.gid);
    let unix = api::listen::bind_unix(&api.socket, group).await?;
    tracing::info!(socket = %api.socket.display(), "listening");
    tokio::spawn(api::listen::serve_unix(unix, router.clone(), Arc::clone(supervisor)));
    let Some(address) = &api.listen else { return Ok(()) };
    let address = address.to_string();
    let tried = format!("listen on {address}");
    let Some(tls) = &api.tls else {
        return Err(Failure::usage(tried, "[api] listen needs tls: certificate and key"));
    };
    if !settings.access.has_tokens() {
        return Err(Failure::usage(tried, "nobody could come in: there is no token")
            .next("add [api.tokens.NAME] with a role and a file"));
    }
    let tls = crate::tls::acceptor(&tls.certificate, &tls.key)?;
    let tcp = TcpListener::bind(&address).await.map_err(|e| Failure::failed(&tried, e))?;
    tracing::info!(address, "listening");
    tokio::spawn(api::listen::serve_tcp(tcp, tls, router));
    Ok(())
}

/// Keeps what metrics say of repositories fresh. One that hangs only makes them old.
async fn look_at_repositories(supervisor: Arc<Supervisor>) {
    loop {
        let settings = supervisor.settings();
        let look = tokio::task::spawn_blocking(move || Seen::look(&settings.context));
        if let Ok(seen) = look.await {
            supervisor.metrics.seen(seen);
        }
        tokio::time::sleep(LOOK_PAUSE).await;
        tokio::select! {
            () = supervisor.metrics.stale.notified() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}

struct Signals {
    end: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    reload: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen(tried: &str) -> Outcome<Self> {
        let stream = |kind| signal(kind).map_err(|e| Failure::failed(tried, e));
        Ok(Self {
            end: stream(SignalKind::terminate())?,
            interrupt: stream(SignalKind::interrupt())?,
            reload: stream(SignalKind::hangup())?,
        })
    }

    /// Returns when the daemon has to end.
    async fn obey(&mut self, supervisor: &Supervisor) {
        // Twice as often as systemd asks for, as it advises.
        let beat = sd_notify::watchdog_enabled().map(|time| time / 2);
        let mut beat = tokio::time::interval(beat.unwrap_or(LOOK_INTERVAL));
        loop {
            tokio::select! {
                _ = self.end.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.reload.recv() => reload(supervisor),
                // A supervisor that hangs holds the lock that this takes.
                _ = beat.tick() => {
                    let load = supervisor.load();
                    let status = format!("{} jobs run, {} wait", load.running, load.waiting);
                    tell(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
                }
            }
        }
    }
}

fn reload(supervisor: &Supervisor) {
    let since = NotifyState::monotonic_usec_now();
    let states = [Some(NotifyState::Reloading), since.ok()];
    tell(&states.into_iter().flatten().collect::<Vec<_>>());
    let before = supervisor.settings();
    match supervisor.reload() {
        Ok(()) => {
            tracing::info!("the configuration was read again");
            let after = supervisor.settings();
            if listens_otherwise(&before.context.config.api, &after.context.config.api) {
                tracing::warn!("socket, group, listen and tls of [api] wait for the next start");
            }
        }
        Err(failure) => {
            supervisor.metrics.reload_failed();
            tracing::error!("the configuration stays as it was: {failure}");
        }
    }
    tell(&[NotifyState::Ready]);
}

/// Whether sockets would have to be opened anew, which cuts off who is connected.
fn listens_otherwise(before: &ApiConfig, after: &ApiConfig) -> bool {
    let places = |api: &ApiConfig| {
        let tls = api.tls.as_ref().map(|tls| (tls.certificate.clone(), tls.key.clone()));
        let listen = api.listen.as_ref().map(|listen| listen.to_string());
        (api.socket.clone(), api.group.clone(), listen, tls)
    };
    places(before) != places(after)
}

/// Tells systemd, where it has asked to be told.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(states) {
        tracing::debug!("systemd was not told: {e}");
    }
}
