//! One client: greeting and haggling under a deadline, then transmission.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::Shared;
use super::negotiation::{Negotiation, OPTION_BYTES_MAX, Offer, Reaction};
use super::transmission::{Transfer, transmit};
use crate::error::ProtocolError;
use crate::proto::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OPTION_MAGIC, option, reply, take_u32,
    take_u64,
};

/// Counts a connection while it lasts.
struct Connected(Arc<Shared>);

impl Connected {
    fn new(shared: &Arc<Shared>) -> Connected {
        shared.connected.fetch_add(1, Ordering::Relaxed);
        Connected(shared.clone())
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves a client to its end. A client that closes between requests ends well.
pub(super) async fn serve<R, W>(shared: Arc<Shared>, mut rx: R, mut tx: W) -> io::Result<()>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let _connected = Connected::new(&shared);
    let deadline = shared.options.handshake_deadline;
    let haggled = timeout(deadline, haggle(&shared, &mut rx, &mut tx)).await;
    match haggled.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? {
        Some(transfer) => transmit(shared, transfer, rx, tx).await,
        None => Ok(()),
    }
}

pub(super) fn broken(error: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

async fn haggle<R, W>(shared: &Shared, rx: &mut R, tx: &mut W) -> io::Result<Option<Transfer>>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut greeting = INIT_MAGIC.to_be_bytes().to_vec();
    greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    tx.write_all(&greeting).await?;
    let flags = rx.read_u32().await?;
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(broken(ProtocolError::Request("unknown client flags")));
    }
    let no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
    let offer = |named: &super::Named| Offer {
        name: named.name.clone(),
        features: named.features.clone(),
        contexts: named.contexts.clone(),
    };
    let offers = shared.exports.iter().map(offer).collect();
    let mut negotiation = Negotiation::new(offers, shared.options.dialect_max, no_zeroes);
    loop {
        let reaction = one_option(&mut negotiation, rx).await?;
        let sent = tx.write_all(&negotiation.take_replies()).await;
        match reaction {
            Reaction::Continue => sent?,
            // A client may close behind its ABORT without waiting for the answer.
            Reaction::Close => return Ok(None),
            Reaction::Transmit { export, contexts } => {
                sent?;
                let named = shared.exports[export].clone();
                let dialect = negotiation.dialect();
                return Ok(Some(Transfer { named, contexts, dialect }));
            }
        }
    }
}

/// Reads one option and reacts to it.
async fn one_option<R>(negotiation: &mut Negotiation, rx: &mut R) -> io::Result<Reaction>
where
    R: AsyncRead + Unpin,
{
    let mut header = [0; 16];
    rx.read_exact(&mut header).await?;
    let mut fields = &header[..];
    let magic = take_u64(&mut fields).unwrap_or_default();
    let code = take_u32(&mut fields).unwrap_or_default();
    let length = take_u32(&mut fields).unwrap_or_default();
    if magic != OPTION_MAGIC {
        return Err(broken(ProtocolError::Magic { expected: "IHAVEOPT", found: magic }));
    }
    if length > OPTION_BYTES_MAX {
        if code != option::EXPORT_NAME {
            negotiation.refuse(code, reply::ERR_TOO_BIG, "an option above 64 KiB");
        }
        return Ok(Reaction::Close);
    }
    let mut data = vec![0; length as usize];
    rx.read_exact(&mut data).await?;
    negotiation.option(code, &data).map_err(broken)
}
