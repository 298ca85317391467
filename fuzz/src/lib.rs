//! Fuzz targets for everything that parses what another process sends or has stored.
//!
//! A target takes any bytes and must come to an end without a panic, within the limits it asserts.
//! The same functions run coverage-guided (`cargo +nightly fuzz run NAME --features coverage`) and,
//! on the stable compiler, over the checked-in inputs and simple mutations of them
//! (`cargo xtask fuzz-smoke`).

mod handshake;
mod server;
mod session;
mod transmission;

use std::path::Path;

pub use handshake::nbd_handshake;
pub use icecore_repository::testing::{
    repository_key, repository_manifest, repository_map, repository_pack,
};
pub use server::nbd_server;
pub use session::qmp_session;
pub use transmission::nbd_transmission;

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// The targets by their names, which are also those of their folders under `corpus`.
pub const TARGETS: [(&str, Target); 9] = [
    ("nbd_handshake", nbd_handshake),
    ("nbd_transmission", nbd_transmission),
    ("nbd_server", nbd_server),
    ("nbd_uri", nbd_uri),
    ("qmp_session", qmp_session),
    ("repository_key", repository_key),
    ("repository_manifest", repository_manifest),
    ("repository_map", repository_map),
    ("repository_pack", repository_pack),
];

/// The checked-in inputs: a folder a target.
pub const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");

/// The inputs in a folder, in the order of their names.
pub fn inputs(dir: &Path) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| std::fs::read(path).ok()).collect()
}

/// The text of an NBD URI.
pub fn nbd_uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = text.parse::<icecore_nbd_client::Uri>();
}

/// Takes `count` bytes off the front, if there are that many.
fn take<'a>(data: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, rest) = data.split_at_checked(count)?;
    *data = rest;
    Some(head)
}
