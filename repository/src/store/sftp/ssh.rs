//! The server at the other end of the system's `ssh`: its address, the command, and what ssh says
//! when it fails.
//!
//! Because it is the user's own ssh, his configuration, keys, agent, jump hosts and known_hosts apply.
//! Nothing is ever asked of a person: a backup runs when nobody is there.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use std::os::unix::process::CommandExt as _;

use super::session::Session;
use super::wire::Hello;
use crate::store::StoreErrorKind;
use crate::store::error::told;

/// What is run in place of `ssh`, with its first arguments, separated by spaces.
const COMMAND_VARIABLE: &str = "ICECORE_SSH";

/// Before the arguments of ours; what stands here beats the user's configuration.
const OPTIONS: [&str; 9] = [
    // No password, no question about an unknown host: fail instead.
    "-oBatchMode=yes",
    "-oConnectTimeout=20",
    // A peer that is gone is noticed within a minute, also by a write that waits.
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
    // What a file transfer has no use for is not opened.
    "-oClearAllForwardings=yes",
    "-oForwardAgent=no",
    "-oForwardX11=no",
    "-oPermitLocalCommand=no",
    "-oRequestTTY=no",
];

/// The last lines of ssh say why it failed; a server's banner may be long.
const COMPLAINT_BYTES_MAX: usize = 2048;
/// ssh ends at once when its connection does.
const END_WAIT: Duration = Duration::from_secs(2);

/// `sftp://[user@]host[:port]/path`. A path below `/~/` begins at the user's home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SftpAddress {
    user: Option<String>,
    host: String,
    port: Option<u16>,
    path: String,
}

/// A text behind `sftp://` that is no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSftpAddress {
    /// No path, or an empty one.
    #[error("an SFTP address is sftp://user@host[:port]/path: the path is missing")]
    Path,
    /// A host or user that ssh could take for something else.
    #[error("the user and the host of an SFTP address have letters, digits and '.-_:' only")]
    Host,
    /// A port that is none.
    #[error("the port of an SFTP address is a number from 1 to 65535")]
    Port,
    /// A secret on the command line.
    #[error("an SFTP address has no password: use a key, as your ssh finds it")]
    Password,
}

impl FromStr for SftpAddress {
    type Err = BadSftpAddress;

    /// What stands behind `sftp://`.
    fn from_str(text: &str) -> Result<Self, BadSftpAddress> {
        let (place, path) = text.split_once('/').ok_or(BadSftpAddress::Path)?;
        let path = path.trim_end_matches('/');
        if path.is_empty() || path == "~" || path.contains('\0') {
            return Err(BadSftpAddress::Path);
        }
        let path = match path.strip_prefix("~/") {
            Some(below_home) => below_home.to_owned(),
            None => format!("/{path}"),
        };
        let (user, place) = match place.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, place),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err(BadSftpAddress::Password);
        }
        let (host, port) = host_and_port(place)?;
        if !is_plain(host, ":") || user.is_some_and(|user| !is_plain(user, "")) {
            return Err(BadSftpAddress::Host);
        }
        Ok(Self { user: user.map(ToOwned::to_owned), host: host.to_owned(), port, path })
    }
}

fn host_and_port(place: &str) -> Result<(&str, Option<u16>), BadSftpAddress> {
    let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => (host, Some(rest.strip_prefix(':').ok_or(BadSftpAddress::Port)?)),
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    let parse = |port: &str| port.parse().ok().filter(|&port| port > 0);
    match port.map(parse) {
        Some(None) => Err(BadSftpAddress::Port),
        port => Ok((host, port.flatten())),
    }
}

/// Nothing that ssh, or a ProxyCommand of the user's, could take for an option or for shell.
fn is_plain(text: &str, more: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c) || more.contains(c);
    !text.is_empty() && !text.starts_with('-') && text.chars().all(plain)
}

impl fmt::Display for SftpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sftp://")?;
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        match self.host.contains(':') {
            true => write!(f, "[{}]", self.host)?,
            false => f.write_str(&self.host)?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        match self.path.starts_with('/') {
            true => f.write_str(&self.path),
            false => write!(f, "/~/{}", self.path),
        }
    }
}

impl SftpAddress {
    /// Where on the server, absolute or from the user's home on.
    pub(super) fn path(&self) -> &str {
        &self.path
    }
}

/// The program that connects, with its first arguments.
#[derive(Debug, Clone)]
pub struct Ssh(Vec<String>);

impl Ssh {
    /// What `ICECORE_SSH` says (words separated by spaces, no shell), else `ssh`.
    #[must_use]
    pub fn from_environment() -> Self {
        Self::new(&std::env::var(COMMAND_VARIABLE).unwrap_or_default())
    }

    /// A program and its first arguments, separated by spaces; `ssh` when empty.
    #[must_use]
    pub fn new(command: &str) -> Self {
        let words: Vec<String> = command.split_whitespace().map(ToOwned::to_owned).collect();
        if words.is_empty() { Self(vec!["ssh".to_owned()]) } else { Self(words) }
    }

    fn command(&self, address: &SftpAddress) -> Command {
        let mut command = Command::new(&self.0[0]);
        command.args(&self.0[1..]).args(OPTIONS);
        if let Some(port) = address.port {
            command.arg(format!("-p{port}"));
        }
        if let Some(user) = &address.user {
            command.arg("-l").arg(user);
        }
        command.args(["-s", "--", &address.host, "sftp"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // An interrupt at the terminal is ours to hear: what was begun is still to be cleaned up.
        command.process_group(0);
        command
    }

    /// Connects and greets.
    pub(super) fn connect(&self, address: &SftpAddress) -> io::Result<(Tunnel, Session, Hello)> {
        // Whatever the system says of the program, it says nothing of an object.
        let start = |error| io::Error::other(format!("{} cannot be started: {error}", self.0[0]));
        let mut child = self.command(address).spawn().map_err(start)?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            return Err(io::Error::other("ssh has no pipes"));
        };
        let complaint = Complaint::default();
        let listener = complaint.collect(stderr)?;
        let tunnel = Tunnel { child: Mutex::new(child), complaint, listener };
        match Session::start(stdout, stdin) {
            Ok((session, hello)) => Ok((tunnel, session, hello)),
            Err(error) => Err(tunnel.why(&error)),
        }
    }
}

/// The process of ssh. It ends with this value.
#[derive(Debug)]
pub(super) struct Tunnel {
    child: Mutex<Child>,
    complaint: Complaint,
    listener: JoinHandle<()>,
}

impl Tunnel {
    /// What a lost connection means, in ssh's own words where there are any.
    pub(super) fn why(&self, error: &io::Error) -> io::Error {
        self.wait_for_end();
        let said = self.complaint.text();
        if said.is_empty() { io::Error::other(error.to_string()) } else { explain(&said) }
    }

    fn wait_for_end(&self) {
        let until = Instant::now() + END_WAIT;
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Not for ever: a connection that ssh shares may live on with its standard error.
        let is_over = |child: &mut Child| {
            !matches!(child.try_wait(), Ok(None)) && self.listener.is_finished()
        };
        while !is_over(&mut child) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Every file that counts was closed or is garbage: nothing is lost with it.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The last lines that ssh wrote to its standard error.
#[derive(Debug, Clone, Default)]
struct Complaint(Arc<Mutex<String>>);

impl Complaint {
    /// Reads on beside everything else, so that ssh never waits for it.
    fn collect(&self, stderr: ChildStderr) -> io::Result<JoinHandle<()>> {
        let kept = self.clone();
        let read = move || kept.read(stderr);
        std::thread::Builder::new().name("icecore-ssh".into()).spawn(read)
    }

    fn read(&self, stderr: impl Read) {
        let mut lines = BufReader::new(stderr);
        let mut line = Vec::new();
        let limit = COMPLAINT_BYTES_MAX as u64;
        while let Ok(1..) = (&mut lines).take(limit).read_until(b'\n', &mut line) {
            let text: String = String::from_utf8_lossy(&line).trim().escape_debug().collect();
            line.clear();
            // Frames of warnings say nothing.
            if text.is_empty() || text.starts_with('@') {
                continue;
            }
            tracing::debug!("ssh: {text}");
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !kept.is_empty() {
                kept.push_str("; ");
            }
            kept.push_str(&text);
            while kept.len() > COMPLAINT_BYTES_MAX {
                let second = kept.find("; ").map_or(kept.len(), |end| end + 2);
                kept.drain(..second);
            }
        }
    }

    fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// ssh has one exit status for everything; its words tell more.
fn explain(said: &str) -> io::Error {
    let lower = said.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if has(&["host key verification failed", "host identification has changed"]) {
        let text = "the server has not the host key that ssh knows for it; make sure that it is \
                    the right server, then correct known_hosts";
        return told(StoreErrorKind::Credentials, format!("{text} ({said})"));
    }
    if has(&["permission denied", "too many authentication failures"]) {
        let text = "the server does not let this user in; a key that needs no passphrase, or an \
                    agent that has it, must be found by ssh";
        return told(StoreErrorKind::Credentials, format!("{text} ({said})"));
    }
    if has(&["subsystem request failed"]) {
        return io::Error::other(format!("the server offers no SFTP ({said})"));
    }
    told(StoreErrorKind::Unreachable, format!("ssh: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    #[test]
    fn an_address_reads_as_it_was_written() {
        for text in ["u@h/a/b", "h:22/a", "u@[::1]:2222/a", "[fe80::1]/x", "u@h/~/backups"] {
            let parsed: SftpAddress = text.parse().unwrap();
            assert_eq!(parsed.to_string(), format!("sftp://{text}"));
        }
        assert_eq!("u@h/~/b/c/".parse::<SftpAddress>().unwrap().path(), "b/c");
        assert_eq!("h//b".parse::<SftpAddress>().unwrap().path(), "//b");
    }

    #[test]
    fn what_ssh_could_misread_is_no_address() {
        use BadSftpAddress::{Host, Password, Path, Port};
        let bad = [
            ("h", Path),
            ("h/", Path),
            ("h/~/", Path),
            ("-oProxyCommand=x/a", Host),
            ("u@-x/a", Host),
            ("-l@h/a", Host),
            ("u@/a", Host),
            ("h;rm/a", Host),
            ("u:secret@h/a", Password),
            ("h:0/a", Port),
            ("h:x/a", Port),
            ("[::1]x/a", Port),
        ];
        for (text, why) in bad {
            assert_eq!(text.parse::<SftpAddress>(), Err(why), "{text}");
        }
    }

    #[test]
    fn the_command_is_the_users_ssh_with_our_options_behind() {
        let address: SftpAddress = "me@host:2222/a".parse().unwrap();
        let command = Ssh::new("my-ssh -F conf").command(&address);
        assert_eq!(command.get_program(), "my-ssh");
        let arguments: Vec<_> = command.get_args().map(|a| a.to_str().unwrap()).collect();
        assert_eq!(arguments[..3], ["-F", "conf", "-oBatchMode=yes"]);
        let last = ["-p2222", "-l", "me", "-s", "--", "host", "sftp"];
        assert_eq!(arguments[arguments.len() - 7..], last);
        assert_eq!(Ssh::new("").command(&address).get_program(), "ssh");
    }

    #[test]
    fn what_ssh_says_tells_who_has_to_act() {
        let kind = |said| StoreError::from_io("open", "x", "y", explain(said)).kind();
        assert_eq!(kind("Host key verification failed."), StoreErrorKind::Credentials);
        assert_eq!(kind("u@h: Permission denied (publickey)."), StoreErrorKind::Credentials);
        assert_eq!(
            kind("connect to host h port 22: Connection refused"),
            StoreErrorKind::Unreachable
        );
        let complaint = Complaint::default();
        let long = "x".repeat(COMPLAINT_BYTES_MAX);
        complaint.read(format!("{long}\nfirst\nlast\n").as_bytes());
        assert_eq!(complaint.text(), "first; last");
    }
}
