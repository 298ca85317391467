//! From the master key of a repository to the key of each object.

use ring::aead::AES_256_GCM;
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use zeroize::Zeroizing;

use super::{ObjectCipher, refused};
use crate::error::Result;
use crate::ids::RepositoryId;

/// Bytes of every key.
pub(crate) const KEY_BYTES: usize = 32;
/// What the id of an object (or its salt) is made of: enough for them never to meet.
pub(crate) type ObjectId = [u8; 16];

/// The secret that everything in a repository is derived from.
pub(crate) struct MasterKey(Zeroizing<[u8; KEY_BYTES]>);

impl MasterKey {
    pub(crate) fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

/// What a key of an object is for. Objects of different purposes have nothing in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Packs, by their ids.
    Pack,
    /// Runs of maps, by their ids.
    Run,
    /// Small objects and caches, by the salt that each begins with.
    Small,
}

/// What the programs that hold the key of a repository derive from it.
pub(crate) struct Keys {
    block_ids: Zeroizing<[u8; KEY_BYTES]>,
    config: Zeroizing<[u8; KEY_BYTES]>,
    packs: Prk,
    runs: Prk,
    small: Prk,
}

impl Keys {
    pub(crate) fn derive(repository: &RepositoryId, master: &MasterKey) -> Result<Self> {
        let salt = Salt::new(HKDF_SHA256, repository.as_str().as_bytes());
        let root = salt.extract(master.bytes());
        let purpose = |name: &str| expand(&root, &[b"icecore 1 ", name.as_bytes()]);
        let further = |name: &str| -> Result<Prk> {
            Ok(Prk::new_less_safe(HKDF_SHA256, &purpose(name)?[..]))
        };
        Ok(Self {
            block_ids: purpose("block ids")?,
            config: purpose("config")?,
            packs: further("packs")?,
            runs: further("runs")?,
            small: further("small objects")?,
        })
    }

    /// The key that block ids are computed with.
    pub(crate) fn block_ids(&self) -> &[u8; KEY_BYTES] {
        &self.block_ids
    }

    /// The key that proves a config.
    pub(crate) fn config(&self) -> &[u8; KEY_BYTES] {
        &self.config
    }

    /// The cipher of one object, whose id nothing else of this purpose ever has.
    pub(crate) fn cipher(&self, purpose: Purpose, id: &ObjectId) -> Result<ObjectCipher> {
        let key = match purpose {
            Purpose::Pack => &self.packs,
            Purpose::Run => &self.runs,
            Purpose::Small => &self.small,
        };
        cipher(key, &[id])
    }
}

/// A cipher from a secret and what distinguishes it from the secret's other uses.
pub(super) fn cipher(secret: &Prk, info: &[&[u8]]) -> Result<ObjectCipher> {
    let key = secret.expand(info, &AES_256_GCM).map_err(|_| refused("no key of that length"))?;
    Ok(ObjectCipher::new(key.into()))
}

struct KeyLength;

impl KeyType for KeyLength {
    fn len(&self) -> usize {
        KEY_BYTES
    }
}

fn expand(secret: &Prk, info: &[&[u8]]) -> Result<Zeroizing<[u8; KEY_BYTES]>> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    let filled =
        secret.expand(info, KeyLength).and_then(|key_stream| key_stream.fill(&mut key[..]));
    filled.map_err(|_| refused("no key of that length"))?;
    Ok(key)
}
