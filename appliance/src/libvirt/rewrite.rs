//! The definition of a new domain, made from that of an old one: pure.
//!
//! Only what has to differ is replaced, in the text itself: all else stays as it was, also what this
//! program knows nothing of.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};

use super::xml::{child, elements, escape};
use crate::image::Format;

/// What tells the new domain from the old one.
#[derive(Debug)]
pub struct NewDomain<'a> {
    pub name: &'a str,
    pub identity: Identity<'a>,
    /// The image of each disk, by its target.
    pub disks: &'a BTreeMap<String, (PathBuf, Format)>,
    /// The file with the firmware's variables, where there is one.
    pub nvram: Option<&'a Path>,
    /// Where what the guest says on its serial ports goes, when it went to files.
    pub dir: &'a Path,
}

/// How others know the domain.
#[derive(Debug, Clone, Copy)]
pub enum Identity<'a> {
    /// As before: UUID and MAC addresses stay.
    Kept,
    /// A new UUID, and MAC addresses from here in turn.
    Fresh { uuid: &'a str, macs: &'a [String] },
}

/// A new definition.
#[derive(Debug, PartialEq, Eq)]
pub struct Rewritten {
    pub xml: String,
    /// Targets of disks that the old domain had and the new one has not.
    pub dropped: Vec<String>,
}

/// How many network interfaces a domain has.
pub fn interfaces(text: &str) -> Result<usize, String> {
    let document = Document::parse(text).map_err(|e| e.to_string())?;
    Ok(document.descendants().filter(|node| node.has_tag_name("interface")).count())
}

/// Makes the new definition from the XML of a domain that does not run.
pub fn rewrite(text: &str, new: &NewDomain<'_>) -> Result<Rewritten, String> {
    let document = Document::parse(text).map_err(|e| format!("its XML is not understood: {e}"))?;
    let domain = document.root_element();
    let devices = child(domain, "devices").ok_or("its XML has no devices")?;
    let mut edits = Edits::default();
    let name = child(domain, "name").ok_or("its XML has no name")?;
    edits.replace(name, &format!("<name>{}</name>", escape(new.name)));
    identity(&mut edits, domain, devices, new.identity)?;
    if matches!(new.identity, Identity::Fresh { .. }) {
        move_sockets_and_logs(&mut edits, devices, new);
    }
    if let Some(nvram) = child(domain, "os").and_then(|os| child(os, "nvram")) {
        let path = new.nvram.map(|path| escape(&path.to_string_lossy()));
        // Without one libvirt makes it from the firmware's template.
        let element = path.map(|path| format!("<nvram>{path}</nvram>")).unwrap_or_default();
        edits.replace(nvram, &element);
    }
    let mut dropped = Vec::new();
    for disk in elements(devices, "disk") {
        dropped.extend(edit_disk(&mut edits, disk, new.disks));
    }
    Ok(Rewritten { xml: edits.apply(text), dropped })
}

fn identity(
    edits: &mut Edits,
    domain: Node<'_, '_>,
    devices: Node<'_, '_>,
    identity: Identity<'_>,
) -> Result<(), String> {
    let Identity::Fresh { uuid, macs } = identity else { return Ok(()) };
    if let Some(old) = child(domain, "uuid") {
        edits.replace(old, &format!("<uuid>{uuid}</uuid>"));
    }
    // libvirt makes a new one: the guest sees that it was cloned.
    if let Some(old) = child(domain, "genid") {
        edits.replace(old, "<genid/>");
    }
    let entries = domain.descendants().filter(|node| {
        node.has_tag_name("entry")
            && node.attribute("name") == Some("uuid")
            && node.parent().is_some_and(|parent| parent.has_tag_name("system"))
    });
    entries.for_each(|entry| edits.replace(entry, &format!("<entry name='uuid'>{uuid}</entry>")));
    let mut macs = macs.iter();
    for mac in elements(devices, "interface").filter_map(|interface| child(interface, "mac")) {
        let next = macs.next().ok_or("there are fewer MAC addresses than interfaces")?;
        edits.replace(mac, &format!("<mac address='{next}'/>"));
    }
    Ok(())
}

/// What only one domain at a time can have open.
fn move_sockets_and_logs(edits: &mut Edits, devices: Node<'_, '_>, new: &NewDomain<'_>) {
    // libvirt chooses new sockets.
    for channel in elements(devices, "channel") {
        let source = child(channel, "source");
        if let Some(source) = source.filter(|source| source.attribute("mode") == Some("bind")) {
            edits.replace(source, "");
        }
    }
    let mut logs: Vec<&str> = Vec::new();
    let ports = devices.children().filter(|node| {
        let kinds = ["serial", "console", "parallel"];
        kinds.iter().any(|kind| node.has_tag_name(*kind)) && node.attribute("type") == Some("file")
    });
    for path in ports.filter_map(|port| child(port, "source")?.attribute_node("path")) {
        // A console is often the serial port under another name.
        let known = logs.iter().position(|log| *log == path.value());
        let number = known.unwrap_or(logs.len());
        if known.is_none() {
            logs.push(path.value());
        }
        let log = new.dir.join(format!("{}-port{number}.log", new.name));
        edits.0.push((path.range_value(), escape(&log.to_string_lossy())));
    }
}

/// Gives a disk its new image; the target of one that has none.
fn edit_disk(
    edits: &mut Edits,
    disk: Node<'_, '_>,
    images: &BTreeMap<String, (PathBuf, Format)>,
) -> Option<String> {
    let target = child(disk, "target").and_then(|target| target.attribute("dev"))?;
    if matches!(disk.attribute("device"), Some("cdrom" | "floppy")) {
        return None;
    }
    let Some((path, format)) = images.get(target) else {
        edits.replace(disk, "");
        return Some(target.to_owned());
    };
    for name in ["backingStore", "mirror", "auth", "encryption"] {
        elements_of(disk, name).for_each(|old| edits.replace(old, ""));
    }
    let source = format!("<source file='{}'/>", escape(&path.to_string_lossy()));
    if let Some(kind) = disk.attribute_node("type") {
        edits.0.push((kind.range_value(), "file".into()));
    }
    match child(disk, "source") {
        Some(old) => edits.replace(old, &source),
        None => edits.insert_before(child(disk, "target")?, &source),
    }
    match child(disk, "driver").and_then(|driver| driver.attribute_node("type")) {
        Some(kind) => edits.0.push((kind.range_value(), format.name().into())),
        None => {
            let driver = format!("<driver name='qemu' type='{}'/>", format.name());
            match child(disk, "driver") {
                Some(old) => edits.replace(old, &driver),
                None => edits.insert_before(child(disk, "target")?, &driver),
            }
        }
    }
    None
}

fn elements_of<'a, 'i: 'a>(
    node: Node<'a, 'i>,
    name: &'a str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

/// Replacements of parts of a text, none of which lies within another.
#[derive(Debug, Default)]
struct Edits(Vec<(Range<usize>, String)>);

impl Edits {
    fn replace(&mut self, node: Node<'_, '_>, with: &str) {
        self.0.push((node.range(), with.to_owned()));
    }

    fn insert_before(&mut self, node: Node<'_, '_>, text: &str) {
        let at = node.range().start;
        self.0.push((at..at, text.to_owned()));
    }

    fn apply(mut self, text: &str) -> String {
        self.0.sort_by_key(|(range, _)| (range.start, range.end));
        let (mut out, mut at) = (String::with_capacity(text.len()), 0);
        for (range, with) in self.0 {
            out += text.get(at..range.start).unwrap_or_default();
            out += &with;
            at = range.end;
        }
        out += text.get(at..).unwrap_or_default();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::xml;

    const OLD: &str = "<domain type='kvm'><!-- a note --><name>old</name><uuid>u-1</uuid>
      <genid>g-1</genid><sysinfo type='smbios'><system><entry name='uuid'>u-1</entry></system></sysinfo>
      <os><nvram template='/t.fd'>/nv/old.fd</nvram></os><vendor:x xmlns:vendor='v'>kept</vendor:x>
      <devices>
      <disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>
        <source dev='/dev/x' index='1'/><backingStore/><target dev='vda' bus='virtio'/></disk>
      <disk type='network' device='disk'><auth username='u'/><source protocol='rbd' name='p'/>
        <target dev='vdb' bus='virtio'/></disk>
      <disk type='file' device='disk'><target dev='vdc'/></disk>
      <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>
      <interface type='bridge'><mac address='52:54:00:00:00:01'/></interface>
      <channel type='unix'><source mode='bind' path='/s'/><target name='a'/></channel>
      <serial type='file'><source path='/log/1'/></serial>
      <serial type='file'><source path='/log/2'/></serial>
      <console type='file'><source path='/log/1'/></console>
      </devices></domain>";

    fn disks() -> BTreeMap<String, (PathBuf, Format)> {
        let image = |name: &str, format| (PathBuf::from(format!("/d's/{name}")), format);
        BTreeMap::from([
            ("vda".to_owned(), image("a.qcow2", Format::Qcow2)),
            ("vdb".to_owned(), image("b.raw", Format::Raw)),
        ])
    }

    #[test]
    fn a_new_domain_has_its_own_identity_and_disks() {
        let (disks, macs) = (disks(), ["52:54:00:aa:bb:cc".to_owned()]);
        let new = NewDomain {
            name: "n & m",
            identity: Identity::Fresh { uuid: "u-2", macs: &macs },
            disks: &disks,
            nvram: Some(Path::new("/new.fd")),
            dir: Path::new("/d"),
        };
        let made = rewrite(OLD, &new).unwrap();
        assert_eq!(made.dropped, ["vdc"]);
        assert_eq!(made.xml.matches("/d/n &amp; m-port0.log").count(), 2);
        assert_eq!(made.xml.matches("/d/n &amp; m-port1.log").count(), 1);
        let seen = xml::parse(&made.xml).unwrap();
        assert_eq!((seen.name.as_str(), seen.uuid.as_str()), ("n & m", "u-2"));
        assert_eq!(seen.nvram.as_deref(), Some(Path::new("/new.fd")));
        let found: Vec<_> = seen
            .disks
            .iter()
            .map(|disk| (disk.target.clone(), (disk.path.clone().unwrap(), disk.format.unwrap())))
            .collect();
        assert_eq!(found, disks.into_iter().collect::<Vec<_>>());
        for gone in ["u-1", "g-1", "00:00:01", "/dev/x", "rbd", "auth", "bind", "backingStore"] {
            assert!(!made.xml.contains(gone), "{gone} in {}", made.xml);
        }
        for kept in ["a note", "cache='none'", "/iso", "kept", "type='bridge'"] {
            assert!(made.xml.contains(kept), "{kept} not in {}", made.xml);
        }
    }

    #[test]
    fn an_identity_can_be_kept_and_firmware_without_variables_starts_anew() {
        let (disks, dir) = (disks(), Path::new("/d"));
        let new =
            NewDomain { name: "n", identity: Identity::Kept, disks: &disks, nvram: None, dir };
        let made = rewrite(OLD, &new).unwrap().xml;
        assert!(made.contains("u-1") && made.contains("00:00:01") && made.contains("bind"));
        assert!(!made.contains("nvram"));
        assert_eq!(interfaces(OLD), Ok(1));
        assert!(rewrite("nonsense", &new).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_name_stays_one_name(name in "[ -~é✓]{1,40}") {
            let (disks, dir) = (BTreeMap::new(), Path::new("/d"));
            let new = NewDomain { name: &name, identity: Identity::Kept, disks: &disks, nvram: None, dir };
            let made = rewrite(OLD, &new).unwrap();
            let document = Document::parse(&made.xml).unwrap();
            let found = child(document.root_element(), "name").and_then(|node| node.text());
            proptest::prop_assert_eq!(found, Some(name.as_str()));
        }
    }
}
