//! The recovery kit: the master key on paper.
//!
//! ```text
//! Icecore recovery kit 1
//! repository: 16 characters
//! key: 14 groups of 4 characters of Crockford's base 32
//! ```
//! The 56 characters are 35 bytes: the key, and the first three of a BLAKE3 of repository and key,
//! so that a slip of the pen is noticed.

use std::fmt;

use zeroize::Zeroizing;

use super::MasterKey;
use super::keys::KEY_BYTES;
use super::material::BadKey;
use crate::ids::RepositoryId;

/// The first line; a key file that begins so is a kit.
pub(super) const FIRST_LINE: &str = "Icecore recovery kit";
const VERSION: &str = "1";
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const GROUP_CHARS: usize = 4;
const CHECK_BYTES: usize = 3;
const ALL_BYTES: usize = KEY_BYTES + CHECK_BYTES;
const CHARS: usize = ALL_BYTES * 8 / 5;
const CHECK_CONTEXT: &str = "icecore 2026 recovery kit check";

/// The master key of a repository as text, to be kept apart from everything else: it opens the
/// repository when all key files and passphrases are lost, and cannot be revoked.
#[derive(Clone)]
pub struct RecoveryKit {
    repository: RepositoryId,
    key: Zeroizing<[u8; KEY_BYTES]>,
}

impl RecoveryKit {
    pub(crate) fn new(repository: &RepositoryId, master: &MasterKey) -> Self {
        Self { repository: repository.clone(), key: Zeroizing::new(*master.bytes()) }
    }

    /// Whether it is of this repository.
    pub(crate) fn is_of(&self, repository: &RepositoryId) -> bool {
        &self.repository == repository
    }

    pub(crate) fn master(&self) -> MasterKey {
        MasterKey::new(*self.key)
    }

    /// The text to print or to write into a file; such a file is accepted as a key file.
    #[must_use]
    pub fn text(&self) -> Zeroizing<String> {
        let mut all = Zeroizing::new([0; ALL_BYTES]);
        all[..KEY_BYTES].copy_from_slice(&*self.key);
        all[KEY_BYTES..].copy_from_slice(&check(&self.repository, &self.key));
        let letters = Zeroizing::new(encode(&all));
        let groups: Vec<&str> = (0..CHARS / GROUP_CHARS)
            .filter_map(|n| letters.get(n * GROUP_CHARS..(n + 1) * GROUP_CHARS))
            .collect();
        let (first, second) = groups.split_at(groups.len() / 2);
        let key = Zeroizing::new(format!("{}\n     {}", first.join(" "), second.join(" ")));
        Zeroizing::new(format!(
            "{FIRST_LINE} {VERSION}\nrepository: {}\nkey: {}\n",
            self.repository, *key
        ))
    }

    /// Reads a kit back, however it was typed: in any case, with any spaces and dashes.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default().trim();
        if first.strip_prefix(FIRST_LINE).map(str::trim) != Some(VERSION) {
            return Err("it is a recovery kit of another version");
        }
        let rest = Zeroizing::new(lines.collect::<Vec<_>>().join(" "));
        let (repository, key) = rest.split_once("key:").ok_or("it has no line 'key:'")?;
        let repository = repository.trim().strip_prefix("repository:").unwrap_or_default().trim();
        let repository: RepositoryId =
            repository.parse().map_err(|_| "its line 'repository:' holds no repository id")?;
        let all = decode(key).ok_or("its key is not 56 letters and digits")?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        key.copy_from_slice(&all[..KEY_BYTES]);
        if all[KEY_BYTES..] != check(&repository, &key) {
            return Err("its check does not match: a character is wrong");
        }
        Ok(Self { repository, key })
    }
}

impl fmt::Debug for RecoveryKit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecoveryKit(of {})", self.repository)
    }
}

impl From<&'static str> for BadKey {
    fn from(why: &'static str) -> Self {
        Self::new("the recovery kit", why)
    }
}

fn check(repository: &RepositoryId, key: &[u8; KEY_BYTES]) -> [u8; CHECK_BYTES] {
    let mut hasher = blake3::Hasher::new_derive_key(CHECK_CONTEXT);
    hasher.update(repository.as_str().as_bytes()).update(key);
    let mut sum = [0; CHECK_BYTES];
    hasher.finalize_xof().fill(&mut sum);
    sum
}

fn encode(bytes: &[u8; ALL_BYTES]) -> String {
    let mut text = String::with_capacity(CHARS);
    for five in bytes.chunks_exact(5) {
        let bits = five.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
        for place in (0..8).rev() {
            text.push(char::from(ALPHABET[(bits >> (5 * place) & 31) as usize]));
        }
    }
    text
}

fn decode(text: &str) -> Option<Zeroizing<[u8; ALL_BYTES]>> {
    let mut digits = Zeroizing::new(Vec::with_capacity(CHARS));
    for letter in text.chars().filter(|letter| !letter.is_whitespace() && *letter != '-') {
        // As Crockford has it: what looks alike is alike.
        let letter = match letter.to_ascii_uppercase() {
            'I' | 'L' => '1',
            'O' => '0',
            other => other,
        };
        let digit = ALPHABET.iter().position(|known| char::from(*known) == letter)?;
        if digits.len() == CHARS {
            return None;
        }
        digits.push(digit as u64);
    }
    let mut bytes = Zeroizing::new([0; ALL_BYTES]);
    if digits.len() != CHARS {
        return None;
    }
    for (eight, five) in digits.chunks_exact(8).zip(bytes.chunks_exact_mut(5)) {
        let bits = eight.iter().fold(0, |bits, digit| bits << 5 | digit);
        five.copy_from_slice(&bits.to_be_bytes()[3..]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kit() -> RecoveryKit {
        let mut key = [0; KEY_BYTES];
        key.iter_mut().enumerate().for_each(|(n, byte)| *byte = n as u8 * 7 + 3);
        RecoveryKit::new(&RepositoryId::from_random(5), &MasterKey::new(key))
    }

    #[test]
    fn a_kit_comes_back_however_it_is_typed() {
        let text = kit().text();
        for typed in [text.to_string(), text.replace('\n', "\r\n\r\n")] {
            let back = RecoveryKit::parse(&typed).unwrap();
            assert_eq!((&*back.key, &back.repository), (&*kit().key, &kit().repository));
        }
        let (head, key) = text.split_once("key:").unwrap();
        let strange = key.replace('0', "o").replace('1', "l").to_lowercase().replace(' ', "-");
        let back = RecoveryKit::parse(&format!("{head}key:{strange}")).unwrap();
        assert_eq!(*back.key, *kit().key);
        assert!(!format!("{:?}", kit()).contains(&key[..5]));
    }

    #[test]
    fn every_wrong_character_is_noticed() {
        let text = kit().text();
        let (head, key) = text.split_once("key:").unwrap();
        for (at, letter) in key.char_indices().filter(|(_, letter)| !letter.is_whitespace()) {
            let other = if letter == 'A' { "B" } else { "A" };
            let mut wrong = key.to_owned();
            wrong.replace_range(at..=at, other);
            assert!(RecoveryKit::parse(&format!("{head}key:{wrong}")).is_err(), "{at}");
            wrong.remove(at);
            assert!(RecoveryKit::parse(&format!("{head}key:{wrong}")).is_err(), "{at} left out");
        }
        assert!(RecoveryKit::parse(&text.replace("kit 1", "kit 2")).is_err());
        assert!(RecoveryKit::parse(FIRST_LINE).is_err() && RecoveryKit::parse("").is_err());
    }
}
