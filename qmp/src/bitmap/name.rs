//! Names of bitmaps: `icecore:<repository>:<chain>:<point>:<disk>`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const PREFIX: &str = "icecore";

/// Longest part. Four of them, prefix and colons stay below the 1023 bytes of a qcow2's bitmap
/// name (QEMU docs/interop/qcow2.txt).
const PART_BYTES_MAX: usize = 200;

/// Why a text is no part of a bitmap name, or no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, too long, or other characters than `A-Z a-z 0-9 . _ -`.
    #[error("{0:?} cannot stand in a bitmap name: 1 to {PART_BYTES_MAX} of A-Z a-z 0-9 . _ -")]
    Part(String),
    /// Not of the form `icecore:<repository>:<chain>:<point>:<disk>`.
    #[error("{0:?} is no name that Icecore gives to a bitmap")]
    Form(String),
}

/// One part of a bitmap name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePart(String);

impl NamePart {
    /// Checks and keeps the text.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if text.is_empty() || text.len() > PART_BYTES_MAX || !text.bytes().all(allowed) {
            return Err(NameError::Part(text));
        }
        Ok(Self(text))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NamePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for NamePart {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl From<NamePart> for String {
    fn from(part: NamePart) -> Self {
        part.0
    }
}

/// Name of a bitmap of ours: it records on `disk` since the instant of `point`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BitmapName {
    /// Id of the repository that holds the point.
    pub repository: NamePart,
    /// The point's chain.
    pub chain: NamePart,
    /// The point.
    pub point: NamePart,
    /// The disk.
    pub disk: NamePart,
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { repository, chain, point, disk } = self;
        write!(f, "{PREFIX}:{repository}:{chain}:{point}:{disk}")
    }
}

impl FromStr for BitmapName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parts: Vec<_> = text.split(':').collect();
        let [PREFIX, repository, chain, point, disk] = parts[..] else {
            return Err(NameError::Form(text.to_owned()));
        };
        Ok(Self {
            repository: NamePart::new(repository)?,
            chain: NamePart::new(chain)?,
            point: NamePart::new(point)?,
            disk: NamePart::new(disk)?,
        })
    }
}

impl TryFrom<String> for BitmapName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<BitmapName> for String {
    fn from(name: BitmapName) -> Self {
        name.to_string()
    }
}

/// Whose bitmap it is. Only those of our own repository may ever be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// Belongs to a point of this repository.
    ThisRepository(BitmapName),
    /// Belongs to a point of another repository.
    OtherRepository(BitmapName),
    /// Not ours at all.
    Foreign,
}

impl Owner {
    /// Tells from a bitmap's name.
    pub fn of(bitmap: &str, repository: &NamePart) -> Self {
        match bitmap.parse::<BitmapName>() {
            Ok(name) if name.repository == *repository => Self::ThisRepository(name),
            Ok(name) => Self::OtherRepository(name),
            Err(_) => Self::Foreign,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn part() -> impl Strategy<Value = NamePart> {
        "[A-Za-z0-9._-]{1,200}".prop_map(|text| NamePart::new(text).unwrap())
    }

    #[test]
    fn only_plain_parts_stand_in_a_name() {
        for bad in ["", "a:b", "a/b", "ä", "a b", "a\0", &"x".repeat(201)] {
            assert!(NamePart::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_of_others_are_foreign() {
        let repository = NamePart::new("r1").unwrap();
        for foreign in [
            "",
            "libvirt-1",
            "icecore",
            "icecore:r1:c:p",
            "icecore:r1:c:p:d:x",
            "icecore:r1::p:d",
            "Icecore:r1:c:p:d",
            "icecore:r1:c:p:d ",
        ] {
            assert_eq!(Owner::of(foreign, &repository), Owner::Foreign, "{foreign:?}");
        }
        assert!(matches!(Owner::of("icecore:r2:c:p:d", &repository), Owner::OtherRepository(_)));
        assert!(matches!(Owner::of("icecore:r1:c:p:d", &repository), Owner::ThisRepository(_)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn names_parse_back_and_fit_into_a_qcow2(
            repository in part(), chain in part(), point in part(), disk in part(),
        ) {
            let name = BitmapName { repository, chain, point, disk };
            let text = name.to_string();
            prop_assert!(text.len() <= 1023);
            prop_assert_eq!(text.parse::<BitmapName>().unwrap(), name);
        }

        #[test]
        fn what_parses_is_written_back_the_same(text in "(icecore|x)(:[a-c.:]{0,3}){3,5}") {
            if let Ok(name) = text.parse::<BitmapName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
