//! Who may do what to which object of a repository, for a server that does not trust its clients.
//! Pure: names and roles in, a verdict out.
//!
//! A host that backs up must be able to add, and must not be able to destroy: whoever takes it over
//! gets its token. So a host creates what a new point is made of and takes back its own announcement
//! and heartbeats (and the words of daemons that they are there, by which nothing is decided), and
//! nothing else is ever removed or decided with its token.
//! - Fates (deletion and protection) end or keep points; fences and verdicts disown a writer's
//!   points; a new generation belongs to a gc. All of them are for administrators, whatever they say:
//!   a rule by name cannot be talked out of it by content.
//! - An announcement of *another* writer keeps gc from what that writer is about to refer to. Taking
//!   it back would let a gc delete a running backup's data, so only its owner may.
//! - A heartbeat of another writer would keep a dead one alive for ever.

use serde::{Deserialize, Serialize};

use crate::ids::{PackId, PointId, RunId, WriterId};
use crate::names;
use crate::store::ObjectName;
use crate::writers::is_beat;
use crate::writers::{
    BEATS, FATES, GENERATIONS, QUARANTINE, RESERVE, RESERVE_OBJECTS, REVOKED, SERVICES, WRITERS,
};

/// What a client of a repository server may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Right {
    /// Add points and read those, and nothing of anybody else's: what a host needs that backs up into
    /// a repository with hosts that it does not trust.
    Own,
    /// Read everything: restore, check, list.
    Read,
    /// And add points: what a host needs that backs up.
    Append,
    /// And delete and decide: retention, gc, protection.
    Administer,
}

/// What is to be done to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// Its bytes, its length, its name in a listing.
    Read,
    /// It is made.
    Create,
    /// It is removed.
    Delete,
}

/// Whose the writer or the point is that an object tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The one who asks.
    Own,
    /// Somebody else, or nobody knows.
    Other,
    /// Nobody's, as far as is known.
    Nobody,
}

/// What an object is for, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// The description of the repository.
    Config,
    /// The repository's key, sealed under one of those that open it.
    Key,
    /// Packs and map runs: what points are made of, of several hosts perhaps.
    Data,
    /// A point's manifest: what it is and where its data are.
    Manifest(PointId),
    /// A point's receipt.
    Receipt(PointId),
    /// A writer's announcement.
    Announcement(WriterId),
    /// A writer's heartbeat.
    Heartbeat(WriterId),
    /// A mark that a pack is damaged: new points use nothing of it.
    DamageMark,
    /// Space set aside for deletions.
    Reserve,
    /// A daemon says that it is there; nothing is decided by it.
    Presence,
    /// Deletion and protection of points, generations of gc, fences and verdicts.
    Decision,
    /// No object of a repository.
    Foreign,
}

impl Purpose {
    /// What an object of this name is for.
    #[must_use]
    pub fn of(name: &ObjectName) -> Self {
        known(name.as_str()).unwrap_or(Self::Foreign)
    }

    /// The writer whose life this object tells of.
    #[must_use]
    pub fn writer(&self) -> Option<&WriterId> {
        match self {
            Self::Announcement(writer) | Self::Heartbeat(writer) => Some(writer),
            _ => None,
        }
    }

    /// The point that this object is of.
    #[must_use]
    pub fn point(&self) -> Option<&PointId> {
        match self {
            Self::Manifest(point) | Self::Receipt(point) => Some(point),
            _ => None,
        }
    }
}

fn known(name: &str) -> Option<Purpose> {
    let is_in = |prefix: &str| name.strip_prefix(prefix);
    if name == names::CONFIG {
        return Some(Purpose::Config);
    }
    if let Some(key) = is_in("keys/") {
        return (!key.contains('/')).then_some(Purpose::Key);
    }
    if let Some(pack) = is_in(names::PACKS) {
        let pack: PackId = in_its_folder(pack)?.parse().ok()?;
        return (names::pack(pack).ok()?.as_str() == name).then_some(Purpose::Data);
    }
    if let Some(run) = is_in(names::RUNS) {
        let run: RunId = in_its_folder(run)?.parse().ok()?;
        return (names::run(run).ok()?.as_str() == name).then_some(Purpose::Data);
    }
    if let Some(point) = is_in(names::POINTS) {
        return point.parse().ok().map(Purpose::Manifest);
    }
    if let Some(point) = is_in(names::RECEIPTS) {
        return point.parse().ok().map(Purpose::Receipt);
    }
    if let Some(writer) = is_in(WRITERS) {
        return writer.parse().ok().map(Purpose::Announcement);
    }
    if let Some(beat) = is_in(BEATS) {
        let (writer, count) = beat.rsplit_once('.')?;
        count.parse::<u64>().ok()?;
        return writer.parse().ok().map(Purpose::Heartbeat);
    }
    if let Some(pack) = is_in(QUARANTINE) {
        return pack.parse::<PackId>().is_ok().then_some(Purpose::DamageMark);
    }
    if let Some(number) = is_in(RESERVE) {
        return (number.parse::<u32>().ok()? < RESERVE_OBJECTS).then_some(Purpose::Reserve);
    }
    if let Some(beat) = is_in(SERVICES) {
        return is_beat(beat).then_some(Purpose::Presence);
    }
    let decisions = [FATES, GENERATIONS, REVOKED];
    decisions.iter().any(|prefix| name.starts_with(prefix)).then_some(Purpose::Decision)
}

fn in_its_folder(rest: &str) -> Option<&str> {
    rest.split_once('/').map(|(_, id)| id)
}

/// Why something is refused, as the end of a sentence.
pub type Refusal = &'static str;

/// Whether a client with this right may do this to an object of this purpose. `owner` is whose
/// writer or point it concerns, where it concerns one.
///
/// Who reads his own alone may read data by name: a name of a pack or map is 128 random bits, and only
/// manifests, maps and listings tell it. So a server shows him no listing of data.
///
/// # Errors
/// The reason, in words.
pub fn may(right: Right, act: Act, purpose: &Purpose, owner: Owner) -> Result<(), Refusal> {
    match (right, act) {
        (Right::Administer, _) | (Right::Read | Right::Append, Act::Read) => Ok(()),
        (Right::Own, Act::Read) => may_see(purpose, owner),
        (Right::Read, Act::Create | Act::Delete) => Err("this token may only read"),
        (Right::Own | Right::Append, Act::Create) => may_append(purpose, owner),
        (Right::Own | Right::Append, Act::Delete) => may_take_back(purpose, owner),
    }
}

fn may_see(purpose: &Purpose, owner: Owner) -> Result<(), Refusal> {
    match purpose {
        Purpose::Manifest(_) | Purpose::Receipt(_) if owner != Owner::Own => {
            Err("that point was written with another token")
        }
        _ => Ok(()),
    }
}

fn may_append(purpose: &Purpose, owner: Owner) -> Result<(), Refusal> {
    match purpose {
        Purpose::Presence => Ok(()),
        Purpose::Config | Purpose::Key | Purpose::Data | Purpose::DamageMark | Purpose::Reserve => {
            Ok(())
        }
        Purpose::Announcement(_) | Purpose::Manifest(_) | Purpose::Receipt(_)
            if owner != Owner::Other =>
        {
            Ok(())
        }
        Purpose::Manifest(_) | Purpose::Receipt(_) => {
            Err("that point was begun with another token")
        }
        Purpose::Heartbeat(_) if owner == Owner::Own => Ok(()),
        Purpose::Announcement(_) | Purpose::Heartbeat(_) => {
            Err("that writer was announced with another token")
        }
        Purpose::Decision => {
            Err("deleting, protecting and gc take a token with the right to administer")
        }
        Purpose::Foreign => Err("no object of a repository has such a name"),
    }
}

fn may_take_back(purpose: &Purpose, owner: Owner) -> Result<(), Refusal> {
    match purpose {
        Purpose::Presence => Ok(()),
        Purpose::Announcement(_) | Purpose::Heartbeat(_) if owner == Owner::Own => Ok(()),
        Purpose::Announcement(_) | Purpose::Heartbeat(_) => {
            Err("that writer was announced with another token")
        }
        _ => Err("this token may add and not delete; gc and deletions take one with the right to \
                  administer"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WRITER: &str = "0123456789abcdef";
    const POINT: &str = "0123456789abcd";
    const HEX: &str = "ab0123456789abcdef0123456789abcd";

    fn purpose(name: &str) -> Purpose {
        Purpose::of(&ObjectName::new(name).unwrap())
    }

    /// What a token that appends may create and delete, for each kind of name: of its own writer,
    /// of another's, of nobody's.
    #[test]
    fn every_kind_of_name_has_its_rule() {
        const NO: [bool; 3] = [false; 3];
        const YES: [bool; 3] = [true; 3];
        let rules = [
            ("config", YES, NO),
            ("keys/main", YES, NO),
            (&format!("packs/ab/{HEX}"), YES, NO),
            (&format!("runs/ab/{HEX}"), YES, NO),
            (&format!("points/{POINT}"), [true, false, true], NO),
            (&format!("receipts/{POINT}"), [true, false, true], NO),
            (&format!("coordination/writers/{WRITER}"), [true, false, true], [true, false, false]),
            (
                &format!("coordination/beats/{WRITER}.00000000000000000007"),
                [true, false, false],
                [true, false, false],
            ),
            (&format!("coordination/damaged/{HEX}"), YES, NO),
            ("coordination/reserve/3", YES, NO),
            ("coordination/reserve/4", NO, NO),
            (
                "coordination/services/0123456789abcdef.00000000000000000001.00000000000000000002",
                YES,
                YES,
            ),
            ("coordination/services/0123456789abcdef.00000001.00000002", NO, NO),
            ("coordination/services/x", NO, NO),
            ("coordination/generations/00000000000000000001", NO, NO),
            (&format!("coordination/revoked/{WRITER}.fence"), NO, NO),
            (&format!("coordination/revoked/{WRITER}.verdict"), NO, NO),
            (&format!("coordination/fates/{POINT}.00000000"), NO, NO),
            ("coordination/anything/else", NO, NO),
            ("notes.txt", NO, NO),
            (&format!("packs/cd/{HEX}"), NO, NO),
            (&format!("packs/{HEX}"), NO, NO),
            ("points/not-an-id", NO, NO),
        ];
        for (name, create, delete) in rules {
            let purpose = purpose(name);
            for (index, owner) in [Owner::Own, Owner::Other, Owner::Nobody].into_iter().enumerate()
            {
                let may = |right, act| may(right, act, &purpose, owner).is_ok();
                assert_eq!(may(Right::Append, Act::Create), create[index], "{name} {owner:?}");
                assert_eq!(may(Right::Append, Act::Delete), delete[index], "{name} {owner:?}");
                assert!(!may(Right::Read, Act::Create) && !may(Right::Read, Act::Delete));
                assert!(may(Right::Administer, Act::Create) && may(Right::Administer, Act::Delete));
                assert!([Right::Read, Right::Append].iter().all(|right| may(*right, Act::Read)));
                let is_of_point = purpose.point().is_some();
                let sees = !is_of_point || owner == Owner::Own;
                assert_eq!(may(Right::Own, Act::Read), sees, "{name} {owner:?}");
                for act in [Act::Create, Act::Delete] {
                    assert_eq!(may(Right::Own, act), may(Right::Append, act), "{name} {owner:?}");
                }
            }
        }
    }

    proptest! {
        /// Whatever the name: what a host's token can remove is its own writer's life and the words
        /// of daemons, nothing else.
        #[test]
        fn a_host_removes_nothing_but_its_own_announcement(
            name in "[a-z0-9._/-]{1,60}",
            folder in "(coordination/(writers|beats|fates|revoked|damaged|generations|reserve|services)/|\
                       packs/ab/|runs/ab/|points/|receipts/|keys/|)",
            owner in prop_oneof![Just(Owner::Own), Just(Owner::Other), Just(Owner::Nobody)],
        ) {
            let Ok(name) = ObjectName::new(format!("{folder}{name}")) else { return Ok(()) };
            let purpose = Purpose::of(&name);
            if may(Right::Append, Act::Delete, &purpose, owner).is_ok() {
                if purpose == Purpose::Presence {
                    return Ok(());
                }
                prop_assert_eq!(owner, Owner::Own);
                let text = name.as_str();
                prop_assert!(text.starts_with(WRITERS) || text.starts_with(BEATS), "{}", text);
                prop_assert!(purpose.writer().is_some());
            }
            if may(Right::Append, Act::Create, &purpose, owner).is_ok() {
                prop_assert!(![Purpose::Decision, Purpose::Foreign].contains(&purpose));
            }
        }
    }
}
