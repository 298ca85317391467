//! Object lock: versions that the server lets nobody take away before their time.
//!
//! A bucket with locks keeps every version of a key. Whoever puts or deletes a key only lays something
//! on top, so what icecore deletes is deleted version by version: nothing is left, and what is locked
//! is refused instead of being hidden. A name is created once, so its oldest version is the object.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use jiff::Timestamp;
use md5::{Digest, Md5};

use super::answer::{self, Version};
use super::client::{Failed, Request, Trouble};
use super::{ANSWER_BYTES_MAX, BATCH_MAX, OWN, S3Store, SINGLY_MAX, Shared, base64};
use crate::lock::LockPolicy;
use crate::store::traffic::Charge;
use crate::store::{ObjectLock, ObjectName, Store as _, StoreError, StoreErrorKind};

/// Extensions under way at once: as many as keep a backup from waiting long for thousands of packs,
/// and no server takes amiss.
const EXTENSIONS_AT_ONCE: usize = 8;
const UNTIL_HEADER: &str = "x-amz-object-lock-retain-until-date";

/// What the server would not delete.
struct Refused {
    key: String,
    version: String,
    refusal: answer::Refusal,
}

impl Shared {
    /// The headers that lock a new object; none where there are no locks, or not for this key.
    pub(super) fn lock_headers(&self, key: &str, bytes: &[u8]) -> Vec<(&'static str, String)> {
        let Some((policy, until)) = self.lock_of_new(key) else { return Vec::new() };
        vec![
            ("x-amz-object-lock-mode", mode(policy)),
            (UNTIL_HEADER, until.to_string()),
            // Servers want it with every lock.
            ("content-md5", base64(&Md5::digest(bytes))),
        ]
    }

    /// Locks an object that was made of parts: not every server takes headers for that.
    pub(super) fn lock_finished(&self, name: &ObjectName) -> Result<(), StoreError> {
        match self.lock_of_new(&self.key(name.as_str())) {
            Some((policy, until)) => self.lock_one(name, policy, until),
            None => Ok(()),
        }
    }

    fn lock_of_new(&self, key: &str) -> Option<(LockPolicy, Timestamp)> {
        let policy = *self.lock.get()?;
        let name = key.strip_prefix(&self.root)?;
        let applies = !name.starts_with(OWN) && LockPolicy::applies_to(name);
        applies.then(|| (policy, policy.horizon(self.client.now()).objects))
    }

    fn lock_one(
        &self,
        name: &ObjectName,
        policy: LockPolicy,
        until: Timestamp,
    ) -> Result<(), StoreError> {
        let mode = mode(policy);
        let body = format!(
            "<Retention><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>"
        );
        let request = Request {
            method: "PUT",
            key: self.key(name.as_str()),
            query: vec![("retention", String::new())],
            headers: vec![("content-md5", base64(&Md5::digest(body.as_bytes())))],
            body: Some(body.as_bytes()),
            ..Request::default()
        };
        match self.client.call(Charge::Write, &request, |_| Ok(())) {
            Ok(()) => Ok(()),
            // Nobody may shorten a lock: another host may have locked it for longer.
            Err(failed)
                if failed.has_status(403)
                    && self.until(&request.key, None)?.is_some_and(|locked| locked >= until) =>
            {
                Ok(())
            }
            Err(failed) => Err(self.failed("lock", name.as_str(), &failed)),
        }
    }

    /// Until when a version of a key is locked, the newest one unless another is named.
    fn until(&self, key: &str, version: Option<&str>) -> Result<Option<Timestamp>, StoreError> {
        let query = version.map(|id| ("versionId", id.to_owned())).into_iter().collect();
        let request = Request { method: "HEAD", key: key.to_owned(), query, ..Request::default() };
        let until = self.client.call(Charge::Read, &request, |good| {
            let until = good.header(UNTIL_HEADER).map(str::parse::<Timestamp>).transpose();
            until.map_err(|error| Trouble::Nonsense(format!("its lock has no date: {error}")))
        });
        until.map_err(|failed| self.failed("look at the lock of", key, &failed))
    }

    /// All versions of all keys that begin with `prefix`, and marks that hide one.
    fn versions(&self, prefix: &str) -> Result<Vec<Version>, Failed> {
        let (mut found, mut mark) = (Vec::new(), None::<String>);
        loop {
            let mut query = vec![("versions", String::new()), ("prefix", prefix.to_owned())];
            if let Some((key, id)) = mark.as_deref().and_then(|mark| mark.split_once('\n')) {
                query.push(("key-marker", key.to_owned()));
                query.push(("version-id-marker", id.to_owned()));
            }
            let request = Request { method: "GET", query, ..Request::default() };
            let page = self.client.call(Charge::List, &request, |good| {
                answer::versions(&good.body(ANSWER_BYTES_MAX)?).map_err(Trouble::Nonsense)
            })?;
            found.extend(page.items);
            mark = page.next;
            if mark.is_none() {
                return Ok(found);
            }
        }
    }

    /// Deletes objects with all their versions; what is locked is left, and counted.
    fn delete_versions(&self, names: &[ObjectName]) -> Result<Vec<Refused>, StoreError> {
        let keys: BTreeSet<String> = names.iter().map(|name| self.key(name.as_str())).collect();
        let failed = |failed: Failed| self.failed("delete", "objects", &failed);
        let mut versions = self.versions(common_prefix(&keys)).map_err(failed)?;
        versions.retain(|version| keys.contains(&version.key));
        let mut refused = Vec::new();
        for batch in versions.chunks(BATCH_MAX) {
            refused.extend(self.delete_these(batch).map_err(failed)?);
        }
        match refused.first() {
            Some(Refused { key, version, refusal })
                if self
                    .until(key, Some(version))?
                    .is_none_or(|until| until <= self.client.now()) =>
            {
                // It is no lock that keeps it.
                let trouble = Trouble::Refused(answer::Refusal { status: 403, ..refusal.clone() });
                Err(self.failed("delete", key, &Failed { trouble, tries: 1 }))
            }
            _ => Ok(refused),
        }
    }

    fn delete_these(&self, versions: &[Version]) -> Result<Vec<Refused>, Failed> {
        let mut list = String::from("<Delete><Quiet>true</Quiet>");
        for Version { key, id } in versions {
            list.push_str(&format!("<Object><Key>{key}</Key><VersionId>{id}</VersionId></Object>"));
        }
        list.push_str("</Delete>");
        let not_deleted = self.delete_listed(&list)?;
        // A server that does not tell the version means the only one, mostly.
        let of_key = |key: &str| versions.iter().find(|version| version.key == key);
        let refused = not_deleted.into_iter().map(|(Version { key, id }, refusal)| {
            let listed = of_key(&key).map(|version| version.id.clone()).unwrap_or_default();
            let version = if id.is_empty() { listed } else { id };
            Refused { key, version, refusal }
        });
        Ok(refused.collect())
    }

    /// As [`Store::delete`](crate::store::Store::delete) in a bucket with locks.
    pub(super) fn delete_for_good(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        // A few go in their order.
        let at_once = if names.len() > SINGLY_MAX { names.len() } else { 1 };
        for batch in names.chunks(at_once) {
            if let Some(Refused { key, version, .. }) = self.delete_versions(batch)?.first() {
                let until = self.until(key, Some(version))?;
                let until = until.map(|until| format!(" until {until}")).unwrap_or_default();
                let why = format!("its lock keeps it{until}");
                return Err(self.error(StoreErrorKind::Locked, "delete", key, &why));
            }
        }
        Ok(())
    }
}

fn mode(policy: LockPolicy) -> String {
    policy.mode().as_str().to_ascii_uppercase()
}

/// What all of some sorted keys begin with.
fn common_prefix(keys: &BTreeSet<String>) -> &str {
    let (Some(first), Some(last)) = (keys.first(), keys.last()) else { return "" };
    let same = first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
    // Keys are ASCII, so that every byte begins a character.
    first.get(..same).unwrap_or_default()
}

impl ObjectLock for S3Store {
    fn require(&self) -> Result<(), StoreError> {
        let shared = &self.shared;
        let refused =
            |why: &str| shared.error(StoreErrorKind::Unsupported, "lock objects in", "it", why);
        let query = vec![("object-lock", String::new())];
        let request = Request { method: "GET", query, ..Request::default() };
        let asked = shared.client.call(Charge::Read, &request, |good| {
            answer::locking(&good.body(ANSWER_BYTES_MAX)?).map_err(Trouble::Nonsense)
        });
        match asked {
            Ok(answer::Locking { is_enabled: true, has_default: false }) => Ok(()),
            Ok(answer::Locking { has_default: true, .. }) => Err(refused(
                "the bucket locks all that is put into it, and coordination lives by deleting: take \
                 its default retention away",
            )),
            Err(failed)
                if !failed.has_status(404)
                    && !failed.has_status(400)
                    && !failed.has_status(501) =>
            {
                Err(shared.failed("look at", "the locks of the bucket", &failed))
            }
            _ => Err(refused(
                "the bucket was made without object lock; name a new one, and it is made with it",
            )),
        }
    }

    fn engage(&self, policy: LockPolicy) {
        // The policy of a repository never changes.
        self.shared.lock.get_or_init(|| policy);
    }

    fn now(&self) -> Timestamp {
        self.shared.client.now()
    }

    fn locked_until(&self, name: &ObjectName) -> Result<Option<Timestamp>, StoreError> {
        self.shared.until(&self.shared.key(name.as_str()), None)
    }

    fn extend(&self, names: &[ObjectName], until: Timestamp) -> Result<(), StoreError> {
        let Some(policy) = self.shared.lock.get().copied() else { return Ok(()) };
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        let work = || {
            while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.shared.lock_one(name, policy, until) {
                    // The others stop, too.
                    next.store(names.len(), Ordering::Relaxed);
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..EXTENSIONS_AT_ONCE.min(names.len()) {
                // Without more threads this one does it alone.
                let _ = std::thread::Builder::new()
                    .name("icecore-lock".into())
                    .spawn_scoped(scope, work);
            }
            work();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn delete_unlocked(&self, names: &[ObjectName]) -> Result<Vec<ObjectName>, StoreError> {
        if self.shared.lock.get().is_none() {
            return self.delete(names).map(|()| Vec::new());
        }
        for name in names {
            self.shared.must_be_writable("delete", name.as_str())?;
        }
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let refused = self.shared.delete_versions(names)?;
        let kept = |name: &&ObjectName| {
            let key = self.shared.key(name.as_str());
            refused.iter().any(|refused| refused.key == key)
        };
        Ok(names.iter().filter(kept).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_asked_for_by_what_keys_have_in_common() {
        let prefix = |keys: &[&str]| {
            let keys: BTreeSet<String> = keys.iter().map(|key| (*key).to_owned()).collect();
            common_prefix(&keys).to_owned()
        };
        assert_eq!(prefix(&["s/packs/01/a", "s/packs/02/b", "s/packs/0f/c"]), "s/packs/0");
        assert_eq!(prefix(&["s/points/a"]), "s/points/a");
        assert_eq!(prefix(&["a", "b"]), "");
        assert_eq!(prefix(&[]), "");
    }
}
