//! The packs of a point being written: one takes frames, those that are full are made durable beside.

use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::ids::{BlockId, PackId};
use crate::pack::PackWriter;
use crate::point::{Frame, Location};
use crate::repository::{Inner, random};

/// Full packs that wait while one is being made durable. More would only put off the moment at which
/// the writer waits for a slow store, and hold as much more of the guest's scratch.
const WAITING_MAX: usize = 1;

/// What is known of the packs of one point. Packs are numbered from 0 in the order of their creation,
/// and become durable in that order.
#[derive(Default)]
pub(crate) struct Packs {
    open: Option<PackWriter>,
    /// Those before the open one that are not known to be durable, oldest first.
    closing: VecDeque<PackId>,
    durable: u64,
    bytes: u64,
    /// All of them.
    made: BTreeSet<PackId>,
    closer: Option<Closer>,
    /// Met while nobody could be told.
    failure: Option<Error>,
}

/// A thread that makes packs durable, in the order in which they come.
struct Closer {
    // None once no more packs come.
    full: Option<SyncSender<PackWriter>>,
    closed: Receiver<Result<u64>>,
    thread: Option<JoinHandle<()>>,
}

impl Closer {
    fn start() -> Result<Self> {
        let (full, packs) = sync_channel::<PackWriter>(WAITING_MAX);
        let (tell, closed) = std::sync::mpsc::channel();
        let close = move || {
            for pack in packs {
                let outcome = pack.finish();
                let failed = outcome.is_err();
                // After a failure nothing of the point is of use, and nobody listens after an abort.
                if tell.send(outcome).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("icecore-pack".into()).spawn(close);
        let thread = thread.map_err(|error| Error::Refused {
            what: format!("the thread that makes packs durable could not be started: {error}"),
            advice: "raise the limit of threads, or run fewer jobs at once",
        })?;
        Ok(Self { full: Some(full), closed, thread: Some(thread) })
    }
}

impl Drop for Closer {
    /// No thread outlives its point: after this nothing more is stored for it.
    fn drop(&mut self) {
        self.full.take();
        if let Some(thread) = self.thread.take() {
            // A panic in there has been noticed as a pack that never became durable.
            let _ = thread.join();
        }
    }
}

impl Packs {
    /// The number of a pack of this point that is not known to be durable.
    pub(crate) fn number_if_not_durable(&self, pack: PackId) -> Option<u64> {
        let open = self.open.iter().map(PackWriter::id);
        let at = self.closing.iter().copied().chain(open).position(|id| id == pack)?;
        Some(self.durable + at as u64)
    }

    /// All packs of this point.
    pub(crate) fn made(&self) -> &BTreeSet<PackId> {
        &self.made
    }

    /// How many packs are durable: those whose numbers are smaller.
    pub(crate) fn durable(&mut self) -> u64 {
        if let Err(error) = self.take_note() {
            self.failure = Some(error);
        }
        self.durable
    }

    /// Stores a frame; returns where, and the number of its pack.
    pub(crate) fn push(
        &mut self,
        inner: &Inner,
        id: &BlockId,
        frame: &Frame,
    ) -> Result<(Location, u64)> {
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let id = PackId(random()?);
                self.made.insert(id);
                self.open.insert(PackWriter::create(&*inner.store, &inner.sealing, id)?)
            }
        };
        let location = Location { pack: open.id(), slot: open.push(id, frame)? };
        let is_full = open.is_full();
        let number = self.durable + self.closing.len() as u64;
        if is_full {
            self.close_beside()?;
        }
        Ok((location, number))
    }

    /// Makes all packs durable; returns their number and bytes.
    pub(crate) fn close_all(&mut self) -> Result<(u64, u64)> {
        self.take_note()?;
        if let Some(closer) = &mut self.closer {
            closer.full.take();
            while !self.closing.is_empty() {
                self.wait()?;
            }
        }
        self.closer = None;
        if let Some(open) = self.open.take() {
            self.bytes += open.finish()?;
            self.durable += 1;
        }
        Ok((self.durable, self.bytes))
    }

    fn close_beside(&mut self) -> Result<()> {
        self.take_note()?;
        let Some(open) = self.open.take() else { return Ok(()) };
        let closer = match &mut self.closer {
            Some(closer) => closer,
            None => self.closer.insert(Closer::start()?),
        };
        self.closing.push_back(open.id());
        let sent = closer.full.as_ref().is_some_and(|full| full.send(open).is_ok());
        // Its thread ends early only after a failure.
        if sent { Ok(()) } else { self.wait() }
    }

    /// Waits until one more pack is durable.
    fn wait(&mut self) -> Result<()> {
        let closed = self.closer.as_ref().and_then(|closer| closer.closed.recv().ok());
        self.note(closed.unwrap_or_else(|| Err(lost())))
    }

    /// Takes in what has become of packs meanwhile.
    fn take_note(&mut self) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        while let Some(closed) = self.closer.as_ref().and_then(|c| c.closed.try_recv().ok()) {
            self.note(closed)?;
        }
        Ok(())
    }

    fn note(&mut self, closed: Result<u64>) -> Result<()> {
        self.bytes += closed?;
        self.closing.pop_front();
        self.durable += 1;
        Ok(())
    }
}

fn lost() -> Error {
    Error::Refused {
        what: "a pack was not made durable, for a reason that was reported before".into(),
        advice: "take the point again",
    }
}
