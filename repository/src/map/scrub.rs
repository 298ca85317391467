//! Reads all of one run, alone, so that every byte of it is verified once however many points share
//! it.

use std::sync::Arc;

use crate::error::Result;

use super::reader::{RunCursor, RunReader};
use super::{Slot, empty_page};

/// Walks a run in order and hands over the id and place of each block that it gives data.
pub(crate) fn scrub_run(
    run: &Arc<RunReader>,
    visit: &mut dyn FnMut(crate::ids::BlockId, crate::point::Location) -> Result<()>,
) -> Result<()> {
    run.packs()?;
    let mut cursor = RunCursor::new(Arc::clone(run));
    let mut from = 0;
    while let Some(number) = run.next_region(from) {
        from = number + 1;
        let Some(region) = run.region(number).filter(|region| !region.piece.is_all_zero()) else {
            continue;
        };
        for record in run.index(region)? {
            let mut slots = empty_page();
            cursor.page(&record.piece, &mut slots)?;
            for slot in slots.iter().flatten() {
                if let Slot::Data(id, location) = slot {
                    visit(*id, *location)?;
                }
            }
        }
    }
    Ok(())
}
