//! What the objects of one repository are written and read with: its id and, where it is encrypted,
//! its keys. The rest of the crate need not know which of the two it is.
//!
//! ```text
//! encrypted small object: header 40 | salt 16 | payload sealed (+ tag 16) | BLAKE3 of that 32
//! ```
//! Its associated data are the header and the object's name: a whole object under another name, of
//! another kind or from another repository is none.

use std::borrow::Cow;
use std::sync::Arc;

use crate::block::BlockHasher;
use crate::crypto::{Keys, ObjectCipher, ObjectId, Part, Purpose, TAG_BYTES};
use crate::envelope::{self, Form, Kind};
use crate::error::{Damage, DamageKind, Result};
use crate::ids::RepositoryId;
use crate::repository::random;

const SALT_BYTES: usize = 16;

/// See the module.
#[derive(Clone)]
pub(crate) struct Sealing {
    repository: RepositoryId,
    keys: Option<Arc<Keys>>,
}

impl std::fmt::Debug for Sealing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sealing({}, {:?})", self.repository, self.form())
    }
}

impl Sealing {
    /// Of a repository that is not encrypted.
    pub(crate) fn plain(repository: RepositoryId) -> Self {
        Self { repository, keys: None }
    }

    /// Of an encrypted repository.
    pub(crate) fn encrypted(repository: RepositoryId, keys: Keys) -> Self {
        Self { repository, keys: Some(Arc::new(keys)) }
    }

    pub(crate) fn repository(&self) -> &RepositoryId {
        &self.repository
    }

    pub(crate) fn keys(&self) -> Option<&Keys> {
        self.keys.as_deref()
    }

    pub(crate) fn form(&self) -> Form {
        if self.keys.is_some() { Form::Encrypted } else { Form::Plain }
    }

    /// How blocks get their ids here.
    pub(crate) fn hasher(&self) -> BlockHasher {
        self.keys().map_or_else(BlockHasher::plain, |keys| BlockHasher::keyed(keys.block_ids()))
    }

    /// A small object, to be stored as `object`.
    pub(crate) fn close(&self, kind: Kind, object: &str, payload: &[u8]) -> Result<Vec<u8>> {
        match self.keys() {
            None => Ok(envelope::seal(kind, &self.repository, payload)),
            Some(keys) => self.close_with(keys, kind, object, payload, random()?),
        }
    }

    /// As [`close`](Self::close), with the salt handed in.
    fn close_with(
        &self,
        keys: &Keys,
        kind: Kind,
        object: &str,
        payload: &[u8],
        salt: [u8; SALT_BYTES],
    ) -> Result<Vec<u8>> {
        let payload_bytes = (SALT_BYTES + payload.len() + TAG_BYTES) as u64;
        let mut bytes = envelope::header(kind, Form::Encrypted, &self.repository, payload_bytes);
        let context = [&bytes, object.as_bytes()].concat();
        bytes.reserve_exact(SALT_BYTES + payload.len() + TAG_BYTES + envelope::SEAL_BYTES);
        bytes.extend_from_slice(&salt);
        let from = bytes.len();
        bytes.extend_from_slice(payload);
        keys.cipher(Purpose::Small, &salt)?.seal(Part::ONLY, &context, &mut bytes, from)?;
        Ok(envelope::close(bytes))
    }

    /// The payload of a small object that was found as `object`.
    pub(crate) fn open<'a>(
        &self,
        kind: Kind,
        object: &str,
        bytes: &'a [u8],
    ) -> Result<Cow<'a, [u8]>> {
        let payload = envelope::open_form(kind, self.form(), &self.repository, object, bytes)?;
        let Some(keys) = self.keys() else { return Ok(Cow::Borrowed(payload)) };
        let not_sealed = || {
            let detail = "it was not sealed with this repository's key, or not under this name";
            Damage::new(object, DamageKind::Foreign, detail)
        };
        let (salt, sealed) = payload.split_first_chunk::<SALT_BYTES>().ok_or_else(not_sealed)?;
        let context = [&bytes[..envelope::HEADER_BYTES], object.as_bytes()].concat();
        let mut opened = vec![0; sealed.len().saturating_sub(TAG_BYTES)];
        let cipher = keys.cipher(Purpose::Small, salt)?;
        if !cipher.open_to(Part::ONLY, &context, sealed, &mut opened) {
            return Err(not_sealed().into());
        }
        Ok(Cow::Owned(opened))
    }

    /// A new streamed object.
    pub(crate) fn stream(&self, kind: Kind, id: ObjectId) -> Result<Stream> {
        let header = envelope::stream_header(kind, self.form(), &self.repository, id);
        self.stream_of(kind, id, header)
    }

    /// A streamed object by its header, which is checked against what it must be.
    pub(crate) fn open_stream(
        &self,
        kind: Kind,
        id: ObjectId,
        object: &str,
        header: &[u8],
    ) -> Result<Stream> {
        envelope::check_stream_header(kind, self.form(), &self.repository, id, object, header)?;
        self.stream_of(kind, id, header.to_vec())
    }

    fn stream_of(&self, kind: Kind, id: ObjectId, header: Vec<u8>) -> Result<Stream> {
        let purpose = if kind == Kind::PACK { Purpose::Pack } else { Purpose::Run };
        let cipher = self.keys().map(|keys| keys.cipher(purpose, &id)).transpose()?;
        Ok(Stream { header, cipher })
    }
}

/// The parts of one streamed object: sealed one by one, or left as they are.
pub(crate) struct Stream {
    header: Vec<u8>,
    cipher: Option<ObjectCipher>,
}

impl Stream {
    /// The object's first bytes.
    pub(crate) fn header(&self) -> &[u8] {
        &self.header
    }

    /// Whether parts are sealed.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// Bytes by which a part is longer as it is stored.
    pub(crate) fn overhead(&self) -> usize {
        if self.is_encrypted() { TAG_BYTES } else { 0 }
    }

    /// Makes what lies in `bytes` from `from` on a part as it is stored.
    pub(crate) fn seal(&self, part: Part, bytes: &mut Vec<u8>, from: usize) -> Result<()> {
        match &self.cipher {
            Some(cipher) => cipher.seal(part, &self.header, bytes, from),
            None => Ok(()),
        }
    }

    /// What a part holds, opened where it lies; none when it is not what was sealed.
    pub(crate) fn open<'a>(&self, part: Part, stored: &'a mut [u8]) -> Option<&'a [u8]> {
        match &self.cipher {
            Some(cipher) => cipher.open(part, &self.header, stored),
            None => Some(stored),
        }
    }

    /// As [`open`](Self::open), into `out`, which has to be as long as what the part holds.
    pub(crate) fn open_to(&self, part: Part, stored: &[u8], out: &mut [u8]) -> bool {
        match &self.cipher {
            Some(cipher) => cipher.open_to(part, &self.header, stored, out),
            None if stored.len() == out.len() => {
                out.copy_from_slice(stored);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::MasterKey;

    fn sealing(repository: u128, key: u8) -> Sealing {
        let repository = RepositoryId::from_random(repository);
        let keys = Keys::derive(&repository, &MasterKey::new([key; 32])).unwrap();
        Sealing::encrypted(repository, keys)
    }

    fn foreign<T: std::fmt::Debug>(result: Result<T>) -> bool {
        result.unwrap_err().damage().unwrap().kind == DamageKind::Foreign
    }

    #[test]
    fn small_objects_go_there_and_back_and_show_nothing() {
        let ours = sealing(1, 1);
        for payload in [&b""[..], b"payload", &[7; 5000]] {
            let bytes = ours.close(Kind::RECEIPT, "receipts/x", payload).unwrap();
            assert_eq!(&*ours.open(Kind::RECEIPT, "receipts/x", &bytes).unwrap(), payload);
            let shows = payload.len() > 3 && bytes.windows(4).any(|four| four == &payload[..4]);
            assert!(!shows);
            let again = ours.close(Kind::RECEIPT, "receipts/x", payload).unwrap();
            assert_ne!(bytes[40..], again[40..], "each has a key of its own");
        }
    }

    #[test]
    fn an_object_under_another_name_or_key_or_in_clear_is_refused() {
        let ours = sealing(1, 1);
        let bytes = ours.close(Kind::RECEIPT, "receipts/x", b"payload").unwrap();
        assert!(foreign(ours.open(Kind::RECEIPT, "receipts/y", &bytes)));
        assert!(foreign(sealing(1, 2).open(Kind::RECEIPT, "receipts/x", &bytes)));
        assert!(foreign(sealing(2, 1).open(Kind::RECEIPT, "receipts/x", &bytes)));
        let plain = Sealing::plain(ours.repository.clone());
        assert!(foreign(plain.open(Kind::RECEIPT, "receipts/x", &bytes)));
        let clear = plain.close(Kind::RECEIPT, "receipts/x", b"payload").unwrap();
        assert!(foreign(ours.open(Kind::RECEIPT, "receipts/x", &clear)));
        assert!(ours.open(Kind::MANIFEST, "receipts/x", &bytes).is_err());
    }

    #[test]
    fn every_flipped_bit_is_found_even_with_the_checksum_put_right() {
        let ours = sealing(1, 1);
        let bytes = ours.close(Kind::RECEIPT, "receipts/x", b"payload").unwrap();
        for at in 0..bytes.len() - envelope::SEAL_BYTES {
            let mut bad = bytes[..bytes.len() - envelope::SEAL_BYTES].to_vec();
            bad[at] ^= 1 << (at % 8);
            assert!(ours.open(Kind::RECEIPT, "receipts/x", &envelope::close(bad)).is_err(), "{at}");
        }
        for length in 40..bytes.len() - envelope::SEAL_BYTES {
            let mut cut = bytes[..length].to_vec();
            cut[32..40].copy_from_slice(&(length as u64 - 40).to_le_bytes());
            assert!(ours.open(Kind::RECEIPT, "receipts/x", &envelope::close(cut)).is_err());
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The vectors of `docs/FORMAT.md`, computed by other programs (Python's hmac and hashlib, OpenSSL's
    /// AES-GCM).
    #[test]
    fn vectors() {
        let repository = RepositoryId::from_random(1);
        let master = MasterKey::new(std::array::from_fn(|n| n as u8));
        let keys = Keys::derive(&repository, &master).unwrap();
        assert_eq!(
            hex(keys.block_ids()),
            "9c7f04c88ac640aa3e25149867f06af8d27f6c727a809adc0b5635226beed294"
        );
        assert_eq!(
            hex(keys.config()),
            "8becab4b68c514ae66e8a0d368f15425203617b0bc9bfba8cd8921e9e359df39"
        );
        let sealing = Sealing::encrypted(repository, keys);
        let pack = sealing.stream(Kind::PACK, [0x22; 16]).unwrap();
        assert_eq!(
            hex(pack.header()),
            "494345434f52450a5041434b010001003030303030303030303030303030303100000000000000002222\
             2222222222222222222222222222 04754cee"
                .replace(' ', "")
        );
        let part = |stream: &Stream, number| {
            let mut bytes = b"icecore".to_vec();
            stream.seal(Part(number), &mut bytes, 0).unwrap();
            hex(&bytes)
        };
        assert_eq!(part(&pack, 0), "eb251e691f1ab97d35cbacf0ef715d123bc6717f4479be");
        assert_eq!(part(&pack, 1), "cc989ba4db5232fd8590c1e90dda94496401c390de8680");
        let run = sealing.stream(Kind::RUN, [0x33; 16]).unwrap();
        assert_eq!(part(&run, 60), "be01ec0704a73434c72cfad9bb1f98acc73072760f08b7");
        let keys = sealing.keys().unwrap();
        let (name, salt) = ("receipts/00000000a00000", [0x44; 16]);
        let receipt = sealing.close_with(keys, Kind::RECEIPT, name, b"icecore", salt).unwrap();
        assert_eq!(
            hex(&receipt[40..receipt.len() - 32]),
            "44444444444444444444444444444444d83a45829bbc61118cd62dfe62bf45bb678078a780f159"
        );
    }

    #[test]
    fn parts_are_bound_to_number_object_and_repository() {
        let ours = sealing(1, 1);
        let stream = ours.stream(Kind::PACK, [5; 16]).unwrap();
        let mut stored = b"before".to_vec();
        stored.extend_from_slice(b"frame");
        stream.seal(Part(3), &mut stored, 6).unwrap();
        let stored = stored.split_off(6);
        assert_eq!(stored.len(), 5 + stream.overhead());
        assert_eq!(stream.open(Part(3), &mut stored.clone()).unwrap(), b"frame");
        let mut out = [0; 5];
        assert!(stream.open_to(Part(3), &stored, &mut out) && &out == b"frame");
        assert!(!stream.open_to(Part(3), &stored, &mut [0; 4]));
        assert!(stream.open(Part(4), &mut stored.clone()).is_none());
        for other in [
            ours.stream(Kind::PACK, [6; 16]).unwrap(),
            ours.stream(Kind::RUN, [5; 16]).unwrap(),
            sealing(1, 2).stream(Kind::PACK, [5; 16]).unwrap(),
            sealing(2, 1).stream(Kind::PACK, [5; 16]).unwrap(),
        ] {
            assert!(other.open(Part(3), &mut stored.clone()).is_none());
        }
    }
}
