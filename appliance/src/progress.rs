//! Progress on stderr for what takes longer than two seconds: bytes, rate and time left.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::names::human_bytes;

/// Nothing is shown before this: short work needs no bar.
const QUIET_FOR: Duration = Duration::from_secs(2);
/// How often the bar moves.
const TICK: Duration = Duration::from_millis(200);
/// How often a line is printed where stderr is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// How far a piece of work is, in bytes.
#[derive(Debug)]
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
    /// Starts showing `meter` under `label`, unless `quiet`.
    pub fn show(label: String, meter: Meter, quiet: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let spawned = || {
            std::thread::Builder::new()
                .name("progress".into())
                .spawn(move || draw_until(&seen, &label, &meter))
                // Without a thread for it there is no progress, and nothing else is lost.
                .ok()
        };
        let thread = if quiet { None } else { spawned() };
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

fn draw_until(stop: &AtomicBool, label: &str, meter: &Meter) {
    let started = Instant::now();
    while started.elapsed() < QUIET_FOR {
        std::thread::park_timeout(QUIET_FOR);
        if stop.load(Ordering::Relaxed) {
            return;
        }
    }
    if std::io::stderr().is_terminal() {
        draw_bar(stop, label, meter, started);
    } else {
        print_lines(stop, label, meter, started);
    }
}

fn draw_bar(stop: &AtomicBool, label: &str, meter: &Meter, started: Instant) {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let template = "{msg} {bar:30} {binary_bytes}/{binary_total_bytes} \
                    {binary_bytes_per_sec} {eta} left";
    bar.set_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.set_message(label.to_owned());
    let bar = bar.with_elapsed(started.elapsed());
    while !stop.load(Ordering::Relaxed) {
        bar.set_length(meter.total);
        bar.set_position(meter.done());
        std::thread::park_timeout(TICK);
    }
    bar.finish_and_clear();
}

fn print_lines(stop: &AtomicBool, label: &str, meter: &Meter, started: Instant) {
    while !stop.load(Ordering::Relaxed) {
        eprintln!("{}", line(label, meter, started.elapsed()));
        let printed = Instant::now();
        while printed.elapsed() < LINE_INTERVAL && !stop.load(Ordering::Relaxed) {
            std::thread::park_timeout(LINE_INTERVAL);
        }
    }
}

fn line(label: &str, meter: &Meter, elapsed: Duration) -> String {
    let (done, total) = (meter.done(), meter.total);
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let left = match total.saturating_sub(done) {
        rest if rate >= 1.0 => format!("{} s left", (rest as f64 / rate).ceil() as u64),
        _ => "time left unknown".into(),
    };
    format!(
        "{label}: {} of {}, {}/s, {left}",
        human_bytes(done),
        human_bytes(total),
        human_bytes(rate as u64)
    )
}
