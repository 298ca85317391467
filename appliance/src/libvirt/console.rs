//! A `virsh` that stays: one process and one connection for many commands.
//!
//! A process for each would take tens of milliseconds, and a guest is stopped or frozen while some
//! of them run. It reads commands from a pipe and is asked to `echo` a mark after each, so that the
//! end of an answer is known. It keeps no history.

use std::io::{BufRead as _, BufReader, PipeReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};

use rustix::process::Pid;

use super::{Virsh, VirshError};

/// Begins the line after an answer.
const MARK: &str = "icecore-answered-";
/// Begins the lines in which virsh repeats what it was asked.
const PROMPT: &str = "virsh # ";
/// Begins what it says of a failure.
const ERROR: &str = "error: ";

/// A `virsh` at work. It ends when this is dropped.
pub(super) struct Console {
    child: Child,
    input: ChildStdin,
    output: BufReader<PipeReader>,
    asked: u64,
}

impl Console {
    pub(super) fn open(virsh: &Virsh) -> std::io::Result<Self> {
        let (output, theirs) = std::io::pipe()?;
        let mut command = Command::new("virsh");
        // A quiet one would keep the number of frozen file systems to itself.
        command.args(["--connect", virsh.uri()]);
        command.env("LC_ALL", "C").env_remove("LANGUAGE");
        // Where it would keep its history of commands: nowhere.
        command.env("XDG_CACHE_HOME", "/dev/null");
        command.stdin(Stdio::piped()).stdout(theirs.try_clone()?).stderr(theirs);
        let mut child = command.spawn()?;
        let input = child.stdin.take().ok_or_else(|| std::io::Error::other("no input"))?;
        Ok(Self { child, input, output: BufReader::new(output), asked: 0 })
    }

    /// Its process.
    pub(super) fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    /// Runs one command, a line of printable ASCII, and waits for its end, however long it takes.
    ///
    /// # Errors
    /// The outer one: virsh is gone. The inner one: what it says of a failure.
    pub(super) fn ask(&mut self, line: &str) -> std::io::Result<Result<String, VirshError>> {
        self.asked += 1;
        let mark = format!("{MARK}{}", self.asked);
        // The prompt after the mark ends with no line: an empty command ends it.
        write!(self.input, "{line}\necho {mark}\n\n")?;
        self.input.flush()?;
        let mut said = String::new();
        loop {
            let mut bytes = Vec::new();
            if self.output.read_until(b'\n', &mut bytes)? == 0 {
                return Err(std::io::Error::other("virsh has ended"));
            }
            let line = String::from_utf8_lossy(&bytes);
            if line.starts_with(&mark) {
                return Ok(answer(&said));
            }
            said += &line;
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // One that has ended is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer without the lines that repeat the question.
fn answer(said: &str) -> Result<String, VirshError> {
    let lines = said.lines().filter(|line| !line.starts_with(PROMPT) && !line.is_empty());
    let (errors, lines): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with(ERROR));
    if errors.is_empty() {
        return Ok(lines.join("\n"));
    }
    let errors: Vec<&str> = errors.iter().filter_map(|line| line.strip_prefix(ERROR)).collect();
    Err(VirshError::said(&errors.join("; ")))
}

/// A JSON text as one argument for virsh: between quotes, with nothing in it that ends them or that
/// a terminal's line editor would take for a key.
pub(super) fn quoted(json: &str) -> String {
    let mut quoted = String::with_capacity(json.len() + 2);
    quoted.push('\'');
    for c in json.chars() {
        match c {
            '\'' => quoted += "\\u0027",
            ' '..='~' => quoted.push(c),
            c => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    quoted += &format!("\\u{unit:04x}");
                }
            }
        }
    }
    quoted.push('\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::Kind;

    #[test]
    fn an_answer_is_what_is_between_question_and_mark() {
        let said = "virsh # qemu-monitor-command u '{}'\n{\"return\":{}}\n\nvirsh # echo mark\n";
        assert_eq!(answer(said).as_deref(), Ok("{\"return\":{}}"));
        let said = "virsh # x\nerror: Requested operation is not valid: domain is not running\n";
        assert_eq!(answer(said).map_err(|e| e.kind), Err(Kind::NotRunning));
        assert_eq!(answer("").as_deref(), Ok(""));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_one_argument_and_stays_itself(text in "\\PC*|[\\x00-\\x7f]*") {
            let json = serde_json::json!({ "text": text }).to_string();
            let quoted = quoted(&json);
            let inner = quoted.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')).unwrap();
            proptest::prop_assert!(inner.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'\''));
            let read: serde_json::Value = serde_json::from_str(inner).unwrap();
            proptest::prop_assert_eq!(read["text"].as_str(), Some(text.as_str()));
        }
    }
}
