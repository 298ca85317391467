//! A process, told apart from a later one with the same number.

use std::io;

use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A process by its number and the moment it began, in clock ticks since the host's boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Process {
    pub pid: i32,
    pub started_ticks: u64,
}

impl Process {
    /// This process.
    pub fn this() -> Option<Self> {
        Self::of(getpid().as_raw_nonzero().get())
    }

    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self { pid, started_ticks: started_ticks(&stat)? })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends it a signal; one that has ended is an error of kind `NotFound`. A process descriptor
    /// is opened before the comparison, so that no other can take the number in between.
    pub fn signal(self, signal: Signal) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "its process has ended");
        let pid = Pid::from_raw(self.pid).ok_or_else(gone)?;
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| gone())?;
        if !self.is_alive() {
            return Err(gone());
        }
        Ok(pidfd_send_signal(descriptor, signal)?)
    }
}

/// Field 22 of proc_pid_stat(5). The name in field 2 may hold anything, also parentheses. A zombie
/// has ended.
fn started_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_mislead() {
        let tail = "S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 1 1";
        assert_eq!(started_ticks(&format!("1 (a) b (c)) {tail}")), Some(777));
        assert_eq!(started_ticks(&format!("1 (a) {}", tail.replace('S', "Z"))), None);
        assert_eq!(started_ticks(""), None);
    }

    #[test]
    fn this_process_lives_and_one_of_another_beginning_does_not() {
        let this = Process::this().unwrap();
        assert!(this.is_alive());
        let other = Process { started_ticks: this.started_ticks + 1, ..this };
        assert!(!other.is_alive());
        assert_eq!(other.signal(Signal::INT).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
