//! Transmission with one client: requests are read one after the other and done at once, each on a
//! blocking thread, and answered as they finish.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::broken;
use super::export::ZeroMode;
use super::requests::{RequestHeader, header_bytes, parse};
use super::{BUDGET_UNIT_BYTES, Named, Shared, replies};
use crate::error::Errno;
use crate::export_info::{Context, ContextId, Dialect};
use crate::extents::{self, Extent};
use crate::proto::{STATUS_EXTENTS_MAX, chunk, command, command_flag, take_u32, take_u64};

/// Requests of one client that are worked on at once. QEMU sends 16.
const IN_FLIGHT_MAX: usize = 64;
/// Extents per context in one answer: 128 KiB on the wire, and the client asks again.
const EXTENTS_MAX: usize = 8192;
const _: () = assert!(EXTENTS_MAX as u64 <= STATUS_EXTENTS_MAX);
/// What payload that nobody has memory for is read into.
const DISCARD_BYTES: usize = 64 << 10;

/// What a client opened.
pub(super) struct Transfer {
    pub(super) named: Named,
    pub(super) contexts: Vec<Context>,
    pub(super) dialect: Dialect,
}

/// What a request produced.
enum Answer {
    Done,
    Data(Vec<u8>),
    Status(Vec<(ContextId, Vec<Extent>)>),
}

/// Reads requests until the client leaves; then waits for the answers that are under way.
pub(super) async fn transmit<R, W>(
    shared: Arc<Shared>,
    transfer: Transfer,
    mut rx: R,
    tx: W,
) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let transfer = Arc::new(transfer);
    let tx = Arc::new(Mutex::new(tx));
    let room = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut work = JoinSet::new();
    loop {
        while let Some(ended) = work.try_join_next() {
            ended??;
        }
        let Ok(place) = room.clone().acquire_owned().await else { break };
        let Some(request) = next_request(&mut rx, transfer.dialect).await? else { break };
        if request.command == command::DISC {
            break;
        }
        let deadline = Instant::now() + shared.options.reply_deadline;
        let job = receive(&shared, &transfer, &mut rx, request, deadline).await?;
        let (shared, transfer, tx) = (shared.clone(), transfer.clone(), tx.clone());
        work.spawn(async move {
            let _place = place;
            let (answer, _budget) = match job {
                Ok(job) => perform(job, transfer.clone(), request, deadline).await,
                Err(errno) => (Err(errno), None),
            };
            let (head, data) = reply(transfer.dialect, request, answer);
            let mut tx = tx.lock().await;
            let sending = async {
                tx.write_all(&head).await?;
                tx.write_all(&data).await
            };
            let sent = timeout(shared.options.unread_deadline, sending).await;
            sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        });
    }
    while let Some(ended) = work.join_next().await {
        ended??;
    }
    tx.lock().await.shutdown().await
}

/// The next request's header; `None` when the client closed between requests.
async fn next_request<R>(rx: &mut R, dialect: Dialect) -> io::Result<Option<RequestHeader>>
where
    R: AsyncRead + Unpin,
{
    let mut header = vec![0; header_bytes(dialect)];
    if rx.read(&mut header[..1]).await? == 0 {
        return Ok(None);
    }
    rx.read_exact(&mut header[1..]).await?;
    parse(&header, dialect).map(Some).map_err(broken)
}

/// A checked request with its payload and the part of the memory budget that it holds.
struct Job {
    payload: Vec<u8>,
    budget: OwnedSemaphorePermit,
}

/// Checks a request, takes memory for it and reads its payload. The inner error is for the client;
/// the payload of a refused request is read and dropped.
async fn receive<R>(
    shared: &Shared,
    transfer: &Transfer,
    rx: &mut R,
    request: RequestHeader,
    deadline: Instant,
) -> io::Result<Result<Job, Errno>>
where
    R: AsyncRead + Unpin,
{
    let payload_bytes = request.payload_bytes(transfer.dialect).map_err(broken)? as usize;
    let checked = request.check(&transfer.named.features, transfer.dialect);
    let held = match request.command {
        command::READ => request.length,
        _ => payload_bytes as u64,
    };
    let budget = match checked {
        Ok(()) => {
            let units = (held.div_ceil(BUDGET_UNIT_BYTES) as u32).max(1);
            let wait = shared.budget.clone().acquire_many_owned(units);
            timeout_at(deadline, wait).await.map_err(|_| Errno::ENOMEM)
        }
        Err(errno) => Err(errno),
    };
    match budget {
        Ok(Ok(budget)) => {
            let mut payload = vec![0; payload_bytes];
            rx.read_exact(&mut payload).await?;
            Ok(Ok(Job { payload, budget }))
        }
        Ok(Err(_closed)) => Err(io::ErrorKind::ConnectionAborted.into()),
        Err(errno) => {
            discard(rx, payload_bytes).await?;
            Ok(Err(errno))
        }
    }
}

async fn discard<R: AsyncRead + Unpin>(rx: &mut R, mut left: usize) -> io::Result<()> {
    let mut scratch = vec![0; left.min(DISCARD_BYTES)];
    while left > 0 {
        let part = left.min(DISCARD_BYTES);
        rx.read_exact(&mut scratch[..part]).await?;
        left -= part;
    }
    Ok(())
}

/// Runs a request on a blocking thread, until the deadline. What takes longer is answered with an
/// error; it runs to its end and keeps its memory until then. The memory of an answer is returned
/// with it, to be given back when it was sent.
async fn perform(
    job: Job,
    transfer: Arc<Transfer>,
    request: RequestHeader,
    deadline: Instant,
) -> (Result<Answer, Errno>, Option<OwnedSemaphorePermit>) {
    let running = tokio::task::spawn_blocking(move || {
        (execute(&transfer, request, &job.payload), Some(job.budget))
    });
    match timeout_at(deadline, running).await {
        Ok(Ok(answered)) => answered,
        // A panic of the export, or too slow.
        Ok(Err(_)) | Err(_) => (Err(Errno::EIO), None),
    }
}

fn execute(transfer: &Transfer, request: RequestHeader, payload: &[u8]) -> Result<Answer, Errno> {
    let export = &transfer.named.export;
    let (offset, length) = (request.offset, request.length);
    match request.command {
        command::READ => {
            let mut data = vec![0; length as usize];
            export.read(offset, &mut data)?;
            return Ok(Answer::Data(data));
        }
        command::BLOCK_STATUS => return status(transfer, request, payload),
        command::WRITE => export.write(offset, payload)?,
        command::WRITE_ZEROES if request.flags & command_flag::NO_HOLE != 0 => {
            export.write_zeroes(offset, length, ZeroMode::NoHole)?;
        }
        command::WRITE_ZEROES => export.write_zeroes(offset, length, ZeroMode::MayTrim)?,
        command::TRIM => export.trim(offset, length)?,
        _ => export.flush()?,
    }
    if request.flags & command_flag::FUA != 0 {
        export.flush()?;
    }
    Ok(Answer::Done)
}

fn status(
    transfer: &Transfer,
    request: RequestHeader,
    mut payload: &[u8],
) -> Result<Answer, Errno> {
    let mut length = request.length;
    let mut contexts = transfer.contexts.clone();
    if request.flags & command_flag::PAYLOAD_LEN != 0 {
        length = take_u64(&mut payload).ok_or(Errno::EINVAL)?;
        let mut ids = Vec::new();
        while let Some(id) = take_u32(&mut payload) {
            ids.push(ContextId(id));
        }
        let known = |id: &ContextId| transfer.contexts.iter().any(|context| context.id == *id);
        if !payload.is_empty() || !ids.iter().all(known) {
            return Err(Errno::EINVAL);
        }
        contexts.retain(|context| ids.contains(&context.id));
        let plain = RequestHeader { flags: 0, length, ..request };
        plain.check_range(length, &transfer.named.features)?;
    }
    if contexts.is_empty() {
        return Err(Errno::EINVAL);
    }
    let range = Extent::new(request.offset, length);
    let one = request.flags & command_flag::REQ_ONE != 0;
    let max = if one { 1 } else { EXTENTS_MAX };
    let mut answers = Vec::new();
    for context in contexts {
        let found = transfer.named.export.extents(&context.name, range, max)?;
        answers.push((context.id, tile(range, found, max)?));
    }
    Ok(Answer::Status(answers))
}

/// Checks an export's extents and cuts them to the range. An export that breaks its promise is
/// answered with EIO: a wrong extent would be worse.
fn tile(range: Extent, found: Vec<Extent>, max: usize) -> Result<Vec<Extent>, Errno> {
    let mut at = range.offset;
    let mut tiles = Vec::new();
    for extent in extents::merge_equal(found) {
        if at >= range.end() || tiles.len() == max {
            break;
        }
        if extent.length == 0 || extent.offset != at {
            return Err(Errno::EIO);
        }
        let length = extent.length.min(range.end() - at);
        tiles.push(Extent { length, ..extent });
        at += length;
    }
    if tiles.is_empty() { Err(Errno::EIO) } else { Ok(tiles) }
}

/// A reply in the connection's dialect: its head, and the data that follows.
fn reply(
    dialect: Dialect,
    request: RequestHeader,
    answer: Result<Answer, Errno>,
) -> (Vec<u8>, Vec<u8>) {
    let RequestHeader { cookie, offset, .. } = request;
    let head = |kind, length| {
        replies::chunk_header(dialect, chunk::FLAG_DONE, kind, cookie, offset, length)
    };
    let chunked = dialect == Dialect::Extended
        || (dialect == Dialect::Structured
            && matches!(request.command, command::READ | command::BLOCK_STATUS));
    let last = |kind, body: Vec<u8>| (head(kind, body.len() as u64), body);
    match answer {
        Err(errno) if chunked => last(chunk::ERROR, replies::error_body(errno, "")),
        Err(errno) => (replies::simple(cookie, Some(errno)), Vec::new()),
        Ok(Answer::Done) if chunked => last(chunk::NONE, Vec::new()),
        Ok(Answer::Done) => (replies::simple(cookie, None), Vec::new()),
        Ok(Answer::Data(data)) if !chunked => (replies::simple(cookie, None), data),
        Ok(Answer::Data(data)) if is_zero(&data) => {
            last(chunk::OFFSET_HOLE, replies::hole_body(offset, data.len() as u32))
        }
        Ok(Answer::Data(data)) => {
            let mut start = head(chunk::OFFSET_DATA, data.len() as u64 + 8);
            start.extend_from_slice(&offset.to_be_bytes());
            (start, data)
        }
        Ok(Answer::Status(answers)) => {
            (status_chunks(dialect, cookie, offset, &answers), Vec::new())
        }
    }
}

/// Whether all bytes are zero. Whole blocks are folded, which compiles to vector instructions.
fn is_zero(data: &[u8]) -> bool {
    data.chunks(4096).all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

fn status_chunks(
    dialect: Dialect,
    cookie: u64,
    offset: u64,
    answers: &[(ContextId, Vec<Extent>)],
) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, (context, extents)) in answers.iter().enumerate() {
        let (kind, body) = replies::status_body(dialect, *context, extents);
        let flags = if index + 1 == answers.len() { chunk::FLAG_DONE } else { 0 };
        let length = body.len() as u64;
        out.extend(replies::chunk_header(dialect, flags, kind, cookie, offset, length));
        out.extend(body);
    }
    out
}
