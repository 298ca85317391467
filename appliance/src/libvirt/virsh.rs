//! Runs `virsh`: one call, one process, one deadline.

use std::fmt;
use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Outcome};

/// For calls that libvirt answers at once: they take 20 ms. A host under load gets this long.
pub const QUICK: Duration = Duration::from_secs(20);
/// Nothing that libvirt is asked for prints more (a domain's XML is some tens of KiB).
const OUTPUT_BYTES_MAX: u64 = 16 << 20;
const POLL: Duration = Duration::from_millis(2);

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirshError {
    /// What kind of failure it is.
    pub kind: Kind,
    /// What virsh said, or what happened to it.
    pub said: String,
}

/// The failures that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `virsh` is not installed or does not start.
    NotStarted,
    /// It did not answer in time, and was killed. What it asked for may still happen.
    TimedOut,
    /// libvirt does not answer.
    Unreachable,
    /// There is no such domain.
    NoDomain,
    /// The domain does not run.
    NotRunning,
    /// There is no such job, or none at all.
    NoJob,
    /// The guest agent does not answer, or there is none.
    Agent,
    /// Anything else.
    Other,
}

/// What libvirt's messages (in the C locale) say, in the order in which they are looked for.
const MESSAGES: [(&str, Kind); 13] = [
    ("failed to connect to the hypervisor", Kind::Unreachable),
    ("failed to connect socket", Kind::Unreachable),
    ("client socket is closed", Kind::Unreachable),
    ("end of file while reading data", Kind::Unreachable),
    ("failed to get domain", Kind::NoDomain),
    ("domain not found", Kind::NoDomain),
    ("no domain backup job present", Kind::NoJob),
    ("no job is active", Kind::NoJob),
    ("guest agent", Kind::Agent),
    ("agent command", Kind::Agent),
    ("agent not available", Kind::Agent),
    ("domain is not running", Kind::NotRunning),
    ("inactive domain", Kind::NotRunning),
];

impl Kind {
    fn of(said: &str) -> Self {
        let said = said.to_lowercase();
        let known = MESSAGES.iter().find(|(words, _)| said.contains(words));
        known.map_or(Self::Other, |(_, kind)| *kind)
    }
}

impl fmt::Display for VirshError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "libvirt: {}", self.said)
    }
}

impl VirshError {
    /// What virsh said of a failure, without its `error: `.
    pub(super) fn said(said: &str) -> Self {
        Self { kind: Kind::of(said), said: said.to_owned() }
    }

    /// The error for the user.
    pub fn failure(self, tried: &str) -> Failure {
        let failure = Failure::failed(tried, &self);
        match self.kind {
            Kind::NotStarted => failure.next("install the package libvirt-clients"),
            Kind::Unreachable => failure.next("see that libvirtd runs and the URI is right"),
            Kind::NoDomain => Failure::usage(tried, &self).next("see 'virsh list --all'"),
            _ => failure,
        }
    }
}

/// A libvirt, by its URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Virsh {
    uri: String,
}

impl Virsh {
    /// A libvirt on this host: scratch files and sockets are shared with its QEMUs.
    pub fn new(uri: &str) -> Outcome<Self> {
        let tried = format!("use the libvirt at {uri}");
        let path = ["qemu:///", "qemu+unix:///"].iter().find_map(|start| uri.strip_prefix(start));
        match path.and_then(|path| path.split('?').next()) {
            Some("system" | "session") => Ok(Self { uri: uri.to_owned() }),
            _ => Err(Failure::usage(tried, "only the libvirt of this host can be used")
                .next("run icecore on the hypervisor, with qemu:///system")),
        }
    }

    /// Its URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Runs a subcommand to its end and gives what it printed.
    pub fn run(&self, arguments: &[&str], deadline: Duration) -> Result<String, VirshError> {
        let mut command = Command::new("virsh");
        command.args(["--connect", self.uri.as_str()]).args(arguments);
        command.env("LC_ALL", "C").env_remove("LANGUAGE");
        output_of(&mut command, deadline)
    }
}

/// Runs a program to its end and gives what it printed; at the deadline it is killed.
pub(super) fn output_of(command: &mut Command, deadline: Duration) -> Result<String, VirshError> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A Ctrl-C is ours to act on.
    command.process_group(0);
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().map_err(|e| VirshError {
        kind: Kind::NotStarted,
        said: format!("{program} does not start: {e}"),
    })?;
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let Some(success) = wait(&mut child, deadline) else {
        let said = format!("no answer to {:?} within {deadline:?}", command.get_args());
        return Err(VirshError { kind: Kind::TimedOut, said });
    };
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    if success {
        return Ok(stdout);
    }
    Err(VirshError::said(&stderr.trim().replace("error: ", "").replace('\n', "; ")))
}

/// Whether it succeeded; `None` when it was killed at the deadline.
fn wait(child: &mut Child, deadline: Duration) -> Option<bool> {
    let until = Instant::now() + deadline;
    while Instant::now() < until {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status.success());
        }
        std::thread::sleep(POLL);
    }
    // It may have ended at this very moment; then there is nothing to kill.
    let _ = child.kill();
    let _ = child.wait();
    None
}

fn drain(source: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(source) = source {
            // What a killed virsh had to say does not matter.
            let _ = source.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
        }
        bytes
    })
}

fn collect(drain: JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&drain.join().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_libvirt_of_this_host_is_used() {
        for good in ["qemu:///system", "qemu:///session", "qemu:///system?socket=/run/x"] {
            assert!(Virsh::new(good).is_ok(), "{good}");
        }
        for bad in ["qemu+ssh://host/system", "test:///default", "qemu:///systemd", "", "xen:///"] {
            assert!(Virsh::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn failures_are_told_apart_by_libvirts_words() {
        let cases = [
            ("Domain backup job id not found: no domain backup job present", Kind::NoJob),
            ("Requested operation is not valid: no job is active on the domain", Kind::NoJob),
            ("Guest agent is not responding: QEMU guest agent is not connected", Kind::Agent),
            ("Requested operation is not valid: domain is not running", Kind::NotRunning),
            ("failed to get domain 'x'", Kind::NoDomain),
            ("failed to connect to the hypervisor; Failed to connect socket", Kind::Unreachable),
            ("something new", Kind::Other),
        ];
        for (said, kind) in cases {
            assert_eq!(Kind::of(said), kind, "{said}");
        }
    }
}
