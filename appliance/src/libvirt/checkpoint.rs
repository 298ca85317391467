//! libvirt's checkpoints: their names, what libvirt says of them, and which of ours may go. Pure.
//!
//! A checkpoint is a bitmap of its own name on each of its disks, so one name serves all of them:
//! `icecore.REPOSITORY.CHAIN.POINT`. (libvirt takes no colons in it.)

use std::fmt;
use std::str::FromStr;

use icecore_qmp::bitmap::{BitmapName, NamePart};
use icecore_repository::DiskId;
use roxmltree::Document;

use super::xml::{child, elements, escape};

const PREFIX: &str = "icecore";

/// The name of a checkpoint of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointName {
    pub repository: NamePart,
    pub chain: NamePart,
    pub point: NamePart,
}

impl CheckpointName {
    /// The checkpoint whose bitmap is remembered as `bitmap` of one of its disks.
    pub fn of(bitmap: &BitmapName) -> Self {
        let BitmapName { repository, chain, point, .. } = bitmap.clone();
        Self { repository, chain, point }
    }

    /// What its bitmap on `disk` is remembered as.
    pub fn bitmap(&self, disk: NamePart) -> BitmapName {
        let Self { repository, chain, point } = self.clone();
        BitmapName { repository, chain, point, disk }
    }
}

impl fmt::Display for CheckpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}.{}", self.repository, self.chain, self.point)
    }
}

impl FromStr for CheckpointName {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parts: Vec<&str> = text.split('.').collect();
        let [PREFIX, repository, chain, point] = parts[..] else { return Err(()) };
        let part = |text: &str| NamePart::new(text).map_err(drop);
        Ok(Self { repository: part(repository)?, chain: part(chain)?, point: part(point)? })
    }
}

/// A checkpoint as libvirt describes it (`checkpoint-dumpxml --size`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub name: String,
    pub disks: Vec<CheckpointDisk>,
}

/// A disk that a checkpoint covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointDisk {
    pub target: String,
    /// Bytes that changed since; `None` where the bitmap is missing or inconsistent, or nobody
    /// looked.
    pub dirty_bytes: Option<u64>,
}

impl Checkpoint {
    /// What it says of a disk, if it covers it.
    pub fn disk(&self, target: &str) -> Option<&CheckpointDisk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

/// Reads a checkpoint's XML.
pub fn parse(text: &str) -> Result<Checkpoint, String> {
    let wrong = |why: &str| format!("a checkpoint's XML is not understood: {why}");
    let document = Document::parse(text).map_err(|e| wrong(&e.to_string()))?;
    let root = document.root_element();
    let name = child(root, "name").and_then(|name| name.text()).ok_or_else(|| wrong("no name"))?;
    let disks = child(root, "disks").map(|disks| {
        let covered =
            elements(disks, "disk").filter(|d| d.attribute("checkpoint") == Some("bitmap"));
        let disk = covered.filter_map(|disk| {
            let dirty_bytes = disk.attribute("size").and_then(|size| size.parse().ok());
            Some(CheckpointDisk { target: disk.attribute("name")?.to_owned(), dirty_bytes })
        });
        disk.collect()
    });
    Ok(Checkpoint { name: name.to_owned(), disks: disks.unwrap_or_default() })
}

/// XML that makes a checkpoint of the disks in `covered` and of none of the `others`.
pub fn request(name: &CheckpointName, covered: &[&str], others: &[&str]) -> String {
    let disk =
        |target: &str, kind: &str| format!("<disk name='{}' checkpoint='{kind}'/>", escape(target));
    let covered = covered.iter().map(|target| disk(target, "bitmap"));
    let disks: String = covered.chain(others.iter().map(|target| disk(target, "no"))).collect();
    format!("<domaincheckpoint><name>{name}</name><disks>{disks}</disks></domaincheckpoint>")
}

/// XML by which libvirt remembers a checkpoint whose bitmaps are there already.
pub fn definition(name: &str, covered: &[String], parent: Option<&str>) -> String {
    let name = escape(name);
    let disk = |target: &String| {
        format!("<disk name='{}' checkpoint='bitmap' bitmap='{name}'/>", escape(target))
    };
    let disks: String = covered.iter().map(disk).collect();
    let parent = parent.map(|parent| format!("<parent><name>{}</name></parent>", escape(parent)));
    let parent = parent.unwrap_or_default();
    format!(
        "<domaincheckpoint><name>{name}</name>{parent}<creationTime>0</creationTime>\
         <disks>{disks}</disks></domaincheckpoint>"
    )
}

/// What the bitmap that an image calls `name` is remembered as: one that belongs to a checkpoint has
/// the checkpoint's name there.
pub fn remembered_name(name: &str, disk: &DiskId) -> String {
    let part = NamePart::new(disk.to_string());
    match (name.parse::<CheckpointName>(), part) {
        (Ok(checkpoint), Ok(part)) => checkpoint.bitmap(part).to_string(),
        _ => name.to_owned(),
    }
}

/// What an image with bitmaps of these `names` calls the one that is remembered as `bitmap`.
pub fn name_in_image<'a>(mut names: impl Iterator<Item = &'a str>, bitmap: &BitmapName) -> String {
    let checkpoint = CheckpointName::of(bitmap).to_string();
    match names.any(|name| name == checkpoint) {
        true => checkpoint,
        false => bitmap.to_string(),
    }
}

/// Checkpoints of the repository of `new` that it makes superfluous: a disk that `new` does not
/// cover still needs its own.
pub fn superseded(all: &[Checkpoint], new: &CheckpointName, covered: &[String]) -> Vec<String> {
    let old = all.iter().filter(|checkpoint| {
        let ours = checkpoint.name.parse::<CheckpointName>();
        ours.is_ok_and(|name| name.repository == new.repository && &name != new)
            && checkpoint.disks.iter().all(|disk| covered.contains(&disk.target))
    });
    old.map(|checkpoint| checkpoint.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(point: &str) -> CheckpointName {
        format!("icecore.r1.c1.{point}").parse().unwrap()
    }

    fn checkpoint(name: &str, targets: &[&str]) -> Checkpoint {
        let disk = |target: &&str| CheckpointDisk { target: (*target).into(), dirty_bytes: None };
        Checkpoint { name: name.into(), disks: targets.iter().map(disk).collect() }
    }

    #[test]
    fn names_come_back_and_those_of_others_are_not_ours() {
        assert_eq!(name("p1").to_string(), "icecore.r1.c1.p1");
        assert_eq!(
            CheckpointName::of(&name("p1").bitmap(NamePart::new("vda").unwrap())),
            name("p1")
        );
        for foreign in
            ["virtnbdbackup.0", "icecore", "icecore.a.b", "icecore.a.b.c.d", "icecore.a..c"]
        {
            assert!(foreign.parse::<CheckpointName>().is_err(), "{foreign}");
        }
    }

    #[test]
    fn what_was_asked_for_is_read_back() {
        let text = request(&name("p1"), &["vda", "vdb"], &["vdc"]);
        let seen = parse(&text).unwrap();
        assert_eq!(seen, checkpoint("icecore.r1.c1.p1", &["vda", "vdb"]));
    }

    #[test]
    fn a_bitmap_in_an_image_is_known_by_either_name() {
        let disk: DiskId = "vda".parse().unwrap();
        let bitmap: BitmapName = "icecore:r1:c1:p1:vda".parse().unwrap();
        let in_image = |names: &[&str]| name_in_image(names.iter().copied(), &bitmap);
        assert_eq!(in_image(&["icecore.r1.c1.p1"]), "icecore.r1.c1.p1");
        assert_eq!(in_image(&["icecore.r1.c1.p2"]), bitmap.to_string());
        assert_eq!(remembered_name("icecore.r1.c1.p1", &disk), bitmap.to_string());
        assert_eq!(remembered_name("foreign", &disk), "foreign");
        let text = definition("icecore.r1.c1.p1", &["vda".into()], Some("other"));
        assert_eq!(parse(&text).unwrap(), checkpoint("icecore.r1.c1.p1", &["vda"]));
    }

    #[test]
    fn a_bitmap_without_a_size_is_of_no_use() {
        let text = "<domaincheckpoint><name>n</name><disks>
            <disk name='vda' checkpoint='bitmap' bitmap='n' size='65536'/>
            <disk name='vdb' checkpoint='bitmap' bitmap='n'/></disks></domaincheckpoint>";
        let sizes: Vec<_> = parse(text).unwrap().disks.iter().map(|d| d.dirty_bytes).collect();
        assert_eq!(sizes, [Some(65536), None]);
    }

    #[test]
    fn only_ours_of_this_repository_go_and_only_when_every_disk_is_covered() {
        let all = [
            checkpoint("icecore.r1.c1.p1", &["vda"]),
            checkpoint("icecore.r1.c0.p0", &["vda", "vdb"]),
            checkpoint("icecore.r2.c1.p1", &["vda"]),
            checkpoint("virtnbdbackup.0", &["vda"]),
            checkpoint("icecore.r1.c1.p2", &["vda"]),
        ];
        let gone = superseded(&all, &name("p2"), &["vda".into()]);
        assert_eq!(gone, ["icecore.r1.c1.p1"]);
        let gone = superseded(&all, &name("p2"), &["vda".into(), "vdb".into()]);
        assert_eq!(gone, ["icecore.r1.c1.p1", "icecore.r1.c0.p0"]);
    }
}
