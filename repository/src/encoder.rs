//! The part of writing that costs CPU: one encoder per worker thread, no IO.

use std::sync::Arc;

use crate::block::{BlockHasher, Packer, is_zero};
use crate::error::Result;
use crate::ids::BlockId;
use crate::point::{Encoded, ParentBlock};
use crate::session::Session;

/// Makes encoders for the workers of one disk.
#[derive(Clone)]
pub struct Encoders {
    session: Arc<Session>,
}

impl Encoders {
    pub(crate) fn new(session: Arc<Session>) -> Self {
        Self { session }
    }

    /// An encoder for one thread.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn encoder(&self) -> Result<BlockEncoder> {
        let packer = Packer::new(self.session.compression())?;
        Ok(BlockEncoder {
            session: Arc::clone(&self.session),
            packer,
            hasher: self.session.inner.sealing.hasher(),
        })
    }
}

/// Turns blocks of the guest's disk into what is pushed; owns its zstd context.
pub struct BlockEncoder {
    session: Arc<Session>,
    packer: Packer,
    hasher: BlockHasher,
}

impl BlockEncoder {
    /// Zero test, id, comparison with the parent, dedup lookup and compression of one block, which
    /// is given whole (the disk's last one may be short). No IO.
    pub fn encode(&mut self, data: &[u8], parent: ParentBlock) -> Encoded {
        if is_zero(data) {
            let same = parent == ParentBlock::Zero;
            return if same { Encoded::Same } else { Encoded::Zero };
        }
        let id = self.hasher.data_id(data);
        let new = || Encoded::New { id, frame: self.packer.pack(data) };
        recognise(&self.session, &id, parent).unwrap_or_else(new)
    }

    /// What can be said of a data block by its id alone: none where its bytes are needed.
    pub(crate) fn recognise(&self, id: &BlockId, parent: ParentBlock) -> Option<Encoded> {
        recognise(&self.session, id, parent)
    }
}

fn recognise(session: &Session, id: &BlockId, parent: ParentBlock) -> Option<Encoded> {
    if parent == ParentBlock::Data(*id) {
        return Some(Encoded::Same);
    }
    session.dedup.find(id).map(|location| Encoded::Known { id: *id, location })
}
