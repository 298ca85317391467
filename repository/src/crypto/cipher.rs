//! AES-256-GCM under a key that belongs to one object alone.
//!
//! Each part of an object is sealed once, under a number that no other part of it has. The number is
//! the nonce: so no two messages ever share key and nonce, and nothing has to be remembered for it.

use ring::aead::{Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::refused;
use crate::error::Result;

/// Bytes that sealing adds to a part.
pub(crate) const TAG_BYTES: usize = 16;

/// The number of a part in its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part(pub(crate) u64);

impl Part {
    /// Of an object that has but one.
    pub(crate) const ONLY: Self = Self(0);

    fn nonce(self) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&self.0.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals and opens the parts of one object.
pub(crate) struct ObjectCipher(LessSafeKey);

impl ObjectCipher {
    pub(super) fn new(key: UnboundKey) -> Self {
        Self(LessSafeKey::new(key))
    }

    /// Seals `bytes` from `from` on where they lie, and appends their tag. `context` is not stored
    /// and must be the same when the part is opened.
    pub(crate) fn seal(
        &self,
        part: Part,
        context: &[u8],
        bytes: &mut Vec<u8>,
        from: usize,
    ) -> Result<()> {
        let plain = bytes.get_mut(from..).ok_or_else(|| refused("nothing to seal"))?;
        let tag = self.0.seal_in_place_separate_tag(part.nonce(), Aad::from(context), plain);
        bytes.extend_from_slice(tag.map_err(|_| refused("a part is too long"))?.as_ref());
        Ok(())
    }

    /// Opens a part where it lies; none when it is not what was sealed under this number, in this
    /// object, with this context.
    pub(crate) fn open<'a>(
        &self,
        part: Part,
        context: &[u8],
        sealed: &'a mut [u8],
    ) -> Option<&'a [u8]> {
        let opened = self.0.open_in_place(part.nonce(), Aad::from(context), sealed);
        opened.ok().map(|plain| &*plain)
    }

    /// As [`open`](Self::open), leaving the part as it is: what it holds goes to `out`, which is as
    /// long. False when it is not what was sealed; `out` holds nothing usable then.
    pub(crate) fn open_to(
        &self,
        part: Part,
        context: &[u8],
        sealed: &[u8],
        out: &mut [u8],
    ) -> bool {
        let Some((data, tag)) = sealed.split_last_chunk::<TAG_BYTES>() else { return false };
        if data.len() != out.len() {
            return false;
        }
        out.copy_from_slice(data);
        let (nonce, context) = (part.nonce(), Aad::from(context));
        self.0.open_in_place_separate_tag(nonce, context, (*tag).into(), out, 0..).is_ok()
    }
}
