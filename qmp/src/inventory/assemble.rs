//! From answers to disks; pure.

use std::collections::HashSet;

use serde_json::Value;

use super::graph::{GraphView, is_filter, is_job_filter, is_ours};
use super::observe::{Observed, Properties, controller_path, qom_path};
use super::order;
use super::wire::{Backend, NamedNode};
use super::{
    Disk, Excluded, Exclusion, Identity, Inventory, Layer, Refusal, StrayBitmap, Unprotected,
};
use crate::bitmap::Bitmap;

/// Devices whose `drive` can be swapped under a running guest.
const SWAPPABLE: [&str; 6] =
    ["virtio-blk-device", "scsi-hd", "ide-hd", "nvme", "nvme-ns", "sd-card"];

/// Devices that hand the guest's commands to the host device.
const PASSTHROUGH: [&str; 2] = ["scsi-block", "scsi-generic"];

/// Beginnings of types of devices that may hold data without a block node, and why it is unseen.
const UNSEEN: [(&str, &str); 11] = [
    ("vhost-user-blk", "its backend is another process"),
    ("vhost-user-scsi", "its backend is another process"),
    ("vhost-user-fs", "it is a shared folder of the host"),
    ("vhost-user-device", "its backend is another process"),
    ("vhost-scsi", "its backend is the host's kernel"),
    ("vhost-vdpa", "its backend is a vDPA device"),
    ("vdpa", "its backend is a vDPA device"),
    ("vfio-", "the guest drives the host's device by itself"),
    ("virtio-9p", "it is a shared folder of the host"),
    ("virtio-pmem", "the guest writes to it as memory"),
    ("nvdimm", "the guest writes to it as memory"),
];

/// File names that stand for a passed descriptor: other numbers may mean the same file.
const DESCRIPTOR_PATHS: [&str; 3] = ["/dev/fdset/", "/dev/fd/", "/proc/self/fd/"];

/// Decides what is a disk, which one, and what stands against it.
pub fn assemble(observed: &Observed) -> Inventory {
    let view = GraphView::new(&observed.graph, &observed.nodes);
    let mut inventory = Inventory { unprotected: unprotected(observed), ..Inventory::default() };
    for backend in order::by_address(observed) {
        match candidate(observed, backend) {
            Err(why) => {
                let device = backend.qdev.as_deref().unwrap_or(&backend.device).to_owned();
                inventory.excluded.push(Excluded { device, why });
            }
            Ok(candidate) => inventory.disks.extend(candidate.disk(&view)),
        }
    }
    make_unique(&mut inventory.disks);
    inventory.stray_bitmaps = stray_bitmaps(observed, &inventory.disks);
    inventory
}

fn stray_bitmaps(observed: &Observed, disks: &[Disk]) -> Vec<StrayBitmap> {
    let elsewhere = |node: &&NamedNode| disks.iter().all(|disk| disk.bitmap_node != node.name);
    let nodes = observed.nodes.iter().filter(elsewhere);
    let bitmaps = nodes.flat_map(|node| node.bitmaps.iter().map(move |bitmap| (node, bitmap)));
    let ours = bitmaps.filter_map(|(node, bitmap)| {
        let name = bitmap.name.as_deref()?.parse().ok()?;
        Some(StrayBitmap { node: node.name.clone(), name })
    });
    ours.collect()
}

struct Candidate<'a> {
    backend: &'a Backend,
    qdev: &'a str,
    path: String,
    /// The node that `query-block` names.
    node: &'a str,
    properties: &'a Properties,
    controller: Option<&'a Properties>,
}

fn candidate<'a>(observed: &'a Observed, backend: &'a Backend) -> Result<Candidate<'a>, Exclusion> {
    let qdev = backend.qdev.as_deref().filter(|qdev| !qdev.is_empty());
    let qdev = qdev.ok_or(Exclusion::NoDevice)?;
    let path = qom_path(qdev);
    // A device that left between two questions has no properties any more.
    let properties = observed.devices.get(&path).ok_or(Exclusion::NoDevice)?;
    let kind = text(properties, "type").unwrap_or_default();
    if kind.ends_with("-cd") {
        return Err(Exclusion::Cdrom);
    }
    if kind.starts_with("floppy") {
        return Err(Exclusion::Floppy);
    }
    if kind.starts_with("cfi.pflash") {
        return Err(Exclusion::Flash);
    }
    let node = backend.inserted.as_ref().and_then(|inserted| inserted.node.as_deref());
    let node = node.ok_or(Exclusion::Empty)?;
    let controller = controller_path(properties).and_then(|path| observed.devices.get(&path));
    Ok(Candidate { backend, qdev, path, node, properties, controller })
}

impl Candidate<'_> {
    fn disk(&self, view: &GraphView<'_>) -> Option<Disk> {
        let backend = match self.backend.device.as_str() {
            "" => self.qdev,
            name => name,
        };
        let chain = view.chain(backend, self.node);
        let root = *chain.first()?;
        let below: Vec<_> = chain.iter().copied().skip_while(|n| is_ours(&n.name)).collect();
        // On a placeholder there is nothing below; it then stands for itself.
        let layers = if below.is_empty() { &chain[..1] } else { &below[..] };
        let bitmap_at = layers.iter().position(|n| !is_filter(&n.driver)).unwrap_or(0);
        let (node, image) = (layers[0], layers[bitmap_at]);
        let refusal = if below.is_empty() {
            Some(Refusal::SwappedAway { root: root.name.clone() })
        } else {
            self.refusal(view, backend, &layers[..=bitmap_at])
        };
        let id = self.id(layers);
        Some(Disk {
            device: self.qdev.to_owned(),
            device_type: self.kind().to_owned(),
            drive_path: self.path.clone(),
            root: root.name.clone(),
            node: node.name.clone(),
            bitmap_node: image.name.clone(),
            size_bytes: node.image.size_bytes,
            writable: !node.read_only,
            persistent_bitmaps: stores_bitmaps(image),
            decrypted: layers.iter().any(|n| n.encrypted || n.driver == "luks"),
            serial: text(self.properties, "serial").map(str::to_owned),
            wwn: self.wwn(),
            iothread: self.iothread(),
            identity: self.identity(&id, layers),
            bitmaps: image.bitmaps.iter().filter_map(Bitmap::from_wire).collect(),
            layers: layers.iter().map(|n| layer(n)).collect(),
            id,
            refusal,
        })
    }

    fn kind(&self) -> &str {
        text(self.properties, "type").unwrap_or_default()
    }

    fn refusal(
        &self,
        view: &GraphView<'_>,
        backend: &str,
        upper: &[&NamedNode],
    ) -> Option<Refusal> {
        let device_type = self.kind().to_owned();
        if PASSTHROUGH.contains(&self.kind()) {
            return Some(Refusal::Passthrough { device_type });
        }
        if !SWAPPABLE.contains(&self.kind()) {
            return Some(Refusal::UnknownDevice { device_type });
        }
        if self.properties.get("share-rw") == Some(&Value::Bool(true)) {
            return Some(Refusal::ShareRw);
        }
        if let Some(node) = upper.iter().find(|n| is_job_filter(&n.driver)) {
            let (driver, node) = (node.driver.clone(), node.name.clone());
            return Some(Refusal::BlockJob { driver, node });
        }
        if upper[0].name != self.node && !is_ours(self.node) && upper[0].name.starts_with('#') {
            let (driver, node) = (upper[0].driver.clone(), upper[0].name.clone());
            return Some(Refusal::BlockJob { driver, node });
        }
        if upper[0].read_only {
            return Some(Refusal::ReadOnly);
        }
        second_writer(view, backend, upper)
    }

    fn id(&self, layers: &[&NamedNode]) -> String {
        let given = |name: &str| !name.is_empty() && !name.starts_with('#');
        let node =
            layers.iter().map(|n| n.name.as_str()).find(|name| given(name) && !is_ours(name));
        let id = qdev_id(&self.path)
            .or(Some(self.backend.device.as_str()).filter(|name| given(name)))
            .or(node)
            .unwrap_or(&self.path);
        tidy(id)
    }

    fn wwn(&self) -> Option<u64> {
        self.properties.get("wwn").and_then(Value::as_u64).filter(|wwn| *wwn != 0)
    }

    fn iothread(&self) -> Option<String> {
        let of = |properties: &Properties| {
            let mapped = properties.get("iothread-vq-mapping").and_then(|list| list.get(0));
            let mapped = mapped.and_then(|first| first.get("iothread")).and_then(Value::as_str);
            let path = mapped.or_else(|| text(properties, "iothread"))?;
            path.rsplit('/').next().map(str::to_owned)
        };
        of(self.properties).or_else(|| self.controller.and_then(of))
    }

    fn identity(&self, id: &str, layers: &[&NamedNode]) -> Identity {
        let mut parts = vec![format!("id={id}")];
        parts.extend(text(self.properties, "serial").map(|serial| format!("serial={serial}")));
        parts.extend(self.wwn().map(|wwn| format!("wwn={wwn:016x}")));
        parts.extend(self.properties.get("nsid").map(|nsid| format!("nsid={nsid}")));
        let file = layers.last().map(|lowest| lowest.file.as_str());
        let lasting = |file: &&str| !DESCRIPTOR_PATHS.iter().any(|prefix| file.starts_with(prefix));
        parts.extend(file.filter(lasting).map(|file| format!("file={file}")));
        Identity(parts.join(";"))
    }
}

/// Each layer down to the image may be written by the layer above it (the device's backend for
/// the first) and by nobody else.
fn second_writer(view: &GraphView<'_>, backend: &str, upper: &[&NamedNode]) -> Option<Refusal> {
    let mut above = backend;
    for layer in upper {
        if let Some(user) = view.other_writers(&layer.name, &[above]).into_iter().next() {
            return Some(Refusal::SecondWriter { node: layer.name.clone(), user });
        }
        above = &layer.name;
    }
    None
}

/// QEMU qapi: persistent bitmaps are refused on anything but qcow2 of version 3.
fn stores_bitmaps(image: &NamedNode) -> bool {
    let version2 = image.image.specific.data.compat.as_deref() == Some("0.10");
    image.driver == "qcow2" && !image.read_only && !version2
}

fn layer(node: &NamedNode) -> Layer {
    Layer { node: node.name.clone(), driver: node.driver.clone(), file: node.file.clone() }
}

fn text<'a>(properties: &'a Properties, name: &str) -> Option<&'a str> {
    properties.get(name).and_then(Value::as_str).filter(|text| !text.is_empty())
}

/// The id that the user gave the device, of which the path may be a part.
fn qdev_id(path: &str) -> Option<&str> {
    path.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next())
}

/// Brings any name to `[A-Za-z0-9._-]+`.
fn tidy(name: &str) -> String {
    let name = name.strip_prefix("/machine/").unwrap_or(name);
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let pieces = name.split(|c| !allowed(c)).filter(|piece| !piece.is_empty());
    let tidy = pieces.collect::<Vec<_>>().join("-");
    // `.` and `..` would be taken for folders.
    if tidy.chars().all(|c| c == '.') { "disk".into() } else { tidy }
}

/// Numbers the later ones of equal ids, in device order.
fn make_unique(disks: &mut [Disk]) {
    let mut taken: HashSet<String> = HashSet::new();
    for disk in disks {
        let mut id = disk.id.clone();
        let mut number = 2;
        while !taken.insert(id.clone()) {
            id = format!("{}-{number}", disk.id);
            number += 1;
        }
        disk.id = id;
    }
}

fn unprotected(observed: &Observed) -> Vec<Unprotected> {
    let why = |kind: &str| UNSEEN.iter().find(|(start, _)| kind.starts_with(start));
    let found = observed.peripherals.iter().filter_map(|(path, kind)| {
        let (_, why) = why(kind)?;
        Some(Unprotected {
            id: tidy(qdev_id(path).unwrap_or(path)),
            path: path.clone(),
            device_type: kind.clone(),
            why: (*why).to_owned(),
        })
    });
    found.collect()
}

#[cfg(test)]
mod tests;
