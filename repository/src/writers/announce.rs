//! A writer's announcement and heartbeat.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::life::Life;
use super::{BEATS, Coordination, GENERATIONS, WRITERS, accept_existing, fence_name, writer_name};
use crate::envelope::Kind;
use crate::error::{Error, Result};
use crate::ids::{PointId, WriterId};
use crate::store::ObjectName;

/// How often a writer raises its counter. A beat costs a few fsyncs; gc waits for several of them.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_secs(10);

/// A listing that is older is no hiccup of the store.
const LISTED_WITHIN: Duration = Duration::from_secs(5);
/// How often it is looked at meanwhile.
const LISTING_PERIOD: Duration = Duration::from_millis(250);

pub(super) const KIND: Kind = Kind::new(b"WRTR");

/// The number of gc runs that have condemned something. What was learned in another generation
/// about where blocks lie (a dedup cache) is worth nothing.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

/// Who announces itself; for messages only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterRecord {
    /// The writer's id, drawn at random for this run.
    pub writer: WriterId,
    /// The host it runs on.
    pub host: String,
    /// What it is about to do.
    pub purpose: String,
    /// Its process, so that gc on the same host need not wait when it was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<Life>,
}

/// A writer that gc waits for, from the moment this exists.
///
/// Dropping it only stops the heartbeat: gc will revoke the writer. [`end`](Self::end) takes it back,
/// which is right when the manifest and receipt are durable, or when no manifest was ever tried.
#[derive(Debug)]
pub struct Announcement {
    coordination: Coordination,
    writer: WriterId,
    generation: Generation,
    heart: Heart,
}

impl Announcement {
    /// The generation read after the announcement.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// To be asked after the manifest is durable and before success is reported.
    ///
    /// # Errors
    /// `Revoked` when gc gave this writer up: whether the point exists is for the verdict to say, so
    /// the caller must treat the outcome as unknown. Or the store's error, likewise.
    pub fn must_stand(&self, point: &PointId) -> Result<()> {
        if self.coordination.store.exists(&fence_name(&self.writer)?)? {
            return Err(Error::Revoked { writer: self.writer.clone(), point: point.clone() });
        }
        Ok(())
    }

    /// Takes the announcement back.
    ///
    /// # Errors
    /// The store's; gc will then have to revoke the writer, which harms nothing.
    pub fn end(mut self) -> Result<()> {
        self.heart.stop();
        self.coordination.forget_writer(&self.writer)
    }
}

impl Coordination {
    /// Announces a writer durably, then reads the generation.
    pub(crate) fn announce(&self, record: &WriterRecord) -> Result<Announcement> {
        let name = writer_name(&record.writer)?;
        self.put(&name, KIND, record)?;
        // One that is gone was given up by a gc: the fence is found at the commit.
        let is_seen =
            || Ok(self.store.names(WRITERS)?.contains(&name) || !self.store.exists(&name)?);
        if let Err(error) = self.await_listing(is_seen) {
            self.forget_writer(&record.writer)?;
            return Err(error);
        }
        let generation = self.generation()?;
        let heart = match Heart::start(self.clone(), record.writer.clone()) {
            Ok(heart) => heart,
            Err(error) => {
                self.forget_writer(&record.writer)?;
                return Err(Error::Refused {
                    what: format!("the thread of the heartbeat could not be started: {error}"),
                    advice: "raise the limit of threads, or run fewer jobs at once",
                });
            }
        };
        let writer = record.writer.clone();
        Ok(Announcement { coordination: self.clone(), writer, generation, heart })
    }

    /// Waits until listings show what was just put: a writer's announcement, a gc's generation. Of
    /// two who each see their own before they look for the other's, one sees the other's, also
    /// where all listings are a little old.
    fn await_listing(&self, is_seen: impl Fn() -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        while !is_seen()? {
            if begun.elapsed() >= LISTED_WITHIN {
                let (location, seconds) = (self.store.location(), LISTED_WITHIN.as_secs());
                return Err(Error::Refused {
                    what: format!(
                        "{location} does not list what it stored {seconds} s before: a gc would \
                         delete what it does not see"
                    ),
                    advice: "try again later; if it stays, this store is not fit for a repository",
                });
            }
            std::thread::sleep(LISTING_PERIOD);
        }
        Ok(())
    }

    /// All announced writers.
    pub(crate) fn writers(&self) -> Result<Vec<WriterId>> {
        Ok(self.last_parts(WRITERS)?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Who a writer said it was, for messages.
    pub(crate) fn writer_record(&self, writer: &WriterId) -> Result<WriterRecord> {
        self.get(&writer_name(writer)?, KIND)
    }

    /// The greatest counter of each writer that has beaten at all.
    pub(crate) fn beats(&self) -> Result<Vec<(WriterId, u64)>> {
        let parse = |name: &String| {
            let (writer, count) = name.rsplit_once('.')?;
            Some((writer.parse().ok()?, count.parse().ok()?))
        };
        Ok(self.last_parts(BEATS)?.iter().filter_map(parse).collect())
    }

    /// Removes an announcement and its beats; a fence stays.
    pub(crate) fn forget_writer(&self, writer: &WriterId) -> Result<()> {
        let mut names = vec![writer_name(writer)?];
        for name in self.store.names(BEATS)? {
            if name.last_part().starts_with(&format!("{writer}.")) {
                names.push(name);
            }
        }
        // The announcement goes last: as long as it is there, gc looks after the rest.
        names.reverse();
        Ok(self.store.delete(&names)?)
    }

    /// The present generation.
    pub(crate) fn generation(&self) -> Result<Generation> {
        let names = self.last_parts(GENERATIONS)?;
        let numbers = names.iter().filter_map(|name| name.parse().ok());
        Ok(Generation(numbers.max().unwrap_or(0)))
    }

    /// Begins the next generation, and forgets those before the last.
    pub(crate) fn next_generation(&self) -> Result<Generation> {
        let last = self.generation()?;
        let next = Generation(last.0 + 1);
        // Another gc that was first has had the same effect for our writers.
        accept_existing(self.store.put(&generation_name(next)?, b"").map_err(Error::from))?;
        self.await_listing(|| Ok(self.generation()? >= next))?;
        // The last one stays: a listing under way must meet one of the two.
        let old = self.store.list(GENERATIONS)?.into_iter().map(|entry| entry.name);
        let keep = generation_name(last)?;
        self.store.delete(&old.filter(|name| *name < keep).collect::<Vec<_>>())?;
        Ok(next)
    }

    pub(crate) fn beat(&self, writer: &WriterId, count: u64) -> Result<()> {
        self.store.put(&beat_name(writer, count)?, b"")?;
        match count.checked_sub(1) {
            Some(last) => Ok(self.store.delete(&[beat_name(writer, last)?])?),
            None => Ok(()),
        }
    }
}

fn generation_name(generation: Generation) -> Result<ObjectName> {
    // Fixed width: the order of names is the order of numbers.
    Ok(ObjectName::new(format!("{GENERATIONS}{:020}", generation.0))?)
}

fn beat_name(writer: &WriterId, count: u64) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{BEATS}{writer}.{count:020}"))?)
}

/// The thread that raises the counter; it dies with its process, and that is its use.
#[derive(Debug)]
struct Heart {
    stopped: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Heart {
    fn start(coordination: Coordination, writer: WriterId) -> std::io::Result<Self> {
        let stopped = Arc::new((Mutex::new(false), Condvar::new()));
        let seen_by_thread = Arc::clone(&stopped);
        let beating = move || {
            let mut count = 0;
            while !wait_for_stop(&seen_by_thread) {
                if let Err(error) = coordination.beat(&writer, count) {
                    // At worst gc revokes a living writer, which then fails cleanly.
                    tracing::warn!(%error, %writer, "a heartbeat could not be stored");
                }
                count += 1;
            }
        };
        let thread = std::thread::Builder::new().name("icecore-beat".into()).spawn(beating)?;
        Ok(Self { stopped, thread: Some(thread) })
    }

    fn stop(&mut self) {
        *self.stopped.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stopped.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // A beat that panicked has nothing to tell that matters here.
            let _ = thread.join();
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.stop();
    }
}

fn wait_for_stop(stopped: &(Mutex<bool>, Condvar)) -> bool {
    let guard = stopped.0.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = stopped.1.wait_timeout_while(guard, HEARTBEAT_PERIOD, |stopped| !*stopped);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}
