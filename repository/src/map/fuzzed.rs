//! The parsers of runs, open to any bytes.

use std::sync::Arc;

use super::layout::{self, TRAILER_BYTES, Trailer};
use super::reader::{RunReader, RunSource};
use super::{PageCursor, empty_page};
use crate::geometry::{BlockIndex, DISK_BLOCKS_MAX};
use crate::point::RunRef;
use crate::sealing::Sealing;

/// One part of a run; the first byte chooses which.
pub(crate) fn parts(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    match choice % 4 {
        0 => drop(layout::parse_page(bytes, &mut empty_page())),
        1 => drop(layout::parse_index(bytes, bytes.len() as u64)),
        2 => drop(layout::parse_table(bytes, bytes.len() as u64)),
        _ => {
            if let Some(trailer) = bytes.first_chunk::<TRAILER_BYTES>() {
                let _ = Trailer::parse(trailer, bytes.len() as u64, 0);
            }
        }
    }
}

/// A whole run, read as far as it goes.
pub(crate) fn run(object: Vec<u8>, sealing: &Sealing, reference: &RunRef) {
    let source = RunSource::Memory(Arc::new(object));
    let Ok(run) = RunReader::of(source, sealing, reference) else { return };
    let _ = run.packs();
    let mut cursor = PageCursor::new(&[Arc::new(run)]);
    let mut at = BlockIndex(0);
    while let Ok(Some(found)) = cursor.next_mentioned(at) {
        assert!(found >= at && found.0 < DISK_BLOCKS_MAX, "a walk went astray");
        let _ = cursor.slot(found);
        at = BlockIndex((found.0 / 256 + 1) * 256);
    }
}
