//! Progress for what takes longer than two seconds: bytes, rate and time left. On stderr for a
//! person, and in a small file of the state directory for whoever follows the job.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::context::Context;
use crate::governor::{GuestNow, GuestView};
use crate::names::human_bytes;
use crate::state::{JobId, State, jobs};

/// Nothing is shown before this: short work needs no bar.
const QUIET_FOR: Duration = Duration::from_secs(2);
/// How often the bar moves.
const TICK: Duration = Duration::from_millis(200);
/// How often a line is printed where stderr is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// How often the job's file is replaced.
const FILE_INTERVAL: Duration = Duration::from_millis(500);
/// A file longer than this is not one of ours.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// How far a job is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// What is being done.
    pub label: String,
    pub done_bytes: u64,
    /// Of the pieces of work that have begun.
    pub total_bytes: u64,
    pub bytes_per_second: u64,
    /// An upper bound: what need not be read is not known beforehand.
    pub eta_seconds: Option<u64>,
    /// How the guest fares, where one runs and is looked after.
    #[serde(default)]
    pub guest: Option<GuestNow>,
    pub at: Timestamp,
}

/// The meters of one process, and the file in which others can follow them.
#[derive(Debug, Clone, Default)]
pub struct Board {
    inner: Arc<Mutex<Posted>>,
}

#[derive(Debug, Default)]
struct Posted {
    file: Option<PathBuf>,
    began: Option<Instant>,
    written: Option<Instant>,
    meters: Vec<Meter>,
    guest: GuestView,
}

impl Board {
    /// Tells of this guest, too, from now on.
    pub fn watch(&self, guest: GuestView) {
        self.lock().guest = guest;
    }

    /// Writes the progress of `job` from now on.
    pub fn follow(&self, state: &State, job: &JobId) {
        self.lock().file = Some(jobs::side_file(state, job, "progress"));
    }

    /// Ends the writing, so that nothing appears after the job's end.
    pub fn close(&self) {
        self.lock().file = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Posted> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, meter: &Meter) {
        let mut posted = self.lock();
        posted.began.get_or_insert_with(Instant::now);
        posted.meters.push(meter.clone());
    }

    fn write(&self, label: &str) {
        let mut posted = self.lock();
        let due = posted.written.is_none_or(|at| at.elapsed() >= FILE_INTERVAL);
        let (Some(file), true) = (posted.file.clone(), due) else { return };
        posted.written = Some(Instant::now());
        let snapshot = posted.snapshot(label);
        let temporary = file.with_extension("progress.tmp");
        // Nothing depends on it: a file that cannot be written is only not seen.
        if let Ok(text) = serde_json::to_vec(&snapshot)
            && std::fs::write(&temporary, text).is_ok()
        {
            let _ = std::fs::rename(&temporary, &file);
        }
    }
}

impl Posted {
    fn snapshot(&self, label: &str) -> Snapshot {
        let done = self.meters.iter().map(Meter::done).sum();
        let total = self.meters.iter().map(|meter| meter.total).sum();
        let elapsed = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        let (rate, left) = pace(done, total, elapsed);
        Snapshot {
            label: label.to_owned(),
            done_bytes: done,
            total_bytes: total,
            bytes_per_second: rate,
            eta_seconds: left,
            guest: self.guest.now(),
            at: Timestamp::now(),
        }
    }
}

/// The progress of a job that runs, as far as it has written any.
pub fn of_job(state: &State, job: &JobId) -> Option<Snapshot> {
    let path = jobs::side_file(state, job, "progress");
    if std::fs::metadata(&path).ok()?.len() > FILE_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Bytes a second, and the seconds left where that can be told.
fn pace(done: u64, total: u64, elapsed: Duration) -> (u64, Option<u64>) {
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let rest = total.saturating_sub(done) as f64;
    (rate as u64, (rate >= 1.0).then(|| (rest / rate).ceil() as u64))
}

/// How far a piece of work is, in bytes.
#[derive(Debug, Clone)]
pub struct Meter {
    total: u64,
    counted: Vec<Arc<icecore_io_engine::Progress>>,
    /// What is written is read back afterwards: both count.
    read_back: bool,
}

impl Meter {
    /// Follows the data plane's counters up to `total`.
    pub fn new(total: u64, counted: Arc<icecore_io_engine::Progress>) -> Self {
        Self::of_all(total, vec![counted])
    }

    /// Follows several pieces of work, `total` bytes together.
    pub fn of_all(total: u64, counted: Vec<Arc<icecore_io_engine::Progress>>) -> Self {
        Self { total, counted, read_back: false }
    }

    /// Follows them through writing and reading back, `total` bytes each.
    pub fn with_read_back(self) -> Self {
        Self { total: 2 * self.total, read_back: true, ..self }
    }

    /// What is not read because it need not be is not counted as done in a backup, so the time left
    /// is an upper bound there.
    fn done(&self) -> u64 {
        let of_one = |counted: &Arc<icecore_io_engine::Progress>| {
            let [read, written, skipped] =
                [&counted.read_bytes, &counted.done_bytes, &counted.skipped_bytes]
                    .map(|counter| counter.load(Ordering::Relaxed));
            skipped + if self.read_back { read + written } else { read.max(written) }
        };
        self.counted.iter().map(of_one).sum()
    }
}

/// Shows a meter until it is dropped.
#[derive(Debug)]
pub struct Progress {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts showing `meter` under `label`; on stderr unless the user wants quiet.
    pub fn show(label: String, meter: Meter, context: &Context) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        context.board.post(&meter);
        let shown = Shown { label, meter, stop: Arc::clone(&stop), board: context.board.clone() };
        let quiet = context.quiet;
        let thread = std::thread::Builder::new()
            .name("progress".into())
            .spawn(move || shown.run(quiet))
            // Without a thread for it there is no progress, and nothing else is lost.
            .ok();
        Self { stop, thread }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic in the drawing thread must not become one here.
            let _ = thread.join();
        }
    }
}

struct Shown {
    label: String,
    meter: Meter,
    stop: Arc<AtomicBool>,
    board: Board,
}

impl Shown {
    fn run(&self, quiet: bool) {
        let started = Instant::now();
        self.turn_until(quiet, || started.elapsed() >= QUIET_FOR);
        if self.stopped() {
            return;
        }
        if std::io::stderr().is_terminal() {
            self.draw_bar(started);
        } else {
            self.print_lines(started);
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Keeps the file fresh until `done`, or for ever where stderr shows nothing.
    fn turn_until(&self, for_ever: bool, done: impl Fn() -> bool) {
        while !self.stopped() && (for_ever || !done()) {
            self.board.write(&self.label);
            std::thread::park_timeout(TICK);
        }
    }

    fn draw_bar(&self, started: Instant) {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let template = "{msg} {bar:30} {binary_bytes}/{binary_total_bytes} \
                        {binary_bytes_per_sec} {eta} left";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_message(self.label.clone());
        let bar = bar.with_elapsed(started.elapsed());
        while !self.stopped() {
            bar.set_length(self.meter.total);
            bar.set_position(self.meter.done());
            self.board.write(&self.label);
            std::thread::park_timeout(TICK);
        }
        bar.finish_and_clear();
    }

    fn print_lines(&self, started: Instant) {
        while !self.stopped() {
            eprintln!("{}", line(&self.label, &self.meter, started.elapsed()));
            let printed = Instant::now();
            self.turn_until(false, || printed.elapsed() >= LINE_INTERVAL);
        }
    }
}

fn line(label: &str, meter: &Meter, elapsed: Duration) -> String {
    let (done, total) = (meter.done(), meter.total);
    let (rate, left) = pace(done, total, elapsed);
    in_words(label, done, total, rate, left)
}

/// Progress as a line of text.
pub fn in_words(label: &str, done: u64, total: u64, rate: u64, left: Option<u64>) -> String {
    let left = left.map_or("time left unknown".into(), |left| format!("{left} s left"));
    format!(
        "{label}: {} of {}, {}/s, {left}",
        human_bytes(done),
        human_bytes(total),
        human_bytes(rate)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_followed_job_can_be_seen_until_the_board_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        state.dir("jobs").unwrap();
        let job = JobId::new(Timestamp::UNIX_EPOCH).unwrap();
        let board = Board::default();
        let counted = Arc::new(icecore_io_engine::Progress::default());
        counted.read_bytes.store(30, Ordering::Relaxed);
        board.post(&Meter::new(100, counted));
        board.follow(&state, &job);
        board.write("vm d0");
        let seen = of_job(&state, &job).unwrap();
        assert_eq!((seen.done_bytes, seen.total_bytes), (30, 100));
        jobs::forget_progress(&state, &job);
        board.close();
        board.write("vm d0");
        assert_eq!(of_job(&state, &job), None);
    }

    #[test]
    fn time_left_is_only_told_when_something_moves() {
        assert_eq!(pace(0, 10, Duration::from_secs(5)), (0, None));
        assert_eq!(pace(10, 30, Duration::from_secs(5)), (2, Some(10)));
        assert_eq!(pace(30, 10, Duration::ZERO).1, Some(0));
    }
}
