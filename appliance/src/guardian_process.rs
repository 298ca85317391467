//! The hidden subcommand: the process that keeps the guest safe while a run is under way.

use std::ffi::OsString;
use std::process::ExitCode;

use icecore_qmp::guardian::{self, GuardianClient};

use crate::failure::{Failure, Outcome};
use crate::state::locks::Lock;

/// The subcommand's name.
const SUBCOMMAND: &str = "__guardian";

/// Body of the guardian's process.
pub fn run() -> ExitCode {
    guardian::main()
}

/// Starts a guardian; `locks` stay held until it has ended.
pub fn start(locks: Vec<Lock>, tried: &str) -> Outcome<GuardianClient> {
    let locks: Vec<_> = locks.into_iter().map(Lock::into_fd).collect();
    GuardianClient::spawn("/proc/self/exe".as_ref(), &[OsString::from(SUBCOMMAND)], &locks)
        .map_err(|e| Failure::failed(tried, e))
}
