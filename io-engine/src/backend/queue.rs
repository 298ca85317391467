//! The queue of requests between the stage that makes them and the IO threads that sleep in
//! `poll` or in a ring, and the kick that wakes those.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crossbeam_channel::{
    Receiver, RecvTimeoutError, SendTimeoutError, Sender, TryRecvError, bounded,
};
use rustix::event::{EventfdFlags, eventfd};

use super::Request;
use crate::control::Halt;
use crate::error::EngineError;
use crate::limits::{QUEUE, WAKE};

/// Wakes IO threads by the event descriptors in which they sleep.
pub(crate) struct Kick {
    /// Set by a thread before it looks at the queue a last time and sleeps.
    sleeping: AtomicBool,
    bells: Vec<OwnedFd>,
}

impl Kick {
    fn new(threads: usize) -> Result<Self, EngineError> {
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bells: Result<Vec<_>, _> = (0..threads).map(|_| bell()).collect();
        let bells = bells.map_err(|errno| EngineError::Setup {
            what: "make an event descriptor",
            source: errno.into(),
        })?;
        Ok(Self { sleeping: AtomicBool::new(false), bells })
    }

    /// The event descriptor of IO thread `thread`.
    pub(crate) fn bell(&self, thread: usize) -> &OwnedFd {
        &self.bells[thread]
    }

    /// Wakes everyone who sleeps or is about to.
    pub(crate) fn ring(&self) {
        if self.sleeping.swap(false, SeqCst) {
            self.bells.iter().for_each(strike);
        }
    }
}

/// Makes `bell` readable. It can only fail when it already is.
pub(crate) fn strike(bell: &OwnedFd) {
    if let Err(errno) = rustix::io::write(bell, &1u64.to_ne_bytes()) {
        tracing::trace!(%errno, "a bell that rings already");
    }
}

/// Makes `bell` silent again.
pub(crate) fn silence(bell: &OwnedFd) {
    if let Err(errno) = rustix::io::read(bell, &mut [0u8; 8]) {
        tracing::trace!(%errno, "a bell that was silent already");
    }
}

/// A queue for `threads` IO threads.
pub(crate) fn queue<N>(threads: usize) -> Result<(Feed<N>, Intake<N>), EngineError> {
    let (sender, receiver) = bounded(QUEUE);
    let kick = Arc::new(Kick::new(threads)?);
    let feed = Feed { sender: Some(sender), kick: Arc::clone(&kick) };
    Ok((feed, Intake { receiver, kick }))
}

/// The end where requests are put in; when the last clone is dropped the run ends.
pub(crate) struct Feed<N> {
    sender: Option<Sender<Request<N>>>,
    kick: Arc<Kick>,
}

impl<N> Clone for Feed<N> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), kick: Arc::clone(&self.kick) }
    }
}

impl<N> Feed<N> {
    /// Puts `request` in, waiting for a place. An error says that the run has stopped.
    pub(crate) fn send(&self, request: Request<N>, halt: &Halt) -> Result<(), EngineError> {
        let mut next = request;
        while let Some(sender) = &self.sender {
            match sender.send_timeout(next, WAKE) {
                Ok(()) => {
                    self.kick.ring();
                    return Ok(());
                }
                Err(SendTimeoutError::Timeout(back)) if !halt.stopped() => next = back,
                Err(_) => break,
            }
        }
        Err(EngineError::Cancelled)
    }
}

impl<N> Drop for Feed<N> {
    fn drop(&mut self) {
        // First the end, then the waking: else a thread could go to sleep in between.
        drop(self.sender.take());
        self.kick.ring();
    }
}

/// What an IO thread finds when it looks for work.
pub(crate) enum Next<N> {
    Request(Request<N>),
    /// Nothing now; the bell will ring.
    Later,
    /// Nothing ever again.
    End,
}

/// The end where IO threads take requests out.
pub(crate) struct Intake<N> {
    receiver: Receiver<Request<N>>,
    pub(crate) kick: Arc<Kick>,
}

impl<N> Clone for Intake<N> {
    fn clone(&self) -> Self {
        Self { receiver: self.receiver.clone(), kick: Arc::clone(&self.kick) }
    }
}

impl<N> Intake<N> {
    /// As [`next`](Self::next), for a thread that sleeps nowhere else: waits up to 200 ms, and a
    /// request wakes one such thread instead of all.
    pub(crate) fn wait(&self) -> Next<N> {
        match self.receiver.recv_timeout(WAKE) {
            Ok(request) => Next::Request(request),
            Err(RecvTimeoutError::Timeout) => Next::Later,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    pub(crate) fn next(&self) -> Next<N> {
        match self.receiver.try_recv() {
            Ok(request) => return Next::Request(request),
            Err(TryRecvError::Disconnected) => return Next::End,
            Err(TryRecvError::Empty) => self.kick.sleeping.store(true, SeqCst),
        }
        match self.receiver.try_recv() {
            Ok(request) => Next::Request(request),
            Err(TryRecvError::Disconnected) => Next::End,
            Err(TryRecvError::Empty) => Next::Later,
        }
    }
}
