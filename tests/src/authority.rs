//! Authorities of certificates that a test makes for itself, and a server's certificate by one.

use std::process::Command;

use crate::failure::Result;
use crate::place::Scratch;
use crate::process::run;

fn openssl(scratch: &Scratch, arguments: &str) -> Result<()> {
    let mut command = Command::new("openssl");
    run(command.current_dir(scratch.path()).args(arguments.split_whitespace())).map(drop)
}

/// Makes `NAME.pem` and `NAME.key` in the folder: an authority that nobody knows.
pub(crate) fn make_authority(scratch: &Scratch, name: &str) -> Result<()> {
    openssl(
        scratch,
        &format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
             -subj /CN=icecore-test-{name} -keyout {name}.key -out {name}.pem"
        ),
    )
}

/// Makes `server.pem` and `server.key` in the folder, by its authority `ca`, for this machine.
pub(crate) fn make_certificate(scratch: &Scratch) -> Result<()> {
    openssl(
        scratch,
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=server \
         -keyout server.key -out server.csr",
    )?;
    std::fs::write(scratch.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n")?;
    openssl(
        scratch,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 \
         -extfile names -out server.pem",
    )
}
