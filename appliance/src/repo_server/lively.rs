//! A connection that ends when nothing moves on it for too long: clients that stop reading or
//! writing in the middle of something hold nothing for ever.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A stream with a limit to its silence.
#[derive(Debug)]
pub struct Lively<S> {
    stream: S,
    patience: Duration,
    silence: Pin<Box<Sleep>>,
}

impl<S> Lively<S> {
    /// Ends `stream` after so long a silence in both directions.
    pub fn new(stream: S, patience: Duration) -> Self {
        Self { stream, patience, silence: Box::pin(sleep(patience)) }
    }

    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            let until = Instant::now() + self.patience;
            self.silence.as_mut().reset(until);
            return polled;
        }
        self.silence.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lively<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.judge(context, polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lively<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        if polled.is_ready() { polled } else { self.judge(context, polled) }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(context);
        self.judge(context, polled)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn who_neither_sends_nor_reads_is_hung_up() {
        let (ours, _theirs) = duplex(16);
        let mut lively = Lively::new(ours, PATIENCE);
        let error = lively.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (ours, _theirs) = duplex(16);
        let mut lively = Lively::new(ours, PATIENCE);
        let error = lively.write_all(&[0; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn who_goes_on_is_waited_for() {
        let (ours, mut theirs) = duplex(16);
        let mut lively = Lively::new(ours, PATIENCE);
        let slow = tokio::spawn(async move {
            for byte in 0..4 {
                tokio::time::sleep(PATIENCE / 2).await;
                theirs.write_u8(byte).await.unwrap();
            }
        });
        for byte in 0..4 {
            assert_eq!(lively.read_u8().await.unwrap(), byte);
        }
        slow.await.unwrap();
    }
}
