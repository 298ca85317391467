//! Starts a guardian and hands it the locks that must outlive the worker.

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most locks that one run holds: its VM's and a few of its images'.
pub const LOCKS_MAX: usize = 32;

const LOCKS_BYTES: usize = rustix::cmsg_space!(ScmRights(LOCKS_MAX));

/// Runs `exe args…` with a socket as its standard input and gives the other end.
pub(super) fn spawn(
    exe: &Path,
    args: &[OsString],
    locks: &[OwnedFd],
) -> std::io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(exe);
    command.args(args).stdin(Stdio::from(OwnedFd::from(theirs)));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    // It outlives us on purpose; while we live, somebody has to take its exit status.
    std::thread::Builder::new().name("guardian-reaper".into()).spawn(move || child.wait())?;
    send_locks(&ours, locks)?;
    Ok(ours)
}

/// The first byte on the socket carries the locks.
pub(super) fn send_locks(stream: &UnixStream, locks: &[OwnedFd]) -> std::io::Result<()> {
    if locks.len() > LOCKS_MAX {
        let message = format!("a guardian holds at most {LOCKS_MAX} locks");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message));
    }
    let fds: Vec<BorrowedFd<'_>> = locks.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); LOCKS_BYTES];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(stream, &[IoSlice::new(b"L")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives what [`send_locks`] sent.
pub(super) fn receive_locks(stream: &UnixStream) -> std::io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); LOCKS_BYTES];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags)?;
    let mut locks = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            locks.extend(fds);
        }
    }
    Ok(locks)
}
