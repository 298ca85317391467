//! Newtypes for everything that names or counts something in a repository.
//!
//! Each is checked where it is built, so that a value that exists can be used without a second look;
//! none of them can hold a path separator.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Crockford's base 32 alphabet: ASCII order equals value order, so texts sort as the numbers do.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// 45 bits of milliseconds since 1970 last until the year 3084 and fill nine characters exactly.
const TIME_CHARS: usize = 9;
/// 25 random bits tell apart points of several hosts in the same millisecond.
const RANDOM_CHARS: usize = 5;
const POINT_ID_CHARS: usize = TIME_CHARS + RANDOM_CHARS;
/// 80 random bits: unique without asking anyone.
const RANDOM_ID_CHARS: usize = 16;
const MILLIS_MAX: u64 = (1 << 45) - 1;
/// The longest VM name (INTERFACE grammar).
pub const VM_NAME_BYTES_MAX: usize = 255;
/// The longest disk id; longer ones would not fit a file name with its extension.
pub const DISK_ID_BYTES_MAX: usize = 200;

/// A text that is not an id of the wanted kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {kind}: {rule}")]
pub struct IdError {
    /// What it was read as, such as "point id".
    pub kind: &'static str,
    /// The offending text, shortened and escaped when shown.
    pub text: String,
    /// What such an id looks like.
    pub rule: &'static str,
}

impl IdError {
    fn new(kind: &'static str, text: &str, rule: &'static str) -> Self {
        Self { kind, text: text.chars().take(80).collect(), rule }
    }
}

/// Content id of a block: BLAKE3 of its bytes, keyed where the repository is encrypted; thirty-two zero bytes stand for any all-zero block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub [u8; 32]);

impl BlockId {
    /// The constant that stands for every all-zero block, whatever its length.
    pub const ZERO: Self = Self([0; 32]);
}

/// Root of the content tree of one disk: proves a restore, independent of packing.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ContentRoot(pub [u8; 32]);

/// BLAKE3 of an object or of a part of one (maps, manifests), as opposed to content.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checksum(pub [u8; 32]);

/// Random name of a pack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(pub [u8; 16]);

/// Random name of a map run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub [u8; 16]);

/// Random bytes that keep equal secrets from giving equal keys.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Salt128(pub(crate) [u8; 16]);

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

macro_rules! text_serde {
    ($name:ident) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
                let text = String::deserialize(source)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! hex_id {
    ($name:ident, $bytes:literal, $kind:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_hex::<$bytes>(text)
                    .map(Self)
                    .ok_or_else(|| IdError::new($kind, text, "lower-case hex of fixed length"))
            }
        }

        text_serde!($name);
    };
}

hex_id!(BlockId, 32, "block id");
hex_id!(ContentRoot, 32, "content root");
hex_id!(Checksum, 32, "checksum");
hex_id!(PackId, 16, "pack id");
hex_id!(RunId, 16, "map run id");
hex_id!(Salt128, 16, "salt");

macro_rules! base32_id {
    ($(#[$doc:meta])* $name:ident, $chars:expr, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The id as text, safe as a file name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let fits = text.len() == $chars && text.bytes().all(|c| ALPHABET.contains(&c));
                if fits {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(IdError::new($kind, text, "base 32 characters of fixed number"))
                }
            }
        }

        text_serde!($name);
    };
}

base32_id!(
    /// A point: nine characters of hybrid time, five random ones. Text order is time order.
    PointId, POINT_ID_CHARS, "point id"
);
base32_id!(
    /// A chain: the id of its first point (which may be deleted; the chain keeps the name).
    ChainId, POINT_ID_CHARS, "chain id"
);
base32_id!(
    /// A repository, drawn at random when it is made.
    RepositoryId, RANDOM_ID_CHARS, "repository id"
);
base32_id!(
    /// One of the keys of an encrypted repository.
    KeyId, RANDOM_ID_CHARS, "key id"
);
base32_id!(
    /// One run of one writer, drawn at random when it announces itself.
    WriterId, RANDOM_ID_CHARS, "writer id"
);
base32_id!(
    /// A daemon, drawn at random once for a host's state directory.
    ServiceId, RANDOM_ID_CHARS, "service id"
);

fn base32(mut value: u128, chars: usize) -> String {
    let mut text = vec![b'0'; chars];
    for place in text.iter_mut().rev() {
        *place = ALPHABET[(value & 31) as usize];
        value >>= 5;
    }
    text.into_iter().map(char::from).collect()
}

impl PointId {
    /// The next id by the hybrid clock: the wall clock, but always after `floor`.
    ///
    /// `floor` is the greatest id that must stay smaller (the parent's, the VM's newest), so that
    /// a wall clock that steps back cannot reorder points. `random` fills the last five characters.
    pub fn next(now: jiff::Timestamp, floor: Option<&Self>, random: u32) -> Self {
        let wall = u64::try_from(now.as_millisecond()).unwrap_or(0);
        let floor = floor.map_or(0, |id| id.millis() + 1);
        let millis = wall.max(floor).min(MILLIS_MAX);
        let random = u128::from(random) & ((1 << (5 * RANDOM_CHARS)) - 1);
        Self(base32(u128::from(millis) << (5 * RANDOM_CHARS) | random, POINT_ID_CHARS))
    }

    /// The hybrid time inside the id, in milliseconds since 1970.
    pub fn millis(&self) -> u64 {
        self.0.bytes().take(TIME_CHARS).fold(0, |value, c| {
            let digit = ALPHABET.iter().position(|&a| a == c).unwrap_or(0);
            value << 5 | digit as u64
        })
    }
}

impl From<&PointId> for ChainId {
    fn from(first: &PointId) -> Self {
        Self(first.0.clone())
    }
}

macro_rules! random_id {
    ($($name:ident)*) => {
        $(impl $name {
            /// An id from 128 random bits, of which 80 are used.
            pub fn from_random(random: u128) -> Self {
                Self(base32(random, RANDOM_ID_CHARS))
            }
        })*
    };
}

random_id!(RepositoryId KeyId ServiceId WriterId);

macro_rules! checked_name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Checks `text` against the grammar.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                let check: fn(&str) -> bool = $check;
                if check(&text) { Ok(Self(text)) } else { Err(IdError::new($kind, &text, $rule)) }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        text_serde!($name);
    };
}

checked_name!(
    /// A disk of a VM: `[A-Za-z0-9._-]+`, not `.` or `..`.
    DiskId,
    "disk id",
    "1 to 200 of A-Z a-z 0-9 . _ - and neither . nor ..",
    |text| {
        let plain = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        (1..=DISK_ID_BYTES_MAX).contains(&text.len())
            && text.bytes().all(plain)
            && text != "."
            && text != ".."
    }
);
checked_name!(
    /// A VM: 1 to 255 bytes, no `/`, no control characters, not `.` or `..`.
    VmName,
    "VM name",
    "1 to 255 bytes, no /, no control characters, neither . nor ..",
    |text| {
        (1..=VM_NAME_BYTES_MAX).contains(&text.len())
            && !text.chars().any(|c| c == '/' || c.is_control())
            && text != "."
            && text != ".."
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> jiff::Timestamp {
        jiff::Timestamp::from_millisecond(millis).unwrap()
    }

    #[test]
    fn point_ids_sort_by_time_and_never_step_back() {
        let first = PointId::next(at(1_700_000_000_000), None, u32::MAX);
        let later = PointId::next(at(1_700_000_000_001), None, 0);
        assert!(first < later);
        let stepped_back = PointId::next(at(1_600_000_000_000), Some(&later), 0);
        assert!(later < stepped_back);
        assert_eq!(stepped_back.millis(), 1_700_000_000_002);
        assert_eq!(first.as_str().len(), 14);
        assert_eq!(first.as_str().parse::<PointId>().unwrap(), first);
    }

    #[test]
    fn a_time_before_1970_or_far_away_is_clamped() {
        assert_eq!(PointId::next(at(-5), None, 0).millis(), 0);
        let end = PointId("zzzzzzzzz00000".into());
        assert_eq!(PointId::next(at(0), Some(&end), 7).millis(), MILLIS_MAX);
    }

    #[test]
    fn names_that_could_leave_a_folder_or_a_line_are_refused() {
        for bad in ["", ".", "..", "a/b", "a\0", "x\x1b[31m", "ü", "a b"] {
            assert!(DiskId::new(bad).is_err(), "{bad:?}");
        }
        for bad in ["", ".", "..", "a/b", "a\0", "x\x1b[31m", "a\n"] {
            assert!(VmName::new(bad).is_err(), "{bad:?}");
        }
        assert!(VmName::new("web server ü").is_ok());
        assert!(VmName::new("x".repeat(256)).is_err());
        assert!("../../etc/passw".parse::<PointId>().is_err());
        assert!("ABCDEFGHJKMNPQ".parse::<PointId>().is_err());
    }

    #[test]
    fn hex_ids_go_there_and_back() {
        let id = PackId([0xa5; 16]);
        assert_eq!(id.to_string().parse::<PackId>().unwrap(), id);
        assert!("A5".repeat(16).parse::<PackId>().is_err());
        assert!("a5".repeat(15).parse::<PackId>().is_err());
    }
}
