//! Names of all that one run puts into a QEMU, so that its leftovers can be told from others'.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest node name that QEMU takes (block.c, `char node_name[32]`).
pub const NODE_NAME_BYTES_MAX: usize = 31;

/// Begins the name of each bitmap of ours; the repository's own fields follow.
pub const BITMAP_PREFIX: &str = "icecore:";

/// Name of the copy of a disk's bitmap on the snapshot node: the one that is exported.
pub const DIRTY_BITMAP: &str = "ic-dirty";

/// One run of the worker: eight hexadecimal digits in every name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(pub u32);

/// What a node, export or job of ours is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Protocol node of the scratch file.
    File,
    /// The cap on the scratch: a raw node with a fixed size.
    Raw,
    /// The scratch image proper.
    Tmp,
    /// The copy-before-write filter.
    Cbw,
    /// The snapshot-access node: the disk as it was at the instant.
    Snap,
    /// A null-co node that carries bitmaps and no data.
    Map,
    /// The NBD client node that a push writes to.
    Push,
    /// Stands in for the disk while a rollback writes to it.
    Null,
    /// A node without a user over the disk, which keeps it alive while its device is elsewhere:
    /// a disk of `-drive` would go with its device's reference.
    Keep,
    /// An export for the worker.
    Export,
    /// An export that nobody connects to: it holds a node in an iothread.
    Pin,
    /// A job.
    Job,
}

const ROLES: [(Role, &str); 12] = [
    (Role::File, "file"),
    (Role::Raw, "raw"),
    (Role::Tmp, "tmp"),
    (Role::Cbw, "cbw"),
    (Role::Snap, "snap"),
    (Role::Map, "map"),
    (Role::Push, "push"),
    (Role::Null, "null"),
    (Role::Keep, "keep"),
    (Role::Export, "exp"),
    (Role::Pin, "pin"),
    (Role::Job, "job"),
];

/// The position of a disk in the run's request, not the guest's numbering.
pub type DiskIndex = u16;

/// A name of ours taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OurName {
    /// The run that made it.
    pub run: RunId,
    /// The disk it belongs to.
    pub disk: DiskIndex,
    /// What it is for.
    pub role: Role,
}

impl RunId {
    /// The name of `role` for `disk`.
    pub fn name(self, disk: DiskIndex, role: Role) -> String {
        OurName { run: self, disk, role }.to_string()
    }
}

impl OurName {
    /// Takes a name apart; `None` for names that are not ours.
    pub fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("ic-")?;
        let (run, rest) = rest.split_once('-')?;
        let (disk, role) = rest.split_once('-')?;
        let parsed = Self {
            run: run.parse().ok()?,
            disk: disk.parse().ok()?,
            role: ROLES.iter().find(|(_, word)| *word == role)?.0,
        };
        // Only the spelling that we write is ours: "ic-…-01-cbw" is somebody else's.
        (parsed.to_string() == name).then_some(parsed)
    }
}

impl fmt::Display for OurName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = ROLES.iter().find(|(role, _)| *role == self.role).map_or("", |(_, word)| word);
        write!(f, "ic-{}-{}-{word}", self.run, self.disk)
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// The text is no run id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no run id: eight lower-case hexadecimal digits are wanted")]
pub struct BadRunId(String);

impl FromStr for RunId {
    type Err = BadRunId;

    fn from_str(text: &str) -> Result<Self, BadRunId> {
        let bad = || BadRunId(text.to_owned());
        let id = Self(u32::from_str_radix(text, 16).map_err(|_| bad())?);
        if id.to_string() == text { Ok(id) } else { Err(bad()) }
    }
}

impl TryFrom<String> for RunId {
    type Error = BadRunId;

    fn try_from(text: String) -> Result<Self, BadRunId> {
        text.parse()
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_qemu_and_come_back() {
        for (role, _) in ROLES {
            let name = RunId(u32::MAX).name(u16::MAX, role);
            assert!(name.len() <= NODE_NAME_BYTES_MAX, "{name}");
            let parsed = OurName::parse(&name).expect("ours");
            assert_eq!((parsed.run, parsed.disk, parsed.role), (RunId(u32::MAX), u16::MAX, role));
        }
    }

    #[test]
    fn foreign_names_are_not_ours() {
        for name in ["", "ic-", "ic-0000000a-0", "ic-0000000A-0-cbw", "ic-0000000a-01-cbw"] {
            assert_eq!(OurName::parse(name), None, "{name}");
        }
        for name in ["ic-a-0-cbw", "ic-0000000a-0-cbw2", "libvirt-1-format", "ic-0000000a-+0-cbw"] {
            assert_eq!(OurName::parse(name), None, "{name}");
        }
    }
}
