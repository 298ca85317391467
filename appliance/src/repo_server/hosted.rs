//! One repository on this server: the directory store, and what clients may do to it.

use std::collections::{BTreeSet, HashMap};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use icecore_repository::rights::{Act, Owner, Purpose, Right, may};
use icecore_repository::store::{
    Access, DirectoryStore, ObjectEntry, ObjectName, ObjectWriter, Store as _,
};

use super::denied::Denied;
use super::tokens::Client;

/// Objects that one client may be writing at once: a backup writes two or three.
const UPLOADS_MAX: usize = 64;
/// An upload of which nothing was heard for so long is given up. A client writes on within seconds,
/// or tries again within a minute.
pub const UPLOAD_IDLE_MAX: Duration = Duration::from_secs(600);
/// Lines of a listing in one answer.
pub const LISTING_MAX: usize = 10_000;
/// Who announced which writer, and wrote which point. No object's name begins with a dot.
const OWNERS: &str = ".owners";

/// A repository that is served.
#[derive(Debug)]
pub struct Hosted {
    store: DirectoryStore,
    owners: PathBuf,
    used: Arc<AtomicU64>,
    /// Held by a deletion: what two of them delete at once is given back once.
    deleting: Mutex<()>,
    uploads: Mutex<HashMap<String, Arc<Upload>>>,
}

/// An object that a client is writing.
struct Upload {
    client: String,
    used: Arc<AtomicU64>,
    state: Mutex<Writing>,
}

struct Writing {
    /// None after success and after failure.
    writer: Option<Box<dyn ObjectWriter>>,
    bytes: u64,
    finished: bool,
    heard: Instant,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("client", &self.client).finish_non_exhaustive()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !state.finished {
            self.used.fetch_sub(state.bytes, Ordering::Relaxed);
        }
    }
}

/// Where it is noted whose writer or point this object is of.
fn owner_file(purpose: &Purpose) -> Option<String> {
    let of_writer = purpose.writer().map(|writer| writer.as_str().to_owned());
    of_writer.or_else(|| purpose.point().map(|point| format!("point.{point}")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hosted {
    /// The repository in this directory, which must be there.
    pub fn open(directory: &Path) -> Result<Self, Denied> {
        let store = DirectoryStore::open(directory, Access::ReadWrite).map_err(|error| {
            if error.is_not_found() { Denied::no_repository() } else { error.into() }
        })?;
        Self::of(store, directory)
    }

    /// The repository in this directory, made if it is not there.
    pub fn make(directory: &Path) -> Result<Self, Denied> {
        Self::of(DirectoryStore::create(directory)?, directory)
    }

    fn of(store: DirectoryStore, directory: &Path) -> Result<Self, Denied> {
        let used = store.list("")?.iter().map(|entry| entry.bytes).sum();
        let (owners, used) = (directory.join(OWNERS), Arc::new(AtomicU64::new(used)));
        let (deleting, uploads) = Default::default();
        Ok(Self { store, owners, used, deleting, uploads })
    }

    /// Refuses what the client may not do to an object.
    fn judge(&self, client: &Client, act: Act, name: &ObjectName) -> Result<(), Denied> {
        let purpose = Purpose::of(name);
        let owner = self.owner(client, &purpose);
        may(client.right, act, &purpose, owner).map_err(|why| {
            tracing::warn!(client = client.name, object = %name, ?act, "refused: {why}");
            Denied::forbidden(why)
        })
    }

    fn owner(&self, client: &Client, purpose: &Purpose) -> Owner {
        let Some(file) = owner_file(purpose) else { return Owner::Nobody };
        match std::fs::read_to_string(self.owners.join(file)) {
            Ok(owner) if owner == client.name => Owner::Own,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Owner::Nobody,
            _ => Owner::Other,
        }
    }

    /// Notes whose writer or point it is, before anybody can see it. Lost in a power cut, it only
    /// keeps the client from taking its announcement back (the next gc does), and a token that reads
    /// its own points from reading this one.
    fn claim(&self, client: &Client, name: &ObjectName) -> Result<(), Denied> {
        let Some(file) = owner_file(&Purpose::of(name)) else { return Ok(()) };
        let path = self.owners.join(file);
        let claim = || -> std::io::Result<String> {
            if !self.owners.is_dir() {
                crate::state::make_private_dir(&self.owners)?;
            }
            // Whoever was first stays: a point is not claimed while another uploads it.
            let mut new = std::fs::OpenOptions::new();
            match new.write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    file.write_all(client.name.as_bytes()).map(|()| client.name.clone())
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    std::fs::read_to_string(&path)
                }
                Err(e) => Err(e),
            }
        };
        let owner =
            claim().map_err(|e| Denied::internal(format!("an owner was not noted: {e}")))?;
        if owner == client.name || client.right == Right::Administer {
            return Ok(());
        }
        Err(Denied::forbidden("another token has begun to write this"))
    }

    /// Whether a client may see an object: to others than those who read their own all is to be
    /// seen. To those it is as if there were no other points, and no list of data: packs and maps
    /// have random names, which only manifests and maps tell.
    fn shows(&self, client: &Client, name: &ObjectName) -> bool {
        let purpose = Purpose::of(name);
        may(client.right, Act::Read, &purpose, self.owner(client, &purpose)).is_ok()
    }

    fn require_shown(&self, client: &Client, name: &ObjectName) -> Result<(), Denied> {
        if self.shows(client, name) {
            return Ok(());
        }
        // What one may not see one does not even learn to be there.
        use icecore_repository::store::{StoreError, StoreErrorKind};
        let (kind, location) = (StoreErrorKind::NotFound, self.store.location());
        let why = "there is no object of that name";
        Err(StoreError::new(kind, "read", name.as_str(), location, why).into())
    }

    /// The length of an object.
    pub fn bytes(&self, client: &Client, name: &ObjectName) -> Result<u64, Denied> {
        self.require_shown(client, name)?;
        Ok(self.store.len(name)?)
    }

    /// Bytes of an object from `offset` on.
    pub fn read(
        &self,
        client: &Client,
        name: &ObjectName,
        offset: u64,
        bytes: usize,
    ) -> Result<Vec<u8>, Denied> {
        self.require_shown(client, name)?;
        let mut content = vec![0; bytes];
        self.store.read_exact(name, offset, &mut content)?;
        Ok(content)
    }

    /// Objects below a prefix that come after a name, and whether there are more.
    pub fn list(
        &self,
        client: &Client,
        prefix: &str,
        after: Option<&ObjectName>,
    ) -> Result<(Vec<ObjectEntry>, bool), Denied> {
        let mut entries = self.store.list(prefix)?;
        if client.right == Right::Own {
            let is_data = |name: &ObjectName| Purpose::of(name) == Purpose::Data;
            entries.retain(|entry| !is_data(&entry.name) && self.shows(client, &entry.name));
        }
        let begin = after.map_or(0, |after| entries.partition_point(|entry| entry.name <= *after));
        entries.drain(..begin);
        let more = entries.len() > LISTING_MAX;
        entries.truncate(LISTING_MAX);
        Ok((entries, more))
    }

    /// Makes durable what is visible below a prefix.
    pub fn settle(&self, prefix: &str) -> Result<(), Denied> {
        Ok(self.store.settle(prefix)?)
    }

    /// Unfinished objects; whose they are is not known, so who sees his own alone sees none.
    pub fn leftovers(&self, client: &Client) -> Result<Vec<String>, Denied> {
        if client.right == Right::Own {
            return Ok(Vec::new());
        }
        Ok(self.store.leftovers()?)
    }

    /// Removes unfinished objects, of running writers too.
    pub fn remove_leftovers(&self, client: &Client, names: &[String]) -> Result<(), Denied> {
        if client.right < Right::Administer {
            return Err(Denied::forbidden(
                "unfinished objects are removed by a gc, and that takes \
                                          a token with the right to administer",
            ));
        }
        Ok(self.store.remove_leftovers(names)?)
    }

    /// Deletes objects, all of which the client may delete.
    pub fn delete(&self, client: &Client, names: &[ObjectName]) -> Result<(), Denied> {
        names.iter().try_for_each(|name| self.judge(client, Act::Delete, name))?;
        // A name may be given twice.
        let distinct: BTreeSet<&ObjectName> = names.iter().collect();
        let deleting = lock(&self.deleting);
        let bytes: u64 = distinct.into_iter().filter_map(|name| self.store.len(name).ok()).sum();
        self.store.delete(names)?;
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            Some(used.saturating_sub(bytes))
        });
        drop(deleting);
        for name in names {
            let purpose = Purpose::of(name);
            let goes = matches!(purpose, Purpose::Announcement(_) | Purpose::Manifest(_));
            if let Some(file) = owner_file(&purpose).filter(|_| goes) {
                // One that stays is a few bytes, and of a writer or point that never comes again.
                let _ = std::fs::remove_file(self.owners.join(file));
            }
        }
        Ok(())
    }

    /// Begins an object; the id of the upload.
    pub fn begin(&self, client: &Client, name: &ObjectName) -> Result<String, Denied> {
        self.judge(client, Act::Create, name)?;
        if self.store.exists(name)? {
            return Err(Denied::from(self.taken(name)));
        }
        let theirs = |uploads: &HashMap<String, Arc<Upload>>| {
            uploads.values().filter(|upload| upload.client == client.name).count()
        };
        if theirs(&lock(&self.uploads)) >= UPLOADS_MAX {
            let why = format!("{} writes {UPLOADS_MAX} objects already", client.name);
            return Err(Denied::busy(why));
        }
        self.claim(client, name)?;
        let writer = self.store.create(name)?;
        let heard = Instant::now();
        let state = Writing { writer: Some(writer), bytes: 0, finished: false, heard };
        let (used, state) = (Arc::clone(&self.used), Mutex::new(state));
        let upload = Upload { client: client.name.clone(), used, state };
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|e| Denied::internal(e.to_string()))?;
        let id = format!("{:032x}", u128::from_le_bytes(random));
        lock(&self.uploads).insert(id.clone(), Arc::new(upload));
        Ok(id)
    }

    fn taken(&self, name: &ObjectName) -> icecore_repository::store::StoreError {
        use icecore_repository::store::{StoreError, StoreErrorKind};
        let kind = StoreErrorKind::AlreadyExists;
        StoreError::new(kind, "create", name.as_str(), self.store.location(), "it exists already")
    }

    fn upload(&self, client: &Client, id: &str) -> Result<Arc<Upload>, Denied> {
        let found = lock(&self.uploads).get(id).cloned();
        // Of another client's upload one does not even learn that it is there.
        found.filter(|upload| upload.client == client.name).ok_or_else(Denied::no_upload)
    }

    /// Takes bytes that belong at `offset`. What is there already came with a request whose answer
    /// was lost, and is passed over.
    pub fn append(
        &self,
        client: &Client,
        id: &str,
        offset: u64,
        bytes: &[u8],
        quota: Option<u64>,
    ) -> Result<(), Denied> {
        let upload = self.upload(client, id)?;
        let mut state = lock(&upload.state);
        state.heard = Instant::now();
        let known = state.bytes.checked_sub(offset).ok_or_else(|| {
            Denied::nonsense(format!("bytes before {offset} are missing from the upload"))
        })?;
        let known = usize::try_from(known).unwrap_or(usize::MAX);
        let Some(new) = bytes.get(known..).filter(|new| !new.is_empty()) else { return Ok(()) };
        // What is finished or broken takes no space.
        let state = &mut *state;
        let Some(writer) = state.writer.as_mut() else { return Err(Denied::no_upload()) };
        self.take_space(client, new.len() as u64, quota)?;
        state.bytes += new.len() as u64;
        let written = writer.write(new);
        if written.is_err() {
            state.writer = None;
        }
        Ok(written?)
    }

    /// An administrator is not held to the quota: making room takes a little of it.
    fn take_space(&self, client: &Client, bytes: u64, quota: Option<u64>) -> Result<(), Denied> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        match quota {
            Some(quota)
                if before.saturating_add(bytes) > quota && client.right < Right::Administer =>
            {
                self.used.fetch_sub(bytes, Ordering::Relaxed);
                Err(Denied::over_quota(quota))
            }
            _ => Ok(()),
        }
    }

    /// Makes the object durable and visible. Asked again, it says the same.
    pub fn finish(&self, client: &Client, id: &str, bytes: u64) -> Result<(), Denied> {
        let upload = self.upload(client, id)?;
        let mut state = lock(&upload.state);
        state.heard = Instant::now();
        if state.bytes != bytes {
            let why = format!("{bytes} bytes were sent and {} came", state.bytes);
            return Err(Denied::nonsense(why));
        }
        if state.finished {
            return Ok(());
        }
        let Some(writer) = state.writer.take() else { return Err(Denied::no_upload()) };
        writer.finish()?;
        state.finished = true;
        Ok(())
    }

    /// Gives an upload up.
    pub fn abandon(&self, client: &Client, id: &str) -> Result<(), Denied> {
        self.upload(client, id)?;
        let gone = lock(&self.uploads).remove(id);
        drop(gone);
        Ok(())
    }

    /// Gives up uploads of which nothing was heard for `patience`.
    pub fn forget_idle(&self, patience: Duration) {
        let mut uploads = lock(&self.uploads);
        // One whose state is locked is at work.
        let idle = |upload: &Upload| {
            upload.state.try_lock().is_ok_and(|state| state.heard.elapsed() >= patience)
        };
        let (gone, kept): (HashMap<_, _>, HashMap<_, _>) =
            uploads.drain().partition(|(_, upload)| idle(upload));
        *uploads = kept;
        drop(uploads);
        // Removing their files is not for under the lock.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITER: &str = "coordination/writers/0123456789abcdef";
    const PACK: &str = "packs/ab/ab0123456789abcdef0123456789abcd";

    fn name(text: &str) -> ObjectName {
        ObjectName::new(text).unwrap()
    }

    fn client(name: &str, right: Right) -> Client {
        Client { name: name.into(), right }
    }

    fn put(hosted: &Hosted, client: &Client, text: &str, bytes: &[u8]) -> Result<(), Denied> {
        let id = hosted.begin(client, &name(text))?;
        hosted.append(client, &id, 0, bytes, None)?;
        hosted.finish(client, &id, bytes.len() as u64)
    }

    #[test]
    fn requests_that_come_twice_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let hosted = Hosted::make(dir.path()).unwrap();
        let host = client("one", Right::Append);
        let id = hosted.begin(&host, &name(PACK)).unwrap();
        hosted.append(&host, &id, 0, b"hello ", None).unwrap();
        hosted.append(&host, &id, 0, b"hello ", None).unwrap();
        hosted.append(&host, &id, 3, b"lo world", None).unwrap();
        assert!(hosted.append(&host, &id, 12, b"gap", None).is_err());
        assert!(hosted.finish(&host, &id, 12).is_err());
        hosted.finish(&host, &id, 11).unwrap();
        hosted.finish(&host, &id, 11).unwrap();
        assert_eq!(hosted.read(&host, &name(PACK), 0, 11).unwrap(), b"hello world");
        hosted.abandon(&host, &id).unwrap();
        assert_eq!(hosted.bytes(&host, &name(PACK)).unwrap(), 11);
        assert!(hosted.begin(&host, &name(PACK)).is_err());
    }

    #[test]
    fn an_upload_is_its_clients_and_ends_when_nobody_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let hosted = Hosted::make(dir.path()).unwrap();
        let (one, two) = (client("one", Right::Append), client("two", Right::Administer));
        let id = hosted.begin(&one, &name(PACK)).unwrap();
        assert!(hosted.append(&two, &id, 0, b"x", None).is_err());
        assert!(hosted.abandon(&two, &id).is_err());
        hosted.append(&one, &id, 0, b"x", None).unwrap();
        assert_eq!(hosted.leftovers(&one).unwrap().len(), 1);
        assert!(hosted.remove_leftovers(&one, &hosted.leftovers(&one).unwrap()).is_err());
        hosted.forget_idle(UPLOAD_IDLE_MAX);
        hosted.append(&one, &id, 1, b"y", None).unwrap();
        hosted.forget_idle(Duration::ZERO);
        assert!(hosted.append(&one, &id, 2, b"z", None).is_err());
        assert!(hosted.leftovers(&one).unwrap().is_empty());
        let uploads: Vec<_> = (0..UPLOADS_MAX)
            .map(|n| hosted.begin(&one, &name(&format!("packs/ab/ab{n:030x}"))).unwrap())
            .collect();
        assert!(hosted.begin(&one, &name(PACK)).is_err());
        hosted.abandon(&one, &uploads[0]).unwrap();
        hosted.begin(&one, &name(PACK)).unwrap();
    }

    #[test]
    fn an_announcement_is_taken_back_by_who_made_it_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (client("one", Right::Append), client("two", Right::Append));
        let hosted = Hosted::make(dir.path()).unwrap();
        put(&hosted, &one, WRITER, b"here").unwrap();
        let hosted = Hosted::open(dir.path()).unwrap();
        let beat = "coordination/beats/0123456789abcdef.00000000000000000001";
        assert!(put(&hosted, &two, beat, b"").is_err());
        assert!(hosted.delete(&two, &[name(WRITER)]).is_err());
        put(&hosted, &one, beat, b"").unwrap();
        put(&hosted, &one, PACK, b"data").unwrap();
        assert!(hosted.delete(&one, &[name(beat), name(PACK)]).is_err());
        assert!(hosted.bytes(&one, &name(beat)).is_ok(), "all of a request is allowed, or nothing");
        hosted.delete(&one, &[name(beat), name(WRITER)]).unwrap();
        assert_eq!(hosted.list(&one, "coordination/", None).unwrap().0, []);
        hosted.delete(&client("keeper", Right::Administer), &[name(PACK)]).unwrap();
    }

    #[test]
    fn who_sees_his_own_points_sees_no_others_and_no_list_of_data() {
        let dir = tempfile::tempdir().unwrap();
        let hosted = Hosted::make(dir.path()).unwrap();
        let (one, two) = (client("one", Right::Own), client("two", Right::Own));
        let reader = client("reader", Right::Read);
        let (mine, theirs) = ("points/0123456789abcd", "points/0123456789abce");
        put(&hosted, &one, PACK, b"data").unwrap();
        put(&hosted, &one, mine, b"mine").unwrap();
        put(&hosted, &two, theirs, b"theirs").unwrap();
        assert!(put(&hosted, &two, "receipts/0123456789abcd", b"x").is_err(), "not their point");
        put(&hosted, &one, "receipts/0123456789abcd", b"x").unwrap();
        let listed =
            |client: &Client, prefix: &str| hosted.list(client, prefix, None).unwrap().0.len();
        let counts =
            |client| [listed(client, "points/"), listed(client, "packs/"), listed(client, "")];
        assert_eq!(
            [counts(&one), counts(&two), counts(&reader)],
            [[1, 0, 2], [1, 0, 1], [2, 1, 4]]
        );
        for (client, name_of, sees) in [
            (&one, mine, true),
            (&one, theirs, false),
            (&two, mine, false),
            (&two, "receipts/0123456789abcd", false),
            (&two, PACK, true),
            (&reader, theirs, true),
        ] {
            let name = name(name_of);
            assert_eq!(hosted.bytes(client, &name).is_ok(), sees, "{client:?} {name_of}");
            assert_eq!(hosted.read(client, &name, 0, 1).is_ok(), sees, "{client:?} {name_of}");
        }
        // Of a point that another is still writing nobody becomes the owner.
        let begun = name("points/0123456789abcf");
        hosted.begin(&one, &begun).unwrap();
        assert!(hosted.begin(&two, &begun).is_err());
    }

    #[test]
    fn a_quota_counts_what_is_there_and_what_is_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let host = client("one", Right::Append);
        let keeper = client("keeper", Right::Administer);
        put(&Hosted::make(dir.path()).unwrap(), &host, PACK, &[1; 60]).unwrap();
        let hosted = Hosted::open(dir.path()).unwrap();
        let quota = Some(100);
        let other = name("packs/cd/cd0123456789abcdef0123456789abcd");
        let id = hosted.begin(&host, &other).unwrap();
        hosted.append(&host, &id, 0, &[2; 40], quota).unwrap();
        assert!(hosted.append(&host, &id, 40, &[2], quota).is_err());
        hosted.abandon(&host, &id).unwrap();
        let id = hosted.begin(&host, &other).unwrap();
        hosted.append(&host, &id, 0, &[2; 40], quota).unwrap();
        hosted.finish(&host, &id, 40).unwrap();
        let fate = name("coordination/fates/0123456789abcd.00000000");
        let id = hosted.begin(&keeper, &fate).unwrap();
        hosted.append(&keeper, &id, 0, &[3; 10], quota).unwrap();
        hosted.finish(&keeper, &id, 10).unwrap();
        hosted.delete(&keeper, &[name(PACK)]).unwrap();
        let id = hosted.begin(&host, &name(PACK)).unwrap();
        hosted.append(&host, &id, 0, &[4; 50], quota).unwrap();
        assert!(hosted.append(&host, &id, 50, &[4], quota).is_err());
    }

    #[test]
    fn nobody_gets_more_or_less_space_than_what_lies_there() {
        let dir = tempfile::tempdir().unwrap();
        let hosted = Hosted::make(dir.path()).unwrap();
        let host = client("one", Right::Append);
        let used = || hosted.used.load(Ordering::Relaxed);
        put(&hosted, &host, PACK, &[1; 60]).unwrap();
        let beat =
            "coordination/services/0123456789abcdef.00000000000000000001.00000000000000000002";
        put(&hosted, &host, beat, &[2; 30]).unwrap();
        hosted.delete(&host, &vec![name(beat); 4]).unwrap();
        assert_eq!(used(), 60);
        let id = hosted.begin(&host, &name("packs/cd/cd0123456789abcdef0123456789abcd")).unwrap();
        hosted.finish(&host, &id, 0).unwrap();
        assert!(hosted.append(&host, &id, 0, &[3; 50], None).is_err());
        assert_eq!(used(), 60);
    }
}
