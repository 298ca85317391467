//! The repository's own description, and what this program understands of it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::block::Compression;
use crate::crypto::Keys;
use crate::envelope::{self, Kind};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::geometry::BlockSize;
use crate::ids::{Checksum, RepositoryId};
use crate::lock::LockPolicy;
use crate::names;

/// Version of the format that is written, and the newest that is read.
pub const FORMAT_VERSION: u32 = 1;
/// A config is a few hundred bytes.
pub(crate) const CONFIG_BYTES_MAX: u64 = 64 << 10;
/// Objects are encrypted.
const INCOMPAT_ENCRYPTED: u64 = 1;
/// Objects are locked: who does not know of it would leave new ones without.
const INCOMPAT_LOCKED: u64 = 2;
/// Incompatible features that this program understands.
const INCOMPAT_KNOWN: u64 = INCOMPAT_ENCRYPTED | INCOMPAT_LOCKED;

const BLOCK_ID_BLAKE3: &str = "blake3";
const BLOCK_ID_KEYED: &str = "blake3-keyed";
const CIPHER: &str = "aes-256-gcm";
const DERIVATION: &str = "hkdf-sha256";
const CONTENT_TREE: &str = "blake3-256x4";

/// What is fixed when a repository is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) id: RepositoryId,
    pub(crate) version: u32,
    pub(crate) created_at: Timestamp,
    pub(crate) block_size: BlockSize,
    pub(crate) compression: Compression,
    /// How blocks get their ids.
    block_id: String,
    /// How content roots are computed.
    content_tree: String,
    /// Features that an older program may ignore.
    compat: u64,
    /// Features without which nothing may be read.
    incompat: u64,
    /// How objects are locked; none where they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lock: Option<LockPolicy>,
    /// How objects are encrypted; none where they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encryption: Option<Encryption>,
}

/// How the objects of a repository are encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Encryption {
    cipher: String,
    /// How an object's key comes from the master key.
    derivation: String,
    /// Keyed BLAKE3 of all that this config says: proves that the key is this repository's, and that
    /// nobody without it has changed the config.
    proof: Checksum,
}

/// Only what says whether the rest can be understood.
#[derive(Deserialize)]
struct Gate {
    version: u32,
    incompat: u64,
}

impl Config {
    pub(crate) fn new(
        id: RepositoryId,
        created_at: Timestamp,
        block_size: BlockSize,
        compression: Compression,
    ) -> Self {
        Self {
            id,
            version: FORMAT_VERSION,
            created_at,
            block_size,
            compression,
            block_id: BLOCK_ID_BLAKE3.to_owned(),
            content_tree: CONTENT_TREE.to_owned(),
            compat: 0,
            incompat: 0,
            lock: None,
            encryption: None,
        }
    }

    /// The same for a repository whose objects are locked. Said before
    /// [`encrypted`](Self::encrypted), which proves it.
    pub(crate) fn locked(mut self, policy: LockPolicy) -> Self {
        self.incompat |= INCOMPAT_LOCKED;
        self.lock = Some(policy);
        self
    }

    /// How objects are locked.
    pub(crate) fn lock(&self) -> Option<LockPolicy> {
        self.lock
    }

    /// The same for an encrypted repository whose keys these are.
    pub(crate) fn encrypted(mut self, keys: &Keys) -> Self {
        self.block_id = BLOCK_ID_KEYED.to_owned();
        self.incompat |= INCOMPAT_ENCRYPTED;
        let (cipher, derivation) = (CIPHER.to_owned(), DERIVATION.to_owned());
        self.encryption = Some(Encryption { cipher, derivation, proof: self.proof(keys) });
        self
    }

    /// Whether objects are encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.encryption.is_some()
    }

    /// Whether somebody with these keys has written just this config.
    pub(crate) fn is_proven(&self, keys: &Keys) -> bool {
        // Comparing hashes takes the same time whatever differs.
        self.encryption.as_ref().is_some_and(|encryption| {
            blake3::Hash::from(encryption.proof.0) == blake3::Hash::from(self.proof(keys).0)
        })
    }

    fn proof(&self, keys: &Keys) -> Checksum {
        let block_size = self.block_size.bytes().to_string();
        let (version, incompat) = (self.version.to_string(), self.incompat.to_string());
        let (created_at, compression) = (self.created_at.to_string(), self.compression.to_string());
        let lock = self.lock.map(|lock| format!("{} {}", lock.mode(), lock.period().as_secs()));
        let mut hasher = blake3::Hasher::new_keyed(keys.config());
        let all = [
            self.id.as_str(),
            &version,
            &created_at,
            &block_size,
            &compression,
            &self.block_id,
            &self.content_tree,
            &incompat,
            CIPHER,
            DERIVATION,
        ];
        for said in all.into_iter().chain(lock.as_deref()) {
            hasher.update(&(said.len() as u64).to_le_bytes()).update(said.as_bytes());
        }
        Checksum(*hasher.finalize().as_bytes())
    }

    /// The algorithms that it names, and those that this program knows for such a repository.
    fn algorithms(&self) -> Vec<(&str, &'static str)> {
        let block_id = if self.is_encrypted() { BLOCK_ID_KEYED } else { BLOCK_ID_BLAKE3 };
        let mut all = vec![(&*self.block_id, block_id), (&*self.content_tree, CONTENT_TREE)];
        if let Some(Encryption { cipher, derivation, .. }) = &self.encryption {
            all.extend([(&**cipher, CIPHER), (&**derivation, DERIVATION)]);
        }
        all
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let payload = serde_json::to_vec_pretty(self).map_err(not_understood)?;
        Ok(envelope::seal(Kind::CONFIG, &self.id, &payload))
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let (id, payload) = envelope::open_any(Kind::CONFIG, names::CONFIG, bytes)?;
        let gate: Gate = serde_json::from_slice(payload).map_err(not_understood)?;
        let unknown = gate.incompat & !INCOMPAT_KNOWN;
        if gate.version > FORMAT_VERSION || unknown != 0 {
            let what = format!("format version {}, features {unknown:#x}", gate.version);
            return Err(Error::Unsupported { object: names::CONFIG.to_owned(), what });
        }
        let config: Self = serde_json::from_slice(payload).map_err(not_understood)?;
        let says_so = config.incompat & INCOMPAT_ENCRYPTED != 0;
        if says_so != config.is_encrypted() {
            let detail = "it does not say how objects are encrypted, or that they are";
            return Err(Damage::new(names::CONFIG, DamageKind::Inconsistent, detail).into());
        }
        let says_so = config.incompat & INCOMPAT_LOCKED != 0;
        if says_so != config.lock.is_some() || !config.lock.is_none_or(LockPolicy::is_sound) {
            let detail = "it does not say how objects are locked, or that they are";
            return Err(Damage::new(names::CONFIG, DamageKind::Inconsistent, detail).into());
        }
        if let Some((found, _)) = config.algorithms().iter().find(|(found, known)| found != known) {
            let what = format!("algorithm {found:?}");
            return Err(Error::Unsupported { object: names::CONFIG.to_owned(), what });
        }
        if config.id != id {
            let detail = "its header names another repository";
            return Err(Damage::new(names::CONFIG, DamageKind::Foreign, detail).into());
        }
        Ok(config)
    }
}

fn not_understood(error: serde_json::Error) -> Error {
    Damage::new(names::CONFIG, DamageKind::Inconsistent, error.to_string()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let id = RepositoryId::from_random(77);
        Config::new(id, Timestamp::UNIX_EPOCH, BlockSize::DEFAULT, Compression::Zstd(3))
    }

    #[test]
    fn goes_there_and_back() {
        assert_eq!(Config::decode(&config().encode().unwrap()).unwrap(), config());
    }

    fn keys(fill: u8) -> Keys {
        Keys::derive(&config().id, &crate::crypto::MasterKey::new([fill; 32])).unwrap()
    }

    #[test]
    fn an_encrypted_one_is_proven_by_its_keys_alone() {
        let ours = config().encrypted(&keys(1));
        let back = Config::decode(&ours.encode().unwrap()).unwrap();
        assert!(back == ours && back.is_encrypted() && back.is_proven(&keys(1)));
        assert!(!back.is_proven(&keys(2)) && !config().is_proven(&keys(1)));
        for changed in [
            Config { compression: Compression::None, ..ours.clone() },
            Config { block_size: BlockSize::new(4096).unwrap(), ..ours.clone() },
            Config { id: RepositoryId::from_random(78), ..ours.clone() },
            Config { created_at: Timestamp::MAX, ..ours.clone() },
        ] {
            assert!(!changed.is_proven(&keys(1)), "{changed:?}");
        }
    }

    #[test]
    fn a_lock_is_kept_proven_and_said_in_two_places() {
        let period = std::time::Duration::from_secs(9);
        let policy = LockPolicy::new(crate::lock::LockMode::Compliance, period).unwrap();
        let ours = config().locked(policy).encrypted(&keys(1));
        let back = Config::decode(&ours.encode().unwrap()).unwrap();
        assert!(back.lock() == Some(policy) && back.is_proven(&keys(1)));
        assert!(!Config { lock: None, ..ours.clone() }.is_proven(&keys(1)));
        let endless = serde_json::json!({ "mode": "compliance", "seconds": u64::MAX });
        let endless = serde_json::from_value(endless).unwrap();
        for bad in [
            Config { lock: None, ..ours.clone() },
            Config { incompat: 1, ..ours.clone() },
            Config { lock: Some(endless), ..ours },
        ] {
            assert!(Config::decode(&bad.encode().unwrap()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_contradicts_itself_about_encryption_is_refused() {
        let ours = config().encrypted(&keys(1));
        for bad in [
            Config { incompat: 0, ..ours.clone() },
            Config { encryption: None, ..ours.clone() },
            Config { block_id: BLOCK_ID_BLAKE3.into(), ..ours.clone() },
            Config { block_id: BLOCK_ID_KEYED.into(), ..config() },
        ] {
            assert!(Config::decode(&bad.encode().unwrap()).is_err(), "{bad:?}");
        }
        let mut other = ours;
        other.encryption.as_mut().unwrap().cipher = "rot13".into();
        let error = Config::decode(&other.encode().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }

    #[test]
    fn unknown_compatible_features_are_ignored_incompatible_ones_refused() {
        let newer = Config { compat: 5, ..config() };
        assert!(Config::decode(&newer.encode().unwrap()).is_ok());
        for newer in [
            Config { incompat: 4, ..config() },
            Config { version: 2, ..config() },
            Config { block_id: "md5".into(), ..config() },
            Config { content_tree: "list".into(), ..config() },
        ] {
            let error = Config::decode(&newer.encode().unwrap()).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        }
    }
}
