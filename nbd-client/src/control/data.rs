//! Moving small amounts of data: pieces of one call are pipelined.

use tokio::time::timeout_at;

use super::Control;
use crate::error::{Cause, Errno, Error, RequestError, SubmitError};
use crate::transmission::{IN_FLIGHT_MAX, Op};

/// Payload of one request. Larger ones only hold more memory on both sides.
const REQUEST_BYTES: u64 = 1 << 20;
/// Zeroes and trims are cut to this: long enough to be few, short enough to finish within the
/// progress deadline on a server that writes real zeroes.
const EFFECT_BYTES: u64 = 128 << 20;

/// Where the data of a call is.
enum Data<'a> {
    None,
    Into(&'a mut [u8]),
    From(&'a [u8]),
}

impl Control {
    /// Reads `buffer.len()` bytes. On error the buffer's content is undefined.
    pub async fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let length = buffer.len() as u64;
        self.call("read", Op::Read, offset, length, REQUEST_BYTES, Data::Into(buffer)).await
    }

    /// Writes; durable only after [`Control::flush`].
    pub async fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        let length = data.len() as u64;
        self.call("write", Op::Write, offset, length, REQUEST_BYTES, Data::From(data)).await
    }

    /// Makes a range read as zeroes, with holes where the server likes.
    pub async fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), Error> {
        self.effect("write zeroes", Op::WriteZeroes { may_trim: true }, offset, length).await
    }

    /// Tells that a range is not needed any more; its content is undefined afterwards.
    pub async fn trim(&mut self, offset: u64, length: u64) -> Result<(), Error> {
        self.effect("trim", Op::Trim, offset, length).await
    }

    /// Makes everything written durable.
    pub async fn flush(&mut self) -> Result<(), Error> {
        self.call("flush", Op::Flush, 0, 0, 1, Data::None).await
    }

    /// A command whose length is an effect. Servers may refuse more than their payload limit with
    /// EINVAL or EOVERFLOW; then it is done again in pieces of that limit.
    async fn effect(
        &mut self,
        doing: &'static str,
        op: Op,
        offset: u64,
        length: u64,
    ) -> Result<(), Error> {
        let limit = u64::from(self.transmission.max_request());
        let result = self.call(doing, op, offset, length, EFFECT_BYTES, Data::None).await;
        match &result {
            Err(Error { cause: Cause::Request(RequestError { errno, .. }), .. })
                if matches!(errno, Errno::EINVAL | Errno::EOVERFLOW) && length > limit =>
            {
                self.call(doing, op, offset, length, limit, Data::None).await
            }
            _ => result,
        }
    }

    async fn call(
        &mut self,
        doing: &'static str,
        op: Op,
        offset: u64,
        length: u64,
        piece_max: u64,
        data: Data<'_>,
    ) -> Result<(), Error> {
        self.begin(doing)?;
        let result = self.pieces(op, offset, length, piece_max, data).await;
        self.end(doing, result)
    }

    /// Runs all pieces. After a failed one nothing more is sent, but all replies are awaited, so
    /// that the connection stays usable.
    async fn pieces(
        &mut self,
        op: Op,
        offset: u64,
        length: u64,
        piece_max: u64,
        mut data: Data<'_>,
    ) -> Result<(), Cause> {
        let piece_max = piece_max.min(self.transmission.max_length(op)).max(1);
        let mut next = 0;
        let mut failed: Option<Cause> = None;
        let mut flush_due = op == Op::Flush;
        loop {
            while failed.is_none()
                && (next < length || flush_due)
                && self.transmission.in_flight() < IN_FLIGHT_MAX as usize
            {
                flush_due = false;
                let piece = piece_max.min(length - next);
                failed = self.send(op, offset, next, piece, &data).await?;
                next += piece;
            }
            if self.transmission.in_flight() == 0 {
                return failed.map_or(Ok(()), Err);
            }
            self.turn(if let Data::Into(buffer) = &mut data { buffer } else { &mut [] }).await?;
            while let Some((_, result)) = self.transmission.completed() {
                self.progress();
                failed = failed.or(result.err().map(Cause::Request));
            }
        }
    }

    /// Sends one piece. The inner result: the request itself was refused by our own checks.
    async fn send(
        &mut self,
        op: Op,
        offset: u64,
        next: u64,
        piece: u64,
        data: &Data<'_>,
    ) -> Result<Option<Cause>, Cause> {
        let Some(start) = offset.checked_add(next) else {
            let size = self.export().size_bytes;
            return Ok(Some(SubmitError::OutOfBounds { offset, length: next, size }.into()));
        };
        let len = piece.try_into().unwrap_or(u32::MAX);
        if let Err(error) = self.transmission.submit(next, op, start, len) {
            return Ok(Some(error.into()));
        }
        self.send_headers().await?;
        if let Data::From(bytes) = data {
            let part = &bytes[next as usize..(next + piece) as usize];
            let sent = timeout_at(self.deadline, self.stream.write_all(part));
            sent.await.map_err(|_| Cause::TimedOut(self.progress_deadline))??;
            self.progress();
        }
        Ok(None)
    }
}
