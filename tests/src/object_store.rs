//! Real object stores on this machine: rclone's and moto's S3, and Ceph's.
//!
//! Each is a process (Ceph's are three) of its own in a folder of its own, ended with its owner.

use std::ffi::OsString;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::authority::{make_authority, make_certificate};
use crate::ceph::Ceph;
use crate::failure::Result;
use crate::icecore::Site;
use crate::place::{Scratch, provisioned};
use crate::process::{Background, run, wait_until};

/// Key and secret that the servers are told.
pub const ACCESS_KEY: &str = "laboratory";
/// See [`ACCESS_KEY`].
pub const SECRET_KEY: &str = "laboratory-secret";

const START_DEADLINE: Duration = Duration::from_secs(60);

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectServer {
    /// `rclone serve s3`: overwrites whatever it is asked.
    Rclone,
    /// The same over TLS, with a certificate by an authority that nobody else knows.
    RcloneTls,
    /// `moto_server`: takes any secret.
    Moto,
    /// Ceph's radosgw over one monitor and one memory OSD.
    Ceph,
}

/// A running server.
#[derive(Debug)]
pub struct ObjectStore {
    server: ObjectServer,
    port: u16,
    _processes: Vec<Background>,
    scratch: Scratch,
}

impl ObjectStore {
    /// Starts a server; none, and a line that says so, where its packages could not be had.
    pub fn start(server: ObjectServer) -> Result<Option<Self>> {
        let Some(program) = program(server) else {
            eprintln!("SKIPPED: {server:?} is not installed; `cargo xtask test` does that");
            return Ok(None);
        };
        let scratch = Scratch::new()?;
        let port = free_port()?;
        let processes = match server {
            ObjectServer::Rclone | ObjectServer::RcloneTls => {
                let folder = scratch.join("objects");
                std::fs::create_dir(&folder)?;
                let mut command = Command::new(program);
                command.args(["serve", "s3", "--config", ""]);
                command.args(["--addr", &format!("127.0.0.1:{port}")]);
                command.args(["--auth-key", &format!("{ACCESS_KEY},{SECRET_KEY}")]);
                if server == ObjectServer::RcloneTls {
                    make_authority(&scratch, "ca")?;
                    make_authority(&scratch, "other-ca")?;
                    make_certificate(&scratch)?;
                    command.arg("--cert").arg(scratch.join("server.pem"));
                    command.arg("--key").arg(scratch.join("server.key"));
                }
                vec![silent(command.arg(folder))?]
            }
            ObjectServer::Moto => {
                let mut command = Command::new(program);
                vec![silent(command.args(["-H", "127.0.0.1", "-p", &port.to_string()]))?]
            }
            ObjectServer::Ceph => Ceph::start(scratch.path(), port)?,
        };
        let store = Self { server, port, _processes: processes, scratch };
        wait_until("an answer of the object store", START_DEADLINE, || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() && store.answers()?)
        })?;
        Ok(Some(store))
    }

    fn answers(&self) -> Result<bool> {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-o", "/dev/null", "-m", "5", &self.endpoint()]);
        if self.server == ObjectServer::RcloneTls {
            curl.arg("--cacert").arg(self.path("ca.pem"));
        }
        Ok(run(&mut curl).is_ok())
    }

    /// Where it is.
    pub fn endpoint(&self) -> String {
        let scheme = if self.server == ObjectServer::RcloneTls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// A path in its own folder; of one with TLS: `ca.pem`, `other-ca.pem`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The variables that name it and its keys.
    pub fn environment(&self) -> Vec<(String, OsString)> {
        object_store_environment(&self.endpoint(), SECRET_KEY)
    }

    /// A repository in it.
    pub fn site(&self, address: &str) -> Site {
        let environment = self.environment();
        Site { address: address.to_owned(), environment, ..Site::default() }
    }
}

/// The variables for a server at `endpoint`, with this secret.
pub(crate) fn object_store_environment(endpoint: &str, secret: &str) -> Vec<(String, OsString)> {
    let variables = [
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", secret),
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
    ];
    variables.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect()
}

fn program(server: ObjectServer) -> Option<PathBuf> {
    let of_python = |name: &str| provisioned().join("object-stores/bin").join(name);
    let program = match server {
        ObjectServer::Rclone | ObjectServer::RcloneTls => of_python("rclone"),
        ObjectServer::Moto => of_python("moto_server"),
        ObjectServer::Ceph => PathBuf::from("/usr/bin/radosgw"),
    };
    program.is_file().then_some(program)
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

pub(crate) fn silent(command: &mut Command) -> Result<Background> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Background::spawn(command)
}
