//! Where a repository server is, and what it takes to come in.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::store::ObjectName;

/// Allows `http://` to other hosts, for a network that is safe by itself.
const ALLOW_HTTP_VARIABLE: &str = "ICECORE_ALLOW_HTTP";

/// `https://host[:port]/name`, with the files that it takes. Two are equal that name one place,
/// whatever files are used to come in.
#[derive(Debug, Clone)]
pub struct ServerAddress {
    tls: bool,
    authority: String,
    name: String,
    /// The file with this host's token; `ICECORE_REPO_TOKEN_FILE` when none.
    pub token_file: Option<PathBuf>,
    /// The file with the certificates that the server's is checked against; `ICECORE_CA_FILE` when
    /// none, else the host's own list.
    pub ca_file: Option<PathBuf>,
}

/// A text that is no address of a repository server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadServerAddress {
    /// The name of the repository is missing, or none.
    #[error(
        "a repository server's address is https://host[:port]/name, the name being letters, \
             digits, '.', '_' and '-'"
    )]
    Name,
    /// The host is missing, or none.
    #[error("the host of a repository server has letters, digits and '.-:[]' only")]
    Host,
    /// A token in clear.
    #[error(
        "http:// would show the token and all data to the network: use https://, or set \
             ICECORE_ALLOW_HTTP=1 where the network is safe by itself"
    )]
    Clear,
    /// A secret on the command line.
    #[error(
        "a repository server's address holds no secret: name a file with \
             ICECORE_REPO_TOKEN_FILE or token_file"
    )]
    Secret,
}

impl PartialEq for ServerAddress {
    fn eq(&self, other: &Self) -> bool {
        (self.tls, &self.authority, &self.name) == (other.tls, &other.authority, &other.name)
    }
}

impl Eq for ServerAddress {}

impl FromStr for ServerAddress {
    type Err = BadServerAddress;

    fn from_str(text: &str) -> Result<Self, BadServerAddress> {
        let allowed = std::env::var(ALLOW_HTTP_VARIABLE).is_ok_and(|word| word == "1");
        Self::parse(text, allowed)
    }
}

impl ServerAddress {
    fn parse(text: &str, http_allowed: bool) -> Result<Self, BadServerAddress> {
        let (tls, rest) = match text.split_once("://") {
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            _ => return Err(BadServerAddress::Host),
        };
        let (authority, name) = rest.split_once('/').ok_or(BadServerAddress::Name)?;
        let name = name.trim_end_matches('/');
        if name.contains('/') || ObjectName::new(name).is_err() {
            return Err(BadServerAddress::Name);
        }
        if authority.contains('@') {
            return Err(BadServerAddress::Secret);
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-:[]".contains(c);
        if authority.is_empty() || !authority.chars().all(plain) {
            return Err(BadServerAddress::Host);
        }
        if !tls && !http_allowed && !is_loopback(authority) {
            return Err(BadServerAddress::Clear);
        }
        let (authority, name) = (authority.to_owned(), name.to_owned());
        Ok(Self { tls, authority, name, token_file: None, ca_file: None })
    }

    pub(super) fn uses_tls(&self) -> bool {
        self.tls
    }

    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// What all requests begin with.
    pub(super) fn base(&self) -> String {
        format!("{}://{}/v1/{}", self.scheme(), self.authority, self.name)
    }
}

fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.scheme(), self.authority, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_as_it_was_written() {
        for text in ["https://backup.example:8443/main", "https://[::1]/a-b.c"] {
            let address = ServerAddress::parse(text, false).unwrap();
            assert_eq!(address.to_string(), text);
        }
        let address = ServerAddress::parse("https://h/main/", false).unwrap();
        assert_eq!(address.base(), "https://h/v1/main");
    }

    #[test]
    fn what_is_no_address_or_would_show_secrets_is_refused() {
        use BadServerAddress::{Clear, Host, Name, Secret};
        let bad = [
            ("https://h", Name),
            ("https://h/", Name),
            ("https://h/a/b", Name),
            ("https://h/../x", Name),
            ("https://h/.hidden", Name),
            ("https:///a", Host),
            ("https://h?x/a", Host),
            ("https://user:token@h/a", Secret),
            ("http://backup.example/a", Clear),
            ("http://10.0.0.1:80/a", Clear),
            ("http://localhost.example/a", Clear),
        ];
        for (text, why) in bad {
            assert_eq!(ServerAddress::parse(text, false), Err(why), "{text}");
        }
        for text in ["http://127.0.0.1:80/a", "http://localhost/a", "http://[::1]:1/a"] {
            assert!(ServerAddress::parse(text, false).is_ok(), "{text}");
        }
        assert!(ServerAddress::parse("http://10.0.0.1/a", true).is_ok());
    }
}
