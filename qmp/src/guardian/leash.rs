//! The worker's data connections, held by the guardian too, so that it can end them.
//!
//! An NBD reply that nobody reads makes QEMU wait in its next drain (a guest's reset, `stop`),
//! and then no monitor of it answers any more: no export can be deleted. What still helps is the
//! connection itself. Shutting it down is not enough, since a sender on a full unix socket is not
//! woken by that: what lies in it has to be read as well.

use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recv, recvmsg, sendmsg, shutdown,
};

/// Most descriptors in one message.
pub const FDS_MAX: usize = 32;

const FDS_BYTES: usize = rustix::cmsg_space!(ScmRights(FDS_MAX));

/// Read at once from a connection that is being ended.
const DRAIN_BYTES: usize = 64 << 10;

/// Most reads from one connection: far more than a socket's buffers hold.
const DRAIN_READS_MAX: usize = 4096;

/// The guardian's end.
#[derive(Debug)]
pub struct Leash {
    stream: UnixStream,
    held: Vec<OwnedFd>,
}

impl Leash {
    /// A leash whose other end the worker has.
    pub fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, held: Vec::new() })
    }

    /// Ends all connections that the worker has handed over.
    pub fn cut(&mut self) {
        if let Err(error) = self.collect() {
            tracing::warn!(%error, "a data connection cannot be ended");
        }
        for fd in std::mem::take(&mut self.held) {
            end(&fd);
        }
    }

    /// Takes what the worker has sent, and lets go of what has ended. An error: a connection
    /// came and could not be taken, so it could not be ended either.
    pub fn collect(&mut self) -> std::io::Result<()> {
        self.held.retain(|fd| !has_ended(fd));
        loop {
            match receive_fds(self.stream.as_fd()) {
                Ok((1.., fds)) => self.held.extend(fds),
                Err(error) if error.kind() == ErrorKind::OutOfMemory => return Err(error),
                // Nothing more now, or ever.
                _ => return Ok(()),
            }
        }
    }
}

/// Both directions are shut and nothing lies in it any more: neither does a sender wait for it,
/// nor has the worker anything to read.
fn has_ended(fd: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(fd, PollFlags::empty())];
    let hung_up = poll(&mut polled, Some(&Timespec::default())).is_ok()
        && polled[0].revents().contains(PollFlags::HUP);
    let look = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    hung_up && matches!(recv(fd, &mut [0u8; 1][..], look), Ok((0, _)))
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
pub fn send_fds(stream: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    if fds.len() > FDS_MAX {
        let message = format!("at most {FDS_MAX} descriptors go to a guardian at once");
        return Err(std::io::Error::new(ErrorKind::InvalidInput, message));
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
pub fn receive_fds(stream: BorrowedFd<'_>) -> std::io::Result<(usize, Vec<OwnedFd>)> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); FDS_BYTES];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags)?;
    if got.flags.contains(ReturnFlags::CTRUNC) {
        let message = "the guardian has no file descriptor left for a connection: raise the limit \
                       of open files (ulimit -n)";
        return Err(std::io::Error::new(ErrorKind::OutOfMemory, message));
    }
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
    use std::io::{Read, Write};

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

    #[test]
    fn what_has_ended_is_let_go_of_once_it_is_read() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut leash = Leash::new(theirs).expect("a leash");
        let (mut qemu, mut worker) = UnixStream::pair().expect("a pair");
        let (_other_qemu, other) = UnixStream::pair().expect("a pair");
        send_fds(ours.as_fd(), &[worker.as_fd(), other.as_fd()]).expect("sent");
        leash.collect().expect("taken");
        drop(other);
        qemu.write_all(b"the last reply").expect("sent");
        drop(qemu);
        leash.collect().expect("nothing new");
        assert_eq!(leash.held.len(), 2, "one is open, one unread");
        let mut read = Vec::new();
        worker.read_to_end(&mut read).expect("read");
        assert_eq!(read, b"the last reply", "nothing was taken from the worker");
        leash.collect().expect("nothing new");
        assert_eq!(leash.held.len(), 1);
    }
}
