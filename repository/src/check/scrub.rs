//! Whether every object is still as it was written, as far as can be told without any key: for the
//! machine that keeps an encrypted repository and must not be able to read it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{CheckProgress, CheckReport, Findings};
use crate::config::{CONFIG_BYTES_MAX, Config};
use crate::crypto::TAG_BYTES;
use crate::envelope::{self, Form, Kind, STREAM_HEADER_BYTES};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::ids::{PackId, RunId};
use crate::keys;
use crate::manifest::MANIFEST_BYTES_MAX;
use crate::map::scrub_stored;
use crate::names;
use crate::pack::{PACK_BYTES_MAX, PackEnd, parse_toc};
use crate::sealing::Sealing;
use crate::store::{ObjectEntry, ObjectName, Store};
use crate::writers::{COORDINATION, Coordination};

/// Frames are read in pieces of about this size.
const READ_BYTES: u64 = 1 << 20;

/// Reads every object of a repository and verifies its checksum. It needs no key, and finds accidents;
/// what somebody has put there on purpose, or taken away, is found by [`check`](crate::Repository::check)
/// with the key.
///
/// # Errors
/// `NotARepository`, `Unsupported`, or the store's when it cannot even list.
pub fn scrub(store: Arc<dyn Store>, mut tell: impl FnMut(CheckProgress)) -> Result<CheckReport> {
    let bytes = match store.read(&names::config()?, CONFIG_BYTES_MAX) {
        Err(error) if error.is_not_found() => {
            let (location, why) = (store.location().to_owned(), "it has no config".to_owned());
            return Err(Error::NotARepository { location, why });
        }
        other => other?,
    };
    let config = Config::decode(&bytes)?;
    let entries = store.list("")?;
    let is_in = |prefix: &str, entry: &&ObjectEntry| entry.name.as_str().starts_with(prefix);
    let count = |prefix| entries.iter().filter(|entry| is_in(prefix, entry)).count() as u64;
    let progress = CheckProgress {
        points_total: count(names::POINTS),
        packs_total: count(names::PACKS),
        ..CheckProgress::default()
    };
    let mut findings = Findings { errors: BTreeSet::new(), progress, tell: &mut tell };
    let scrubber = Scrubber::new(&store, &config);
    for entry in &entries {
        let verified = scrubber.object(entry);
        // What goes away meanwhile is no damage.
        if verified.is_ok() || store.exists(&entry.name)? {
            findings.note(entry.name.as_str(), verified)?;
        }
        findings.progress.points_done += u64::from(is_in(names::POINTS, &entry));
        findings.progress.packs_done += u64::from(is_in(names::PACKS, &entry));
        findings.progress.bytes_read += entry.bytes;
        findings.tell();
    }
    Ok(CheckReport {
        ok: findings.errors.is_empty(),
        points_checked: findings.progress.points_total,
        blocks_checked: 0,
        errors: findings.errors.into_iter().collect(),
    })
}

struct Scrubber<'a> {
    store: &'a Arc<dyn Store>,
    config: &'a Config,
    form: Form,
    coordination: Coordination,
}

impl<'a> Scrubber<'a> {
    fn new(store: &'a Arc<dyn Store>, config: &'a Config) -> Self {
        let form = if config.is_encrypted() { Form::Encrypted } else { Form::Plain };
        let sealing = Sealing::plain(config.id.clone());
        Self { store, config, form, coordination: Coordination::new(Arc::clone(store), sealing) }
    }

    fn object(&self, entry: &ObjectEntry) -> Result<()> {
        let name = &entry.name;
        let is_in = |prefix| name.as_str().starts_with(prefix);
        if name.as_str() == names::CONFIG {
            Config::decode(&self.store.read(name, CONFIG_BYTES_MAX)?).map(drop)
        } else if is_in(names::KEYS) {
            keys::verify(&**self.store, &self.config.id, name)
        } else if is_in(names::PACKS) {
            self.pack(entry)
        } else if is_in(names::RUNS) {
            let id: RunId = name.last_part().parse().map_err(|_| stranger(name))?;
            let length = entry.bytes;
            scrub_stored(self.store, self.form, &self.config.id, id, length)
        } else if is_in(names::POINTS) || is_in(names::RECEIPTS) {
            self.small(name)
        } else if !is_in(COORDINATION) {
            Err(stranger(name))
        } else if self.form == Form::Encrypted && self.coordination.is_record(name) {
            self.small(name)
        } else {
            self.coordination.verify(name)
        }
    }

    fn small(&self, name: &ObjectName) -> Result<()> {
        let bytes = self.store.read(name, MANIFEST_BYTES_MAX)?;
        envelope::verify(self.form, &self.config.id, name.as_str(), &bytes)
    }

    fn pack(&self, entry: &ObjectEntry) -> Result<()> {
        let name = &entry.name;
        let damaged = |kind, detail: &str| Error::from(Damage::new(name, kind, detail));
        let id: PackId = name.last_part().parse().map_err(|_| stranger(name))?;
        if entry.bytes > PACK_BYTES_MAX {
            return Err(damaged(DamageKind::Limit, "it is larger than any pack"));
        }
        if entry.bytes < STREAM_HEADER_BYTES as u64 {
            return Err(damaged(DamageKind::Length, "it is too short for a pack"));
        }
        let mut header = [0; STREAM_HEADER_BYTES];
        self.store.read_exact(name, 0, &mut header)?;
        let (form, repository) = (self.form, &self.config.id);
        let object = name.as_str();
        envelope::check_stream_header(Kind::PACK, form, repository, id.0, object, &header)?;
        let overhead = if form == Form::Encrypted { TAG_BYTES } else { 0 };
        let end = PackEnd::read(&**self.store, name, entry.bytes, &header, overhead)?;
        let changed = || damaged(DamageKind::Checksum, "its frames do not match their checksum");
        if let Some(wanted) = end.frames_crc {
            let found = self.crc(name, STREAM_HEADER_BYTES as u64, end.frames_end)?;
            return if found == wanted { Ok(()) } else { Err(changed()) };
        }
        let frames = parse_toc(&end.toc, end.frames_end);
        for frame in frames.map_err(|detail| damaged(DamageKind::Inconsistent, detail))? {
            let start = u64::from(frame.offset);
            if self.crc(name, start, start + u64::from(frame.stored_bytes))? != frame.crc {
                return Err(changed());
            }
        }
        Ok(())
    }

    /// CRC-32C of some bytes of an object.
    fn crc(&self, name: &ObjectName, start: u64, end: u64) -> Result<u32> {
        let (mut crc, mut offset, mut buffer) = (0, start, Vec::new());
        while offset < end {
            buffer.resize((end - offset).min(READ_BYTES) as usize, 0);
            self.store.read_exact(name, offset, &mut buffer)?;
            crc = crc32c::crc32c_append(crc, &buffer);
            offset += buffer.len() as u64;
        }
        Ok(crc)
    }
}

fn stranger(name: &ObjectName) -> Error {
    Damage::new(name, DamageKind::Foreign, "no object of a repository has this name").into()
}
