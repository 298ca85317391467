//! NBD URIs (nbd `doc/uri.md`): `nbd://host[:port]/export` and `nbd+unix:///export?socket=path`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port that the protocol has registered.
pub const DEFAULT_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "{}", path.display()),
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Endpoint::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// A server and an export.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// Where the server listens.
    pub endpoint: Endpoint,
    /// The export's name, often empty.
    pub export: String,
}

/// Why a text is no NBD URI for us.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a usable NBD URI: {why}")]
pub struct UriError {
    /// The text.
    pub text: String,
    /// What is wrong, and what would be right.
    pub why: &'static str,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Uri, UriError> {
        parse(text).map_err(|why| UriError { text: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<Uri, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no scheme; begin with nbd://")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path)?;
    let endpoint = match scheme {
        "nbd" if query.is_empty() => tcp(authority)?,
        "nbd" => return Err("nbd:// takes no parameters here"),
        "nbd+unix" if authority.is_empty() => Endpoint::Unix(socket(query)?),
        "nbd+unix" => {
            return Err("a unix socket has no host; write nbd+unix:///export?socket=path");
        }
        "nbds" | "nbds+unix" => return Err("TLS is not available; use nbd+unix:// or a tunnel"),
        "nbd+vsock" | "nbds+vsock" | "nbd+ssh" => return Err("this transport is not available"),
        _ => return Err("unknown scheme; use nbd:// or nbd+unix://"),
    };
    Ok(Uri { endpoint, export })
}

fn tcp(authority: &str) -> Result<Endpoint, &'static str> {
    if authority.contains('@') {
        return Err("a user name has no meaning without TLS");
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, after) = v6.split_once(']').ok_or("the bracket of the address is open")?;
            (host, after.strip_prefix(':').or(after.is_empty().then_some("")))
        }
        None => {
            let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
            (host, Some(port))
        }
    };
    let port = match port.ok_or("after the address only a port may come")? {
        "" => DEFAULT_PORT,
        digits => digits.parse().map_err(|_| "the port is no number up to 65535")?,
    };
    let host = decode(host)?;
    match host.is_empty() {
        true => Ok(Endpoint::Tcp { host: "localhost".to_owned(), port }),
        false => Ok(Endpoint::Tcp { host, port }),
    }
}

fn socket(query: &str) -> Result<PathBuf, &'static str> {
    let mut path = None;
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some(("socket", value)) if path.is_none() => path = Some(decode(value)?),
            Some(("socket", _)) => return Err("it names two sockets"),
            _ => return Err("the only parameter is socket=path"),
        }
    }
    path.filter(|path| !path.is_empty()).map(PathBuf::from).ok_or("socket=path is missing")
}

/// Undoes percent-encoding. Zero bytes are refused: no name or path has them.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16));
                let (high, low) = (digit(rest.next()), digit(rest.next()));
                let (Some(high), Some(low)) = (high, low) else {
                    return Err("after % two hexadecimal digits must come");
                };
                (high * 16 + low) as u8
            }
            byte => byte,
        };
        if byte == 0 {
            return Err("it contains a zero byte");
        }
        bytes.push(byte);
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

fn encode(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                write!(f, "{}", char::from(byte))?;
            }
            byte => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                encode(&self.export, f)?;
                f.write_str("?socket=")?;
                encode(&path.to_string_lossy(), f)
            }
            tcp => {
                write!(f, "nbd://{tcp}/")?;
                encode(&self.export, f)
            }
        }
    }
}
