//! The file that says who may come in: tokens by their hashes, and what each repository may take.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use icecore_repository::rights::Right;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};
use crate::names;

/// A token's random bytes: nobody guesses 256 bits, so a plain hash is enough to keep.
const TOKEN_BYTES: usize = 32;
/// Tells a token of ours from other secrets, for people and for scanners of secrets.
const TOKEN_PREFIX: &str = "icecore_";
/// What stands before a hash in the file.
const HASH_PREFIX: &str = "blake3:";
/// A larger file is something else.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Stands for all repositories.
const ALL: &str = "*";

/// What the file holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// `[token.NAME]`, the name being the host's.
    #[serde(default)]
    token: BTreeMap<String, Token>,
    /// `[repository.NAME]`
    #[serde(default)]
    repository: BTreeMap<String, Allowance>,
}

/// One token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    hash: String,
    pub right: Right,
    pub repositories: Vec<String>,
}

/// What one repository may take.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Allowance {
    quota: Option<String>,
}

/// Somebody who may do something in a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    pub name: String,
    pub right: Right,
}

impl Tokens {
    /// Reads a file that only its owner may read; one that is not there holds nothing.
    pub fn load(path: &Path) -> Outcome<Self> {
        let tried = format!("read the tokens in {}", path.display());
        let about = match std::fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            other => other.map_err(|e| Failure::failed(&tried, e))?,
        };
        if about.mode() & 0o077 != 0 {
            let why = "others than its owner may read or change it";
            return Err(Failure::usage(tried, why).next(format!("chmod 600 {}", path.display())));
        }
        if about.len() > FILE_BYTES_MAX {
            return Err(Failure::usage(tried, "it is too long for a list of tokens"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| Failure::failed(&tried, e))?;
        let tokens: Self = toml::from_str(&text).map_err(|e| Failure::usage(&tried, e))?;
        tokens.check().map_err(|why| Failure::usage(tried, why))?;
        Ok(tokens)
    }

    fn check(&self) -> Result<(), String> {
        for (name, token) in &self.token {
            parse_hash(&token.hash).map_err(|why| format!("token {name}: {why}"))?;
        }
        for (name, allowance) in &self.repository {
            if let Some(quota) = &allowance.quota {
                names::size(quota).map_err(|why| format!("repository {name}: {why}"))?;
            }
        }
        Ok(())
    }

    /// Replaces the file at once, so that a running server reads the old one or the new one.
    pub fn save(&self, path: &Path) -> Outcome<()> {
        let tried = format!("write the tokens to {}", path.display());
        let text = toml::to_string_pretty(self).map_err(|e| Failure::failed(&tried, e))?;
        let beside = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            // The folder may be another user's: what lies there is not followed and not opened.
            match std::fs::remove_file(&beside) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(&beside)?;
            file.write_all(text.as_bytes())?;
            keep_owner(path, &file)?;
            file.sync_all()?;
            std::fs::rename(&beside, path)
        };
        write().map_err(|e| Failure::failed(tried, e))
    }

    /// Makes a token; its text is nowhere else.
    pub fn add(&mut self, name: &str, right: Right, repositories: Vec<String>) -> Outcome<String> {
        let tried = format!("add the token {name}");
        if self.token.contains_key(name) {
            let why = "there is one of that name";
            return Err(Failure::refused(tried, why).next("remove it first, or take another name"));
        }
        let mut random = [0; TOKEN_BYTES];
        getrandom::fill(&mut random).map_err(|e| Failure::failed(&tried, e))?;
        let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!("{TOKEN_PREFIX}{hex}");
        let hash = format!("{HASH_PREFIX}{}", blake3::hash(text.as_bytes()));
        self.token.insert(name.to_owned(), Token { hash, right, repositories });
        Ok(text)
    }

    /// Takes a token away; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        self.token.remove(name).is_some()
    }

    /// All tokens by name.
    pub fn all(&self) -> impl Iterator<Item = (&String, &Token)> {
        self.token.iter()
    }

    /// Who the bearer of `secret` is in a repository, if anybody. Hashes are compared in constant
    /// time, all of them.
    pub fn bearer(&self, secret: &str, repository: &str) -> Option<Client> {
        let hash = blake3::hash(secret.as_bytes());
        let mut found = None;
        for (name, token) in &self.token {
            if parse_hash(&token.hash).is_ok_and(|known| known == hash) {
                found = Some((name, token));
            }
        }
        let (name, token) = found?;
        let may = |known: &String| known == ALL || known == repository;
        let client = || Client { name: name.clone(), right: token.right };
        token.repositories.iter().any(may).then(client)
    }

    /// What a repository may take in bytes, if the file says it.
    pub fn quota(&self, repository: &str) -> Option<u64> {
        let quota = self.repository.get(repository)?.quota.as_ref()?;
        names::size(quota).ok()
    }
}

/// The server runs as a user of its own, and whoever gives tokens may be root: what replaces the
/// file belongs to whoever has the file, or the directory of the first one.
fn keep_owner(path: &Path, file: &std::fs::File) -> std::io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let folder = || std::fs::metadata(parent.unwrap_or(Path::new(".")));
    let owner = std::fs::symlink_metadata(path).or_else(|_| folder())?;
    if file.metadata()?.uid() == owner.uid() {
        return Ok(());
    }
    std::os::unix::fs::fchown(file, Some(owner.uid()), Some(owner.gid()))
}

fn parse_hash(text: &str) -> Result<blake3::Hash, String> {
    let hex = text.strip_prefix(HASH_PREFIX).ok_or("a hash begins with blake3:")?;
    blake3::Hash::from_hex(hex).map_err(|e| e.to_string())
}

/// The file as it is now, read again whenever it changes.
#[derive(Debug)]
pub struct Watched {
    path: PathBuf,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    version: Version,
    /// The state of the file that was last told to be unsound; it is looked at again all the same.
    refused: Option<Version>,
    tokens: Arc<Tokens>,
}

/// What tells one state of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version(Option<(u64, [i64; 4], u64)>);

impl Version {
    fn of(path: &Path) -> Self {
        let about = std::fs::metadata(path).ok();
        Self(about.map(|file| {
            // chmod and chown change the second time only.
            let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
            (file.ino(), times, file.len())
        }))
    }
}

impl Watched {
    /// Reads the file; it must be sound now.
    pub fn open(path: PathBuf) -> Outcome<Self> {
        let version = Version::of(&path);
        let tokens = Arc::new(Tokens::load(&path)?);
        Ok(Self { path, seen: Mutex::new(Seen { version, refused: None, tokens }) })
    }

    /// The tokens now. A file that cannot be read lets in whom the last sound one did.
    pub fn now(&self) -> Arc<Tokens> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let version = Version::of(&self.path);
        if version != seen.version {
            match Tokens::load(&self.path) {
                Ok(tokens) => {
                    tracing::info!("the tokens were read again");
                    *seen = Seen { version, refused: None, tokens: Arc::new(tokens) };
                }
                Err(failure) => {
                    if seen.refused.replace(version) != Some(version) {
                        tracing::error!("the tokens stay as they were: {failure}");
                    }
                }
            }
        }
        Arc::clone(&seen.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_repositories_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.toml");
        let mut tokens = Tokens::default();
        let host = tokens.add("web1", Right::Append, vec!["main".into()]).unwrap();
        let admin = tokens.add("admin", Right::Administer, vec!["*".into()]).unwrap();
        assert!(tokens.add("web1", Right::Read, vec![]).is_err());
        tokens.save(&path).unwrap();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(!kept.contains(&host) && kept.contains("blake3:"), "{kept}");
        let watched = Watched::open(path.clone()).unwrap();
        let who = |secret: &str, repository: &str| watched.now().bearer(secret, repository);
        let web1 = Client { name: "web1".into(), right: Right::Append };
        assert_eq!(who(&host, "main"), Some(web1));
        assert_eq!(who(&host, "other"), None);
        assert_eq!(who(&admin, "other").unwrap().right, Right::Administer);
        assert_eq!(who("icecore_", "main"), None);
        assert!(tokens.remove("web1") && !tokens.remove("web1"));
        tokens.save(&path).unwrap();
        assert_eq!(who(&host, "main"), None);
        std::fs::write(&path, "nonsense").unwrap();
        assert!(who(&admin, "main").is_some(), "the last sound file counts");
    }

    #[test]
    fn a_file_that_others_may_read_or_that_is_wrong_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.toml");
        let load = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            Tokens::load(&path)
        };
        let quota = "[repository.main]\nquota = \"10G\"\n";
        assert_eq!(load(quota, 0o600).unwrap().quota("main"), Some(10 << 30));
        assert!(load(quota, 0o640).is_err());
        assert!(load("[repository.main]\nquota = \"10X\"\n", 0o600).is_err());
        assert!(load("[tokens.x]\n", 0o600).is_err());
        let bad = "[token.x]\nhash = \"abc\"\nright = \"append\"\nrepositories = [\"*\"]\n";
        assert!(load(bad, 0o600).is_err());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Tokens::load(&path).unwrap(), Tokens::default());
    }
}
