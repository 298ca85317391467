//! A domain that is off: its images, and the checkpoints that libvirt remembers of them.
//!
//! libvirt neither makes nor deletes a checkpoint while a domain is off. So the bitmaps are changed
//! in the images, under the names that libvirt would give them, and what it remembers is brought
//! into line afterwards.

use std::collections::BTreeMap;

use icecore_repository::{DiskId, Repository};

use super::checkpoint::{self, Checkpoint, CheckpointName};
use super::xml::{Description, DomainDisk};
use super::{CaptureForm, Domain, capsule, xml};
use crate::capture::image::{Machine, Named};
use crate::failure::{Failure, Outcome};
use crate::image::{self, RunDir};

/// A domain that is off.
#[derive(Debug, Clone)]
pub struct PoweredOff {
    pub domain: Domain,
    /// The disks that are in local images.
    pub images: Vec<Named>,
    pub machine: Machine,
}

impl PoweredOff {
    /// Looks at a domain as it would start.
    pub fn of(domain: &Domain, form: CaptureForm, tried: &str) -> Outcome<Self> {
        let text = domain.inactive_xml().map_err(|e| e.failure(tried))?;
        let description = xml::parse(&text).map_err(|e| Failure::failed(tried, e))?;
        let (images, refused) = images(&description, tried)?;
        let machine = Machine {
            capsule: capsule::of(domain, &description, None, tried)?,
            parts: capsule::parts(domain, &description),
            refused,
            form,
            tpm: description.tpm.emulated(),
            domain: domain.clone(),
        };
        Ok(Self { domain: domain.clone(), images, machine })
    }

    /// Brings what libvirt remembers of the checkpoints of a repository into line with the bitmaps
    /// in the images.
    pub fn reconcile(&self, repository: &Repository, dir: &RunDir, tried: &str) -> Outcome<()> {
        let own = repository.id().to_string();
        let mut known = self.domain.our_checkpoints(false, tried)?;
        known.retain(|one| is_of(&one.name, &own));
        let mut found = bitmaps(&self.images)?;
        found.retain(|name, _| is_of(name, &own));
        for name in stale(&known, &found) {
            self.domain.forget_checkpoint(&name).map_err(|e| e.failure(tried))?;
        }
        let names = self.domain.checkpoint_names().map_err(|e| e.failure(tried))?;
        let mut parent = names.last().cloned();
        for (name, disks) in missing(&known, &found) {
            let text = checkpoint::definition(&name, &disks, parent.as_deref());
            let path = dir.path().map(|dir| dir.join("checkpoint.xml"));
            let path = path.map_err(|e| Failure::failed(tried, e))?;
            std::fs::write(&path, text).map_err(|e| Failure::failed(tried, e))?;
            self.domain.remember_checkpoint(&path).map_err(|e| e.failure(tried))?;
            parent = Some(name);
        }
        Ok(())
    }
}

fn is_of(name: &str, repository: &str) -> bool {
    name.parse::<CheckpointName>().is_ok_and(|name| name.repository.as_str() == repository)
}

type Refused = Vec<(DiskId, String)>;

/// The images of the disks that are kept in any, and why the others cannot be backed up now.
fn images(description: &Description, tried: &str) -> Outcome<(Vec<Named>, Refused)> {
    let (mut named, mut refused) = (Vec::new(), Vec::new());
    for disk in description.disks.iter().filter(|disk| !disk.read_only) {
        let id: DiskId = disk.target.parse().map_err(|e| Failure::failed(tried, e))?;
        match refusal(disk) {
            Some(why) => refused.push((id, why)),
            None => named.extend(image_of(id, disk, tried)?),
        }
    }
    Ok((named, refused))
}

fn refusal(disk: &DomainDisk) -> Option<String> {
    if disk.refusal.is_some() {
        disk.refusal.clone()
    } else if disk.path.is_none() {
        Some(
            "it is in no local file or device: it can only be backed up while the domain runs"
                .into(),
        )
    } else if disk.format.is_none() {
        Some("its format is neither raw nor qcow2: start the domain to back it up".into())
    } else {
        None
    }
}

fn image_of(id: DiskId, disk: &DomainDisk, tried: &str) -> Outcome<Option<Named>> {
    let Some(path) = &disk.path else { return Ok(None) };
    let path = std::fs::canonicalize(path)
        .map_err(|e| Failure::failed(tried, format!("{}: {e}", path.display())))?;
    image::utf8(&path, tried)?;
    Ok(Some(Named { id, path, format: disk.format }))
}

/// Targets by the checkpoint whose bitmap is in their image.
type Found = BTreeMap<String, Vec<String>>;

fn bitmaps(images: &[Named]) -> Outcome<Found> {
    let mut found = Found::new();
    for named in images {
        for bitmap in image::info(&named.path, named.format()?)?.bitmaps {
            if bitmap.name.parse::<CheckpointName>().is_ok() {
                found.entry(bitmap.name).or_default().push(named.id.to_string());
            }
        }
    }
    Ok(found)
}

/// Checkpoints of ours of which no image has a bitmap any more, or other images than libvirt thinks.
fn stale(known: &[Checkpoint], found: &Found) -> Vec<String> {
    let differs = |one: &&Checkpoint| !matches(one, found.get(&one.name));
    known.iter().filter(differs).map(|one| one.name.clone()).collect()
}

/// Bitmaps in images that libvirt does not know as checkpoints (any more).
fn missing(known: &[Checkpoint], found: &Found) -> Found {
    let is_known = |name: &String, disks: &Vec<String>| {
        known.iter().any(|one| &one.name == name && matches(one, Some(disks)))
    };
    let missing = found.iter().filter(|(name, disks)| !is_known(name, disks));
    missing.map(|(name, disks)| (name.clone(), disks.clone())).collect()
}

fn matches(checkpoint: &Checkpoint, disks: Option<&Vec<String>>) -> bool {
    let mut covered: Vec<&str> = checkpoint.disks.iter().map(|d| d.target.as_str()).collect();
    let mut there: Vec<&str> = disks.into_iter().flatten().map(String::as_str).collect();
    covered.sort_unstable();
    there.sort_unstable();
    covered == there
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::checkpoint::CheckpointDisk;

    #[test]
    fn what_libvirt_remembers_follows_the_images() {
        let one = |name: &str, targets: &[&str]| Checkpoint {
            name: name.into(),
            disks: targets
                .iter()
                .map(|target| CheckpointDisk { target: (*target).into(), dirty_bytes: None })
                .collect(),
        };
        let known = [one("icecore.r.c.p1", &["vda"]), one("icecore.r.c.p2", &["vda", "vdb"])];
        let found = Found::from([
            ("icecore.r.c.p2".to_owned(), vec!["vdb".to_owned(), "vda".to_owned()]),
            ("icecore.r.c.p3".to_owned(), vec!["vda".to_owned()]),
        ]);
        assert_eq!(stale(&known, &found), ["icecore.r.c.p1"]);
        let expected = Found::from([("icecore.r.c.p3".to_owned(), vec!["vda".to_owned()])]);
        assert_eq!(missing(&known, &found), expected);
        assert!(stale(&[], &found).is_empty() && missing(&known, &Found::new()).is_empty());
    }
}
