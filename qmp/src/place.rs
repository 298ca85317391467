//! Where a QEMU's monitor or its guest agent is reached.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use crate::errors::QmpError;

/// Exit status of a [`Place::Program`] that found no QEMU to speak for.
pub const NOBODY_THERE: u8 = 3;

/// How long a program that closed its end may take to exit.
const EXIT_WAIT: Duration = Duration::from_secs(1);

/// Where a monitor, or an agent's channel, is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A unix socket.
    Socket(PathBuf),
    /// A program and its arguments: it speaks on its standard input and output as the socket
    /// would, ends with its input, and exits with [`NOBODY_THERE`] where there is no QEMU.
    Program(Vec<String>),
}

impl From<PathBuf> for Place {
    fn from(path: PathBuf) -> Self {
        Self::Socket(path)
    }
}

impl Place {
    /// What it is called in messages: the socket's path, or the command line.
    pub fn name(&self) -> PathBuf {
        match self {
            Self::Socket(path) => path.clone(),
            Self::Program(words) => words.join(" ").into(),
        }
    }

    /// Connects. The program, where it is one, is given along: it tells why it ended.
    pub(crate) async fn open(
        &self,
        until: Instant,
        waited: Duration,
    ) -> Result<(UnixStream, Option<Child>), QmpError> {
        match self {
            Self::Socket(path) => {
                crate::monitor::connect(path, until, waited).await.map(|stream| (stream, None))
            }
            Self::Program(words) => {
                let started = start(words).map_err(|error| QmpError::Connect {
                    path: self.name(),
                    why: error.to_string(),
                })?;
                Ok((started.0, Some(started.1)))
            }
        }
    }
}

fn start(words: &[String]) -> std::io::Result<(UnixStream, Child)> {
    let (program, arguments) =
        words.split_first().ok_or_else(|| std::io::Error::other("no program is named"))?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let input = OwnedFd::from(theirs);
    let output = input.try_clone()?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::from(input)).stdout(Stdio::from(output));
    let child = command.stderr(Stdio::null()).spawn()?;
    Ok((UnixStream::from_std(ours)?, child))
}

/// A connection failed: `error`, unless its program says that there is no QEMU.
pub(crate) async fn told_by(child: Option<Child>, name: &Path, error: QmpError) -> QmpError {
    let Some(mut child) = child else { return error };
    match timeout(EXIT_WAIT, child.wait()).await {
        Ok(Ok(status)) if status.code() == Some(i32::from(NOBODY_THERE)) => {
            QmpError::NobodyListens { path: name.to_owned() }
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Monitor, agent::Agent};

    const DEADLINE: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Place {
        Place::Program(["sh", "-c", script].map(str::to_owned).to_vec())
    }

    #[tokio::test]
    async fn a_program_speaks_for_a_qemu() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}}}}"#;
        let script = format!(
            "echo '{greeting}'; while read -r line; do \
             id=${{line##*\\\"id\\\":}}; echo \"{{\\\"return\\\": {{}}, \\\"id\\\": $id\"; done"
        );
        let monitor = Monitor::reach(&shell(&script), DEADLINE).await.unwrap();
        assert_eq!(monitor.version().to_string(), "9.1.0");
        monitor.execute_raw("stop", serde_json::Value::Null, DEADLINE).await.unwrap();
    }

    #[tokio::test]
    async fn a_program_tells_whether_there_is_a_qemu() {
        let none = Monitor::reach(&shell("exit 3"), DEADLINE).await.unwrap_err();
        assert!(none.nobody_there(), "{none}");
        for other in [shell("exit 1"), Place::Program(vec!["/no/such/program".into()])] {
            let error = Monitor::reach(&other, DEADLINE).await.unwrap_err();
            assert!(!error.nobody_there(), "{error}");
        }
        let mut agent = Agent::reach(&shell("exit 1"), DEADLINE).await.unwrap();
        assert!(agent.ping(DEADLINE).await.is_err());
    }
}
