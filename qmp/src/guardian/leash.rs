//! The worker's data connections, held by the guardian too, so that it can end them.
//!
//! An NBD reply that nobody reads makes QEMU wait in its next drain (a guest's reset, `stop`),
//! and then no monitor of it answers any more: no export can be deleted. What still helps is the
//! connection itself. Shutting it down is not enough, since a sender on a full unix socket is not
//! woken by that: what lies in it has to be read as well.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recv, recvmsg, sendmsg, shutdown,
};

/// Most descriptors in one message.
pub(super) const FDS_MAX: usize = 32;

const FDS_BYTES: usize = rustix::cmsg_space!(ScmRights(FDS_MAX));

/// Read at once from a connection that is being ended.
const DRAIN_BYTES: usize = 64 << 10;

/// Most reads from one connection: far more than a socket's buffers hold.
const DRAIN_READS_MAX: usize = 4096;

/// The guardian's end.
#[derive(Debug)]
pub(super) struct Leash {
    stream: UnixStream,
    held: Vec<OwnedFd>,
}

impl Leash {
    pub(super) fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, held: Vec::new() })
    }

    /// Ends all connections that the worker has handed over.
    pub(super) fn cut(&mut self) {
        self.collect();
        for fd in std::mem::take(&mut self.held) {
            end(&fd);
        }
    }

    /// Takes what the worker has sent.
    pub(super) fn collect(&mut self) {
        while let Ok((1.., fds)) = receive_fds(self.stream.as_fd()) {
            self.held.extend(fds);
        }
    }
}

fn end(fd: &OwnedFd) {
    // One that is no socket, or closed at the other end, needs no ending.
    let _ = shutdown(fd, Shutdown::Both);
    let mut buffer = [0u8; DRAIN_BYTES];
    for _ in 0..DRAIN_READS_MAX {
        match recv(fd, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((1.., _)) => {}
            _ => return,
        }
    }
}

/// Sends one byte and descriptors with it.
pub(super) fn send_fds(stream: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    if fds.len() > FDS_MAX {
        let message = format!("at most {FDS_MAX} descriptors go to a guardian at once");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message));
    }
    let mut space = [MaybeUninit::uninit(); FDS_BYTES];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(stream, &[IoSlice::new(b"F")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives what [`send_fds`] sent: bytes read (0 at the end) and the descriptors.
pub(super) fn receive_fds(stream: BorrowedFd<'_>) -> std::io::Result<(usize, Vec<OwnedFd>)> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); FDS_BYTES];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags)?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok((got.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_stuck_sender_is_freed() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut leash = Leash::new(theirs).expect("a leash");
        let (mut qemu, worker) = UnixStream::pair().expect("a pair");
        send_fds(ours.as_fd(), &[worker.as_fd()]).expect("sent");
        let sender = std::thread::spawn(move || qemu.write_all(&vec![0; 8 << 20]));
        // The sender fills the socket and sticks; ending it twice also covers a slow start.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!sender.is_finished());
        leash.cut();
        assert!(sender.join().expect("no panic").is_err(), "freed with an error");
        drop(worker);
    }
}
