//! Commands in the guest, through a virtio port of the laboratory's own.
//!
//! Unlike `guest-exec` it needs no agent, leaves the agent's socket to Icecore, and works while
//! the guest's file systems are frozen.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::failure::{During, Failure, Result};

/// Guest commands are slow under emulation; none of the tests' takes longer.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// The command channel of one guest.
#[derive(Debug)]
pub struct Shell {
    reader: BufReader<UnixStream>,
    next_id: u64,
}

impl Shell {
    /// Connects to the port's socket. The guest need not be up yet.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).during(socket.display())?;
        Ok(Self { reader: BufReader::new(stream), next_id: 1 })
    }

    /// Waits until the guest runs commands.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let until = Instant::now() + deadline;
        // A request that a rebooting guest swallowed is never answered, so each try is short.
        while Instant::now() < until {
            if self.request("true", Duration::from_secs(2)).is_ok() {
                return Ok(());
            }
        }
        Err(Failure::new(format!("the guest ran no command within {} s", deadline.as_secs())))
    }

    /// Runs a shell command; a status other than 0 is a failure with its output.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let (status, output) = self.request(command, COMMAND_DEADLINE).during(command)?;
        if status == 0 {
            return Ok(output);
        }
        Err(Failure::new(format!("in the guest: {command}: status {status}: {output}")))
    }

    /// Sends a command without waiting for an answer (it may end the guest).
    pub fn send(&mut self, command: &str) -> Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let line = format!("{id} {}\n", base64_encode(command.as_bytes()));
        self.reader.get_mut().write_all(line.as_bytes()).during("guest command channel")?;
        Ok(id)
    }

    fn request(&mut self, command: &str, deadline: Duration) -> Result<(i32, String)> {
        let id = self.send(command)?;
        let until = Instant::now() + deadline;
        let mut line = Vec::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::new("no answer from the guest in time"));
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => return Err(Failure::new("the guest's command channel closed")),
                Ok(_) if line.ends_with(b"\n") => {
                    let text = String::from_utf8_lossy(&line).into_owned();
                    line.clear();
                    // Answers to requests given up earlier carry smaller ids.
                    if let Some(answer) = parse_answer(&text, id) {
                        return Ok(answer);
                    }
                }
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn parse_answer(line: &str, id: u64) -> Option<(i32, String)> {
    let mut words = line.split_whitespace();
    if words.next()?.parse() != Ok(id) {
        return None;
    }
    let status = words.next()?.parse().ok()?;
    let output = base64_decode(words.next().unwrap_or_default());
    Some((status, String::from_utf8_lossy(&output).trim_end().to_owned()))
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64_encode(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for position in 0..4 {
            let index = word >> (18 - 6 * position) & 63;
            let padding = position > chunk.len();
            text.push(if padding { '=' } else { char::from(ALPHABET[index as usize]) });
        }
    }
    text
}

fn base64_decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut word, mut bits) = (0u32, 0);
    for letter in text.bytes() {
        let Some(value) = ALPHABET.iter().position(|known| *known == letter) else { continue };
        word = word << 6 | value as u32;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits & 0xff) as u8);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_what_the_guest_understands() {
        for (plain, text) in [("", ""), ("a", "YQ=="), ("ab", "YWI="), ("abc", "YWJj")] {
            assert_eq!(base64_encode(plain.as_bytes()), text);
            assert_eq!(base64_decode(text), plain.as_bytes());
        }
    }

    #[test]
    fn an_answer_to_another_request_is_passed_over() {
        assert_eq!(parse_answer("7 0 YQ==\n", 8), None);
        assert_eq!(parse_answer("8 1 YQ==\n", 8), Some((1, "a".to_owned())));
        assert_eq!(parse_answer("8 0 \n", 8), Some((0, String::new())));
    }
}
