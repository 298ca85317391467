//! A real OpenSSH server on this machine, with keys, known hosts and a client's configuration of its
//! own: nothing of the user's `~/.ssh` is read or changed.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::failure::{During, Failure, Result};
use crate::icecore::Site;
use crate::place::Scratch;
use crate::process::{Background, run, wait_until};

/// A server listens within this time, also on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// A server. It ends with its owner, and its sessions with it.
#[derive(Debug)]
pub struct SshServer {
    scratch: Scratch,
    port: u16,
    process: Option<Background>,
}

impl SshServer {
    /// Makes keys and starts the server.
    pub fn start() -> Result<Self> {
        let scratch = Scratch::new()?;
        // Free now; who takes it meanwhile makes the test fail, not pass.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        for key in ["host", "user"] {
            make_key(&scratch.join(key))?;
        }
        std::fs::copy(scratch.join("user.pub"), scratch.join("authorized"))?;
        std::fs::create_dir(scratch.join("served"))?;
        let mut server = Self { scratch, port, process: None };
        server.know_host("host")?;
        server.write_client_config()?;
        server.restart("internal-sftp")?;
        Ok(server)
    }

    /// Starts it again, with this program as its SFTP server.
    pub fn restart(&mut self, sftp_server: &str) -> Result<()> {
        self.kill();
        let scratch = |name: &str| self.scratch.join(name).display().to_string();
        let config = format!(
            "Port {}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n\
             StrictModes no\nPermitRootLogin yes\nMaxStartups 100\n\
             Subsystem sftp {sftp_server}\n",
            self.port,
            scratch("host"),
            scratch("authorized"),
        );
        std::fs::write(self.scratch.join("sshd.conf"), config)?;
        if rustix::process::geteuid().is_root() {
            // The package's service makes it when it starts.
            std::fs::create_dir_all("/run/sshd")?;
        }
        let log = std::fs::File::options().append(true).create(true).open(self.log())?;
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(self.scratch.join("sshd.conf"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut process = Background::spawn(&mut command)
            .during("start sshd: `cargo xtask test` installs openssh-server")?;
        wait_until("sshd", START_DEADLINE, || {
            if process.ended()?.is_some() {
                let log = std::fs::read_to_string(self.log())?;
                return Err(Failure::new(format!("sshd ended: {log}")));
            }
            Ok(TcpStream::connect(("127.0.0.1", self.port)).is_ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills the server and all its sessions, as when its host dies.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            kill_children(process.pid());
            process.kill();
        }
    }

    /// Kills its sessions; new ones are accepted.
    pub fn kill_sessions(&self) {
        if let Some(process) = &self.process {
            kill_children(process.pid());
        }
    }

    /// The folder that is served.
    pub fn served(&self) -> PathBuf {
        self.scratch.join("served")
    }

    /// The address of a path below the served folder.
    pub fn address(&self, path: &str) -> String {
        let served = self.served();
        format!("sftp://127.0.0.1:{}{}/{path}", self.port, served.display())
    }

    /// What to give `ICECORE_SSH`: ssh with a configuration of this server's own.
    pub fn command(&self) -> String {
        format!("ssh -F {}", self.scratch.join("ssh.conf").display())
    }

    /// A path below the served folder, and what it takes to reach it.
    pub fn site(&self, path: &str) -> Site {
        let environment = vec![("ICECORE_SSH".to_owned(), self.command().into())];
        Site { address: self.address(path), environment, init: Vec::new() }
    }

    /// Has clients expect another host key than the server's.
    pub fn forge_known_host(&self) -> Result<()> {
        make_key(&self.scratch.join("other"))?;
        self.know_host("other")
    }

    /// Lets no client in any more.
    pub fn forget_user(&self) -> Result<()> {
        Ok(std::fs::write(self.scratch.join("authorized"), "")?)
    }

    /// What the server wrote.
    fn log(&self) -> PathBuf {
        self.scratch.join("sshd.log")
    }

    fn know_host(&self, key: &str) -> Result<()> {
        let key = std::fs::read_to_string(self.scratch.join(format!("{key}.pub")))?;
        let line = format!("[127.0.0.1]:{} {key}", self.port);
        Ok(std::fs::write(self.scratch.join("known_hosts"), line)?)
    }

    fn write_client_config(&self) -> Result<()> {
        let config = format!(
            "Host *\n IdentityFile {}\n IdentitiesOnly yes\n IdentityAgent none\n\
             UserKnownHostsFile {}\n GlobalKnownHostsFile none\n StrictHostKeyChecking yes\n\
             CheckHostIP no\n UpdateHostKeys no\n",
            self.scratch.join("user").display(),
            self.scratch.join("known_hosts").display(),
        );
        Ok(std::fs::write(self.scratch.join("ssh.conf"), config)?)
    }
}

impl Drop for SshServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn make_key(path: &Path) -> Result<()> {
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-t", "ed25519", "-N", "", "-C", "icecore-test", "-f"]);
    run(command.arg(path)).map(drop)
}

/// Kills the children of a process of ours, and theirs first.
fn kill_children(pid: u32) {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    for child in children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()) {
        kill_children(child);
        if let Some(child) = rustix::process::Pid::from_raw(child.cast_signed()) {
            let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
        }
    }
}
