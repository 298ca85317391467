//! The repository's own description, and what this program understands of it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::block::Compression;
use crate::envelope::{self, Kind};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::geometry::BlockSize;
use crate::ids::RepositoryId;
use crate::names;

/// Version of the format that is written, and the newest that is read.
pub const FORMAT_VERSION: u32 = 1;
/// A config is a few hundred bytes.
pub(crate) const CONFIG_BYTES_MAX: u64 = 64 << 10;
/// Incompatible features that this program understands.
const INCOMPAT_KNOWN: u64 = 0;

const BLOCK_ID_BLAKE3: &str = "blake3";
const CONTENT_TREE: &str = "blake3-256x4";

/// What is fixed when a repository is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) id: RepositoryId,
    pub(crate) version: u32,
    pub(crate) created_at: Timestamp,
    pub(crate) block_size: BlockSize,
    pub(crate) compression: Compression,
    /// How blocks get their ids.
    block_id: String,
    /// How content roots are computed.
    content_tree: String,
    /// Features that an older program may ignore.
    compat: u64,
    /// Features without which nothing may be read.
    incompat: u64,
}

/// Only what says whether the rest can be understood.
#[derive(Deserialize)]
struct Gate {
    version: u32,
    incompat: u64,
}

impl Config {
    pub(crate) fn new(
        id: RepositoryId,
        created_at: Timestamp,
        block_size: BlockSize,
        compression: Compression,
    ) -> Self {
        Self {
            id,
            version: FORMAT_VERSION,
            created_at,
            block_size,
            compression,
            block_id: BLOCK_ID_BLAKE3.to_owned(),
            content_tree: CONTENT_TREE.to_owned(),
            compat: 0,
            incompat: 0,
        }
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let payload = serde_json::to_vec_pretty(self).map_err(not_understood)?;
        Ok(envelope::seal(Kind::CONFIG, &self.id, &payload))
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let (id, payload) = envelope::open_any(Kind::CONFIG, names::CONFIG, bytes)?;
        let gate: Gate = serde_json::from_slice(payload).map_err(not_understood)?;
        let unknown = gate.incompat & !INCOMPAT_KNOWN;
        if gate.version > FORMAT_VERSION || unknown != 0 {
            let what = format!("format version {}, features {unknown:#x}", gate.version);
            return Err(Error::Unsupported { object: names::CONFIG.to_owned(), what });
        }
        let config: Self = serde_json::from_slice(payload).map_err(not_understood)?;
        for (found, known) in
            [(&config.block_id, BLOCK_ID_BLAKE3), (&config.content_tree, CONTENT_TREE)]
        {
            if found != known {
                let what = format!("algorithm {found:?}");
                return Err(Error::Unsupported { object: names::CONFIG.to_owned(), what });
            }
        }
        if config.id != id {
            let detail = "its header names another repository";
            return Err(Damage::new(names::CONFIG, DamageKind::Foreign, detail).into());
        }
        Ok(config)
    }
}

fn not_understood(error: serde_json::Error) -> Error {
    Damage::new(names::CONFIG, DamageKind::Inconsistent, error.to_string()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let id = RepositoryId::from_random(77);
        Config::new(id, Timestamp::UNIX_EPOCH, BlockSize::DEFAULT, Compression::Zstd(3))
    }

    #[test]
    fn goes_there_and_back() {
        assert_eq!(Config::decode(&config().encode().unwrap()).unwrap(), config());
    }

    #[test]
    fn unknown_compatible_features_are_ignored_incompatible_ones_refused() {
        let newer = Config { compat: 5, ..config() };
        assert!(Config::decode(&newer.encode().unwrap()).is_ok());
        for newer in [
            Config { incompat: 1, ..config() },
            Config { version: 2, ..config() },
            Config { block_id: "md5".into(), ..config() },
            Config { content_tree: "list".into(), ..config() },
        ] {
            let error = Config::decode(&newer.encode().unwrap()).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        }
    }
}
