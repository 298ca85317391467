//! What a backup has to copy: dirty extents first, allocation asked only inside them.

use super::{Control, Flow};
use crate::error::{Cause, Error};
use crate::export_info::{ContextId, is_dirty, reads_as_zero};
use crate::extents::{self, Extent};

/// First stretch of the disk whose dirty extents are held at once.
const STRETCH_BYTES_FIRST: u64 = 8 << 30;
/// A stretch with fewer dirty extents than this is followed by one twice as long.
const STRETCH_EXTENTS_FEW: usize = 1 << 12;
/// Most dirty extents held at once (6 MiB); more end the stretch early.
const STRETCH_EXTENTS_MAX: usize = 1 << 18;

/// What has to be done with a changed extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangedKind {
    /// Read it.
    Data,
    /// It reads as zeroes: note that without reading.
    Zero,
}

/// A changed extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Start, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub length: u64,
    /// Data or zeroes.
    pub kind: ChangedKind,
}

impl Control {
    /// Reports what is to be copied of `range`, ascending.
    ///
    /// `bitmap` picks the dirty extents; without one the whole range counts as dirty. Its failure
    /// fails the call: missing knowledge is never "clean". `allocation` tells data from zeroes;
    /// without one, or when the server cannot answer it, dirty is data. Memory is bounded.
    pub async fn changed(
        &mut self,
        range: Extent,
        bitmap: Option<ContextId>,
        allocation: Option<ContextId>,
        mut receive: impl FnMut(Changed) -> Flow,
    ) -> Result<(), Error> {
        let (mut at, mut length) = (range.offset, STRETCH_BYTES_FIRST);
        while at < range.end() {
            let stretch = Extent::new(at, length.min(range.end() - at));
            let (dirty, end) = self.dirty(stretch, bitmap).await?;
            if dirty.len() < STRETCH_EXTENTS_FEW {
                length = length.saturating_mul(2);
            }
            if self.classify(&dirty, allocation, &mut receive).await?.is_break() {
                return Ok(());
            }
            at = end;
        }
        Ok(())
    }

    /// The dirty extents of a stretch, and where the answer ends.
    async fn dirty(
        &mut self,
        stretch: Extent,
        bitmap: Option<ContextId>,
    ) -> Result<(Vec<Extent>, u64), Error> {
        let Some(bitmap) = bitmap else {
            return Ok((vec![stretch], stretch.end()));
        };
        let (mut dirty, mut end) = (Vec::new(), stretch.offset);
        self.extents(bitmap, [stretch], |extent| {
            end = extent.end();
            if is_dirty(extent.flags) {
                dirty.push(Extent::new(extent.offset, extent.length));
            }
            if dirty.len() >= STRETCH_EXTENTS_MAX { Flow::Break(()) } else { Flow::Continue(()) }
        })
        .await?;
        Ok((dirty, end))
    }

    async fn classify(
        &mut self,
        dirty: &[Extent],
        allocation: Option<ContextId>,
        receive: &mut impl FnMut(Changed) -> Flow,
    ) -> Result<Flow, Error> {
        let (mut known, mut flow) = (0, Flow::Continue(()));
        if let Some(allocation) = allocation {
            let asked = self.extents(allocation, dirty.iter().copied(), |extent| {
                known = extent.end();
                let zero = reads_as_zero(extent.flags);
                flow = receive(changed(
                    extent,
                    if zero { ChangedKind::Zero } else { ChangedKind::Data },
                ));
                flow
            });
            match asked.await {
                Ok(()) => return Ok(flow),
                Err(Error { cause: Cause::Request(_), .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let told = [Extent::new(0, known)];
        for extent in extents::subtract(dirty.iter().copied(), told) {
            if flow.is_continue() {
                flow = receive(changed(extent, ChangedKind::Data));
            }
        }
        Ok(flow)
    }
}

fn changed(extent: Extent, kind: ChangedKind) -> Changed {
    Changed { offset: extent.offset, length: extent.length, kind }
}
