//! Starts a guardian and hands it what must outlive the worker.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use super::leash::{Leash, receive_fds, send_fds};

/// Runs `exe args…` with a socket as its standard input and gives the other end.
pub(super) fn spawn(exe: &Path, args: &[OsString]) -> std::io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(exe);
    command.args(args).stdin(Stdio::from(OwnedFd::from(theirs)));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    // It outlives us on purpose; while we live, somebody has to take its exit status.
    std::thread::Builder::new().name("guardian-reaper".into()).spawn(move || child.wait())?;
    Ok(ours)
}

/// The first byte on the socket carries the leash's other end, then the locks. Gives our end.
pub(super) fn hand_over(stream: &UnixStream, locks: &[OwnedFd]) -> std::io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut fds = vec![theirs.as_fd()];
    fds.extend(locks.iter().map(AsFd::as_fd));
    send_fds(stream.as_fd(), &fds)?;
    Ok(ours)
}

/// Receives what [`hand_over`] sent.
pub(super) fn take_over(stream: &UnixStream) -> std::io::Result<(Leash, Vec<OwnedFd>)> {
    let (_, mut fds) = receive_fds(stream.as_fd())?;
    if fds.is_empty() {
        let message = "the worker did not send a leash";
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
    }
    let leash = Leash::new(UnixStream::from(fds.remove(0)))?;
    Ok((leash, fds))
}
