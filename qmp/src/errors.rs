//! What can go wrong on a QMP or guest-agent connection, and what to do next.

use std::path::PathBuf;
use std::time::Duration;

/// A failed call or connection. Each message says what was tried, on what, and what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// There is nothing at the socket's path.
    #[error("no socket at {path}: is the VM running, and is this the path of its monitor?")]
    NoSocket {
        /// The path tried.
        path: PathBuf,
    },
    /// The socket's file is there, and nothing listens on it any more.
    #[error("nobody listens on {path} any more: its QEMU has ended")]
    NobodyListens {
        /// The path tried.
        path: PathBuf,
    },
    /// The socket cannot be connected to, which says nothing about its QEMU.
    #[error("cannot connect to {path}: {why}")]
    Connect {
        /// The path tried.
        path: PathBuf,
        /// The system's word.
        why: String,
    },
    /// Connected, and no greeting came: a monitor serves one client at a time.
    #[error(
        "no QMP greeting on {path} within {waited:?}: another client probably holds this monitor \
         (or QEMU is stopped); give Icecore a monitor of its own (-qmp unix:...,server=on,wait=off)"
    )]
    NoGreeting {
        /// The path tried.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// The other end speaks something else.
    #[error("{path} is not a QMP monitor: {why}")]
    NotQmp {
        /// The path tried.
        path: PathBuf,
        /// What it said instead.
        why: String,
    },
    /// QEMU or the agent answered with an error.
    #[error("{command} was refused: {desc} ({class})")]
    Refused {
        /// The command's name.
        command: String,
        /// QMP error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// The human-readable reason, from the other side.
        desc: String,
    },
    /// No answer in time. Whether the command was (or will be) carried out is unknown.
    #[error("{command} was not answered within {waited:?}; whether it was done is unknown")]
    Timeout {
        /// The command's name.
        command: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The connection ended. A command under way may or may not have been carried out.
    #[error("{command} failed: the connection to {path} ended: {why}")]
    Closed {
        /// The command's name.
        command: String,
        /// The socket's path.
        path: PathBuf,
        /// Why it ended.
        why: String,
    },
    /// Too many commands wait for an answer already.
    #[error("{command} was not sent: {pending} commands already wait for an answer")]
    Busy {
        /// The command's name.
        command: String,
        /// How many wait.
        pending: usize,
    },
    /// The answer has not the shape the command promises, or its arguments none that JSON has.
    #[error("{command}: unexpected content: {why}")]
    Content {
        /// The command's name.
        command: String,
        /// What was unexpected.
        why: String,
    },
    /// The guest agent did not come back to a known state in time.
    #[error(
        "the guest agent on {path} did not answer within {waited:?}: is qemu-guest-agent \
         installed and running in the guest, and is no other client (libvirt) on its channel?"
    )]
    AgentSilent {
        /// The socket's path.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
}

impl QmpError {
    /// The other side may have carried the command out although it is reported as failed.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Closed { .. } | Self::Content { .. })
    }

    /// There is no process behind the socket: what a QEMU held is gone with it.
    pub fn nobody_there(&self) -> bool {
        matches!(self, Self::NoSocket { .. } | Self::NobodyListens { .. })
    }

    /// The connection is of no more use.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    /// The other side does not know the command (an older QEMU, or a disabled agent command).
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }

    /// The device or object asked about does not exist (any more).
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }

    /// The description when QEMU or the agent answered with an error.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { desc, .. } => Some(desc),
            _ => None,
        }
    }
}
