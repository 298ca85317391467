//! What every object begins with, and how small ones are closed by a checksum. Pure.
//!
//! ```text
//! 0   8  magic "ICECORE\n"
//! 8   4  kind, four ASCII letters
//! 12  2  version of the kind, little endian
//! 14  2  flags: 1 what follows is encrypted; a bit that is not known is a reason to refuse
//! 16 16  repository id (ASCII)
//! 32  8  payload length; 0 in streamed objects (packs, runs), which end in a trailer of their own
//! 40  …  payload
//!    32  BLAKE3 of all the bytes before (sealed objects only)
//! ```

use crate::error::{Damage, DamageKind, Error, Result};
use crate::ids::RepositoryId;

const MAGIC: &[u8; 8] = b"ICECORE\n";
const FLAG_ENCRYPTED: u16 = 1;
/// Of all kinds.
const NEWEST_VERSION: u16 = 1;
/// Length of the header.
pub(crate) const HEADER_BYTES: usize = 40;
/// Length of the checksum that ends a sealed object.
pub(crate) const SEAL_BYTES: usize = 32;
/// Header, object id and their CRC at the start of a streamed object.
pub(crate) const STREAM_HEADER_BYTES: usize = HEADER_BYTES + 16 + 4;

/// A kind of object: its four letters and the version that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) letters: &'static [u8; 4],
    pub(crate) version: u16,
}

impl Kind {
    pub(crate) const CONFIG: Self = Self::new(b"CONF");
    pub(crate) const KEY: Self = Self::new(b"KEYW");
    pub(crate) const PACK: Self = Self::new(b"PACK");
    pub(crate) const RUN: Self = Self::new(b"MRUN");
    pub(crate) const MANIFEST: Self = Self::new(b"MANI");
    pub(crate) const RECEIPT: Self = Self::new(b"RCPT");
    pub(crate) const CATALOG: Self = Self::new(b"CATL");
    pub(crate) const DEDUP: Self = Self::new(b"DDUP");

    /// A kind in its first version.
    pub(crate) const fn new(letters: &'static [u8; 4]) -> Self {
        Self { letters, version: NEWEST_VERSION }
    }
}

/// How what follows a header is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As it is.
    Plain,
    /// Encrypted.
    Encrypted,
}

impl Form {
    /// Whether an object has the form that all objects of its repository have: one that is written
    /// in clear where all are encrypted was put there by somebody without the key.
    fn require(self, found: Self, object: &str) -> Result<()> {
        let detail = match (self, found) {
            (Self::Plain, Self::Encrypted) => "it is encrypted, and the repository is not",
            (Self::Encrypted, Self::Plain) => "it is not encrypted, and the repository is",
            _ => return Ok(()),
        };
        Err(Damage::new(object, DamageKind::Foreign, detail).into())
    }
}

/// The first bytes of an object.
pub(crate) fn header(
    kind: Kind,
    form: Form,
    repository: &RepositoryId,
    payload_bytes: u64,
) -> Vec<u8> {
    let flags = match form {
        Form::Plain => 0,
        Form::Encrypted => FLAG_ENCRYPTED,
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(kind.letters);
    bytes.extend_from_slice(&kind.version.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(repository.as_str().as_bytes());
    bytes.extend_from_slice(&payload_bytes.to_le_bytes());
    bytes
}

/// Wraps a small object that is not encrypted.
pub(crate) fn seal(kind: Kind, repository: &RepositoryId, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(kind, Form::Plain, repository, payload.len() as u64);
    bytes.extend_from_slice(payload);
    close(bytes)
}

/// Ends a small object with its checksum.
pub(crate) fn close(mut bytes: Vec<u8>) -> Vec<u8> {
    let seal = blake3::hash(&bytes);
    bytes.extend_from_slice(seal.as_bytes());
    bytes
}

/// Unwraps a small object of this repository that is not encrypted; `object` names it in errors.
pub(crate) fn open<'a>(
    kind: Kind,
    repository: &RepositoryId,
    object: &str,
    bytes: &'a [u8],
) -> Result<&'a [u8]> {
    open_form(kind, Form::Plain, repository, object, bytes)
}

/// The payload of a small object of this repository, of the form that all of them have.
pub(crate) fn open_form<'a>(
    kind: Kind,
    form: Form,
    repository: &RepositoryId,
    object: &str,
    bytes: &'a [u8],
) -> Result<&'a [u8]> {
    let (found, payload) = open_of_any(kind, form, object, bytes)?;
    check_repository(repository, &found, object)?;
    Ok(payload)
}

/// Unwraps a small object of whatever repository: the config, which says which one it is.
pub(crate) fn open_any<'a>(
    kind: Kind,
    object: &str,
    bytes: &'a [u8],
) -> Result<(RepositoryId, &'a [u8])> {
    open_of_any(kind, Form::Plain, object, bytes)
}

fn open_of_any<'a>(
    kind: Kind,
    form: Form,
    object: &str,
    bytes: &'a [u8],
) -> Result<(RepositoryId, &'a [u8])> {
    open_closed(Some(kind), form, object, bytes)
}

/// Verifies the checksum of a small object of this repository without opening it, whatever its kind.
pub(crate) fn verify(
    form: Form,
    repository: &RepositoryId,
    object: &str,
    bytes: &[u8],
) -> Result<()> {
    let (found, _) = open_closed(None, form, object, bytes)?;
    check_repository(repository, &found, object)
}

fn open_closed<'a>(
    kind: Option<Kind>,
    form: Form,
    object: &str,
    bytes: &'a [u8],
) -> Result<(RepositoryId, &'a [u8])> {
    let length = || Damage::new(object, DamageKind::Length, "it is too short for its header");
    let end = bytes.len().checked_sub(SEAL_BYTES).ok_or_else(length)?;
    let (sealed, seal) = bytes.split_at(end);
    let (found, repository, payload_bytes) = parse_header(kind, object, sealed)?;
    form.require(found, object)?;
    if blake3::hash(sealed) != *seal {
        return Err(Damage::new(object, DamageKind::Checksum, "its seal does not match").into());
    }
    let payload = &sealed[HEADER_BYTES..];
    if payload_bytes != payload.len() as u64 {
        return Err(Damage::new(object, DamageKind::Length, "its length is not as stated").into());
    }
    Ok((repository, payload))
}

/// Header of a streamed object with this 128-bit id.
pub(crate) fn stream_header(
    kind: Kind,
    form: Form,
    repository: &RepositoryId,
    id: [u8; 16],
) -> Vec<u8> {
    let mut bytes = header(kind, form, repository, 0);
    bytes.extend_from_slice(&id);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// Checks the header of a streamed object against what it must be.
pub(crate) fn check_stream_header(
    kind: Kind,
    form: Form,
    repository: &RepositoryId,
    id: [u8; 16],
    object: &str,
    bytes: &[u8],
) -> Result<()> {
    let (found_form, found, _) = parse_header(Some(kind), object, bytes)?;
    let rest = bytes.get(HEADER_BYTES..STREAM_HEADER_BYTES).unwrap_or_default();
    let crc = crc32c::crc32c(&bytes[..STREAM_HEADER_BYTES.min(bytes.len()).saturating_sub(4)]);
    if rest.get(16..) != Some(&crc.to_le_bytes()) {
        return Err(Damage::new(object, DamageKind::Checksum, "its header's CRC is wrong").into());
    }
    form.require(found_form, object)?;
    check_repository(repository, &found, object)?;
    if rest.get(..16) != Some(&id) {
        return Err(Damage::new(object, DamageKind::Foreign, "it has another object's id").into());
    }
    Ok(())
}

fn check_repository(wanted: &RepositoryId, found: &RepositoryId, object: &str) -> Result<()> {
    if wanted == found {
        return Ok(());
    }
    let detail = format!("it belongs to repository {found}, not to {wanted}");
    Err(Damage::new(object, DamageKind::Foreign, detail).into())
}

/// Of an object of that kind, or of any.
fn parse_header(
    kind: Option<Kind>,
    object: &str,
    bytes: &[u8],
) -> Result<(Form, RepositoryId, u64)> {
    let damaged = |kind, detail: &str| Error::from(Damage::new(object, kind, detail));
    let Some(header) = bytes.get(..HEADER_BYTES) else {
        return Err(damaged(DamageKind::Length, "it is too short for its header"));
    };
    if &header[..8] != MAGIC || kind.is_some_and(|kind| &header[8..12] != kind.letters) {
        return Err(damaged(DamageKind::Header, "its magic is wrong"));
    }
    let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (version, flags) = (number(12), number(14));
    let form = match flags {
        0 => Some(Form::Plain),
        FLAG_ENCRYPTED => Some(Form::Encrypted),
        _ => None,
    };
    let newest = kind.map_or(NEWEST_VERSION, |kind| kind.version);
    let Some(form) = form.filter(|_| version > 0 && version <= newest) else {
        let what = format!("version {version}, flags {flags:#x}, of an object of its kind");
        return Err(Error::Unsupported { object: object.to_owned(), what });
    };
    let repository = std::str::from_utf8(&header[16..32]).ok().and_then(|id| id.parse().ok());
    let repository =
        repository.ok_or_else(|| damaged(DamageKind::Header, "its repository id is none"))?;
    let mut length = [0; 8];
    length.copy_from_slice(&header[32..40]);
    Ok((form, repository, u64::from_le_bytes(length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(n: u128) -> RepositoryId {
        RepositoryId::from_random(n)
    }

    #[test]
    fn sealed_objects_go_there_and_back() {
        let bytes = seal(Kind::RECEIPT, &repository(5), b"payload");
        assert_eq!(open(Kind::RECEIPT, &repository(5), "x", &bytes).unwrap(), b"payload");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = seal(Kind::RECEIPT, &repository(5), b"payload");
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                assert!(open(Kind::RECEIPT, &repository(5), "x", &bad).is_err(), "{at}.{bit}");
            }
            assert!(open(Kind::RECEIPT, &repository(5), "x", &bytes[..at]).is_err(), "cut {at}");
        }
    }

    #[test]
    fn an_object_of_another_repository_or_kind_is_refused() {
        let bytes = seal(Kind::RECEIPT, &repository(5), b"payload");
        let error = open(Kind::RECEIPT, &repository(6), "x", &bytes).unwrap_err();
        assert_eq!(error.damage().unwrap().kind, DamageKind::Foreign);
        let error = open(Kind::MANIFEST, &repository(5), "x", &bytes).unwrap_err();
        assert_eq!(error.damage().unwrap().kind, DamageKind::Header);
    }

    #[test]
    fn a_later_version_asks_for_an_upgrade() {
        let later = Kind { letters: b"RCPT", version: 2 };
        let bytes = seal(later, &repository(5), b"payload");
        let error = open(Kind::RECEIPT, &repository(5), "x", &bytes).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }

    #[test]
    fn stream_headers_are_bound_to_id_and_repository() {
        let bytes = stream_header(Kind::PACK, Form::Plain, &repository(1), [7; 16]);
        assert_eq!(bytes.len(), STREAM_HEADER_BYTES);
        let check = |repo, id, bytes: &[u8]| {
            let form = Form::Plain;
            check_stream_header(Kind::PACK, form, &repository(repo), id, "x", bytes).is_ok()
        };
        assert!(check(1, [7; 16], &bytes));
        assert!(!check(2, [7; 16], &bytes));
        assert!(!check(1, [8; 16], &bytes));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(!check(1, [7; 16], &bad), "{at}");
            assert!(!check(1, [7; 16], &bytes[..at]), "cut {at}");
        }
    }
}
