//! The cryptography of an encrypted repository: which key seals what. No IO.
//!
//! ```text
//! key file, passphrase ──► wrapping key ──► master key ──► purpose keys ──► a key for each object
//!                          (wrapped.rs)     32 random bytes  (keys.rs)       (cipher.rs)
//! ```
//! `docs/FORMAT.md`, section "Encryption", has the bytes and the argument.

mod cipher;
mod keys;
mod kit;
mod material;
mod wrapped;

pub(crate) use cipher::{ObjectCipher, Part, TAG_BYTES};
pub(crate) use keys::{Keys, MasterKey, ObjectId, Purpose};
pub use kit::RecoveryKit;
pub use material::{BadKey, KeyMaterial};
pub(crate) use wrapped::{Drawn, KEY_BYTES_MAX, WrappedKey};
pub use wrapped::{KeyInfo, KeyMethod};

use crate::error::Error;

/// The provider refuses only what no caller of this crate asks for.
fn refused(what: &'static str) -> Error {
    Error::Refused {
        what: format!("cryptography failed: {what}"),
        advice: "report this as a defect",
    }
}
