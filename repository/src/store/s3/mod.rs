//! The store in a bucket of an object store that speaks S3.
//!
//! An object is created by one conditional request (`If-None-Match: *`) where the server knows that,
//! which is found by trying, and under a lock object where it does not (see [`lock`]). What is
//! answered is durable and is listed from then on: every server that this is for says so.
//!
//! Keys are the prefix and the object's name. Beside the objects, `.icecore/` under the prefix holds
//! locks and the object of the trial; no object name begins with a dot.

mod address;
mod answer;
mod client;
mod create;
mod credentials;
mod lock;
mod object_lock;
mod settings;
mod sign;
mod upload;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use md5::{Digest, Md5};

pub use address::S3Address;
pub use settings::S3Settings;

use self::answer::{Refusal, Upload, Version};
use self::client::{Client, Failed, Request, Trouble};
use self::create::Creation;
use self::upload::{S3Writer, Turns};
use super::http::Silence;
use super::retry::Fault;
use super::traffic::Charge;
use super::{
    Access, ObjectEntry, ObjectLock, ObjectName, ObjectWriter, Store, StoreError, StoreErrorKind,
    Traffic, TransferMemory,
};
use crate::lock::LockPolicy;
use crate::names;

/// Listings have at most 1,000 entries of some hundred bytes.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// So many names are deleted by one request at most.
const BATCH_MAX: usize = 1000;
/// So few names are deleted one by one, in their order.
const SINGLY_MAX: usize = 4;
/// What becomes an object so large that it is uploaded in parts.
const UPLOADED: [&str; 4] = [names::PACKS, names::RUNS, names::POINTS, names::RECEIPTS];
/// Where what is no object lies.
const OWN: &str = ".icecore/";

/// Whether a bucket that has to be made is to lock objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// It is.
    Wanted,
    /// It need not.
    NotWanted,
}

/// Objects in a bucket.
#[derive(Debug)]
pub struct S3Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    client: Client,
    location: String,
    /// What all keys begin with.
    root: String,
    access: Access,
    /// None before it was tried.
    creation: Mutex<Option<Creation>>,
    /// How objects are locked, once the repository has said so.
    lock: OnceLock<LockPolicy>,
    turns: Arc<Turns>,
}

impl S3Store {
    /// A place in a bucket; asks nothing of the server yet.
    ///
    /// # Errors
    /// When credentials or certificates cannot be read.
    pub fn open(
        address: &S3Address,
        settings: S3Settings,
        access: Access,
    ) -> Result<Self, StoreError> {
        let location = address.to_string();
        let client = Client::new(address, settings).map_err(|why| setup_error(&location, why))?;
        let (root, creation) = (address.root(), Mutex::default());
        let turns = Arc::new(Turns::within(TransferMemory::MOST.writing()));
        let lock = OnceLock::new();
        let shared = Shared { client, location, root, access, creation, lock, turns };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// With so many bytes of memory for uploads.
    pub(super) fn with_memory(mut self, bytes: u64) -> Self {
        // Nobody else has it yet.
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.turns = Arc::new(Turns::within(bytes));
        }
        self
    }

    /// As [`open`](Self::open) for writing; makes the bucket if it is missing, with object lock
    /// where objects are to be locked.
    ///
    /// # Errors
    /// What the server says.
    pub fn create(
        address: &S3Address,
        settings: S3Settings,
        locking: Locking,
    ) -> Result<Self, StoreError> {
        let store = Self::open(address, settings, Access::ReadWrite)?;
        let shared = &store.shared;
        match shared.page(&shared.root, None) {
            Err(failed) if failed.has_code("NoSuchBucket") => shared.make_bucket(locking)?,
            Err(failed) => return Err(shared.failed("open", "the bucket", &failed)),
            Ok(_) => {}
        }
        Ok(store)
    }
}

/// The store of an address, with the settings of this process's environment.
pub(super) fn from_environment(location: &str) -> Result<S3Settings, StoreError> {
    S3Settings::from_environment().map_err(|why| setup_error(location, why))
}

fn setup_error(location: &str, why: String) -> StoreError {
    StoreError::new(StoreErrorKind::Credentials, "open", "the bucket", location, why)
}

impl Shared {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.root)
    }

    fn failed(&self, action: &'static str, object: &str, failed: &Failed) -> StoreError {
        failed.error(action, object, &self.location)
    }

    fn error(
        &self,
        kind: StoreErrorKind,
        action: &'static str,
        object: &str,
        why: &str,
    ) -> StoreError {
        StoreError::new(kind, action, object, &self.location, why)
    }

    fn must_be_writable(&self, action: &'static str, object: &str) -> Result<(), StoreError> {
        if self.access == Access::ReadWrite {
            return Ok(());
        }
        let why = "the repository is open for reading only";
        Err(self.error(StoreErrorKind::ReadOnly, action, object, why))
    }

    fn make_bucket(&self, locking: Locking) -> Result<(), StoreError> {
        let settings = self.client.settings();
        // AWS wants to hear a region other than its first one here; other servers refuse theirs.
        let place = if settings.is_aws && settings.region != "us-east-1" {
            format!(
                "<CreateBucketConfiguration><LocationConstraint>{}</LocationConstraint>\
                 </CreateBucketConfiguration>",
                settings.region
            )
        } else {
            String::new()
        };
        let body = Some(place.as_bytes());
        let headers = match locking {
            Locking::Wanted => vec![("x-amz-bucket-object-lock-enabled", "true".to_owned())],
            Locking::NotWanted => Vec::new(),
        };
        let request = Request { method: "PUT", headers, body, ..Request::default() };
        match self.client.call(Charge::Write, &request, |_| Ok(())) {
            Err(failed) if failed.has_code("BucketAlreadyOwnedByYou") => Ok(()),
            other => other.map_err(|failed| self.failed("create", "the bucket", &failed)),
        }
    }

    fn random<const N: usize>(&self) -> Result<[u8; N], StoreError> {
        let mut bytes = [0; N];
        getrandom::fill(&mut bytes).map_err(|error| {
            StoreError::from_io("lock", "an object", &self.location, std::io::Error::other(error))
        })?;
        Ok(bytes)
    }

    fn abort(&self, key: &str, id: &str) -> Result<(), Failed> {
        let request = Request {
            method: "DELETE",
            key: key.to_owned(),
            query: vec![("uploadId", id.to_owned())],
            ..Request::default()
        };
        match self.client.call(Charge::Delete, &request, |_| Ok(())) {
            Err(failed) if failed.has_status(404) => Ok(()),
            other => other,
        }
    }

    fn delete_key(&self, key: &str) -> Result<(), Failed> {
        let request = Request { method: "DELETE", key: key.to_owned(), ..Request::default() };
        match self.client.call(Charge::Delete, &request, |_| Ok(())) {
            Err(failed) if failed.has_status(404) && !failed.has_code("NoSuchBucket") => Ok(()),
            other => other,
        }
    }

    fn delete_batch(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        let mut list = String::from("<Delete><Quiet>true</Quiet>");
        for name in names {
            list.push_str("<Object><Key>");
            list.push_str(&self.key(name.as_str()));
            list.push_str("</Key></Object>");
        }
        list.push_str("</Delete>");
        let failed = |failed: Failed| self.failed("delete", "objects", &failed);
        match self.delete_listed(&list).map_err(failed)?.pop() {
            None => Ok(()),
            Some((_, refusal)) => {
                Err(failed(Failed { trouble: Trouble::Refused(refusal), tries: 1 }))
            }
        }
    }

    /// Deletes what a list names; returns what of it was refused.
    fn delete_listed(&self, list: &str) -> Result<Vec<(Version, Refusal)>, Failed> {
        let request = Request {
            method: "POST",
            query: vec![("delete", String::new())],
            headers: vec![("content-md5", base64(&Md5::digest(list.as_bytes())))],
            body: Some(list.as_bytes()),
            ..Request::default()
        };
        self.client.call(Charge::Delete, &request, |good| {
            let body = good.body(ANSWER_BYTES_MAX)?;
            if let Some(refusal) = answer::error_within(&body) {
                return Err(Trouble::Refused(refusal));
            }
            let refused = answer::not_deleted(&body).map_err(Trouble::Nonsense)?;
            match refused.iter().find(|(_, refusal)| refusal.fault() != Fault::Final) {
                Some((_, refusal)) => Err(Trouble::Refused(refusal.clone())),
                None => Ok(refused),
            }
        })
    }

    /// Length of an object, if there is one.
    fn length(&self, name: &ObjectName) -> Result<Option<u64>, StoreError> {
        self.length_until(name, None)
    }

    fn length_until(
        &self,
        name: &ObjectName,
        until: Option<Instant>,
    ) -> Result<Option<u64>, StoreError> {
        let key = self.key(name.as_str());
        let request = Request { method: "HEAD", key, until, ..Request::default() };
        let length = self.client.call(Charge::Read, &request, |good| {
            good.length().ok_or_else(|| Trouble::Nonsense("it gave no length".to_owned()))
        });
        match length {
            Ok(length) => Ok(Some(length)),
            Err(failed) if failed.has_status(404) => Ok(None),
            Err(failed) => Err(self.failed("look at", name.as_str(), &failed)),
        }
    }

    fn get_all(&self, name: &ObjectName, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        let key = self.key(name.as_str());
        let request = Request { method: "GET", key, ..Request::default() };
        let content = self.client.call(Charge::Read, &request, |good| match good.length() {
            Some(bytes) if bytes > bytes_max => Ok(Err(bytes)),
            _ => Ok(Ok(good.body(bytes_max)?)),
        });
        match content.map_err(|failed| self.failed("read", name.as_str(), &failed))? {
            Ok(content) => {
                self.client.meter.received(content.len() as u64);
                Ok(content)
            }
            Err(bytes) => {
                let why = format!("it has {bytes} bytes where at most {bytes_max} are possible");
                Err(self.error(StoreErrorKind::Corrupt, "read", name.as_str(), &why))
            }
        }
    }

    fn get_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        let wanted = buffer.len() as u64;
        let last = offset.saturating_add(wanted - 1);
        let request = Request {
            method: "GET",
            key: self.key(name.as_str()),
            headers: vec![("range", format!("bytes={offset}-{last}"))],
            ..Request::default()
        };
        let got = self.client.call(Charge::Read, &request, |good| {
            // rclone has status 200 for a part, so the status does not tell.
            let begins = good.header("content-range").map(str::to_owned);
            let is_range =
                begins.is_some_and(|range| range.starts_with(&format!("bytes {offset}-")));
            let is_all = offset == 0 && good.length() == Some(wanted);
            match good.length() {
                _ if !is_range && !is_all => {
                    let why = "the server does not answer with the part that it was asked for";
                    Err(Trouble::Silent(Silence::Impossible(why.to_owned())))
                }
                Some(bytes) if bytes < wanted => Ok(Some(bytes)),
                _ => Ok(good.fill(buffer).map(|()| None)?),
            }
        });
        let end = match got {
            Ok(None) => {
                self.client.meter.received(wanted);
                return Ok(());
            }
            Ok(Some(bytes)) => format!("at byte {}", offset + bytes),
            Err(failed) if failed.has_status(416) => "before it".to_owned(),
            Err(failed) => return Err(self.failed("read", name.as_str(), &failed)),
        };
        let why = format!("it ends {end} in a read of {wanted} bytes at {offset}");
        Err(self.error(StoreErrorKind::Corrupt, "read", name.as_str(), &why))
    }

    /// One page of the keys that begin with `prefix`.
    fn page(
        &self,
        prefix: &str,
        from: Option<String>,
    ) -> Result<answer::Page<(String, u64)>, Failed> {
        let mut query = vec![("list-type", "2".to_owned()), ("prefix", prefix.to_owned())];
        query.extend(from.map(|token| ("continuation-token", token)));
        let request = Request { method: "GET", query, ..Request::default() };
        self.client.call(Charge::List, &request, |good| {
            answer::objects(&good.body(ANSWER_BYTES_MAX)?).map_err(Trouble::Nonsense)
        })
    }

    /// All keys that begin with `prefix`, and their bytes.
    fn keys(&self, prefix: &str) -> Result<Vec<(String, u64)>, Failed> {
        let mut page = self.page(prefix, None)?;
        let mut keys = std::mem::take(&mut page.items);
        while let Some(next) = page.next.take() {
            page = self.page(prefix, Some(next))?;
            keys.append(&mut page.items);
        }
        Ok(keys)
    }

    fn unfinished(&self) -> Result<Vec<Upload>, Failed> {
        let mut found = Vec::new();
        let mut mark: Option<String> = None;
        loop {
            let mut query = vec![("uploads", String::new()), ("prefix", self.root.clone())];
            if let Some((key, id)) = mark.as_deref().and_then(|mark| mark.split_once('\n')) {
                query.push(("key-marker", key.to_owned()));
                query.push(("upload-id-marker", id.to_owned()));
            }
            let request = Request { method: "GET", query, ..Request::default() };
            let page = self.client.call(Charge::List, &request, |good| {
                answer::uploads(&good.body(ANSWER_BYTES_MAX)?).map_err(Trouble::Nonsense)
            });
            let page = match page {
                // rclone's answer for a bucket into which nothing was uploaded in parts so far.
                Err(failed) if mark.is_none() && failed.has_code("NoSuchUpload") => {
                    return Ok(found);
                }
                other => other?,
            };
            found.extend(page.items);
            mark = page.next;
            if mark.is_none() {
                // Not every server looks at the prefix.
                found.retain(|upload| may_be_of(&self.root, &upload.key));
                return Ok(found);
            }
        }
    }
}

/// Whether an upload may be of the repository whose keys begin with `root`: others may have theirs in
/// the same bucket.
fn may_be_of(root: &str, key: &str) -> bool {
    let name = key.strip_prefix(root);
    name.is_some_and(|name| UPLOADED.iter().any(|prefix| name.starts_with(prefix)))
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

impl Store for S3Store {
    fn location(&self) -> &str {
        &self.shared.location
    }

    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        self.shared.must_be_writable("create", name.as_str())?;
        Ok(Box::new(S3Writer::new(Arc::clone(&self.shared), name.clone())))
    }

    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<(), StoreError> {
        self.shared.must_be_writable("create", name.as_str())?;
        if bytes.len() <= upload::PART_BYTES {
            return self.shared.create_small(name, bytes);
        }
        let mut writer = self.create(name)?;
        writer.write(bytes)?;
        writer.finish().map(drop)
    }

    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        if buffer.is_empty() { Ok(()) } else { self.shared.get_range(name, offset, buffer) }
    }

    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        let missing = || {
            let why = "there is no object of that name";
            self.shared.error(StoreErrorKind::NotFound, "look at", name.as_str(), why)
        };
        self.shared.length(name)?.ok_or_else(missing)
    }

    fn read(&self, name: &ObjectName, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        self.shared.get_all(name, bytes_max)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        let shared = &self.shared;
        let keys = shared.keys(&shared.key(prefix));
        let keys = keys.map_err(|failed| shared.failed("list", prefix, &failed))?;
        let entry = |(key, bytes): (String, u64)| {
            let name = ObjectName::new(key.strip_prefix(&shared.root)?).ok()?;
            Some(ObjectEntry { name, bytes })
        };
        let mut entries: Vec<ObjectEntry> = keys.into_iter().filter_map(entry).collect();
        entries.sort_unstable();
        entries.dedup();
        Ok(entries)
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        for name in names {
            self.shared.must_be_writable("delete", name.as_str())?;
        }
        if self.shared.lock.get().is_some() {
            return self.shared.delete_for_good(names);
        }
        if names.len() > SINGLY_MAX {
            return names.chunks(BATCH_MAX).try_for_each(|batch| self.shared.delete_batch(batch));
        }
        names.iter().try_for_each(|name| {
            let deleted = self.shared.delete_key(&self.shared.key(name.as_str()));
            deleted.map_err(|failed| self.shared.failed("delete", name.as_str(), &failed))
        })
    }

    fn settle(&self, _prefix: &str) -> Result<(), StoreError> {
        // What a server has answered for is durable.
        Ok(())
    }

    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        let uploads = self.shared.unfinished();
        let uploads =
            uploads.map_err(|failed| self.shared.failed("list", "unfinished uploads", &failed))?;
        Ok(uploads.into_iter().map(|upload| format!("{}\n{}", upload.key, upload.id)).collect())
    }

    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        for (key, id) in leftovers.iter().filter_map(|leftover| leftover.split_once('\n')) {
            self.shared.must_be_writable("remove", key)?;
            let aborted = self.shared.abort(key, id);
            aborted.map_err(|failed| self.shared.failed("remove", key, &failed))?;
        }
        Ok(())
    }

    fn lock(&self) -> Option<&dyn ObjectLock> {
        Some(self)
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(self.shared.client.meter.read())
    }
}

#[cfg(test)]
mod tests {
    use super::may_be_of;

    #[test]
    fn uploads_of_others_in_the_bucket_are_not_ours() {
        assert!(may_be_of("", "packs/ab/x") && may_be_of("site/", "site/points/x"));
        for other in ["site2/packs/ab/x", "film.mkv", "site/packs/ab/x"] {
            assert!(!may_be_of("", other), "{other}");
        }
        assert!(!may_be_of("site/", "site/two/packs/ab/x"));
        assert!(!may_be_of("site/", "packs/ab/x"));
    }
}
