//! The capture of a powered-off VM: its images, read without a lock.
//!
//! The new bitmap is added first, under the image's write lock and for milliseconds. The images are
//! then read with force-share, so that a VM that starts meanwhile gets its disks; it is noticed at
//! the end, and the backup fails.

use std::ops::Range;
use std::path::{Path, PathBuf};

use icecore_qmp::bitmap::{Bitmap, Granularity, NamePart, Owner};
use icecore_qmp::inventory::Identity;
use icecore_repository::{CapsulePart, Consistency, ConsistencyLevel, DiskId};
use jiff::Timestamp;
use serde_json::json;

use super::{Base, Capture, Data, DirtyMap, Fate, Readable, Recorder, SeenDisk, Taken, Task};
use crate::failure::{Failure, Outcome};
use crate::image::{self, Format, ImageInfo, RunDir, Served, Stamp, StorageDaemon};
use crate::libvirt::checkpoint::{CheckpointName, remembered_name};
use crate::libvirt::tpm::Version;
use crate::libvirt::{CaptureForm, Domain};
use crate::nbd::Peer;
use crate::report::Unprotected;

/// An image as the user named it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub id: DiskId,
    pub path: PathBuf,
    /// Its format, where somebody knows better than the file.
    pub format: Option<Format>,
}

impl Named {
    /// Its format.
    pub fn format(&self) -> Outcome<Format> {
        let tried = || format!("look at the image {}", self.path.display());
        let found = self.format.map_or_else(|| image::of_file(&self.path), Ok);
        found.map_err(|e| Failure::failed(tried(), e))
    }
}

/// The domain of libvirt that the images belong to.
#[derive(Debug, Clone)]
pub struct Machine {
    pub capsule: serde_json::Value,
    pub parts: Vec<CapsulePart>,
    /// Disks of it that are in no image, and why they cannot be backed up.
    pub refused: Vec<(DiskId, String)>,
    /// How it is captured while it runs: it goes on with the bitmaps that are made here.
    pub form: CaptureForm,
    /// Its TPM, where its state can be put back.
    pub tpm: Option<Version>,
    pub domain: Domain,
}

/// Reads `[ID=]FILE`. Without an id the file's name up to its extension is it.
pub fn parse_named(text: &str) -> Outcome<Named> {
    let tried = format!("use the image {text}");
    let (id, path) = match text.split_once('=') {
        Some((id, path)) if !id.contains('/') => (id.to_owned(), PathBuf::from(path)),
        _ => {
            let path = PathBuf::from(text);
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            (stem.unwrap_or_default(), path)
        }
    };
    let id = id.parse().map_err(|e| {
        Failure::usage(&tried, e).next("give the disk an id of letters and digits: ID=FILE")
    })?;
    let path = std::fs::canonicalize(&path).map_err(|e| Failure::failed(&tried, e))?;
    image::utf8(&path, &tried)?;
    Ok(Named { id, path, format: None })
}

#[derive(Debug)]
struct Image {
    named: Named,
    info: ImageInfo,
    stamp: Option<Stamp>,
    /// The name of the bitmap that was added.
    added: Option<String>,
    daemon: Option<StorageDaemon>,
}

/// The capture.
#[derive(Debug)]
pub struct ImageCapture {
    disks: Vec<SeenDisk>,
    images: Vec<Image>,
    tasks: Vec<Task>,
    granularity: Granularity,
    repository: NamePart,
    machine: Option<Machine>,
    // Dropped after the daemons, whose sockets are in it.
    dir: RunDir,
    tried: String,
}

impl ImageCapture {
    /// Looks at the images; a VM that runs on one of them is refused.
    pub fn open(
        named: Vec<Named>,
        repository: NamePart,
        granularity: Granularity,
        dir: &Path,
        tried: &str,
    ) -> Outcome<Self> {
        let mut images = Vec::with_capacity(named.len());
        for named in named {
            let format = named.format()?;
            image::require_unlocked(&named.path, format, tried)?;
            let info = image::info(&named.path, format)?;
            images.push(Image { named, info, stamp: None, added: None, daemon: None });
        }
        Ok(Self {
            disks: images.iter().map(seen).collect(),
            images,
            tasks: Vec::new(),
            granularity,
            repository,
            machine: None,
            dir: RunDir::at(dir),
            tried: tried.to_owned(),
        })
    }

    /// The images are those of a domain of libvirt: their bitmaps are its checkpoints.
    pub fn of_machine(mut self, machine: Option<Machine>) -> Self {
        let refused = machine.iter().flat_map(|machine| &machine.refused);
        self.disks.extend(refused.map(|(id, why)| refused_disk(id, why)));
        self.machine = machine;
        self
    }

    fn image(&mut self, at: usize) -> &mut Image {
        let index = self.tasks[at].index;
        &mut self.images[index]
    }

    fn made_dir(&self) -> Outcome<PathBuf> {
        let dir = self.dir.path().map_err(|e| Failure::failed(&self.tried, e))?;
        Ok(dir.to_owned())
    }

    /// What the images were like when the capture was done with them, in their order: taken only
    /// where nobody else had changed them since the instant.
    pub fn stamps(&self) -> Vec<Option<Stamp>> {
        self.images.iter().map(|image| image.stamp.clone()).collect()
    }

    fn add_bitmap(&mut self, at: usize) -> Outcome<()> {
        let Some(bitmap) = self.tasks[at].bitmap.clone() else { return Ok(()) };
        let (dir, granularity) = (self.made_dir()?, self.granularity);
        let tried = self.tried.clone();
        let name = match self.machine.as_ref().map(|machine| machine.form) {
            Some(CaptureForm::Job) => CheckpointName::of(&bitmap).to_string(),
            Some(CaptureForm::Direct) | None => bitmap.to_string(),
        };
        let image = self.image(at);
        image::add_bitmap(
            &image.named.path,
            &name,
            granularity.bytes(),
            image.info.size_bytes,
            &dir,
            &tried,
        )?;
        image.added = Some(name);
        Ok(())
    }

    /// Images that the read touched must be as they were, and nobody may hold them.
    fn require_unchanged(&self) -> Outcome<()> {
        for task in &self.tasks {
            let image = &self.images[task.index];
            let path = &image.named.path;
            let started = || {
                Failure::failed(
                    &self.tried,
                    format!("VM started: {} was taken into use while it was read", path.display()),
                )
                .next("back the running VM up by its QMP socket")
            };
            if image.stamp.is_some() && !is_as_stamped(image) {
                return Err(started());
            }
            image::require_unlocked(path, image.info.format, &self.tried).map_err(|_| started())?;
        }
        Ok(())
    }

    fn remove_bitmap(&self, image: &Image, name: &str) {
        // The VM may have started: it then holds the lock, and the bitmap goes with a later run.
        if let Err(failure) = image::remove_bitmap(&image.named.path, name, &self.tried) {
            tracing::info!(bitmap = name, "left for a later run: {failure}");
        }
    }
}

impl Capture for ImageCapture {
    fn disks(&self) -> &[SeenDisk] {
        &self.disks
    }

    fn unprotected(&self) -> Vec<Unprotected> {
        Vec::new()
    }

    fn capsule(&self) -> serde_json::Value {
        if let Some(machine) = &self.machine {
            return machine.capsule.clone();
        }
        let disks: Vec<_> = self
            .images
            .iter()
            .map(|image| {
                json!({
                    "disk": image.named.id, "file": image.named.path.to_string_lossy(),
                    "format": image.info.format, "backing": image.info.backing,
                    "size_bytes": image.info.size_bytes,
                })
            })
            .collect();
        json!({ "source": "images", "disks": disks })
    }

    fn parts(&self) -> Vec<CapsulePart> {
        self.machine.as_ref().map(|machine| machine.parts.clone()).unwrap_or_default()
    }

    async fn take(&mut self, tasks: &[Task]) -> Outcome<Taken> {
        self.tasks = tasks.to_vec();
        for at in 0..tasks.len() {
            self.add_bitmap(at)?;
            let image = self.image(at);
            image.stamp = Some(Stamp::of(&image.named.path, &image.info)?);
        }
        Ok(Taken {
            captured_at: Timestamp::now(),
            consistency: Consistency {
                level: ConsistencyLevel::Crash,
                frozen_filesystems: 0,
                freeze_ms: 0.0,
                pause_ms: 0.0,
                why: Some("the VM is off; its filesystems are as it left them".into()),
            },
        })
    }

    async fn open(
        &mut self,
        at: usize,
        base: Option<&Base>,
        _samples: &[Range<u64>],
    ) -> Outcome<Readable> {
        let dir = self.made_dir()?;
        let image = self.image(at);
        // One serves one way of reading only.
        image.daemon = None;
        let bitmap = base.map(|base| image.info.name_of(&base.bitmap));
        let served = Served::Shared { bitmap: bitmap.clone() };
        let daemon = StorageDaemon::start(&image.named.path, image.info.format, &served, &dir)?;
        let uri = Peer::on_socket(daemon.socket(), daemon.export());
        let size_bytes = image.info.size_bytes;
        image.daemon = Some(daemon);
        let dirty = bitmap.map(|bitmap| DirtyMap::Export { bitmap });
        Ok(Readable { data: Data::Export(uri), dirty, size_bytes })
    }

    fn close(&mut self, at: usize) {
        self.image(at).daemon = None;
    }

    async fn lost(&self) -> Option<String> {
        None
    }

    async fn release(&mut self) -> Outcome<()> {
        for image in &mut self.images {
            image.daemon = None;
        }
        self.require_unchanged()
    }

    async fn settle(&mut self, fate: Fate) -> Outcome<()> {
        for image in &mut self.images {
            image.daemon = None;
        }
        for at in 0..self.images.len() {
            let image = &self.images[at];
            let Some(added) = &image.added else { continue };
            let unchanged = is_as_stamped(image);
            match fate {
                Fate::Unknown => {}
                Fate::NotCommitted => self.remove_bitmap(image, added),
                Fate::Committed => {
                    let old = image.info.bitmaps.iter().map(|bitmap| &bitmap.name);
                    let ours = old.filter(|name| {
                        let name = remembered_name(name, &image.named.id);
                        matches!(Owner::of(&name, &self.repository), Owner::ThisRepository(_))
                    });
                    ours.for_each(|name| self.remove_bitmap(image, name));
                }
            }
            if unchanged {
                let stamp = Stamp::of(&image.named.path, &image.info).ok();
                self.images[at].stamp = stamp;
            }
        }
        Ok(())
    }
}

fn is_as_stamped(image: &Image) -> bool {
    Stamp::of(&image.named.path, &image.info).ok() == image.stamp
}

fn refused_disk(id: &DiskId, why: &str) -> SeenDisk {
    SeenDisk {
        id: id.clone(),
        size_bytes: 0,
        identity: Identity(format!("id={id}")),
        partial_identity: true,
        bitmaps: Vec::new(),
        records: false,
        recorder: Recorder::Icecore,
        refusal: Some(why.to_owned()),
        read_only: false,
    }
}

fn seen(image: &Image) -> SeenDisk {
    let bitmaps = image.info.bitmaps.iter().map(|bitmap| Bitmap {
        name: remembered_name(&bitmap.name, &image.named.id),
        granularity_bytes: bitmap.granularity,
        dirty_bytes: 0,
        recording: bitmap.recording(),
        busy: false,
        persistent: true,
        inconsistent: bitmap.inconsistent(),
    });
    SeenDisk {
        id: image.named.id.clone(),
        size_bytes: image.info.size_bytes,
        identity: Identity(format!("id={};file={}", image.named.id, image.named.path.display())),
        partial_identity: true,
        bitmaps: bitmaps.collect(),
        records: image.info.keeps_bitmaps,
        recorder: Recorder::Icecore,
        refusal: None,
        read_only: false,
    }
}
