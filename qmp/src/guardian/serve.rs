//! The guardian's process: one loop over the worker's lines and a clock.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::flow::refused;
use super::keeper::Keeper;
use super::probe::{self, ProbeCommand};
use super::protocol::{ErrorKind, GuardianError, LINE_BYTES_MAX, ToGuardian, ToWorker};
use super::spawn::take_over;
use super::watch::{Live, Watch};

/// How often the worker and the disks' sizes are looked at.
const TICK: Duration = Duration::from_millis(250);

/// Body of the hidden subcommand with which [`super::GuardianClient::spawn`] starts this
/// executable: file descriptor 0 is the socket. Makes its own tokio runtime, so it must be called
/// outside of one.
pub fn main() -> ExitCode {
    if let Some(directory) = std::env::var_os(probe::PROBE_VARIABLE) {
        // A write that fails at once (full, gone) has answered, too.
        let _ = probe::body(&PathBuf::from(directory));
        return ExitCode::SUCCESS;
    }
    // Already a leader of its own group or session: then the worker's signals miss it anyway.
    let _ = rustix::process::setsid();
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    match serve(StdUnixStream::from(socket), own_probe()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the guardian cannot begin");
            ExitCode::FAILURE
        }
    }
}

/// This process again, with the same arguments: the variable makes it a probe.
fn own_probe() -> ProbeCommand {
    let arguments = std::env::args_os().skip(1).collect();
    let program = PathBuf::from("/proc/self/exe");
    ProbeCommand { program, arguments }
}

/// Serves one worker on `stream` and returns when nothing of its run is left. `probe` is run
/// before anything is done that hangs a guest whose scratch storage hangs.
pub fn serve(stream: StdUnixStream, probe: ProbeCommand) -> std::io::Result<()> {
    let (leash, locks) = take_over(&stream)?;
    stream.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let served = runtime.block_on(async {
        let deaf = deafen()?;
        let (read, write) = UnixStream::from_std(stream)?.into_split();
        Server::new(read, write, Keeper::new(leash, probe)).run().await;
        drop(deaf);
        Ok(())
    });
    // A worker that waits for these locks may go on only now.
    drop::<Vec<OwnedFd>>(locks);
    served
}

/// Handlers that nobody listens to: what ends the worker does not end its guardian.
fn deafen() -> std::io::Result<Vec<Signal>> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    kinds.into_iter().map(signal).collect()
}

struct Server {
    lines: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
    write: OwnedWriteHalf,
    keeper: Keeper,
    watch: Watch,
    started: Instant,
}

enum Wake {
    Line(std::io::Result<usize>),
    Tick,
}

impl Server {
    fn new(read: OwnedReadHalf, write: OwnedWriteHalf, keeper: Keeper) -> Self {
        Self {
            lines: BufReader::new(read),
            line: Vec::new(),
            write,
            keeper,
            watch: Watch::new(Duration::ZERO),
            started: Instant::now(),
        }
    }

    async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let limit = (LINE_BYTES_MAX - self.line.len()) as u64;
            let mut limited = (&mut self.lines).take(limit);
            let wake = tokio::select! {
                // What was read so far stays in `line` when the tick comes first.
                read = limited.read_until(b'\n', &mut self.line) => Wake::Line(read),
                _ = tick.tick() => Wake::Tick,
            };
            match wake {
                Wake::Line(Ok(_)) if self.line.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.line);
                    if self.line(&line).await.is_err() {
                        break;
                    }
                }
                Wake::Line(_) => break,
                Wake::Tick => self.tick().await,
            }
        }
        tracing::debug!("the worker is gone");
        self.keeper.finish_alone().await;
    }

    /// An error means that the worker cannot be talked to any more.
    async fn line(&mut self, line: &[u8]) -> std::io::Result<()> {
        match serde_json::from_slice(line)? {
            ToGuardian::Pulse(counter) => self.watch.pulse(counter, self.started.elapsed()),
            ToGuardian::Request(id, request) => {
                let shows_life = request.shows_life();
                let answer = self.keeper.handle(request).await;
                if shows_life {
                    self.watch.request(self.started.elapsed());
                }
                let mut reply = serde_json::to_vec(&ToWorker { id, answer })?;
                reply.push(b'\n');
                // A worker that does not read its few replies is stopped; it is not waited for.
                tokio::time::timeout(TICK, self.write.write_all(&reply)).await??;
            }
        }
        Ok(())
    }

    async fn tick(&mut self) {
        let live = self.keeper.live();
        if let Err(error) = self.keeper.leash.collect() {
            // A connection that cannot be ended may hang the guest.
            self.keeper.cut(refused(error.to_string())).await;
            return;
        }
        if self.watch.stalled(live, self.started.elapsed()) {
            let message = "the worker made no progress, and QEMU must not wait for it".into();
            self.keeper.cut(GuardianError { kind: ErrorKind::WorkerStalled, message }).await;
        } else if live == Live::Data {
            self.keeper.look().await;
        } else {
            self.keeper.pay_debts().await;
        }
    }
}
