//! Every parser of this crate, open to any bytes: for fuzzing, not for use.
//!
//! The first byte chooses the parser, the rest is what it gets. Seals and checksums are put right
//! first where they would keep the bytes from being looked at. None of these may panic or take more
//! memory than its limits allow.

use crate::block::{BlockHasher, Unpacker};
use crate::config::Config;
use crate::crypto::{KeyMaterial, WrappedKey};
use crate::dedup::DedupIndex;
use crate::envelope::{self, Form, Kind, STREAM_HEADER_BYTES};
use crate::geometry::{BlockIndex, BlockSize};
use crate::ids::{BlockId, Checksum, KeyId, PointId, RepositoryId, RunId};
use crate::manifest::{self, Receipt};
use crate::map::fuzzed;
use crate::pack;
use crate::point::{Codec, Point, RunRef};
use crate::resolve;
use crate::sealing::Sealing;

/// The block size that everything here assumes.
const BLOCK_BYTES: usize = 4096;

fn repository() -> RepositoryId {
    RepositoryId::from_random(7)
}

fn point_id() -> Option<PointId> {
    "00000000a00000".parse().ok()
}

/// Config, manifest, receipt, envelope, catalog, ids and point specs.
pub fn repository_manifest(data: &[u8]) {
    let (Some((choice, bytes)), Some(id)) = (data.split_first(), point_id()) else { return };
    let repository = repository();
    let sealing = Sealing::plain(repository.clone());
    match choice % 7 {
        0 => drop(Config::decode(&envelope::seal(Kind::CONFIG, &repository, bytes))),
        1 => {
            let sealed = envelope::seal(Kind::MANIFEST, &repository, bytes);
            let block_size = BlockSize::DEFAULT;
            if let Ok((point, parts)) = manifest::decode(&sealing, block_size, &id, &sealed) {
                for part in &point.parts {
                    let _ = manifest::part(&point, &parts, part.name.as_str());
                }
                assert!(point.disks.len() <= manifest::POINT_DISKS_MAX, "a limit was passed");
            }
        }
        2 => {
            let sealed = envelope::seal(Kind::RECEIPT, &repository, bytes);
            let _ = Receipt::decode(&sealing, &id, &sealed);
        }
        3 => drop(envelope::open_any(Kind::MANIFEST, "fuzzed", bytes)),
        4 => {
            let form = Form::Plain;
            let _ =
                envelope::check_stream_header(Kind::PACK, form, &repository, [0; 16], "", bytes);
        }
        5 => drop(serde_json::from_slice::<Vec<Point>>(bytes)),
        _ => {
            if let Ok(text) = std::str::from_utf8(bytes) {
                let _ = resolve::point(text, &[&id]);
            }
        }
    }
}

/// Pages, indexes, tables and trailers of runs, and whole runs.
pub fn repository_map(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    if choice % 2 == 0 {
        return fuzzed::parts(bytes);
    }
    let run = RunId([3; 16]);
    let mut object = envelope::stream_header(Kind::RUN, Form::Plain, &repository(), run.0);
    object.extend_from_slice(bytes);
    let trailer = object.len().saturating_sub(64);
    let reference = RunRef {
        run,
        bytes: object.len() as u64,
        entries: 0,
        trailer: Checksum(*blake3::hash(&object[trailer..]).as_bytes()),
    };
    fuzzed::run(object, &Sealing::plain(repository()), &reference);
}

/// Tables of contents and trailers of packs, frames, the dedup cache.
pub fn repository_pack(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    match choice % 4 {
        0 => {
            let end = STREAM_HEADER_BYTES as u64 + bytes.len() as u64;
            let _ = pack::parse_toc(bytes, end);
        }
        1 => {
            let _ = pack::parse_trailer(bytes);
        }
        2 => {
            let Ok(mut unpacker) = Unpacker::new(BlockHasher::plain()) else { return };
            let mut block = vec![0; BLOCK_BYTES];
            let _ = unpacker.unpack(Codec::Zstd, bytes, &BlockId([1; 32]), &mut block);
        }
        _ => {
            let mut asked = BlockIndex(0);
            let loaded = DedupIndex::load(bytes, |_| {
                asked.0 += 1;
                Ok(asked.0.is_multiple_of(2))
            });
            drop(loaded);
        }
    }
}

/// Key objects, recovery kits, key files and passphrases. Nothing here stretches a passphrase: that is
/// slow by design, and its parameters have a test of their own.
pub fn repository_key(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    let given = || zeroize::Zeroizing::new(bytes.to_vec());
    match choice % 3 {
        0 => {
            let sealed = envelope::seal(Kind::KEY, &repository(), bytes);
            let id = KeyId::from_random(3);
            if let Ok(key) = WrappedKey::parse(&repository(), &id, &sealed) {
                let label = key.info().label.unwrap_or_default();
                assert!(!label.chars().any(char::is_control), "a label could move the cursor");
            }
        }
        1 => {
            let text = [b"Icecore recovery kit 1\n", bytes].concat();
            drop(KeyMaterial::from_key_file(zeroize::Zeroizing::new(text)));
            drop(KeyMaterial::from_key_file(given()));
        }
        _ => drop(KeyMaterial::from_passphrase(given())),
    }
}
