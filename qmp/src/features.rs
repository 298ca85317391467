//! What the connected QEMU can do: from its schema where that tells, from its version where not.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Monitor, QmpError};

/// Oldest QEMU accepted. copy-before-write's options and snapshot-access exist from 7.1; 7.2 is
/// the oldest that was tested.
pub const OLDEST: QemuVersion = QemuVersion { major: 7, minor: 2, micro: 0 };

/// Before it, any NBD client that leaves an export of a disk in an iothread crashes QEMU
/// (`nbd_blockdev_client_closed: Assertion qemu_in_main_thread()`); no schema shows that.
pub const SAFE_IOTHREAD_EXPORTS: QemuVersion = QemuVersion { major: 9, minor: 1, micro: 0 };

/// Version of a QEMU, as its greeting states it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QemuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number; 50 and above mark a development version.
    pub micro: u32,
}

impl QemuVersion {
    /// The version in the `QMP` member of a greeting (qmp-spec.rst, section server greeting).
    pub fn from_greeting(greeting: &Value) -> Option<Self> {
        let numbers = greeting.get("version")?.get("qemu")?;
        let number = |key: &str| u32::try_from(numbers.get(key)?.as_u64()?).ok();
        Some(Self { major: number("major")?, minor: number("minor")?, micro: number("micro")? })
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What this QEMU can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Its version.
    pub version: QemuVersion,
    /// Commands without which nothing works, that it does not have.
    pub missing_commands: Vec<String>,
    /// copy-before-write takes `on-cbw-error`: a full scratch need not fail the guest's writes.
    pub cbw_on_error: bool,
    /// copy-before-write takes `cbw-timeout`: a slow scratch need not stall the guest's writes.
    pub cbw_timeout: bool,
    /// The driver snapshot-access exists.
    pub snapshot_access: bool,
    /// An NBD export takes `bitmaps` (of other nodes, too).
    pub export_bitmaps: bool,
    /// An export can be tied to an iothread (`iothread`, `fixed-iothread`).
    pub export_iothread: bool,
    /// copy-before-write takes `min-cluster-size` (9.2).
    pub cbw_min_cluster_size: bool,
}

/// This QEMU cannot be backed up safely.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("QEMU {version} cannot be backed up safely: it lacks {lacks}; {OLDEST} or newer is needed")]
pub struct Unsupported {
    /// Its version.
    pub version: QemuVersion,
    /// What is missing, in words.
    pub lacks: String,
}

const NEEDED_COMMANDS: [&str; 14] = [
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-merge",
    "block-dirty-bitmap-remove",
    "block-export-add",
    "block-export-del",
    "blockdev-add",
    "blockdev-del",
    "nbd-server-start",
    "nbd-server-stop",
    "query-block-exports",
    "query-named-block-nodes",
    "qom-set",
    "transaction",
    "x-debug-query-block-graph",
];

impl Features {
    /// Asks for the schema (one answer of about 236 kB).
    pub async fn query(monitor: &Monitor, deadline: Duration) -> Result<Self, QmpError> {
        let command = "query-qmp-schema";
        let answer = monitor.execute_raw(command, Value::Null, deadline).await?;
        let schema: Vec<SchemaEntry> = serde_json::from_value(answer)
            .map_err(|e| QmpError::Content { command: command.into(), why: e.to_string() })?;
        Ok(Self::from_schema(monitor.version(), &schema))
    }

    fn from_schema(version: QemuVersion, schema: &[SchemaEntry]) -> Self {
        let schema = Schema::new(schema);
        let missing = NEEDED_COMMANDS.iter().filter(|name| !schema.has_command(name));
        let filter = schema.variant("blockdev-add", "copy-before-write");
        let nbd = schema.variant("block-export-add", "nbd");
        let export = schema.arguments("block-export-add");
        Self {
            version,
            missing_commands: missing.map(|name| (*name).to_owned()).collect(),
            cbw_on_error: has_member(filter, "on-cbw-error"),
            cbw_timeout: has_member(filter, "cbw-timeout"),
            snapshot_access: schema.variant("blockdev-add", "snapshot-access").is_some(),
            export_bitmaps: has_member(nbd, "bitmaps"),
            export_iothread: has_member(export, "iothread") && has_member(export, "fixed-iothread"),
            cbw_min_cluster_size: has_member(filter, "min-cluster-size"),
        }
    }

    /// Whether a capture is possible at all, and if not, what it lacks.
    pub fn check(&self) -> Result<(), Unsupported> {
        let mut lacks: Vec<_> =
            self.missing_commands.iter().map(|name| format!("the command {name}")).collect();
        let wanted = [
            (self.cbw_on_error, "copy-before-write's on-cbw-error"),
            (self.cbw_timeout, "copy-before-write's cbw-timeout"),
            (self.snapshot_access, "the driver snapshot-access"),
            (self.export_bitmaps, "bitmaps of NBD exports"),
            (self.version >= OLDEST, "fixes that no tested version is without"),
        ];
        lacks.extend(wanted.iter().filter(|(there, _)| !there).map(|(_, what)| (*what).to_owned()));
        if lacks.is_empty() {
            return Ok(());
        }
        Err(Unsupported { version: self.version, lacks: lacks.join(", ") })
    }

    /// Whether a disk in an iothread may be exported over NBD (else it must be pushed).
    pub fn iothread_exports_are_safe(&self) -> bool {
        self.version >= SAFE_IOTHREAD_EXPORTS
    }
}

/// One entry of `query-qmp-schema`, as far as used (QEMU qapi/introspect.json).
#[derive(Debug, Clone, Deserialize)]
struct SchemaEntry {
    name: String,
    #[serde(rename = "meta-type")]
    meta: String,
    #[serde(rename = "arg-type")]
    arguments: Option<String>,
    #[serde(default)]
    members: Vec<Value>,
    #[serde(default)]
    variants: Vec<Variant>,
}

#[derive(Debug, Clone, Deserialize)]
struct Variant {
    case: String,
    #[serde(rename = "type")]
    kind: String,
}

struct Schema<'a> {
    entries: HashMap<&'a str, &'a SchemaEntry>,
}

impl<'a> Schema<'a> {
    fn new(entries: &'a [SchemaEntry]) -> Self {
        Self { entries: entries.iter().map(|entry| (entry.name.as_str(), entry)).collect() }
    }

    fn has_command(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.meta == "command")
    }

    fn arguments(&self, command: &str) -> Option<&'a SchemaEntry> {
        let arguments = self.entries.get(command)?.arguments.as_deref()?;
        self.entries.get(arguments).copied()
    }

    /// The type of one case of a command's tagged arguments.
    fn variant(&self, command: &str, case: &str) -> Option<&'a SchemaEntry> {
        let variants = &self.arguments(command)?.variants;
        let kind = &variants.iter().find(|variant| variant.case == case)?.kind;
        self.entries.get(kind.as_str()).copied()
    }
}

fn has_member(entry: Option<&SchemaEntry>, name: &str) -> bool {
    let named = |member: &Value| member.get("name").and_then(Value::as_str) == Some(name);
    entry.is_some_and(|entry| entry.members.iter().any(named))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema(with_timeout: bool) -> Vec<SchemaEntry> {
        let mut filter = vec![json!({"name": "on-cbw-error", "type": "9"})];
        if with_timeout {
            filter.push(json!({"name": "cbw-timeout", "type": "int"}));
        }
        let mut entries = vec![
            json!({"name": "1", "meta-type": "object", "members": [], "tag": "driver", "variants": [
                {"case": "copy-before-write", "type": "2"}, {"case": "snapshot-access", "type": "3"}]}),
            json!({"name": "2", "meta-type": "object", "members": filter}),
            json!({"name": "3", "meta-type": "object", "members": []}),
            json!({"name": "4", "meta-type": "object", "members": [{"name": "iothread"}, {"name": "fixed-iothread"}],
                   "variants": [{"case": "nbd", "type": "5"}]}),
            json!({"name": "5", "meta-type": "object", "members": [{"name": "bitmaps"}]}),
            json!({"name": "9", "meta-type": "new-meta-type", "something": {"else": true}}),
        ];
        entries.extend(NEEDED_COMMANDS.iter().map(|name| {
            let arguments = if *name == "block-export-add" { "4" } else { "1" };
            json!({"name": name, "meta-type": "command", "arg-type": arguments})
        }));
        entries.into_iter().map(|entry| serde_json::from_value(entry).unwrap()).collect()
    }

    fn version(major: u32, minor: u32) -> QemuVersion {
        QemuVersion { major, minor, micro: 0 }
    }

    #[test]
    fn a_complete_schema_is_accepted_from_7_2_on() {
        for (major, minor) in [(7, 2), (9, 0), (10, 2), (11, 1), (12, 0)] {
            let features = Features::from_schema(version(major, minor), &schema(true));
            assert_eq!(features.check(), Ok(()));
            assert_eq!(features.iothread_exports_are_safe(), (major, minor) > (9, 0));
        }
        let old = Features::from_schema(version(7, 1), &schema(true)).check().unwrap_err();
        assert!(old.to_string().contains("7.2.0 or newer"), "{old}");
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut schema = schema(false);
        schema.retain(|entry| entry.name != "qom-set");
        let lacks = Features::from_schema(version(8, 0), &schema).check().unwrap_err();
        assert_eq!(lacks.lacks, "the command qom-set, copy-before-write's cbw-timeout");
    }
}
