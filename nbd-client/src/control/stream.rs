//! The sockets that carry NBD.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::Blocking;
use crate::uri::Endpoint;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(crate) async fn connect(endpoint: &Endpoint) -> io::Result<Stream> {
        match endpoint {
            Endpoint::Unix(path) => UnixStream::connect(path).await.map(Stream::Unix),
            Endpoint::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                // Requests are small: waiting to fill a segment would only add latency.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }

    pub(crate) async fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read_exact(buffer).await,
            Stream::Tcp(stream) => stream.read_exact(buffer).await,
        }
    }

    pub(crate) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.write_all(bytes).await,
            Stream::Tcp(stream) => stream.write_all(bytes).await,
        }
    }

    pub(crate) async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.shutdown().await,
            Stream::Tcp(stream) => stream.shutdown().await,
        }
    }

    /// The socket, for whoever has to end the connection from outside.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }

    /// Takes the socket away from tokio.
    pub(crate) fn into_fd(self, blocking: Blocking) -> io::Result<OwnedFd> {
        let nonblocking = blocking == Blocking::No;
        match self {
            Stream::Unix(stream) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(nonblocking)?;
                Ok(stream.into())
            }
            Stream::Tcp(stream) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(nonblocking)?;
                Ok(stream.into())
            }
        }
    }
}
