//! Assembling from hand-made answers: what the machines at hand cannot show.

use std::collections::BTreeMap;

use super::*;
use proptest::prelude::*;
use serde_json::json;

/// A machine with one disk `d`: qcow2 node `img` on `/img.qcow2`, device `vd` at a virtio-blk.
fn answers() -> Value {
    let node = |name: &str, driver: &str, file: &str| {
        json!({"node-name": name, "drv": driver, "file": file, "ro": false, "brand-new": {"x": 1},
               "image": {"virtual-size": 1_048_576, "format-specific": {"type": "new", "data": {}}}})
    };
    let path = "/machine/peripheral/vd/virtio-backend";
    json!({
        "block": [{"device": "", "qdev": path, "type": "unknown", "removable": false,
                   "io-status": "a-new-status", "inserted": {"node-name": "img", "drv": "qcow2"}}],
        "nodes": [node("img", "qcow2", "/img.qcow2"), node("#file", "file", "/img.qcow2")],
        "graph": {
            "nodes": [{"id": 1, "type": "block-backend", "name": path},
                      {"id": 2, "type": "block-driver", "name": "img"},
                      {"id": 3, "type": "block-driver", "name": "#file"},
                      {"id": 4, "type": "block-backend", "name": ""}],
            "edges": [{"parent": 1, "child": 2, "name": "root", "perm": ["write"]},
                      {"parent": 2, "child": 3, "name": "file", "perm": ["write", "resize"]}]},
        "properties": {"type": "virtio-blk-device", "parent_bus": "/machine/peripheral/vd/virtio-bus",
                       "iothread": "", "serial": "", "share-rw": false},
    })
}

fn observed(answers: &Value) -> Observed {
    let path = answers["block"][0]["qdev"].as_str().unwrap();
    Observed {
        backends: serde_json::from_value(answers["block"].clone()).unwrap(),
        nodes: serde_json::from_value(answers["nodes"].clone()).unwrap(),
        graph: serde_json::from_value(answers["graph"].clone()).unwrap(),
        devices: BTreeMap::from([(
            qom_path(path),
            serde_json::from_value(answers["properties"].clone()).unwrap(),
        )]),
        peripherals: vec![],
    }
}

fn disk(change: impl FnOnce(&mut Value)) -> Disk {
    let mut answers = answers();
    change(&mut answers);
    assemble(&observed(&answers)).disks.remove(0)
}

#[test]
fn unknown_fields_of_newer_versions_are_passed_over() {
    let disk = disk(|_| {});
    assert_eq!((disk.id.as_str(), disk.refusal), ("vd", None));
    assert_eq!(disk.identity.0, "id=vd;file=/img.qcow2");
    assert_eq!(disk.iothread, None);
}

#[test]
fn a_second_writer_anywhere_down_to_the_image_is_refused() {
    let writer =
        |child: u64| json!({"parent": 4, "child": child, "name": "root", "perm": ["write"]});
    let refused = disk(|a| a["graph"]["edges"].as_array_mut().unwrap().push(writer(2)));
    assert!(matches!(refused.refusal, Some(Refusal::SecondWriter { node, .. }) if node == "img"));
    let reader = json!({"parent": 4, "child": 2, "name": "root", "perm": ["consistent-read"]});
    let fine = disk(|a| a["graph"]["edges"].as_array_mut().unwrap().push(reader));
    assert_eq!(fine.refusal, None);
    let ours = disk(|a| {
        a["graph"]["nodes"][3]["name"] = json!("ic-0-cbw");
        a["graph"]["edges"].as_array_mut().unwrap().push(writer(2));
    });
    assert_eq!(ours.refusal, None);
}

#[test]
fn devices_are_refused_by_their_type() {
    let refusal = |kind: &str| disk(|a| a["properties"]["type"] = json!(kind)).refusal;
    for kind in ["scsi-block", "scsi-generic"] {
        assert!(matches!(refusal(kind), Some(Refusal::Passthrough { .. })), "{kind}");
    }
    assert!(matches!(refusal("m25p80"), Some(Refusal::UnknownDevice { .. })));
    let shared = disk(|a| a["properties"]["share-rw"] = json!(true)).refusal;
    assert_eq!(shared, Some(Refusal::ShareRw));
}

#[test]
fn the_first_of_mapped_iothreads_is_the_disks() {
    let mapping = json!([{"iothread": "io3", "vqs": [0]}, {"iothread": "io4"}]);
    let mapped = disk(|a| a["properties"]["iothread-vq-mapping"] = mapping);
    assert_eq!(mapped.iothread.as_deref(), Some("io3"));
    let linked = disk(|a| a["properties"]["iothread"] = json!("/objects/io1"));
    assert_eq!(linked.iothread.as_deref(), Some("io1"));
}

#[test]
fn a_passed_descriptor_is_no_identity() {
    let passed = disk(|a| a["nodes"][1]["file"] = json!("/dev/fdset/4"));
    assert_eq!(passed.identity.0, "id=vd");
}

#[test]
fn a_disk_that_qemu_decrypts_is_marked() {
    assert!(!disk(|_| {}).decrypted);
    assert!(disk(|a| a["nodes"][0]["encrypted"] = json!(true)).decrypted);
    assert!(disk(|a| a["nodes"][0]["drv"] = json!("luks")).decrypted);
}

#[test]
fn anonymous_devices_are_named_by_drive_then_node_then_path() {
    let anonymous = "/machine/peripheral-anon/device[3]";
    let named = |drive: &str, node: &str| {
        disk(|a| {
            a["block"][0]["qdev"] = json!(anonymous);
            a["block"][0]["device"] = json!(drive);
            a["block"][0]["inserted"]["node-name"] = json!(node);
            a["nodes"][0]["node-name"] = json!(node);
            a["graph"]["nodes"][1]["name"] = json!(node);
            a["graph"]["nodes"][0]["name"] =
                json!(if drive.is_empty() { anonymous } else { drive });
        })
        .id
    };
    assert_eq!(named("drive0", "img"), "drive0");
    assert_eq!(named("", "img"), "img");
    assert_eq!(named("", "#block1"), "peripheral-anon-device-3");
}

#[test]
fn a_device_that_left_meanwhile_is_no_disk() {
    let mut observed = observed(&answers());
    observed.devices.clear();
    let inventory = assemble(&observed);
    assert_eq!(inventory.disks, []);
    assert_eq!(inventory.excluded[0].why, Exclusion::NoDevice);
}

#[test]
fn a_graph_that_runs_in_a_circle_ends() {
    let circle = json!({"parent": 3, "child": 2, "name": "file", "perm": []});
    let disk = disk(|a| a["graph"]["edges"].as_array_mut().unwrap().push(circle));
    assert_eq!(disk.layers.len(), 64);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn ids_are_plain_and_unique(names in prop::collection::vec("[a-b./ \\[\\]#é-]{0,4}(-2)?", 1..8)) {
        let template = disk(|_| {});
        let of = |name: &String| Disk { id: tidy(name), ..template.clone() };
        let mut disks: Vec<_> = names.iter().map(of).collect();
        make_unique(&mut disks);
        let ids: HashSet<_> = disks.iter().map(|disk| disk.id.clone()).collect();
        prop_assert_eq!(ids.len(), names.len());
        for id in ids {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            prop_assert!(!id.is_empty() && id.bytes().all(plain) && id != "." && id != "..");
        }
    }
}
