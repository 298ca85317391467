//! Cuts a byte stream into JSON objects, bounded in length and depth before anything is parsed.
//!
//! QEMU ends each message with a newline, but `-mon pretty=on` spreads one message over many
//! lines, so objects are told apart by their braces and not by lines.

use std::fmt;

/// Longest message accepted. The longest honest one is the schema (236 kB); block queries of a
/// machine with hundreds of disks stay below 2 MiB. Parsed JSON takes up to ten times its text.
pub const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// Deepest nesting accepted: serde_json stops one further. `query-block` nests one level for each
/// backing file, so a disk may lie on some 120 of them.
pub const MAX_DEPTH: u32 = 127;

/// How much of an offending message an error quotes.
const QUOTE_BYTES: usize = 40;

/// Why a byte stream is not a sequence of JSON objects.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A message grew past [`MAX_MESSAGE_BYTES`] (or the framer's own limit).
    #[error("a message is longer than {limit_bytes} bytes")]
    TooLong {
        /// The limit in force.
        limit_bytes: usize,
    },
    /// A message is nested deeper than [`MAX_DEPTH`].
    #[error("a message is nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// Something other than an object stands where a message must begin.
    #[error("expected a JSON object, found {start:?}")]
    NotAnObject {
        /// The first bytes found there, made printable.
        start: String,
    },
    /// The braces balance but the text between them is no JSON.
    #[error("a message is not JSON: {why}")]
    NotJson {
        /// The parser's word.
        why: String,
    },
}

/// Incremental splitter; holds at most one incomplete message.
pub(crate) struct Framer {
    message: Vec<u8>,
    depth: u32,
    in_string: bool,
    escaped: bool,
    max_bytes: usize,
}

impl Framer {
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { message: Vec::new(), depth: 0, in_string: false, escaped: false, max_bytes }
    }

    /// Whether a message has begun and not ended.
    pub(crate) fn is_mid_message(&self) -> bool {
        self.depth > 0
    }

    /// Forgets an incomplete message.
    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.max_bytes);
    }

    /// Takes bytes up to the end of the next complete message; returns how many it took.
    pub(crate) fn push(
        &mut self,
        input: &[u8],
    ) -> Result<(usize, Option<serde_json::Value>), FrameError> {
        let start = if self.depth == 0 { skip_blank(input) } else { 0 };
        for (at, &byte) in input.iter().enumerate().skip(start) {
            if self.depth == 0 && byte != b'{' {
                return Err(FrameError::NotAnObject { start: quote(&input[at..]) });
            }
            self.scan(byte)?;
            if self.message.len() + (at + 1 - start) > self.max_bytes {
                return Err(FrameError::TooLong { limit_bytes: self.max_bytes });
            }
            if self.depth == 0 {
                self.message.extend_from_slice(&input[start..=at]);
                return Ok((at + 1, Some(self.parse()?)));
            }
        }
        self.message.extend_from_slice(&input[start..]);
        Ok((input.len(), None))
    }

    fn scan(&mut self, byte: u8) -> Result<(), FrameError> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return Ok(());
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' if self.depth == MAX_DEPTH => return Err(FrameError::TooDeep),
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        Ok(())
    }

    fn parse(&mut self) -> Result<serde_json::Value, FrameError> {
        let message = std::mem::take(&mut self.message);
        serde_json::from_slice(&message)
            .map_err(|error| FrameError::NotJson { why: error.to_string() })
    }
}

impl fmt::Debug for Framer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Framer")
            .field("bytes", &self.message.len())
            .field("depth", &self.depth)
            .finish()
    }
}

fn skip_blank(input: &[u8]) -> usize {
    input.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(input.len())
}

/// Printable beginning of foreign bytes, for messages.
pub(crate) fn quote(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(QUOTE_BYTES)];
    String::from_utf8_lossy(shown).chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn all(input: &[u8], cut: usize) -> Result<Vec<serde_json::Value>, FrameError> {
        let mut framer = Framer::new(1000);
        let mut found = Vec::new();
        for chunk in input.chunks(cut.max(1)) {
            let mut rest = chunk;
            while !rest.is_empty() {
                let (used, value) = framer.push(rest)?;
                rest = &rest[used..];
                found.extend(value);
            }
        }
        Ok(found)
    }

    #[test]
    fn objects_are_cut_wherever_the_bytes_are_cut() {
        let text = b"\r\n{\"a\": \"}{\\\"]\"}\r\n{\n \"b\": [\n {}\n ]\n}\r\n";
        for cut in 1..text.len() {
            assert_eq!(all(text, cut).unwrap(), [json!({"a": "}{\"]"}), json!({"b": [{}]})]);
        }
    }

    #[test]
    fn length_and_depth_are_bounded() {
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(2000));
        assert_eq!(all(long.as_bytes(), 7), Err(FrameError::TooLong { limit_bytes: 1000 }));
        let endless = format!("{{\"a\":\"{}", "x".repeat(2000));
        assert_eq!(all(endless.as_bytes(), 7), Err(FrameError::TooLong { limit_bytes: 1000 }));
        let deep = format!("{{\"a\":{}", "[".repeat(200));
        assert_eq!(all(deep.as_bytes(), 7), Err(FrameError::TooDeep));
    }

    #[test]
    fn garbage_is_named() {
        let found = all(b"(qemu) \x1b[K", 50);
        assert_eq!(found, Err(FrameError::NotAnObject { start: "(qemu) [K".into() }));
        assert!(matches!(all(b"}", 1), Err(FrameError::NotAnObject { .. })));
        assert!(matches!(all(b"{]", 1), Err(FrameError::NotJson { .. })));
        assert!(matches!(all(b"{\"a\":\"\xff\"}", 1), Err(FrameError::NotJson { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_bytes_end_in_objects_or_an_error(bytes: Vec<u8>, cut in 1usize..9) {
            if let Ok(values) = all(&bytes, cut) {
                prop_assert!(values.iter().all(serde_json::Value::is_object));
            }
        }
    }
}
