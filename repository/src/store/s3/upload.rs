//! An object on its way: small ones in one request, large ones in parts that go while more comes in.

use std::fmt::Write as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::client::{Failed, Request, Trouble};
use super::{ANSWER_BYTES_MAX, Shared, answer};
use crate::store::traffic::Charge;
use crate::store::{ObjectName, ObjectWriter, StoreError, StoreErrorKind};

/// Size of a part, and up to this an object is one request. Servers want at least 5 MiB; a pack
/// takes five of these.
pub(super) const PART_BYTES: usize = 8 << 20;
/// More parts a server does not take.
const PARTS_MAX: usize = 10_000;
/// Parts of one process under way at once, at most: enough to fill a fast line at a usual distance.
const PARTS_UNDER_WAY_MAX: u32 = 4;

/// Turns to send a part.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<TurnsState>,
    freed: Condvar,
}

#[derive(Debug)]
struct TurnsState {
    free: u32,
    /// Memory of parts that were sent, for those to come.
    spare: Vec<Vec<u8>>,
}

impl Turns {
    /// As many as so much memory allows, beside a part that is being gathered; one at least. The
    /// rests of full packs that wait are small: four parts make a pack.
    pub(super) fn within(memory_bytes: u64) -> Self {
        let parts = u32::try_from(memory_bytes / PART_BYTES as u64).unwrap_or(u32::MAX);
        let free = parts.saturating_sub(1).clamp(1, PARTS_UNDER_WAY_MAX);
        Self { state: Mutex::new(TurnsState { free, spare: Vec::new() }), freed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, TurnsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, part: Vec<u8>) -> TakenTurn {
        let state = self.freed.wait_while(self.state(), |state| state.free == 0);
        state.unwrap_or_else(PoisonError::into_inner).free -= 1;
        TakenTurn { turns: Arc::clone(self), part }
    }

    /// Memory for a part, used before if possible.
    fn memory(&self) -> Vec<u8> {
        self.state().spare.pop().unwrap_or_default()
    }
}

/// A part whose turn it is.
struct TakenTurn {
    turns: Arc<Turns>,
    part: Vec<u8>,
}

impl Drop for TakenTurn {
    fn drop(&mut self) {
        let mut part = std::mem::take(&mut self.part);
        part.clear();
        let mut state = self.turns.state();
        state.free += 1;
        // One for each writer that may be gathering is enough.
        if state.spare.is_empty() {
            state.spare.push(part);
        }
        drop(state);
        self.turns.freed.notify_one();
    }
}

enum Part {
    UnderWay(JoinHandle<Result<String, Failed>>),
    /// With the tag that it was answered with.
    Sent(String),
}

/// An upload in parts.
struct Upload {
    id: String,
    key: String,
    parts: Vec<Part>,
}

/// See [`ObjectWriter`].
pub(super) struct S3Writer {
    shared: Arc<Shared>,
    name: ObjectName,
    /// What has not been sent.
    part: Vec<u8>,
    bytes: u64,
    upload: Option<Upload>,
    is_spent: bool,
}

impl S3Writer {
    pub(super) fn new(shared: Arc<Shared>, name: ObjectName) -> Self {
        Self { shared, name, part: Vec::new(), bytes: 0, upload: None, is_spent: false }
    }

    fn failed(&self, action: &'static str, failed: &Failed) -> StoreError {
        failed.error(action, self.name.as_str(), &self.shared.location)
    }

    fn wrong(&self, action: &'static str, why: &str) -> StoreError {
        let kind = StoreErrorKind::Server;
        StoreError::new(kind, action, self.name.as_str(), &self.shared.location, why)
    }

    fn append(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            let room = PART_BYTES - self.part.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.part.extend_from_slice(now);
            bytes = later;
            if self.part.len() == PART_BYTES {
                self.send_part()?;
            }
        }
        Ok(())
    }

    /// Sends what has been gathered, beside; waits while too many parts are under way.
    fn send_part(&mut self) -> Result<(), StoreError> {
        if self.upload.is_none() {
            self.upload = Some(self.begin()?);
        }
        self.take_note(false)?;
        let turn = self.shared.turns.take(std::mem::take(&mut self.part));
        self.part = self.shared.turns.memory();
        let Some(upload) = &mut self.upload else { return Ok(()) };
        if upload.parts.len() == PARTS_MAX {
            return Err(self.wrong("write", "it is too large for an object store"));
        }
        let index = upload.parts.len();
        let shared = Arc::clone(&self.shared);
        let (key, id) = (upload.key.clone(), upload.id.clone());
        let send = move || {
            let sent = shared.send_part(&key, &id, index, &turn.part);
            drop(turn);
            sent
        };
        let thread = std::thread::Builder::new().name("icecore-part".into()).spawn(send);
        let thread = thread.map_err(|error| {
            StoreError::from_io("send", self.name.as_str(), &self.shared.location, error)
        })?;
        upload.parts.push(Part::UnderWay(thread));
        Ok(())
    }

    fn begin(&self) -> Result<Upload, StoreError> {
        let key = self.shared.key(self.name.as_str());
        let request = Request {
            method: "POST",
            key: key.clone(),
            query: vec![("uploads", String::new())],
            body: Some(b""),
            ..Request::default()
        };
        let id = self.shared.client.call(Charge::Write, &request, |good| {
            answer::upload_id(&good.body(ANSWER_BYTES_MAX)?).map_err(Trouble::Nonsense)
        });
        let id = id.map_err(|failed| self.failed("create", &failed))?;
        Ok(Upload { id, key, parts: Vec::new() })
    }

    /// Takes in what has become of parts: of those that are done, or of all. Tells the first failure.
    fn take_note(&mut self, of_all: bool) -> Result<(), StoreError> {
        let mut failure = None;
        for part in self.upload.iter_mut().flat_map(|upload| &mut upload.parts) {
            let is_due = matches!(part, Part::UnderWay(thread) if of_all || thread.is_finished());
            if !is_due {
                continue;
            }
            // Whatever it was answered: it is under way no more.
            if let Part::UnderWay(thread) = std::mem::replace(part, Part::Sent(String::new())) {
                match thread.join() {
                    Ok(Ok(tag)) => *part = Part::Sent(tag),
                    Ok(Err(failed)) => failure = failure.or(Some(Some(failed))),
                    Err(_) => failure = failure.or(Some(None)),
                }
            }
        }
        match failure {
            None => Ok(()),
            Some(Some(failed)) => Err(self.failed("write", &failed)),
            Some(None) => Err(self.wrong("write", "the thread that sent a part of it has died")),
        }
    }

    fn complete(&mut self) -> Result<(), StoreError> {
        if !self.part.is_empty() {
            self.send_part()?;
        }
        self.take_note(true)?;
        let Some(upload) = &self.upload else { return Ok(()) };
        let mut list = String::from("<CompleteMultipartUpload>");
        for (index, part) in upload.parts.iter().enumerate() {
            let Part::Sent(tag) = part else { continue };
            let tag = tag.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            let number = index + 1;
            // Writing to a string does not fail.
            let _ =
                write!(list, "<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>");
        }
        list.push_str("</CompleteMultipartUpload>");
        self.shared.complete(&self.name, &upload.id, list.as_bytes(), self.bytes)?;
        self.shared.lock_finished(&self.name)
    }

    /// Waits for what is under way, and gives the parts up.
    fn abandon(&mut self) {
        // Parts that arrive after the upload was given up would stay.
        let _ = self.take_note(true);
        if let Some(upload) = self.upload.take()
            && let Err(failed) = self.shared.abort(&upload.key, &upload.id)
        {
            let why = self.failed("remove the parts of", &failed);
            tracing::debug!(%why, "an unfinished upload stays behind for gc");
        }
    }
}

impl ObjectWriter for S3Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if self.is_spent {
            return Err(self.wrong("write", "an earlier write of this object failed"));
        }
        self.bytes += bytes.len() as u64;
        self.append(bytes).inspect_err(|_| self.is_spent = true)
    }

    fn finish(mut self: Box<Self>) -> Result<u64, StoreError> {
        if self.is_spent {
            return Err(self.wrong("finish", "an earlier write of this object failed"));
        }
        if self.upload.is_none() {
            self.shared.create_small(&self.name, &self.part)?;
        } else {
            self.complete()?;
            // It is an object now, and nothing is left of the upload.
            self.upload = None;
        }
        Ok(self.bytes)
    }
}

impl Drop for S3Writer {
    fn drop(&mut self) {
        self.abandon();
    }
}
