//! `icecore repo serve`, run from outside, with an authority of certificates of its own.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::authority::{make_authority, make_certificate};
use crate::failure::{Failure, Result};
use crate::icecore::{Icecore, Site};
use crate::place::Scratch;
use crate::process::{Background, run, wait_until};

/// A server listens, and ends, within this time, also on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// A repository server with TLS on a port of its own.
#[derive(Debug)]
pub struct RepoServer {
    scratch: Scratch,
    port: u16,
    binary: PathBuf,
    process: Option<Background>,
}

impl RepoServer {
    /// Makes certificates and starts a server of this binary.
    pub fn start(binary: &Path) -> Result<Self> {
        let scratch = Scratch::new()?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        make_authority(&scratch, "ca")?;
        make_authority(&scratch, "other-ca")?;
        make_certificate(&scratch)?;
        std::fs::create_dir(scratch.join("served"))?;
        let mut server = Self { scratch, port, binary: binary.to_owned(), process: None };
        server.restart()?;
        Ok(server)
    }

    /// Starts it (again).
    pub fn restart(&mut self) -> Result<()> {
        self.process = None;
        let log = File::options().append(true).create(true).open(self.path("server.log"))?;
        let mut command = Command::new(&self.binary);
        command.args(["repo", "serve", "--listen", &format!("127.0.0.1:{}", self.port)]);
        command.arg("--directory").arg(self.served());
        command.arg("--tls-cert").arg(self.path("server.pem"));
        command.arg("--tls-key").arg(self.path("server.key"));
        command.arg("--state-dir").arg(self.path("state"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut process = Background::spawn(&mut command)?;
        wait_until("the repository server", DEADLINE, || {
            if process.ended()?.is_some() {
                return Err(Failure::new(format!("the server ended: {}", self.log()?)));
            }
            Ok(TcpStream::connect(("127.0.0.1", self.port)).is_ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills it, as when its host dies.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Ends it as systemd does; its exit status.
    pub fn end(&mut self) -> Result<Option<i32>> {
        let mut process =
            self.process.take().ok_or_else(|| Failure::new("the server does not run"))?;
        process.signal(Signal::TERM);
        Ok(process.wait_within(DEADLINE)?.code())
    }

    /// All that it wrote.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.path("server.log"))?)
    }

    /// A path in its own folder: `ca.pem`, `other-ca.pem`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// The directory that it serves.
    pub fn served(&self) -> PathBuf {
        self.scratch.join("served")
    }

    /// Where it listens.
    pub fn authority(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The address of a repository.
    pub fn address(&self, name: &str) -> String {
        format!("https://{}/{name}", self.authority())
    }

    /// Makes a token for a repository; the file that holds it.
    pub fn add_token(&self, name: &str, right: &str, repository: &str) -> Result<PathBuf> {
        let mut command = Command::new(&self.binary);
        command.args(["repo", "token", "add", name, "--right", right, "--repository", repository]);
        command.arg("--directory").arg(self.served()).arg("--state-dir").arg(self.path("state"));
        let token = run(&mut command)?.stdout;
        let file = self.path(&format!("{name}.token"));
        std::fs::write(&file, token)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
        Ok(file)
    }

    /// Adds lines to the file of tokens and quotas.
    pub fn allow(&self, lines: &str) -> Result<()> {
        let path = self.served().join(".tokens.toml");
        let text = std::fs::read_to_string(&path)?;
        Ok(std::fs::write(path, format!("{text}\n{lines}"))?)
    }

    /// A repository, and what it takes to reach it with this token.
    pub fn site(&self, repository: &str, token: &Path) -> Site {
        let environment = vec![
            ("ICECORE_REPO_TOKEN_FILE".to_owned(), token.into()),
            ("ICECORE_CA_FILE".to_owned(), self.path("ca.pem").into()),
        ];
        Site { address: self.address(repository), environment, init: Vec::new() }
    }

    /// A user with a token of this name and right, and the address of a repository.
    pub fn user(&self, name: &str, right: &str, repository: &str) -> Result<Icecore> {
        let token = self.add_token(name, right, repository)?;
        Icecore::without_repository_at(&self.site(repository, &token))
    }
}
