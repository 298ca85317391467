//! What QEMU says of its block devices, uninterpreted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::wire::{Backend, Graph, NamedNode, Property};
use crate::{Monitor, QmpError};

/// Where QEMU keeps the devices that its user added.
const PERIPHERALS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Properties of a disk device that are read, where it has them.
const DEVICE_PROPERTIES: [&str; 13] = [
    "type",
    "parent_bus",
    "share-rw",
    "serial",
    "wwn",
    "nsid",
    "iothread",
    "iothread-vq-mapping",
    "addr",
    "channel",
    "scsi-id",
    "lun",
    "unit",
];

/// Properties that tell which iothread serves a controller, and where it sits.
const CONTROLLER_PROPERTIES: [&str; 4] = ["iothread", "iothread-vq-mapping", "parent_bus", "addr"];

/// Controllers above a device that are looked at: a disk on a hub behind bridges has fewer.
const CONTROLLERS_MAX: usize = 16;

/// Properties by name.
pub(crate) type Properties = BTreeMap<String, Value>;

/// Answers to all questions that an inventory needs.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub(crate) backends: Vec<Backend>,
    pub(crate) nodes: Vec<NamedNode>,
    pub(crate) graph: Graph,
    /// Properties of disk devices and the controllers above them by QOM path.
    pub(crate) devices: BTreeMap<String, Properties>,
    /// QOM path and type of each device that the user added.
    pub(crate) peripherals: Vec<(String, String)>,
}

/// Asks QEMU. The answers are not of one instant: a device may come or go in between.
pub async fn observe(monitor: &Monitor, deadline: Duration) -> Result<Observed, QmpError> {
    let ask = Asker { monitor, deadline };
    let (backends, nodes, graph, peripherals) = tokio::try_join!(
        ask.query::<Vec<Backend>>("query-block", Value::Null),
        ask.query("query-named-block-nodes", json!({"flat": true})),
        ask.query("x-debug-query-block-graph", Value::Null),
        ask.peripherals(),
    )?;
    let devices = backends.iter().filter_map(|b| b.qdev.as_deref()).map(qom_path).collect();
    let devices = ask.devices(devices).await?;
    Ok(Observed { backends, nodes, graph, devices, peripherals })
}

/// QOM path of what `query-block` calls `qdev`: a path already, or the id of a device.
pub(crate) fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("{}/{qdev}", PERIPHERALS[0]) }
}

/// The controller is the object that owns the bus on which the device sits.
pub(crate) fn controller_path(device: &Properties) -> Option<String> {
    let bus = device.get("parent_bus")?.as_str()?;
    let (controller, _) = bus.rsplit_once('/')?;
    (!controller.is_empty()).then(|| controller.to_owned())
}

/// One question with an answer of a known shape.
pub(crate) async fn query<T: DeserializeOwned>(
    monitor: &Monitor,
    command: &str,
    arguments: Value,
    deadline: Duration,
) -> Result<T, QmpError> {
    shaped(command, monitor.execute_raw(command, arguments, deadline).await?)
}

fn shaped<T: DeserializeOwned>(command: &str, answer: Value) -> Result<T, QmpError> {
    serde_json::from_value(answer)
        .map_err(|error| QmpError::Content { command: command.into(), why: error.to_string() })
}

struct Asker<'a> {
    monitor: &'a Monitor,
    deadline: Duration,
}

impl Asker<'_> {
    async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        query(self.monitor, command, arguments, self.deadline).await
    }

    async fn peripherals(&self) -> Result<Vec<(String, String)>, QmpError> {
        let kind = |property: &Property| {
            property.kind.strip_prefix("child<")?.strip_suffix('>').map(str::to_owned)
        };
        let mut found = Vec::new();
        for (folder, listed) in PERIPHERALS.iter().zip(self.lists(&PERIPHERALS).await?) {
            let children = listed?.into_iter();
            let children =
                children.filter_map(|p| Some((format!("{folder}/{}", p.name), kind(&p)?)));
            found.extend(children);
        }
        Ok(found)
    }

    /// Properties of the devices, and of all that is above them. A device that left in between has
    /// none.
    async fn devices(
        &self,
        devices: BTreeSet<String>,
    ) -> Result<BTreeMap<String, Properties>, QmpError> {
        let mut found = BTreeMap::new();
        for (path, properties) in self.properties(&devices, &DEVICE_PROPERTIES).await? {
            match properties {
                Err(error) if error.is_gone() => {}
                properties => drop(found.insert(path, properties?)),
            }
        }
        let mut above = controllers(&found);
        for _ in 0..CONTROLLERS_MAX {
            if above.is_empty() {
                break;
            }
            for (path, properties) in self.properties(&above, &CONTROLLER_PROPERTIES).await? {
                found.insert(path, properties?);
            }
            above = controllers(&found);
        }
        Ok(found)
    }

    async fn lists(
        &self,
        paths: &[impl AsRef<str>],
    ) -> Result<Vec<Result<Vec<Property>, QmpError>>, QmpError> {
        let question = |path: &_| ("qom-list", json!({ "path": AsRef::<str>::as_ref(path) }));
        let answers = self.monitor.execute_all(paths.iter().map(question), self.deadline).await?;
        let shaped = answers.into_iter().map(|answer| shaped("qom-list", answer?));
        Ok(shaped.collect())
    }

    /// Those of the `wanted` properties that each object has.
    async fn properties(
        &self,
        paths: &BTreeSet<String>,
        wanted: &[&str],
    ) -> Result<Vec<(String, Result<Properties, QmpError>)>, QmpError> {
        let paths: Vec<&String> = paths.iter().collect();
        let mut found = Vec::with_capacity(paths.len());
        let mut asked = Vec::new();
        for (at, listed) in self.lists(&paths).await?.into_iter().enumerate() {
            if let Ok(listed) = &listed {
                let has = listed.iter().filter(|p| wanted.contains(&p.name.as_str()));
                asked.extend(has.map(|property| (at, property.name.clone())));
            }
            found.push((paths[at].clone(), listed.map(|_| Properties::new())));
        }
        let question = |(at, name): &(usize, String)| {
            ("qom-get", json!({"path": paths[*at], "property": name}))
        };
        let answers = self.monitor.execute_all(asked.iter().map(question), self.deadline).await?;
        for ((at, name), answer) in asked.into_iter().zip(answers) {
            match (&mut found[at].1, answer) {
                (Ok(properties), Ok(value)) => drop(properties.insert(name, value)),
                (Ok(_), Err(error)) => found[at].1 = Err(error),
                (Err(_), _) => {}
            }
        }
        Ok(found)
    }
}

/// Controllers of what is known that are not known themselves.
fn controllers(known: &BTreeMap<String, Properties>) -> BTreeSet<String> {
    let above = known.values().filter_map(controller_path);
    above.filter(|path| !known.contains_key(path)).collect()
}
