//! Whether a writer of this very host is still running, so that gc need not wait for the patience
//! to pass after a crash here. Revoking is safe even if this were wrong: the writer would notice.

use serde::{Deserialize, Serialize};

/// A process in a way that outlasts reuse of its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    boot: String,
    namespace: String,
    pid: u32,
    started: u64,
}

impl Life {
    /// This process; none where `/proc` does not tell.
    #[must_use]
    pub fn of_this_process() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// A process of this host and namespace.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
        Some(Self {
            boot: boot.trim().to_owned(),
            namespace: namespace.to_str()?.to_owned(),
            pid,
            started: started(pid)?,
        })
    }

    /// True when it ran where `here` runs and is there no more; unknown is false.
    #[must_use]
    pub fn has_ended(&self, here: &Self) -> bool {
        let comparable = self.boot == here.boot && self.namespace == here.namespace;
        comparable && started(self.pid) != Some(self.started)
    }
}

/// Start time of a process in clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)).
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold spaces and parentheses; count after its end.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    // A zombie writes nothing any more.
    if state == "Z" { None } else { fields.nth(18)?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_process_has_ended_and_a_running_one_not() {
        let here = Life::of_this_process().unwrap();
        assert!(!here.has_ended(&here));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = Life::of(child.id()).unwrap();
        assert!(!other.has_ended(&here));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(other.has_ended(&here));
        let elsewhere = Life { boot: "another".into(), ..other };
        assert!(!elsewhere.has_ended(&here), "of another host nothing is known");
        let reused = Life { started: here.started + 1, ..here.clone() };
        assert!(reused.has_ended(&here));
    }
}
