//! The store on an Icecore repository server (`icecore repo serve`), over HTTPS.
//!
//! A small object goes in one request; others are uploads: begun, sent in pieces that name their
//! place, finished. So a request whose answer was lost can be sent again: a piece that is there is
//! passed over, an upload that is finished stays finished. Where even that leaves it open whether an
//! object was made by us, it is read back and compared.

mod address;
mod client;

use serde::{Deserialize, Serialize};

pub use address::{BadServerAddress, ServerAddress};

use super::{Access, ObjectEntry, ObjectName, ObjectWriter, Store, StoreError, StoreErrorKind};
use client::{Body, Client, Failed};

/// The header of an answer that tells the kind of an error.
pub const ERROR_HEADER: &str = "x-icecore-error";
/// The header that tells an object's length where the object is not sent.
pub const BYTES_HEADER: &str = "x-icecore-bytes";
/// The header that tells what the token allows.
pub const RIGHT_HEADER: &str = "x-icecore-right";
/// An object of more bytes, or whose length is not known, is an upload; an upload's piece has no
/// more bytes either. Few enough to be sent again after a lost answer.
pub const OBJECT_PUT_BYTES_MAX: usize = 4 << 20;

/// Names in one request to delete.
const NAMES_MAX: usize = 500;

/// An answer to `GET …/list`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Listing {
    /// Names and lengths in bytes, sorted by name.
    pub entries: Vec<(String, u64)>,
    /// Whether more come after the last one.
    pub more: bool,
}

/// Names of objects or of leftovers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Names {
    /// In no order.
    pub names: Vec<String>,
}

/// An answer to `POST …/uploads`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Started {
    /// What the upload is called.
    pub upload: String,
}

/// How a kind of error is called in [`ERROR_HEADER`].
#[must_use]
pub fn kind_name(kind: StoreErrorKind) -> &'static str {
    match kind {
        StoreErrorKind::NotFound => "not-found",
        StoreErrorKind::AlreadyExists => "already-exists",
        StoreErrorKind::NoSpace => "no-space",
        StoreErrorKind::ReadOnly => "read-only",
        StoreErrorKind::Permission => "permission",
        StoreErrorKind::Corrupt => "corrupt",
        StoreErrorKind::Credentials => "credentials",
        StoreErrorKind::Unreachable => "unreachable",
        StoreErrorKind::Server => "server",
        StoreErrorKind::Locked => "locked",
        StoreErrorKind::OverBudget => "over-budget",
        StoreErrorKind::Unsupported => "unsupported",
        StoreErrorKind::Io => "io",
    }
}

fn kind_of(name: &str) -> Option<StoreErrorKind> {
    use StoreErrorKind as Kind;
    let kinds = [
        Kind::NotFound,
        Kind::AlreadyExists,
        Kind::NoSpace,
        Kind::ReadOnly,
        Kind::Permission,
        Kind::Corrupt,
        Kind::Credentials,
        Kind::Unreachable,
        Kind::Server,
        Kind::Locked,
        Kind::OverBudget,
        Kind::Unsupported,
        Kind::Io,
    ];
    kinds.into_iter().find(|kind| kind_name(*kind) == name)
}

/// Objects of a repository on a server.
#[derive(Debug)]
pub struct ServedStore {
    client: Client,
    access: Access,
}

impl ServedStore {
    /// Opens a repository's store, which must be there.
    ///
    /// # Errors
    /// `NotFound` when there is nothing of that name, `Permission` when the token is not accepted,
    /// else what the server or the network says.
    pub fn open(address: &ServerAddress, access: Access) -> Result<Self, StoreError> {
        let client = Client::new(address)?;
        client.ask("open", "the repository", "GET", "", OBJECT_PUT_BYTES_MAX as u64)?;
        Ok(Self { client, access })
    }

    /// Opens a repository's store, made if it is not there.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn create(address: &ServerAddress) -> Result<Self, StoreError> {
        let client = Client::new(address)?;
        client.tell("create", "the repository", "POST", "", Body::Empty)?;
        Ok(Self { client, access: Access::ReadWrite })
    }

    fn must_be_writable(&self, action: &'static str, object: &str) -> Result<(), StoreError> {
        if self.access == Access::ReadWrite {
            return Ok(());
        }
        let reason = "the repository is open for reading only";
        Err(self.client.error(StoreErrorKind::ReadOnly, action, object, reason))
    }

    fn tell_names(
        &self,
        action: &'static str,
        about: &str,
        path: &str,
        names: &Names,
    ) -> Result<(), StoreError> {
        let document = serde_json::to_vec(names).map_err(|error| {
            self.client.error(StoreErrorKind::Io, action, about, error.to_string())
        })?;
        self.client.tell(action, about, "POST", path, Body::Json(&document))
    }
}

fn object_path(name: &ObjectName) -> String {
    format!("/objects/{name}")
}

impl Store for ServedStore {
    fn location(&self) -> &str {
        self.client.location()
    }

    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        self.must_be_writable("create", name.as_str())?;
        let path = format!("/uploads?name={name}");
        let started: Started = self.client.ask_document("create", name.as_str(), "POST", &path)?;
        let path = format!("/uploads/{}", started.upload);
        Ok(Box::new(Upload {
            store: Self { client: self.client.clone(), access: self.access },
            name: name.clone(),
            path,
            piece: Vec::new(),
            sent: 0,
            hasher: blake3::Hasher::new(),
            state: UploadState::Open,
        }))
    }

    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<(), StoreError> {
        self.must_be_writable("create", name.as_str())?;
        if bytes.len() > OBJECT_PUT_BYTES_MAX {
            let mut writer = self.create(name)?;
            writer.write(bytes)?;
            return writer.finish().map(drop);
        }
        let path = object_path(name);
        let put = self.client.try_tell("create", name.as_str(), "PUT", &path, Body::Bytes(bytes));
        match put {
            // An earlier try of ours may have made it.
            Err(failed) if failed.may_have_worked && failed.error.already_exists() => {
                if self.client.holds(name, bytes.len() as u64, &blake3::hash(bytes))? {
                    Ok(())
                } else {
                    Err(failed.error)
                }
            }
            other => other.map_err(|failed| failed.error),
        }
    }

    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        if buffer.is_empty() {
            return Ok(());
        }
        self.client.read_into(name, offset, buffer)
    }

    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.client.len(name)
    }

    fn read(&self, name: &ObjectName, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        self.client.ask("read", name.as_str(), "GET", &object_path(name), bytes_max)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        let mut found: Vec<ObjectEntry> = Vec::new();
        loop {
            let after = found.last().map(|entry| format!("&after={}", entry.name));
            let path = format!("/list?prefix={prefix}{}", after.unwrap_or_default());
            let listing: Listing = self.client.ask_document("list", prefix, "GET", &path)?;
            for (name, bytes) in listing.entries {
                let name = ObjectName::new(name).map_err(|error| {
                    self.client.error(StoreErrorKind::Io, "list", prefix, error.to_string())
                })?;
                // A server that goes in circles must not keep us for ever.
                if found.last().is_some_and(|last| last.name >= name) {
                    let reason = "the server's listing is not sorted";
                    return Err(self.client.error(StoreErrorKind::Io, "list", prefix, reason));
                }
                found.push(ObjectEntry { name, bytes });
            }
            if !listing.more {
                return Ok(found);
            }
        }
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        let Some(first) = names.first() else { return Ok(()) };
        self.must_be_writable("delete", first.as_str())?;
        for names in names.chunks(NAMES_MAX) {
            let about = names.first().map_or("", ObjectName::as_str);
            let names = names.iter().map(ToString::to_string).collect();
            self.tell_names("delete", about, "/delete", &Names { names })?;
        }
        Ok(())
    }

    fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        let path = format!("/settle?prefix={prefix}");
        self.client.tell("make durable", prefix, "POST", &path, Body::Empty)
    }

    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        let about = "unfinished objects";
        Ok(self.client.ask_document::<Names>("list", about, "GET", "/leftovers")?.names)
    }

    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        let about = "unfinished objects";
        for names in leftovers.chunks(NAMES_MAX) {
            self.must_be_writable("remove", about)?;
            let names = Names { names: names.to_vec() };
            self.tell_names("remove", about, "/leftovers", &names)?;
        }
        Ok(())
    }
}

/// An object on its way to the server.
struct Upload {
    store: ServedStore,
    name: ObjectName,
    path: String,
    piece: Vec<u8>,
    sent: u64,
    hasher: blake3::Hasher,
    state: UploadState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UploadState {
    Open,
    Failed,
    Finished,
}

impl Upload {
    fn send(&mut self) -> Result<(), StoreError> {
        if self.state == UploadState::Failed {
            let reason = "an earlier write of this object failed";
            let kind = StoreErrorKind::Io;
            return Err(self.store.client.error(kind, "write", self.name.as_str(), reason));
        }
        let path = format!("{}?offset={}", self.path, self.sent);
        let body = Body::Bytes(&self.piece);
        let sent = self.store.client.tell("write", self.name.as_str(), "PUT", &path, body);
        match &sent {
            Ok(()) => self.sent += self.piece.len() as u64,
            Err(_) => self.state = UploadState::Failed,
        }
        self.piece.clear();
        sent
    }
}

impl ObjectWriter for Upload {
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        self.hasher.update(bytes);
        while !bytes.is_empty() {
            let take = bytes.len().min(OBJECT_PUT_BYTES_MAX - self.piece.len());
            self.piece.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.piece.len() == OBJECT_PUT_BYTES_MAX {
                self.send()?;
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<u64, StoreError> {
        if !self.piece.is_empty() || self.state == UploadState::Failed {
            self.send()?;
        }
        let path = format!("{}?bytes={}", self.path, self.sent);
        let (client, object) = (&self.store.client, self.name.as_str());
        match client.try_tell("publish", object, "POST", &path, Body::Empty) {
            Ok(()) => {}
            // The answer was lost, and then the server did not know of it any more.
            Err(Failed { may_have_worked: true, error }) => {
                if !client.holds(&self.name, self.sent, &self.hasher.finalize()).unwrap_or(false) {
                    return Err(error);
                }
            }
            Err(failed) => return Err(failed.error),
        }
        self.state = UploadState::Finished;
        Ok(self.sent)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Also after success: the server need not remember it. One that it does not hear of is given
        // up there after a while.
        self.store.client.mention("DELETE", &self.path);
    }
}
