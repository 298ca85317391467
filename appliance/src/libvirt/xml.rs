//! What a domain's XML says: pure.

use std::path::PathBuf;

use roxmltree::{Document, Node};

use super::tpm::{Tpm, Version};
use crate::image::Format;

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainDisk {
    /// Its target, as in `vda`: the name that libvirt knows it by.
    pub target: String,
    pub serial: Option<String>,
    /// The id of its device in QEMU, where it runs.
    pub alias: Option<String>,
    /// The file or block device that holds it.
    pub path: Option<PathBuf>,
    /// The format that the domain gives it; `None` for one that is not understood.
    pub format: Option<Format>,
    /// It is served by an iothread.
    pub iothread: bool,
    /// Why it cannot be backed up.
    pub refusal: Option<String>,
    /// The guest cannot write to it.
    pub read_only: bool,
}

impl DomainDisk {
    /// What it is recognised by next time; a part of it holds for its image alone, too.
    pub fn identity(&self) -> String {
        let mut identity = format!("id={}", self.target);
        if let Some(serial) = &self.serial {
            identity += &format!(";serial={serial}");
        }
        if let Some(path) = &self.path {
            let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            identity += &format!(";file={}", path.display());
        }
        identity
    }
}

/// Whether a guest agent can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// The domain has no channel for one.
    None,
    /// It has one, and nobody answers on it.
    Silent,
    /// The guest has opened it.
    Connected,
}

/// What the backup of a domain needs to know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    pub uuid: String,
    pub disks: Vec<DomainDisk>,
    /// Devices with data that no backup of disks holds.
    pub unprotected: Vec<(String, String)>,
    pub agent: Agent,
    /// The user and group of its QEMU, where libvirt says so.
    pub owner: Option<(u32, u32)>,
    /// The file with the firmware's variables.
    pub nvram: Option<PathBuf>,
    pub tpm: Tpm,
}

/// Reads the XML of a domain, live or inactive.
pub fn parse(text: &str) -> Result<Description, String> {
    let document = Document::parse(text).map_err(|e| format!("its XML is not understood: {e}"))?;
    let domain = document.root_element();
    let text_of = |name: &str| child(domain, name).and_then(|node| node.text());
    let devices = child(domain, "devices").ok_or("its XML has no devices")?;
    Ok(Description {
        name: text_of("name").ok_or("its XML has no name")?.to_owned(),
        uuid: text_of("uuid").ok_or("its XML has no uuid")?.to_owned(),
        disks: elements(devices, "disk").filter_map(disk).collect(),
        unprotected: unprotected(devices),
        agent: agent(devices),
        owner: owner(domain),
        nvram: child(domain, "os")
            .and_then(|os| child(os, "nvram"))
            .and_then(|nvram| nvram.text())
            .map(PathBuf::from),
        tpm: tpm(devices),
    })
}

/// The UUID in a domain's XML, where it is one.
pub fn uuid(text: &str) -> Option<String> {
    let document = Document::parse(text).ok()?;
    checked_uuid(child(document.root_element(), "uuid")?.text()?)
}

/// A UUID as libvirt writes it, where it is one.
pub fn checked_uuid(text: &str) -> Option<String> {
    let uuid = text.trim();
    let allowed = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    (uuid.len() == 36 && uuid.bytes().all(allowed)).then(|| uuid.to_ascii_lowercase())
}

pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

pub(super) fn elements<'a, 'i: 'a>(
    node: Node<'a, 'i>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

/// `None` for a drive with a medium that is not the guest's own.
fn disk(node: Node<'_, '_>) -> Option<DomainDisk> {
    if matches!(node.attribute("device"), Some("cdrom" | "floppy")) {
        return None;
    }
    let target = child(node, "target")?.attribute("dev")?.to_owned();
    let source = child(node, "source");
    let path = source.and_then(|s| s.attribute("file").or_else(|| s.attribute("dev")));
    let driver = child(node, "driver");
    let format = match driver.and_then(|driver| driver.attribute("type")) {
        Some("qcow2") => Some(Format::Qcow2),
        // What libvirt takes for granted: it never guesses.
        Some("raw") | None => Some(Format::Raw),
        Some(_) => None,
    };
    Some(DomainDisk {
        alias: child(node, "alias").and_then(|a| a.attribute("name")).map(str::to_owned),
        serial: child(node, "serial").and_then(|s| s.text()).map(str::to_owned),
        path: path.map(PathBuf::from),
        format,
        iothread: driver
            .is_some_and(|d| d.has_attribute("iothread") || child(d, "iothreads").is_some())
            || controller_has_iothread(node),
        refusal: refusal(node, &target),
        read_only: child(node, "readonly").is_some(),
        target,
    })
}

/// A SCSI disk is served by its controller's iothread.
fn controller_has_iothread(disk: Node<'_, '_>) -> bool {
    let bus = child(disk, "target").and_then(|target| target.attribute("bus"));
    let index = child(disk, "address").and_then(|at| at.attribute("controller")).unwrap_or("0");
    let Some(devices) = disk.parent().filter(|_| bus == Some("scsi")) else { return false };
    elements(devices, "controller")
        .filter(|node| node.attribute("type") == Some("scsi"))
        .filter(|node| node.attribute("index").unwrap_or("0") == index)
        .filter_map(|node| child(node, "driver"))
        .any(|driver| driver.has_attribute("iothread"))
}

fn refusal(node: Node<'_, '_>, target: &str) -> Option<String> {
    let has = |name: &str| child(node, name).is_some();
    if node.attribute("device") == Some("lun") {
        Some("it is a SCSI device passed through to the guest: its writes are not seen".into())
    } else if has("shareable") {
        Some("it is shared with other domains: their writes are not seen".into())
    } else if has("transient") {
        Some("it is transient: what it holds is gone when the domain stops".into())
    } else if node.attribute("type") == Some("vhostuser") {
        Some("it is served by another process (vhost-user): its writes are not seen".into())
    } else if has("readonly") {
        Some("it is read-only".into())
    } else if has("mirror") {
        Some(format!("a block job is at work on it: see 'virsh blockjob DOMAIN {target}'"))
    } else {
        None
    }
}

fn unprotected(devices: Node<'_, '_>) -> Vec<(String, String)> {
    let reasons = [
        ("hostdev", "a device of the host, passed through"),
        ("filesystem", "a directory of the host"),
        ("tpm", "its state is in a chip, or with another program"),
    ];
    let in_the_point =
        |node: &Node<'_, '_>| node.has_tag_name("tpm") && emulated_tpm(*node).is_some();
    let of = |(name, why): &(&'static str, &str)| {
        let why = (*why).to_owned();
        elements(devices, name)
            .filter(|node| !in_the_point(node))
            .enumerate()
            .map(move |(at, _)| (format!("{name}{at}"), why.clone()))
            .collect::<Vec<_>>()
    };
    reasons.iter().flat_map(of).collect()
}

fn tpm(devices: Node<'_, '_>) -> Tpm {
    match elements(devices, "tpm").next() {
        None => Tpm::None,
        Some(node) => emulated_tpm(node).map_or(Tpm::Elsewhere, Tpm::Emulated),
    }
}

fn emulated_tpm(node: Node<'_, '_>) -> Option<Version> {
    let backend = child(node, "backend")?;
    // A newer libvirt may be told to keep the state elsewhere.
    let usual = backend.attribute("type") == Some("emulator") && child(backend, "source").is_none();
    match backend.attribute("version").unwrap_or("2.0") {
        "1.2" if usual => Some(Version::V1_2),
        "2.0" if usual => Some(Version::V2),
        _ => None,
    }
}

fn agent(devices: Node<'_, '_>) -> Agent {
    let targets = elements(devices, "channel").filter_map(|channel| child(channel, "target"));
    let mut agents = targets.filter(|t| t.attribute("name") == Some("org.qemu.guest_agent.0"));
    match agents.next() {
        None => Agent::None,
        Some(target) if target.attribute("state") == Some("connected") => Agent::Connected,
        Some(_) => Agent::Silent,
    }
}

/// `<seclabel model='dac'><label>+64055:+64055</label>`
fn owner(domain: Node<'_, '_>) -> Option<(u32, u32)> {
    let dac = elements(domain, "seclabel").find(|node| node.attribute("model") == Some("dac"))?;
    let (user, group) = child(dac, "label")?.text()?.split_once(':')?;
    let id = |text: &str| text.trim_start_matches('+').parse().ok();
    Some((id(user)?, id(group)?))
}

/// A text as the content of an element or of an attribute in any quotes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '\'' => escaped += "&apos;",
            '"' => escaped += "&quot;",
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain type='kvm' id='1'><name>a &amp; b</name><uuid>u-1</uuid>
      <os><nvram>/nv/a.fd</nvram></os><devices>
      <disk type='file' device='disk'><driver name='qemu' type='qcow2' iothread='1'/>
        <source file='/i/a.qcow2' index='1'/><target dev='vda' bus='virtio'/><serial>S1</serial></disk>
      <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
      <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/x'/>
        <target dev='sdb' bus='scsi'/><address type='drive' controller='1'/><shareable/></disk>
      <disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdc'/></disk>
      <controller type='scsi' index='1'><driver iothread='2'/></controller>
      <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
      <hostdev mode='subsystem'/><tpm model='tpm-crb'/></devices>
      <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+105</label></seclabel></domain>";

    #[test]
    fn a_domain_is_read() {
        let seen = parse(DOMAIN).unwrap();
        assert_eq!((seen.name.as_str(), seen.uuid.as_str()), ("a & b", "u-1"));
        let targets: Vec<_> = seen.disks.iter().map(|disk| disk.target.as_str()).collect();
        assert_eq!(targets, ["vda", "sdb", "vdc"]);
        assert_eq!(seen.disks[0].identity(), "id=vda;serial=S1;file=/i/a.qcow2");
        assert_eq!(seen.disks[0].format, Some(Format::Qcow2));
        assert!(seen.disks[0].iothread && seen.disks[0].refusal.is_none());
        assert!(seen.disks[1].iothread && seen.disks[1].refusal.is_some());
        assert_eq!((seen.disks[2].path.as_ref(), seen.disks[2].iothread), (None, false));
        assert_eq!(seen.agent, Agent::Connected);
        assert_eq!(seen.owner, Some((64055, 105)));
        assert_eq!(seen.nvram, Some(PathBuf::from("/nv/a.fd")));
        let devices: Vec<_> = seen.unprotected.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!((devices, seen.tpm), (vec!["hostdev0", "tpm0"], Tpm::Elsewhere));
        let emulated = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";
        let seen = parse(&DOMAIN.replace("<tpm model='tpm-crb'/>", emulated)).unwrap();
        assert_eq!((seen.unprotected.len(), seen.tpm), (1, Tpm::Emulated(Version::V2)));
    }

    #[test]
    fn what_is_no_domain_is_an_error() {
        for bad in [
            "",
            "<domain/>",
            "<domain><name>a</name></domain>",
            "<!DOCTYPE a [<!ENTITY x 'y'>]><a/>",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_escaped_comes_back() {
        let nasty = "a'\"<>&b";
        let text = format!("<a b='{0}'>{0}</a>", escape(nasty));
        let document = Document::parse(&text).unwrap();
        assert_eq!(document.root_element().text(), Some(nasty));
        assert_eq!(document.root_element().attribute("b"), Some(nasty));
    }
}
