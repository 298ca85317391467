//! Reads all of one run, alone, so that every byte of it is verified once however many points share
//! it.

use std::sync::Arc;

use crate::crypto::TAG_BYTES;
use crate::envelope::{self, Form, Kind, STREAM_HEADER_BYTES};
use crate::error::{Damage, DamageKind, Result};
use crate::ids::{Checksum, RepositoryId, RunId};
use crate::names;
use crate::point::RunRef;
use crate::sealing::Sealing;
use crate::store::Store;

use super::layout::{FOOTER_BYTES, footer, tail_bytes};
use super::reader::{RunCursor, RunReader};
use super::{Slot, empty_page};

/// Sealed runs are read in pieces of this size.
const READ_BYTES: u64 = 1 << 20;

/// Verifies a stored run as far as it can be without any key and without the manifest that refers to
/// it: one that is not sealed wholly, a sealed one by its checksum.
pub(crate) fn scrub_stored(
    store: &Arc<dyn Store>,
    form: Form,
    repository: &RepositoryId,
    id: RunId,
    length: u64,
) -> Result<()> {
    let name = names::run(id)?;
    let damaged = |kind, detail: &str| Damage::new(&name, kind, detail);
    let overhead = if form == Form::Encrypted { TAG_BYTES } else { 0 };
    let least = STREAM_HEADER_BYTES + tail_bytes(overhead);
    if length < least as u64 {
        return Err(damaged(DamageKind::Length, "it is too short for a run").into());
    }
    let mut header = [0; STREAM_HEADER_BYTES];
    store.read_exact(&name, 0, &mut header)?;
    envelope::check_stream_header(Kind::RUN, form, repository, id.0, name.as_str(), &header)?;
    if form == Form::Plain {
        let mut tail = vec![0; tail_bytes(0)];
        store.read_exact(&name, length - tail.len() as u64, &mut tail)?;
        let trailer = Checksum(*blake3::hash(&tail).as_bytes());
        let reference = RunRef { run: id, bytes: length, entries: 0, trailer };
        let run = RunReader::open(store, &Sealing::plain(repository.clone()), &reference)?;
        return scrub_run(&Arc::new(run), &mut |_, _| Ok(()));
    }
    let end = length - FOOTER_BYTES as u64;
    let (mut crc, mut offset, mut buffer) = (0, 0, Vec::new());
    while offset < end {
        buffer.resize((end - offset).min(READ_BYTES) as usize, 0);
        store.read_exact(&name, offset, &mut buffer)?;
        crc = crc32c::crc32c_append(crc, &buffer);
        offset += buffer.len() as u64;
    }
    let mut found = [0; FOOTER_BYTES];
    store.read_exact(&name, end, &mut found)?;
    if found == footer(crc) {
        return Ok(());
    }
    Err(damaged(DamageKind::Checksum, "it does not match its checksum").into())
}

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
