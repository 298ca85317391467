//! Creating objects: each name once, whole or not at all, by the means that the server has.

use std::sync::PoisonError;
use std::time::Instant;

use md5::{Digest, Md5};

use super::super::http::Answer;
use super::super::traffic::Charge;
use super::super::{ObjectName, StoreError, StoreErrorKind};
use super::client::{Failed, Request, Trouble};
use super::lock::{self, Contest, Turn};
use super::{ANSWER_BYTES_MAX, OWN, Shared, answer};

/// Up to this size an object's tag is compared with what was sent: coordination and manifests.
const TAG_BYTES_MAX: usize = 256 << 10;

/// How a name is created only once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Creation {
    /// The server refuses to overwrite when it is asked to.
    Conditional,
    /// It overwrites.
    Locked,
}

impl Shared {
    /// How this server lets a name be created once. Asked of it once, by trying.
    fn creation(&self) -> Result<Creation, StoreError> {
        let mut known = self.creation.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(creation) = *known {
            return Ok(creation);
        }
        let creation = self.try_creation().map_err(|f| self.failed("create", "a trial", &f))?;
        if creation == Creation::Locked {
            tracing::info!(
                store = %self.location,
                "this server overwrites objects even if it is asked not to: names are locked instead"
            );
        }
        Ok(*known.insert(creation))
    }

    /// A server that knows conditions refuses the second of two; the trial object stays, so that it
    /// is one request mostly.
    fn try_creation(&self) -> Result<Creation, Failed> {
        let key = self.key(&format!("{OWN}conditional-put"));
        for _ in 0..2 {
            match self.put_key(&key, b"", true, None) {
                Ok(_) => {}
                Err(failed) if failed.has_status(412) => return Ok(Creation::Conditional),
                Err(failed) if failed.has_status(501) || failed.has_code("NotImplemented") => {
                    return Ok(Creation::Locked);
                }
                Err(failed) => return Err(failed),
            }
        }
        Ok(Creation::Locked)
    }

    /// Puts a whole object; returns its tag, if the server gave one.
    fn put_key(
        &self,
        key: &str,
        bytes: &[u8],
        only_if_new: bool,
        until: Option<Instant>,
    ) -> Result<Option<String>, Failed> {
        let mut headers = self.lock_headers(key, bytes);
        headers.extend(only_if_new.then(|| ("if-none-match", "*".to_owned())));
        let request = Request {
            method: "PUT",
            key: key.to_owned(),
            headers,
            body: Some(bytes),
            until,
            ..Request::default()
        };
        self.client.call(Charge::Write, &request, |good| Ok(tag(&good)))
    }

    /// Creates an object in one request.
    pub(super) fn create_small(&self, name: &ObjectName, bytes: &[u8]) -> Result<(), StoreError> {
        let key = self.key(name.as_str());
        let put = match self.creation()? {
            Creation::Conditional => self.put_key(&key, bytes, true, None),
            Creation::Locked => {
                self.locked(name, |until| self.put_key(&key, bytes, false, Some(until)))?
            }
        };
        match put {
            Ok(tag) => self.check_tag(name, bytes, tag.as_deref()),
            // The answer to an earlier try was lost, and it is our own that is there.
            Err(failed) if failed.has_status(412) && failed.tries > 1 => {
                if self.holds(name, bytes)? { Ok(()) } else { Err(self.taken(name)) }
            }
            Err(failed) if failed.has_status(412) => Err(self.taken(name)),
            Err(failed) => Err(self.failed("create", name.as_str(), &failed)),
        }
    }

    fn taken(&self, name: &ObjectName) -> StoreError {
        let kind = StoreErrorKind::AlreadyExists;
        self.error(kind, "create", name.as_str(), "there is an object of that name")
    }

    /// The server has checked the sum of what it got; its tag tells whether it kept the same. A tag
    /// of another kind (of some ways of encryption) says nothing, so what is there is read.
    fn check_tag(
        &self,
        name: &ObjectName,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<(), StoreError> {
        let Some(tag) = tag.filter(|_| bytes.len() <= TAG_BYTES_MAX) else { return Ok(()) };
        let sum = Md5::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        if tag.trim_matches('"').eq_ignore_ascii_case(&sum) || self.holds(name, bytes)? {
            return Ok(());
        }
        let why = "what the server kept is not what was sent";
        Err(self.error(StoreErrorKind::Server, "create", name.as_str(), why))
    }

    /// Whether an object has just this content.
    fn holds(&self, name: &ObjectName, bytes: &[u8]) -> Result<bool, StoreError> {
        match self.get_all(name, bytes.len() as u64) {
            Ok(content) => Ok(content == bytes),
            Err(error) if error.kind() == StoreErrorKind::Corrupt || error.is_not_found() => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Does something to a free name under its lock, see [`lock`].
    fn locked<T>(
        &self,
        name: &ObjectName,
        operation: impl Fn(Instant) -> Result<T, Failed>,
    ) -> Result<Result<T, Failed>, StoreError> {
        let begun = Instant::now();
        let mut contest = Contest::default();
        let locks = self.key(&format!("{OWN}locks/{name}/"));
        while begun.elapsed() < lock::WAIT_MAX {
            if self.length(name)?.is_some() {
                return Err(self.taken(name));
            }
            let own = format!("{locks}{:016x}", u64::from_le_bytes(self.random()?));
            let held_since = Instant::now();
            let failed = |failed| self.failed("lock", name.as_str(), &failed);
            self.put_key(&own, b"", false, None).map_err(failed)?;
            let listed = self.keys(&locks).map_err(failed)?;
            let seen: Vec<String> = listed.into_iter().map(|(key, _)| key).collect();
            match contest.look(&own, &seen, begun.elapsed()) {
                Turn::Ours if held_since.elapsed() < lock::LEASE / 2 => {
                    return self.under_lock(name, &own, held_since, operation);
                }
                Turn::Ours => self.delete_key(&own).map_err(failed)?,
                Turn::Theirs { dead } => {
                    for lock in dead.iter().chain([&own]) {
                        self.delete_key(lock).map_err(failed)?;
                    }
                }
            }
            std::thread::sleep(contest.pause(u32::from_le_bytes(self.random()?)));
        }
        let why = "others kept its lock for minutes";
        Err(self.error(StoreErrorKind::Server, "create", name.as_str(), why))
    }

    fn under_lock<T>(
        &self,
        name: &ObjectName,
        own: &str,
        held_since: Instant,
        operation: impl Fn(Instant) -> Result<T, Failed>,
    ) -> Result<Result<T, Failed>, StoreError> {
        let until = held_since + lock::LEASE;
        let is_free = self.length_until(name, Some(until))?.is_none();
        let done = is_free.then(|| operation(until));
        let is_unknown = matches!(&done, Some(Err(failed)) if failed.may_have_happened());
        if !is_unknown {
            // A lock whose request may still be carried out stays until others lose patience.
            self.delete_key(own).map_err(|failed| self.failed("unlock", name.as_str(), &failed))?;
        }
        match done {
            None => Err(self.taken(name)),
            Some(_) if held_since.elapsed() > lock::LEASE => {
                let why = "it took longer than its lock is respected by others";
                Err(self.error(StoreErrorKind::Server, "create", name.as_str(), why))
            }
            Some(done) => Ok(done),
        }
    }

    pub(super) fn send_part(
        &self,
        key: &str,
        id: &str,
        index: usize,
        part: &[u8],
    ) -> Result<String, Failed> {
        let request = Request {
            method: "PUT",
            key: key.to_owned(),
            query: vec![("partNumber", (index + 1).to_string()), ("uploadId", id.to_owned())],
            body: Some(part),
            ..Request::default()
        };
        self.client.call(Charge::Write, &request, |good| {
            tag(&good).ok_or_else(|| Trouble::Nonsense("it gave a part no tag".to_owned()))
        })
    }

    /// Makes an object of the parts that were sent.
    pub(super) fn complete(
        &self,
        name: &ObjectName,
        id: &str,
        list: &[u8],
        bytes: u64,
    ) -> Result<(), StoreError> {
        let completed = match self.creation()? {
            Creation::Locked => {
                let complete = |until| self.complete_once(name, id, list, Some(until));
                self.locked(name, complete)?
            }
            // Not every server that knows the condition of a PUT knows it here. The names of large
            // objects are drawn at random, so that nobody creates the same one just now.
            Creation::Conditional if self.length(name)?.is_some() => return Err(self.taken(name)),
            Creation::Conditional => self.complete_once(name, id, list, None),
        };
        let Err(failed) = completed else { return Ok(()) };
        let may_be_ours = failed.tries > 1 && (failed.has_status(404) || failed.has_status(412));
        if may_be_ours && self.length(name)? == Some(bytes) {
            return Ok(());
        }
        if failed.has_status(412) {
            return Err(self.taken(name));
        }
        if failed.has_status(404) {
            let why = "its unfinished bytes were removed meanwhile, as gc does with those of a \
                       writer that it takes for dead";
            return Err(self.error(StoreErrorKind::Server, "create", name.as_str(), why));
        }
        Err(self.failed("create", name.as_str(), &failed))
    }

    fn complete_once(
        &self,
        name: &ObjectName,
        id: &str,
        list: &[u8],
        until: Option<Instant>,
    ) -> Result<(), Failed> {
        // Under a lock the server does not know conditions.
        let condition = until.is_none().then(|| ("if-none-match", "*".to_owned()));
        let request = Request {
            method: "POST",
            key: self.key(name.as_str()),
            query: vec![("uploadId", id.to_owned())],
            headers: condition.into_iter().collect(),
            body: Some(list),
            until,
        };
        self.client.call(Charge::Write, &request, |good| {
            match answer::error_within(&good.body(ANSWER_BYTES_MAX)?) {
                None => Ok(()),
                Some(refusal) => Err(Trouble::Refused(refusal)),
            }
        })
    }
}

fn tag(answer: &Answer) -> Option<String> {
    answer.header("etag").map(str::to_owned)
}
