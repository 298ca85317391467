//! Extents of an export, streamed in ascending order with bounded memory.

use std::iter::Peekable;
use std::ops::ControlFlow;

use super::Control;
use super::status_plan::{StatusPlan, WAITING_EXTENTS_MAX};
use crate::error::{Cause, Error, SubmitError};
use crate::export_info::{ContextId, Dialect};
use crate::extents::{self, Extent};

/// What a receiver of extents says: go on, or that is enough.
pub type Flow = ControlFlow<()>;

/// Most bytes that one request asks about. With 64 KiB granules an answer has 32,768 extents at
/// most, so that eight of them may wait in memory.
pub(super) const UNIT_BYTES: u64 = 2 << 30;
/// A larger range is asked about in so many requests at most: on a disk of terabytes few extents
/// are expected in 2 GiB, and each request costs. A server that has more to say than fits into
/// one answer says it in several.
const UNITS_MAX: u64 = 512;
/// Ranges nearer than this are asked together: the answer for a gap is cheaper than a request.
const GAP_BYTES: u64 = 1 << 20;

impl Control {
    /// The id of a metadata context on this connection.
    pub fn context(&self, name: &str) -> Option<ContextId> {
        self.session().context(name)
    }

    /// Reports the extents of one context within ascending, disjoint ranges: ascending, cut to the
    /// ranges, covering them exactly, equal neighbours merged. Requests are pipelined. A range
    /// beyond [`crate::ExportInfo::reachable_bytes`] is refused.
    pub async fn extents<R>(
        &mut self,
        context: ContextId,
        ranges: R,
        mut receive: impl FnMut(Extent) -> Flow,
    ) -> Result<(), Error>
    where
        R: IntoIterator<Item = Extent, IntoIter: Clone>,
    {
        const DOING: &str = "ask for block status";
        self.begin(DOING)?;
        let result = self.walk(context, ranges.into_iter(), &mut receive).await;
        self.end(DOING, result)
    }

    async fn walk(
        &mut self,
        context: ContextId,
        ranges: impl Iterator<Item = Extent> + Clone,
        receive: &mut impl FnMut(Extent) -> Flow,
    ) -> Result<(), Cause> {
        let size = self.export().reachable_bytes();
        if let Some(Extent { offset, length, .. }) = ranges.clone().find(|range| range.end() > size)
        {
            return Err(SubmitError::OutOfBounds { offset, length, size }.into());
        }
        let granularity = u64::from(self.export().block.minimum);
        let near = extents::join_near(ranges.clone(), GAP_BYTES);
        let asked: u64 = ranges.clone().map(|range| range.length).sum();
        let unit = match self.session().dialect {
            Dialect::Extended => UNIT_BYTES.max((asked / UNITS_MAX).next_power_of_two()),
            // Lengths have 32 bits.
            _ => UNIT_BYTES,
        };
        let units = extents::split(extents::align(near, granularity, size), unit);
        let mut plan = StatusPlan::new(units, WAITING_EXTENTS_MAX);
        let mut output = Output { ranges: ranges.peekable(), run: None, over: false, receive };
        let mut failed = None;
        loop {
            while !output.over
                && failed.is_none()
                && let Some((tag, offset, length)) = plan.next_request()
            {
                self.transmission.submit_status(tag, offset, length, &[context])?;
            }
            self.send_headers().await?;
            if self.transmission.in_flight() == 0 {
                break;
            }
            self.turn(&mut []).await?;
            failed = failed.or(self.take_status(&mut plan)?);
            while let Some(extent) = plan.report() {
                output.cut(extent);
            }
        }
        match failed {
            Some(cause) => Err(cause),
            None => {
                output.flush();
                Ok(())
            }
        }
    }

    /// Moves what has come into the plan; gives the failure of a request, after which the replies
    /// in flight are still awaited so that the connection stays usable.
    fn take_status<I: Iterator<Item = Extent>>(
        &mut self,
        plan: &mut StatusPlan<I>,
    ) -> Result<Option<Cause>, Cause> {
        while let Some(run) = self.transmission.status_run() {
            plan.run(run.tag, run.extent);
        }
        let mut failed = None;
        while let Some((tag, result)) = self.transmission.completed() {
            self.progress();
            match result {
                Ok(()) => plan.completed(tag)?,
                Err(error) => failed = failed.or(Some(Cause::Request(error))),
            }
        }
        Ok(failed)
    }
}

/// Cuts extents to the ranges, merges equal neighbours and hands them on.
struct Output<'a, I: Iterator<Item = Extent>, F> {
    ranges: Peekable<I>,
    run: Option<Extent>,
    over: bool,
    receive: &'a mut F,
}

impl<I: Iterator<Item = Extent>, F: FnMut(Extent) -> Flow> Output<'_, I, F> {
    fn cut(&mut self, extent: Extent) {
        while let Some(range) = self.ranges.peek().copied() {
            let start = range.offset.max(extent.offset);
            let end = range.end().min(extent.end());
            if start < end {
                self.push(Extent { offset: start, length: end - start, flags: extent.flags });
            }
            if range.end() > extent.end() {
                return;
            }
            self.ranges.next();
        }
    }

    fn push(&mut self, extent: Extent) {
        match &mut self.run {
            Some(run) if run.end() == extent.offset && run.flags == extent.flags => {
                run.length += extent.length;
            }
            _ => {
                self.flush();
                self.run = Some(extent);
            }
        }
    }

    fn flush(&mut self) {
        if let Some(run) = self.run.take()
            && !self.over
        {
            self.over = (self.receive)(run).is_break();
        }
    }
}
