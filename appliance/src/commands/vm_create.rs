//! `icecore vm create`: the disks and the definition of a new VM, from a point.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use icecore_io_engine::Verify;
use icecore_repository::{Point, Repository};
use serde::Serialize;
use serde_json::json;

use super::backup::absolute;
use super::point::find;
use crate::cli::OK;
use crate::cli::args::VmCreateArgs;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::image::{self, Format};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::libvirt::rewrite::{self, Identity, NewDomain};
use crate::libvirt::tpm::{self, There, Version};
use crate::libvirt::{Domain, Virsh, capsule, xml};
use crate::output;
use crate::recovery;
use crate::restore::{Restore, RestoredDisk, Target};
use crate::state::JobKind;
use crate::state::locks::LockKey;

#[derive(Debug, Serialize)]
struct VmCreated {
    vm: String,
    point: String,
    from: String,
    job: String,
    /// The file with its definition.
    definition: PathBuf,
    /// Whether libvirt knows it.
    defined: bool,
    disks: Vec<RestoredDisk>,
    /// Disks of the old VM that are not in the point, and not in the new VM.
    dropped: Vec<String>,
}

/// Runs `icecore vm create`.
pub async fn run(context: &Context, args: &VmCreateArgs) -> Outcome<u8> {
    let tried = format!("make the VM {} of {}", args.name, args.from);
    icecore_repository::VmName::new(args.name.as_str()).map_err(|e| Failure::usage(&tried, e))?;
    let interrupt = Interrupt::listen()?;
    let repository = context.open_read_only(&args.repo.repo)?;
    let point = find(&repository, &args.from, args.vm.as_deref(), &tried)?;
    let libvirt = args.libvirt.as_deref().map(Virsh::new).transpose()?;
    let create = Create { context, repository: &repository, point: &point, args, tried: &tried };
    create.require_free(libvirt.as_ref())?;
    let dir = create.dir()?;
    let images = create.images(&dir)?;
    let keys = [LockKey::vm(&args.name), LockKey::file(&dir)];
    let mut job = Job::begin(context, JobKind::Restore, &args.repo.repo, &keys, &tried)?;
    recovery::recover_all(context, None).await;
    job.record.vm = Some(args.name.clone());
    job.record.point = Some(point.id.to_string());
    job.save(context)?;
    let outcome = create.make(&mut job, &interrupt, &dir, &images, libvirt).await;
    let created = job.end(context, outcome)?;
    print(context, &created)?;
    Ok(OK)
}

struct Create<'a> {
    context: &'a Context,
    repository: &'a Repository,
    point: &'a Point,
    args: &'a VmCreateArgs,
    tried: &'a str,
}

type Images = BTreeMap<String, (PathBuf, Format)>;

impl Create<'_> {
    fn is_of_libvirt(&self) -> bool {
        self.point.meta.capsule["source"] == "libvirt"
    }

    /// Nothing may be there under the new name.
    fn require_free(&self, libvirt: Option<&Virsh>) -> Outcome<()> {
        let Some(virsh) = libvirt else { return Ok(()) };
        if !self.is_of_libvirt() {
            let why =
                "the point is not one of a libvirt domain: it holds no definition for libvirt";
            return Err(Failure::refused(self.tried, why)
                .next("leave --libvirt out: the disks and a description are made"));
        }
        if Domain::is_known(virsh, &self.args.name).map_err(|e| e.failure(self.tried))? {
            let why = format!("libvirt has a domain {} already", self.args.name);
            return Err(Failure::refused(self.tried, why).next("choose another --name"));
        }
        Ok(())
    }

    fn dir(&self) -> Outcome<PathBuf> {
        let dir = absolute(&self.args.dir, self.tried)?;
        std::fs::create_dir_all(&dir)
            .and_then(|()| std::fs::canonicalize(&dir))
            .map_err(|e| Failure::failed(self.tried, format!("{}: {e}", dir.display())))
    }

    /// Where each disk goes; nothing may be there.
    fn images(&self, dir: &Path) -> Outcome<Images> {
        image::utf8(dir, self.tried)?;
        let place = |disk: &icecore_repository::PointDisk| {
            let path = dir.join(format!("{}-{}.qcow2", self.args.name, disk.disk));
            (disk.disk.to_string(), (path, Format::Qcow2))
        };
        let images: Images = self.point.disks.iter().map(place).collect();
        let mut all: Vec<PathBuf> = images.values().map(|(path, _)| path.clone()).collect();
        all.extend([self.definition(dir), self.nvram(dir)]);
        match all.iter().find(|path| path.symlink_metadata().is_ok()) {
            None => Ok(images),
            Some(there) => {
                let why = format!("{} is there already", there.display());
                Err(Failure::refused(self.tried, why).next("choose another --dir or --name"))
            }
        }
    }

    fn definition(&self, dir: &Path) -> PathBuf {
        let kind = if self.is_of_libvirt() { "xml" } else { "json" };
        dir.join(format!("{}.{kind}", self.args.name))
    }

    fn nvram(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}-nvram.fd", self.args.name))
    }

    async fn make(
        &self,
        job: &mut Job,
        interrupt: &Interrupt,
        dir: &Path,
        images: &Images,
        libvirt: Option<Virsh>,
    ) -> Outcome<VmCreated> {
        let id = job.id().to_string();
        let made = self.write(job, interrupt, dir, images).await;
        let defined = made.and_then(|(disks, dropped)| {
            let definition = self.definition(dir);
            if let Some(virsh) = &libvirt {
                let tpm = self.restore_tpm(virsh, &definition)?;
                if let Err(e) = Domain::define(virsh, &definition) {
                    tpm.iter().for_each(|(domain, version)| tpm::discard(domain, *version));
                    return Err(e.failure(self.tried));
                }
            }
            Ok(VmCreated {
                vm: self.args.name.clone(),
                point: self.point.id.to_string(),
                from: self.point.vm.to_string(),
                job: id,
                definition,
                defined: libvirt.is_some(),
                disks,
                dropped,
            })
        });
        if defined.is_err() {
            self.remove(dir, images);
        }
        defined
    }

    /// The new domain's TPM knows what the old one's did. libvirt keeps it under the UUID.
    fn restore_tpm(&self, virsh: &Virsh, definition: &Path) -> Outcome<Option<(Domain, Version)>> {
        let failed = |e: &dyn std::fmt::Display| Failure::failed(self.tried, e);
        let text = std::fs::read_to_string(definition).map_err(|e| failed(&e))?;
        let made = xml::parse(&text).map_err(|e| failed(&e))?;
        let held = |name: &str| self.point.parts.iter().any(|part| part.name.as_str() == name);
        let Some(version) = made.tpm.emulated().filter(|version| held(version.part())) else {
            return Ok(None);
        };
        let bytes = self.repository.capsule_part(self.point, version.part());
        let bytes = bytes.map_err(|e| Failure::from_repository(self.tried, e))?;
        let domain = Domain { virsh: virsh.clone(), uuid: made.uuid, name: made.name };
        tpm::restore(&domain, version, &bytes, There::Refuse, self.tried)?;
        Ok(Some((domain, version)))
    }

    async fn write(
        &self,
        job: &mut Job,
        interrupt: &Interrupt,
        dir: &Path,
        images: &Images,
    ) -> Outcome<(Vec<RestoredDisk>, Vec<String>)> {
        let mut restore = Restore {
            context: self.context,
            repository: self.repository,
            point: self.point,
            verify: Verify::ReadBack,
            interrupt,
            job,
        };
        let mut disks = Vec::with_capacity(images.len());
        for disk in &self.point.disks {
            let Some((path, format)) = images.get(disk.disk.as_str()) else { continue };
            let target = Target::File { path: path.clone(), format: *format, replace: false };
            disks.push(restore.disk(disk, &target).await?);
        }
        let nvram = self.write_nvram(dir)?;
        let (text, dropped) = match self.is_of_libvirt() {
            true => self.domain_xml(dir, images, nvram.as_deref())?,
            false => (self.description(images)?, Vec::new()),
        };
        self.write_file(&self.definition(dir), text.as_bytes())?;
        Ok((disks, dropped))
    }

    fn write_file(&self, path: &Path, bytes: &[u8]) -> Outcome<()> {
        let written = crate::state::replace_file(path, bytes);
        written.map_err(|e| Failure::failed(self.tried, format!("{}: {e}", path.display())))
    }

    fn write_nvram(&self, dir: &Path) -> Outcome<Option<PathBuf>> {
        let has = self.point.parts.iter().any(|part| part.name.as_str() == capsule::NVRAM);
        if !has {
            return Ok(None);
        }
        let bytes = self.repository.capsule_part(self.point, capsule::NVRAM);
        let bytes = bytes.map_err(|e| Failure::from_repository(self.tried, e))?;
        let path = self.nvram(dir);
        self.write_file(&path, &bytes)?;
        Ok(Some(path))
    }

    fn domain_xml(
        &self,
        dir: &Path,
        images: &Images,
        nvram: Option<&Path>,
    ) -> Outcome<(String, Vec<String>)> {
        let failed = |why: String| Failure::failed(self.tried, why);
        let Some(old) = self.point.meta.capsule["xml_inactive"].as_str() else {
            return Err(failed("the point holds no definition".into()));
        };
        let count = rewrite::interfaces(old).map_err(failed)?;
        let random = |e| Failure::failed(self.tried, e);
        let uuid = fresh_uuid().map_err(random)?;
        let macs: Vec<String> =
            (0..count).map(|_| fresh_mac()).collect::<Result<_, _>>().map_err(random)?;
        let identity = match self.args.keep_identity {
            true => Identity::Kept,
            false => Identity::Fresh { uuid: &uuid, macs: &macs },
        };
        let new = NewDomain { name: &self.args.name, identity, disks: images, nvram, dir };
        let made = rewrite::rewrite(old, &new).map_err(failed)?;
        Ok((made.xml, made.dropped))
    }

    /// What is known of a VM that libvirt did not define, beside where its disks are now.
    fn description(&self, images: &Images) -> Outcome<String> {
        let disks: Vec<_> = images
            .iter()
            .map(|(disk, (path, format))| {
                let node = json!({
                    "driver": format.name(), "node-name": disk,
                    "file": { "driver": "file", "filename": path.to_string_lossy() },
                });
                json!({ "disk": disk, "file": path.to_string_lossy(), "blockdev": node })
            })
            .collect();
        let all = json!({
            "name": self.args.name, "point": self.point.id.to_string(), "disks": disks,
            "was": self.point.meta.capsule,
        });
        serde_json::to_string_pretty(&all).map_err(|e| Failure::failed(self.tried, e))
    }

    /// What this run made; it refused to begin where anything was there.
    fn remove(&self, dir: &Path, images: &Images) {
        let files = images.values().map(|(path, _)| path.clone());
        for path in files.chain([self.definition(dir), self.nvram(dir)]) {
            // Most of them are not there when it failed early.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A random UUID (RFC 9562, version 4).
fn fresh_uuid() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    Ok(parts.join("-"))
}

/// A random address among those that QEMU's guests have.
fn fresh_mac() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 3];
    getrandom::fill(&mut bytes)?;
    Ok(format!("52:54:00:{:02x}:{:02x}:{:02x}", bytes[0], bytes[1], bytes[2]))
}

fn print(context: &Context, created: &VmCreated) -> Outcome<()> {
    if context.json {
        return output::json(created);
    }
    let known = if created.defined { "; libvirt knows it, and it is off" } else { "" };
    output::print(&format!(
        "made {} of point {} of {}: {}{known}\n",
        created.vm,
        created.point,
        created.from,
        created.definition.display()
    ))?;
    for disk in &created.disks {
        output::print(&format!("  {}: {}\n", disk.disk, disk.target))?;
    }
    for disk in &created.dropped {
        eprintln!("icecore: not in the point, so not in the new VM: disk {disk}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_identities_have_their_form() {
        let uuid = fresh_uuid().unwrap();
        assert!(
            crate::libvirt::xml::uuid(&format!("<domain><uuid>{uuid}</uuid></domain>")).is_some()
        );
        assert_eq!(uuid.as_bytes()[14], b'4');
        let mac = fresh_mac().unwrap();
        assert!(mac.starts_with("52:54:00:") && mac.len() == 17, "{mac}");
    }
}
