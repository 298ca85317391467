//! A point's disk as an NBD export, straight from the repository.

mod overlay;

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use icecore_nbd_client::Errno;
use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::proto::{STATE_HOLE, STATE_ZERO};
use icecore_nbd_client::server::{Access, Export, Features, ZeroMode};
use icecore_repository::{BlockDecoder, BlockIndex, DiskReader, Entry, Error};

pub use overlay::{Label, Overlay};

/// Blocks fetched at once: neighbours lie together in their pack.
const FETCH_BYTES: u64 = 1 << 20;
/// Idle decoders that are kept for the next request; each has a decompression context.
const IDLE_DECODERS_MAX: usize = 8;

/// A disk of a point, with or without an overlay that takes writes.
pub struct PointExport {
    reader: DiskReader,
    description: String,
    decoders: Mutex<Vec<BlockDecoder>>,
    overlay: Option<Mutex<Overlay>>,
}

impl PointExport {
    /// Serves `reader`; writes go to the overlay where there is one.
    pub fn new(reader: DiskReader, description: String, overlay: Option<Overlay>) -> Self {
        let overlay = overlay.map(Mutex::new);
        Self { reader, description, decoders: Mutex::default(), overlay }
    }

    fn block(&self) -> u64 {
        u64::from(self.reader.block_size().bytes())
    }

    /// Reads whole blocks from the point; `offset` is a block's, `out` ends at one or at the end.
    fn read_point(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let first = BlockIndex(offset / self.block());
        let end = offset + out.len() as u64;
        let mut entries: Vec<Entry> = Vec::new();
        for entry in self.reader.entries(first) {
            let entry = entry?;
            if entry.index.0 * self.block() >= end {
                break;
            }
            entries.push(entry);
        }
        let idle = locked(&self.decoders).pop();
        let mut decoder = idle.map_or_else(|| self.reader.decoder(), Ok)?;
        decoder.read_many(first, &entries, out)?;
        let mut idle = locked(&self.decoders);
        if idle.len() < IDLE_DECODERS_MAX {
            idle.push(decoder);
        }
        Ok(())
    }

    /// Reads whole blocks as clients see them.
    fn read_blocks(&self, offset: u64, out: &mut [u8]) -> Result<(), Errno> {
        self.read_point(offset, out).map_err(|error| {
            tracing::error!(offset, "the point cannot be read: {error}");
            Errno::EIO
        })?;
        let Some(overlay) = &self.overlay else { return Ok(()) };
        let overlay = locked(overlay);
        for (at, block) in out.chunks_mut(self.block() as usize).enumerate() {
            let start = offset + at as u64 * self.block();
            if overlay.holds(start / self.block()) {
                overlay.read(start, block).map_err(|error| overlay_failed(&error))?;
            }
        }
        Ok(())
    }

    /// Calls `each` with every whole or partial block of a range: its start, and the part meant.
    fn pieces(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(u64, std::ops::Range<u64>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut at = offset;
        while at < offset + length {
            let start = at - at % self.block();
            let end = (start + self.block()).min(offset + length);
            each(start, at..end)?;
            at = end;
        }
        Ok(())
    }

    fn block_end(&self, start: u64) -> u64 {
        (start + self.block()).min(self.reader.size_bytes())
    }

    /// Changes a part of a block: all of it moves to the overlay first.
    fn change_part(
        &self,
        overlay: &mut Overlay,
        start: u64,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<(), Errno> {
        let mut block = vec![0; (self.block_end(start) - start) as usize];
        if overlay.holds(start / self.block()) {
            overlay.read(start, &mut block).map_err(|error| overlay_failed(&error))?;
        } else {
            self.read_point(start, &mut block).map_err(|_| Errno::EIO)?;
        }
        change(&mut block);
        overlay.write(start, &block).map_err(|error| overlay_failed(&error))
    }

    fn writable(&self) -> Result<MutexGuard<'_, Overlay>, Errno> {
        self.overlay.as_ref().map(locked).ok_or(Errno::EPERM)
    }
}

impl Export for PointExport {
    fn features(&self) -> Features {
        let access = if self.overlay.is_some() { Access::Writable } else { Access::ReadOnly };
        Features {
            description: self.description.clone(),
            ..Features::new(self.reader.size_bytes(), access)
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        let mut blocks = Vec::new();
        while at < end {
            let start = at - at % self.block();
            let stop = (start + FETCH_BYTES.max(self.block())).min(self.reader.size_bytes());
            blocks.resize((stop.min(end.next_multiple_of(self.block())) - start) as usize, 0);
            self.read_blocks(start, &mut blocks)?;
            let upto = end.min(start + blocks.len() as u64);
            let (from, to) = ((at - offset) as usize, (upto - offset) as usize);
            buffer[from..to]
                .copy_from_slice(&blocks[(at - start) as usize..(upto - start) as usize]);
            at = upto;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let mut overlay = self.writable()?;
        self.pieces(offset, data.len() as u64, |start, part| {
            let bytes = &data[(part.start - offset) as usize..(part.end - offset) as usize];
            if part.start == start && part.end == self.block_end(start) {
                return overlay.write(start, bytes).map_err(|error| overlay_failed(&error));
            }
            self.change_part(&mut overlay, start, |block| {
                block[(part.start - start) as usize..(part.end - start) as usize]
                    .copy_from_slice(bytes);
            })
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, _mode: ZeroMode) -> Result<(), Errno> {
        let mut overlay = self.writable()?;
        self.pieces(offset, length, |start, part| {
            if part.start == start && part.end == self.block_end(start) {
                let whole = overlay.zero(start, part.end - start);
                return whole.map_err(|error| overlay_failed(&error));
            }
            self.change_part(&mut overlay, start, |block| {
                block[(part.start - start) as usize..(part.end - start) as usize].fill(0);
            })
        })
    }

    fn flush(&self) -> Result<(), Errno> {
        match &self.overlay {
            Some(overlay) => locked(overlay).flush().map_err(|error| overlay_failed(&error)),
            None => Ok(()),
        }
    }

    fn extents(&self, _context: &str, range: Extent, max: usize) -> Result<Vec<Extent>, Errno> {
        let block = self.block();
        let first = range.offset - range.offset % block;
        let mut found: Vec<Extent> = Vec::new();
        let mut at = first;
        let mut add = |start: u64, end: u64, flags: u64| {
            match found.last_mut() {
                Some(last) if last.flags == flags => last.length = end - last.offset,
                _ => found.push(Extent { offset: start, length: end - start, flags }),
            }
            found.len() > max
        };
        let overlay = self.overlay.as_ref().map(locked);
        let held = |index: u64| overlay.as_ref().is_some_and(|overlay| overlay.holds(index));
        let mut entries = self.reader.entries(BlockIndex(first / block)).peekable();
        while at < range.end() {
            let index = at / block;
            let here = entries.next_if(|e| e.as_ref().map_or(true, |e| e.index.0 <= index));
            let data = match here {
                Some(Err(_)) => return Err(Errno::EIO),
                Some(Ok(_)) => true,
                None => held(index),
            };
            let end = match (data, entries.peek(), &overlay) {
                // Without an overlay a gap between two entries is one hole.
                (false, Some(Ok(next)), None) => next.index.0 * block,
                (false, None, None) => range.end(),
                _ => at + block,
            };
            let end = end.min(self.reader.size_bytes()).max(at + 1);
            if add(at, end, if data { 0 } else { STATE_HOLE | STATE_ZERO }) {
                found.pop();
                break;
            }
            at = end;
        }
        Ok(trimmed(found, range))
    }
}

/// Cuts the first extent to where the question began.
fn trimmed(mut found: Vec<Extent>, range: Extent) -> Vec<Extent> {
    if let Some(first) = found.first_mut() {
        first.length -= range.offset - first.offset;
        first.offset = range.offset;
    }
    found
}

fn overlay_failed(error: &io::Error) -> Errno {
    tracing::error!("the overlay failed: {error}");
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => Errno::ENOSPC,
        _ => Errno::EIO,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
