//! What people give to open a repository: a key file, a passphrase, a recovery kit.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use zeroize::Zeroizing;

use super::RecoveryKit;
use super::kit::FIRST_LINE;

/// A key file holds at least as much as the key that it protects.
const KEY_FILE_BYTES_MIN: usize = 32;
/// Longer files are no keys but a mistake.
const KEY_FILE_BYTES_MAX: usize = 1 << 20;
/// argon2id makes guessing slow, not impossible.
const PASSPHRASE_BYTES_MIN: usize = 8;
/// Permission bits of a file that others than its owner could use.
const OTHERS_MAY: u32 = 0o077;

/// Something that opens an encrypted repository. It is wiped from memory when it is dropped, and
/// shows nothing of itself.
#[derive(Clone)]
pub struct KeyMaterial(Secret);

#[derive(Clone)]
pub(super) enum Secret {
    /// Bytes that nobody can guess.
    File(Zeroizing<Vec<u8>>),
    /// Bytes that somebody could guess.
    Passphrase(Zeroizing<Vec<u8>>),
    /// The master key itself.
    Kit(RecoveryKit),
}

/// What was given as a key and cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} cannot be used: {why}")]
pub struct BadKey {
    what: String,
    why: String,
}

impl BadKey {
    pub(super) fn new(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

impl KeyMaterial {
    /// The content of a key file: any bytes, at least 32; or the text of a recovery kit.
    ///
    /// # Errors
    /// When there are too few bytes, too many, or a kit with a slip in it.
    pub fn from_key_file(bytes: Zeroizing<Vec<u8>>) -> Result<Self, BadKey> {
        let bad = |why: &str| BadKey::new("the key file", why);
        if bytes.trim_ascii_start().starts_with(FIRST_LINE.as_bytes()) {
            let text = std::str::from_utf8(&bytes).map_err(|_| bad("it is no text"))?;
            return Ok(Self(Secret::Kit(RecoveryKit::parse(text.trim_start())?)));
        }
        if bytes.len() < KEY_FILE_BYTES_MIN {
            let why = format!("it has {} bytes, and a key has at least 32", bytes.len());
            return Err(bad(&why));
        }
        if bytes.len() > KEY_FILE_BYTES_MAX {
            return Err(bad("it has more than 1 MiB, which no key has"));
        }
        Ok(Self(Secret::File(bytes)))
    }

    /// A passphrase. A line break at its end is not part of it.
    ///
    /// # Errors
    /// When it is shorter than eight bytes.
    pub fn from_passphrase(mut bytes: Zeroizing<Vec<u8>>) -> Result<Self, BadKey> {
        while bytes.last().is_some_and(|last| matches!(last, b'\n' | b'\r')) {
            bytes.pop();
        }
        if bytes.len() < PASSPHRASE_BYTES_MIN {
            return Err(BadKey::new("the passphrase", "it has less than 8 bytes"));
        }
        Ok(Self(Secret::Passphrase(bytes)))
    }

    /// Reads a key file, see [`from_key_file`](Self::from_key_file).
    ///
    /// # Errors
    /// As there, and when the file cannot be read.
    pub fn read_key_file(path: &Path) -> Result<Self, BadKey> {
        let what = || format!("the key file {}", path.display());
        let read = read(path).map_err(|error| BadKey::new(what(), error))?;
        Self::from_key_file(read).map_err(|error| BadKey::new(what(), error.why))
    }

    /// Reads a passphrase from a file, see [`from_passphrase`](Self::from_passphrase).
    ///
    /// # Errors
    /// As there, and when the file cannot be read.
    pub fn read_passphrase_file(path: &Path) -> Result<Self, BadKey> {
        let what = || format!("the passphrase file {}", path.display());
        let read = read(path).map_err(|error| BadKey::new(what(), error))?;
        Self::from_passphrase(read).map_err(|error| BadKey::new(what(), error.why))
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.0
    }

    /// Whether trying it takes argon2id.
    pub(crate) fn is_passphrase(&self) -> bool {
        matches!(self.0, Secret::Passphrase(_))
    }

    /// The recovery kit, if it is one.
    pub(crate) fn kit(&self) -> Option<&RecoveryKit> {
        match &self.0 {
            Secret::Kit(kit) => Some(kit),
            Secret::File(_) | Secret::Passphrase(_) => None,
        }
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Secret::File(_) => "KeyMaterial(a key file)",
            Secret::Passphrase(_) => "KeyMaterial(a passphrase)",
            Secret::Kit(_) => "KeyMaterial(a recovery kit)",
        })
    }
}

/// The bytes of a file in one buffer that is wiped; one more than can be of use at most.
fn read(path: &Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path)?;
    let status = file.metadata()?;
    if status.is_file() && status.mode() & OTHERS_MAY != 0 {
        tracing::warn!(path = %path.display(), "others may read or change this key; chmod 600 it");
    }
    let most = KEY_FILE_BYTES_MAX + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(most + 1));
    file.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> Result<KeyMaterial, BadKey> {
        KeyMaterial::from_key_file(Zeroizing::new(bytes.to_vec()))
    }

    #[test]
    fn a_key_file_has_a_size() {
        assert!(file(&[0; 31]).unwrap_err().to_string().contains("31 bytes"));
        assert!(file(&[0; 32]).is_ok() && file(&[7; KEY_FILE_BYTES_MAX]).is_ok());
        assert!(file(&[7; KEY_FILE_BYTES_MAX + 1]).is_err());
        let kit = format!("{FIRST_LINE} 1\nrepository: x\nkey: y\n");
        let error = file(kit.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("recovery kit"), "{error}");
    }

    #[test]
    fn a_passphrase_has_no_line_break() {
        let of = |text: &str| KeyMaterial::from_passphrase(Zeroizing::new(text.into()));
        assert!(of("seven77\n\n").is_err());
        let Secret::Passphrase(bytes) = of("eight 88\r\n").unwrap().0 else { unreachable!() };
        assert_eq!(&**bytes, b"eight 88");
    }

    #[test]
    fn nothing_of_it_is_shown() {
        let shown = format!("{:?}", file(&[b'S'; 40]).unwrap());
        assert_eq!(shown, "KeyMaterial(a key file)");
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let missing = KeyMaterial::read_key_file(Path::new("/nowhere/key")).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/key"), "{missing}");
        assert!(KeyMaterial::read_passphrase_file(Path::new("/")).is_err());
    }
}
