//! What the connected QEMU can do.

use std::fmt;

use serde_json::Value;

/// Version of a QEMU, as its greeting states it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
