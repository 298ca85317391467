//! Device order: by address, from the machine's root bus down to the device; pure.
//!
//! `query-block` lists all `-drive`s before the first `-blockdev`, whatever the machine looks like,
//! and QOM lists devices in no order at all. The address of a device is what the guest numbers its
//! disks by, and does not change while the machine does not: of PCI slot and function, then what
//! the controller tells its disks by (channel, target, LUN; unit; namespace). Devices without an
//! address, and those with the same one, keep QEMU's order.

use super::observe::{Observed, controller_path, qom_path};
use super::wire::Backend;

/// What tells a device from others on its bus, the most significant first.
const ADDRESSES: [&str; 6] = ["addr", "channel", "scsi-id", "lun", "unit", "nsid"];

/// Levels that are followed upwards; a broken answer might name a circle.
const LEVELS_MAX: usize = 32;

/// One step from a bus to a device on it: the bus's number at its controller, and the address.
type Level = (u64, Vec<i64>);

/// The backends in device order.
pub(super) fn by_address(observed: &Observed) -> Vec<&Backend> {
    let mut backends: Vec<&Backend> = observed.backends.iter().collect();
    backends.sort_by_cached_key(|backend| address(observed, backend));
    backends
}

fn address(observed: &Observed, backend: &Backend) -> Vec<Level> {
    let mut levels = Vec::new();
    let mut next = backend.qdev.as_deref().map(qom_path);
    while let Some(device) = next.and_then(|path| observed.devices.get(&path)) {
        let bus = device.get("parent_bus").and_then(|bus| bus.as_str()).unwrap_or_default();
        let numbers = ADDRESSES.iter().filter_map(|name| device.get(*name)?.as_i64());
        levels.push((bus_number(bus), numbers.collect()));
        next = controller_path(device).filter(|_| levels.len() < LEVELS_MAX);
    }
    levels.reverse();
    levels
}

/// The number at the end of a bus's name: `ide.3` is the fourth of its controller.
fn bus_number(bus: &str) -> u64 {
    let digits = bus.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    bus[digits..].parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn observed(devices: &[(&str, Value)], backends: &[&str]) -> Observed {
        let backends = backends.iter().map(|qdev| json!({"device": "", "qdev": qdev}));
        let device = |(path, properties): &(&str, Value)| {
            ((*path).to_owned(), serde_json::from_value(properties.clone()).unwrap())
        };
        Observed {
            backends: backends.map(|backend| serde_json::from_value(backend).unwrap()).collect(),
            devices: devices.iter().map(device).collect(),
            ..Observed::default()
        }
    }

    #[test]
    fn disks_come_as_the_guest_numbers_them() {
        let root = "/machine/q35/pcie.0";
        let devices = [
            ("/machine/q35", json!({"parent_bus": "/machine/unattached/sysbus"})),
            ("/machine/peripheral/vda", json!({"parent_bus": root, "addr": 8})),
            (
                "/machine/peripheral/vda/virtio-backend",
                json!({"parent_bus": "/machine/peripheral/vda/virtio-bus"}),
            ),
            ("/machine/peripheral/rp", json!({"parent_bus": root, "addr": 16})),
            (
                "/machine/peripheral/vdb",
                json!({"parent_bus": "/machine/peripheral/rp/rp", "addr": 0}),
            ),
            ("/machine/peripheral/sc", json!({"parent_bus": root, "addr": 24})),
            (
                "/machine/peripheral/sdb",
                json!({"parent_bus": "/machine/peripheral/sc/sc.0", "scsi-id": 10, "lun": 0}),
            ),
            (
                "/machine/peripheral/sda",
                json!({"parent_bus": "/machine/peripheral/sc/sc.0", "scsi-id": 9, "lun": 1}),
            ),
            ("/machine/unattached/ahci", json!({"parent_bus": root, "addr": 250})),
            (
                "/machine/unattached/d10",
                json!({"parent_bus": "/machine/unattached/ahci/ide.10", "unit": 0}),
            ),
            (
                "/machine/unattached/d9",
                json!({"parent_bus": "/machine/unattached/ahci/ide.9", "unit": 0}),
            ),
        ];
        let listed = [
            "sdb",
            "/machine/unattached/d10",
            "vdb",
            "/machine/unattached/d9",
            "/machine/peripheral/vda/virtio-backend",
            "sda",
        ];
        let observed = observed(&devices, &listed);
        let order: Vec<_> = by_address(&observed).iter().filter_map(|b| b.qdev.clone()).collect();
        let wanted = [
            "/machine/peripheral/vda/virtio-backend",
            "vdb",
            "sda",
            "sdb",
            "/machine/unattached/d9",
            "/machine/unattached/d10",
        ];
        assert_eq!(order, wanted);
    }

    #[test]
    fn a_circle_ends_and_what_has_no_address_keeps_its_place() {
        let devices = [
            ("/machine/a", json!({"parent_bus": "/machine/b/bus"})),
            ("/machine/b", json!({"parent_bus": "/machine/a/bus"})),
        ];
        let observed = observed(&devices, &["/machine/x", "/machine/a", "/machine/w"]);
        let order: Vec<_> = by_address(&observed).iter().filter_map(|b| b.qdev.clone()).collect();
        assert_eq!(order, ["/machine/x", "/machine/w", "/machine/a"]);
    }
}
