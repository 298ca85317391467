//! Who may do what: peers of the unix socket by their credentials, others by a token.

use std::path::Path;

use crate::config::{ApiConfig, TokenConfig};
use crate::failure::{Failure, Outcome};

pub use crate::config::Role;

/// A shorter secret could be guessed.
const TOKEN_BYTES_MIN: usize = 24;
/// A longer file holds something else.
const TOKEN_BYTES_MAX: u64 = 4096;
/// What comes before a token's hash where a file holds that in its place.
const HASH_PREFIX: &str = "blake3:";

/// Somebody who may do something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// As the job's record remembers it.
    pub name: String,
    pub role: Role,
}

impl Caller {
    /// Refuses what the caller's role does not allow.
    pub fn require(&self, role: Role, tried: &str) -> Outcome<()> {
        if self.role >= role {
            return Ok(());
        }
        let why = format!(
            "{} has the role {}, and this takes {}",
            self.name,
            word(self.role),
            word(role)
        );
        Err(Failure::forbidden(tried, why).next("ask an administrator of this host"))
    }
}

fn word(role: Role) -> &'static str {
    match role {
        Role::Read => "read",
        Role::Operate => "operate",
        Role::Administer => "administer",
    }
}

/// The user at the other end of a unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
}

/// What the daemon knows about who may come in.
#[derive(Debug, Default)]
pub struct Access {
    own_uid: u32,
    group: Option<Group>,
    tokens: Vec<Token>,
}

/// A group and the users that have it beside their first one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub gid: u32,
    members: Vec<String>,
}

#[derive(Debug)]
struct Token {
    name: String,
    role: Role,
    hash: blake3::Hash,
}

impl Access {
    /// Reads what the configuration names.
    pub fn load(config: &ApiConfig) -> Outcome<Self> {
        let group = config.group.as_deref().map(group).transpose()?;
        let tokens = config.tokens.iter().map(|(name, token)| Token::load(name, token));
        let own_uid = rustix::process::geteuid().as_raw();
        Ok(Self { own_uid, group, tokens: tokens.collect::<Outcome<_>>()? })
    }

    /// The group that may open the socket.
    pub fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// Whether anybody can come in over TCP.
    pub fn has_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Who a peer of the unix socket is, if anybody.
    pub fn peer(&self, peer: Peer) -> Option<Caller> {
        let name = format!("uid {}", peer.uid);
        if peer.uid == 0 || peer.uid == self.own_uid {
            return Some(Caller { name, role: Role::Administer });
        }
        let group = self.group.as_ref()?;
        let member = || {
            let user = user_name(&std::fs::read_to_string("/etc/passwd").ok()?, peer.uid)?;
            Some(group.members.contains(&user))
        };
        let may = peer.gid == group.gid || member().unwrap_or(false);
        may.then_some(Caller { name, role: Role::Operate })
    }

    /// Who the bearer of a token is. Hashes are compared in constant time.
    pub fn bearer(&self, token: &str) -> Option<Caller> {
        let hash = blake3::hash(token.as_bytes());
        let found = self.tokens.iter().find(|known| known.hash == hash)?;
        Some(Caller { name: format!("token {}", found.name), role: found.role })
    }
}

impl Token {
    fn load(name: &str, config: &TokenConfig) -> Outcome<Self> {
        let tried = format!("read the token {name} from {}", config.file.display());
        let text = read_secret(&config.file).map_err(|e| Failure::usage(&tried, e))?;
        let text = text.trim();
        let hash = match text.strip_prefix(HASH_PREFIX) {
            Some(hex) => blake3::Hash::from_hex(hex).map_err(|e| Failure::usage(&tried, e))?,
            None if text.len() < TOKEN_BYTES_MIN => {
                let why = format!("it is shorter than {TOKEN_BYTES_MIN} bytes");
                return Err(Failure::usage(tried, why)
                    .next("make one with 'head -c 32 /dev/urandom | base64'"));
            }
            None => blake3::hash(text.as_bytes()),
        };
        Ok(Self { name: name.to_owned(), role: config.role, hash })
    }
}

/// Reads a file that only its owner may read.
fn read_secret(path: &Path) -> std::io::Result<String> {
    use std::os::unix::fs::MetadataExt as _;
    let about = std::fs::metadata(path)?;
    if about.mode() & 0o077 != 0 {
        return Err(std::io::Error::other("others than its owner may read it: chmod 600"));
    }
    if about.len() > TOKEN_BYTES_MAX {
        return Err(std::io::Error::other("it is too long for a token"));
    }
    std::fs::read_to_string(path)
}

fn group(name: &str) -> Outcome<Group> {
    let tried = format!("find the group {name}");
    let text = std::fs::read_to_string("/etc/group").map_err(|e| Failure::failed(&tried, e))?;
    group_in(&text, name).ok_or_else(|| Failure::usage(tried, "/etc/group has no such group"))
}

/// A line of group(5) is `name:password:gid:member,member`.
fn group_in(text: &str, name: &str) -> Option<Group> {
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    let members = fields.next().unwrap_or_default().split(',').map(ToOwned::to_owned).collect();
    Some(Group { gid, members })
}

/// A line of passwd(5) is `name:password:uid:…`.
fn user_name(text: &str, uid: u32) -> Option<String> {
    let has_uid = |line: &&str| line.split(':').nth(2) == Some(&uid.to_string());
    text.lines().find(has_uid)?.split(':').next().map(ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        let group = group_in("root:x:0:\nice:x:77:ann,bob\n", "ice");
        let hash = blake3::hash(b"secret");
        let tokens = vec![Token { name: "t".into(), role: Role::Read, hash }];
        Access { own_uid: 500, group, tokens }
    }

    #[test]
    fn root_and_the_daemons_user_administer_and_the_group_operates() {
        let access = access();
        let role = |uid, gid| access.peer(Peer { uid, gid }).map(|caller| caller.role);
        assert_eq!(role(0, 5), Some(Role::Administer));
        assert_eq!(role(500, 5), Some(Role::Administer));
        assert_eq!(role(4242, 77), Some(Role::Operate));
        assert_eq!(role(4242, 5), None);
        assert_eq!(user_name("ann:x:12:13::/:/bin/sh\n", 12), Some("ann".into()));
    }

    #[test]
    fn a_token_is_known_by_its_hash_and_a_role_is_enough_or_not() {
        let access = access();
        assert_eq!(access.bearer("wrong"), None);
        let caller = access.bearer("secret").unwrap();
        assert!(caller.require(Role::Read, "look").is_ok());
        let refused = caller.require(Role::Operate, "act").unwrap_err();
        assert_eq!(refused.nature, crate::failure::Nature::Forbidden);
    }

    #[test]
    fn a_token_that_others_can_read_or_guess_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let load = || Token::load("t", &TokenConfig { role: Role::Read, file: file.clone() });
        std::fs::write(&file, "x".repeat(40)).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load().is_err());
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(load().is_ok());
        std::fs::write(&file, "short").unwrap();
        assert!(load().is_err());
        std::fs::write(&file, format!("blake3:{}\n", blake3::hash(b"abc"))).unwrap();
        assert_eq!(load().unwrap().hash, blake3::hash(b"abc"));
    }
}
