//! Key objects: the master key, sealed under a key file or a passphrase.
//!
//! ```text
//! envelope KEYW, payload: length of the JSON u32, JSON, the master key sealed 48
//! ```
//! All bytes before the sealed key (the envelope's header too) are its associated data. The wrapping
//! key belongs to this object alone, by its id and salt; so its only message has nonce 0.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use jiff::Timestamp;
use ring::hkdf::{HKDF_SHA256, Prk, Salt};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::keys::{self, KEY_BYTES};
use super::material::Secret;
use super::{KeyMaterial, MasterKey, ObjectCipher, Part, TAG_BYTES, refused};
use crate::envelope::{self, Form, HEADER_BYTES, Kind};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::ids::{KeyId, RepositoryId, Salt128};
use crate::names;

/// A description is a few hundred bytes.
pub(crate) const KEY_BYTES_MAX: u64 = 4 << 10;
const LENGTH_BYTES: usize = 4;
const SEALED_BYTES: usize = KEY_BYTES + TAG_BYTES;
/// A label is for one line of a list.
const LABEL_CHARS_MAX: usize = 100;

/// RFC 9106, section 4, for where memory is short: 64 MiB, three passes, four lanes.
const ARGON2: Argon2Cost = Argon2Cost { memory_kib: 64 << 10, passes: 3, lanes: 4 };
/// What is read may ask for no more memory than this (256 MiB), whoever wrote it: a host that is asked
/// for more may have to kill a guest for it.
const ARGON2_MEMORY_KIB_MAX: u32 = 256 << 10;
const ARGON2_LANES_MAX: u32 = 16;
/// Memory times passes: about ten seconds of work.
const ARGON2_WORK_KIB_MAX: u64 = 8 << 20;

/// What a passphrase costs whoever tries one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Argon2Cost {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

/// How a key is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyMethod {
    /// As a key file: HKDF-SHA256 of its bytes.
    File,
    /// As a passphrase: argon2id.
    Passphrase,
}

/// One of the keys of a repository, as everybody may know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyInfo {
    /// Its id.
    pub id: KeyId,
    /// How it is given.
    pub method: KeyMethod,
    /// When it was added.
    pub created_at: Timestamp,
    /// What the operator calls it.
    pub label: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    id: KeyId,
    created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    method: KeyMethod,
    salt: Salt128,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    argon2id: Option<Argon2Cost>,
}

/// A key object, parsed.
pub(crate) struct WrappedKey<'a> {
    description: Description,
    /// All that is before the sealed key.
    context: &'a [u8],
    sealed: &'a [u8; SEALED_BYTES],
}

/// What is drawn at random for a key object.
pub(crate) struct Drawn {
    pub(crate) id: u128,
    pub(crate) salt: [u8; 16],
}

impl<'a> WrappedKey<'a> {
    /// Seals the master key for whoever gives `material`; returns the object.
    pub(crate) fn wrap(
        repository: &RepositoryId,
        master: &MasterKey,
        material: &KeyMaterial,
        label: Option<String>,
        now: Timestamp,
        drawn: &Drawn,
    ) -> Result<(KeyInfo, Vec<u8>)> {
        let (method, argon2id) = match material.secret() {
            Secret::File(_) => (KeyMethod::File, None),
            Secret::Passphrase(_) => (KeyMethod::Passphrase, Some(ARGON2)),
            Secret::Kit(_) => {
                return Err(Error::Refused {
                    what:
                        "a recovery kit is the master key itself and opens the repository as it is"
                            .to_owned(),
                    advice: "give a key file or a passphrase as the new key",
                });
            }
        };
        let description = Description {
            id: KeyId::from_random(drawn.id),
            created_at: now,
            label: label.map(|label| cleaned(&label)),
            method,
            salt: Salt128(drawn.salt),
            argon2id,
        };
        let Some(cipher) = description.cipher(repository, material)? else {
            return Err(refused("a key of another kind"));
        };
        let json = serde_json::to_vec(&description).map_err(|_| refused("no JSON of a key"))?;
        let payload_bytes = LENGTH_BYTES + json.len() + SEALED_BYTES;
        let mut bytes = envelope::header(Kind::KEY, Form::Plain, repository, payload_bytes as u64);
        // A description is a few hundred bytes.
        bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&json);
        let context = bytes.clone();
        bytes.reserve_exact(SEALED_BYTES + envelope::SEAL_BYTES);
        bytes.extend_from_slice(master.bytes());
        cipher.seal(Part::ONLY, &context, &mut bytes, context.len())?;
        Ok((description.info(), envelope::close(bytes)))
    }

    /// Parses the object of a key of this repository; verifies its checksum.
    pub(crate) fn parse(repository: &RepositoryId, id: &KeyId, bytes: &'a [u8]) -> Result<Self> {
        let object = names::key(id)?;
        let damaged = |kind, detail: &str| Error::from(Damage::new(&object, kind, detail));
        let payload = envelope::open(Kind::KEY, repository, object.as_str(), bytes)?;
        let cut = || damaged(DamageKind::Length, "it is cut off");
        let (rest, sealed) = payload.split_last_chunk::<SEALED_BYTES>().ok_or_else(cut)?;
        let (length, json) = rest.split_first_chunk::<LENGTH_BYTES>().ok_or_else(cut)?;
        if u32::from_le_bytes(*length) as usize != json.len() {
            return Err(cut());
        }
        let description: Description = serde_json::from_slice(json)
            .map_err(|error| damaged(DamageKind::Inconsistent, &error.to_string()))?;
        if &description.id != id {
            return Err(damaged(DamageKind::Foreign, "it is another key's"));
        }
        let context = &bytes[..HEADER_BYTES + rest.len()];
        Ok(Self { description, context, sealed })
    }

    /// Whether these bytes are a key object of that id, of whatever repository.
    pub(crate) fn is_one(id: &KeyId, bytes: &'a [u8]) -> Result<()> {
        let (repository, _) = envelope::open_any(Kind::KEY, names::key(id)?.as_str(), bytes)?;
        Self::parse(&repository, id, bytes).map(drop)
    }

    /// What everybody may know of it.
    pub(crate) fn info(&self) -> KeyInfo {
        self.description.info()
    }

    /// The master key; none when `material` is not this key.
    pub(crate) fn unwrap(
        &self,
        repository: &RepositoryId,
        material: &KeyMaterial,
    ) -> Result<Option<MasterKey>> {
        let Some(cipher) = self.description.cipher(repository, material)? else {
            return Ok(None);
        };
        let mut master = Zeroizing::new([0; KEY_BYTES]);
        let opened = cipher.open_to(Part::ONLY, self.context, self.sealed, &mut master[..]);
        Ok(opened.then(|| MasterKey::new(*master)))
    }
}

impl Description {
    fn info(&self) -> KeyInfo {
        KeyInfo {
            id: self.id.clone(),
            method: self.method,
            created_at: self.created_at,
            label: self.label.as_deref().map(cleaned),
        }
    }

    /// The cipher of this object under `material`; none when that is of another kind.
    fn cipher(
        &self,
        repository: &RepositoryId,
        material: &KeyMaterial,
    ) -> Result<Option<ObjectCipher>> {
        let (secret, purpose) = match (self.method, material.secret()) {
            (KeyMethod::File, Secret::File(bytes)) => {
                let salt = Salt::new(HKDF_SHA256, &self.salt.0);
                (salt.extract(bytes), "icecore 1 key file")
            }
            (KeyMethod::Passphrase, Secret::Passphrase(bytes)) => {
                let key = self.stretch(bytes)?;
                (Prk::new_less_safe(HKDF_SHA256, &*key), "icecore 1 passphrase")
            }
            _ => return Ok(None),
        };
        let (repository, id) = (repository.as_str(), self.id.as_str());
        let info = [purpose.as_bytes(), repository.as_bytes(), id.as_bytes()];
        keys::cipher(&secret, &info).map(Some)
    }

    /// argon2id of a passphrase, within what is allowed to be asked for.
    fn stretch(&self, passphrase: &[u8]) -> Result<Zeroizing<[u8; KEY_BYTES]>> {
        let object = names::key(&self.id)?;
        let asks = |what: &str| Error::from(Damage::new(&object, DamageKind::Limit, what));
        let cost = self.argon2id.ok_or_else(|| asks("it does not say how to stretch"))?;
        let work = u64::from(cost.memory_kib) * u64::from(cost.passes);
        let bounded = cost.memory_kib <= ARGON2_MEMORY_KIB_MAX
            && cost.lanes <= ARGON2_LANES_MAX
            && work <= ARGON2_WORK_KIB_MAX;
        if !bounded {
            return Err(asks("it asks for more memory or time than any key needs"));
        }
        let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(KEY_BYTES))
            .map_err(|_| asks("it names no parameters of argon2id"))?;
        let mut memory = Vec::new();
        memory.try_reserve_exact(params.block_count()).map_err(|_| Error::Refused {
            what: format!("there are no {} KiB of memory to try the passphrase", cost.memory_kib),
            advice: "free some memory, or use a key file",
        })?;
        memory.resize(params.block_count(), Block::default());
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        argon2
            .hash_password_into_with_memory(passphrase, &self.salt.0, &mut key[..], &mut memory)
            .map_err(|_| refused("argon2id"))?;
        Ok(key)
    }
}

/// A label comes from whoever may write to the store, and goes to a terminal.
fn cleaned(label: &str) -> String {
    label.chars().filter(|c| !c.is_control()).take(LABEL_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository() -> RepositoryId {
        RepositoryId::from_random(1)
    }

    fn file(fill: u8) -> KeyMaterial {
        KeyMaterial::from_key_file(Zeroizing::new(vec![fill; 40])).unwrap()
    }

    fn passphrase(text: &str) -> KeyMaterial {
        KeyMaterial::from_passphrase(Zeroizing::new(text.into())).unwrap()
    }

    fn wrap(material: &KeyMaterial) -> (KeyInfo, Vec<u8>) {
        let label = Some("on \x1b[2J paper".to_owned());
        let drawn = Drawn { id: 9, salt: [4; 16] };
        let master = MasterKey::new([8; KEY_BYTES]);
        let now = Timestamp::UNIX_EPOCH;
        WrappedKey::wrap(&repository(), &master, material, label, now, &drawn).unwrap()
    }

    fn unwrap(bytes: &[u8], material: &KeyMaterial) -> Result<Option<[u8; KEY_BYTES]>> {
        let key = WrappedKey::parse(&repository(), &KeyId::from_random(9), bytes)?;
        Ok(key.unwrap(&repository(), material)?.map(|master| *master.bytes()))
    }

    #[test]
    fn only_the_right_material_opens_it() {
        let (info, bytes) = wrap(&file(1));
        assert_eq!(info.label.as_deref(), Some("on [2J paper"));
        assert!(bytes.len() as u64 <= KEY_BYTES_MAX);
        assert_eq!(unwrap(&bytes, &file(1)).unwrap(), Some([8; KEY_BYTES]));
        assert_eq!(unwrap(&bytes, &file(2)).unwrap(), None);
        assert_eq!(unwrap(&bytes, &passphrase(&"\x01".repeat(40))).unwrap(), None);
        let (info, bytes) = wrap(&passphrase("correct horse"));
        assert_eq!(info.method, KeyMethod::Passphrase);
        assert_eq!(unwrap(&bytes, &passphrase("correct horse\n")).unwrap(), Some([8; KEY_BYTES]));
        assert_eq!(unwrap(&bytes, &passphrase("correct house")).unwrap(), None);
    }

    #[test]
    fn every_flipped_bit_is_found_with_and_without_its_checksum() {
        let (_, bytes) = wrap(&file(1));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(unwrap(&bad, &file(1)).is_err(), "{at}");
            // Forged by somebody who puts the checksum right.
            bad.truncate(bad.len() - envelope::SEAL_BYTES);
            if at < bad.len() {
                let forged = unwrap(&envelope::close(bad), &file(1));
                assert!(!matches!(forged, Ok(Some(_))), "{at}");
            }
        }
    }

    #[test]
    fn a_key_of_another_repository_or_id_is_refused() {
        let (info, bytes) = wrap(&file(1));
        let other = RepositoryId::from_random(2);
        assert!(WrappedKey::parse(&other, &info.id, &bytes).is_err());
        assert!(WrappedKey::parse(&repository(), &KeyId::from_random(8), &bytes).is_err());
        let parsed = WrappedKey::parse(&repository(), &info.id, &bytes).unwrap();
        assert!(parsed.unwrap(&other, &file(1)).unwrap().is_none());
    }

    #[test]
    fn greedy_parameters_are_refused_before_memory_is_taken() {
        let cost = |memory_kib, passes, lanes| {
            let description = Description {
                id: KeyId::from_random(9),
                created_at: Timestamp::UNIX_EPOCH,
                label: None,
                method: KeyMethod::Passphrase,
                salt: Salt128([0; 16]),
                argon2id: Some(Argon2Cost { memory_kib, passes, lanes }),
            };
            description.stretch(b"passphrase").map(drop)
        };
        for (memory_kib, passes, lanes) in [
            (u32::MAX, 1, 1),
            (ARGON2_MEMORY_KIB_MAX + 1, 1, 1),
            (1 << 20, 9, 1),
            (64, u32::MAX, 1),
            (1024, 1, 17),
            (0, 0, 0),
            (8, 1, 0),
        ] {
            let error = cost(memory_kib, passes, lanes).unwrap_err();
            assert_eq!(error.damage().unwrap().kind, DamageKind::Limit, "{memory_kib} {passes}");
        }
        cost(64, 1, 1).unwrap();
    }

    #[test]
    fn a_recovery_kit_is_not_wrapped() {
        let kit = super::super::RecoveryKit::new(&repository(), &MasterKey::new([1; KEY_BYTES]));
        let material = KeyMaterial::from_key_file(Zeroizing::new(kit.text().as_bytes().to_vec()));
        let drawn = Drawn { id: 9, salt: [4; 16] };
        let master = MasterKey::new([8; KEY_BYTES]);
        let wrapped = WrappedKey::wrap(
            &repository(),
            &master,
            &material.unwrap(),
            None,
            Timestamp::UNIX_EPOCH,
            &drawn,
        );
        assert!(matches!(wrapped, Err(Error::Refused { .. })));
    }
}
