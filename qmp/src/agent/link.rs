//! Where the agent's channel stands; pure.

use serde_json::{Value, json};

use crate::frame::{FrameError, Framer};
use crate::session::Failure;

/// Longest answer accepted from a guest; `guest-get-fsinfo` with thousands of mounts fits.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Precedes the reply to `guest-sync-delimited`; sent by us it resets the agent's own parser. It
/// occurs in no UTF-8 text.
pub(super) const DELIMITER: u8 = 0xFF;

/// The channel's state, fed with what the guest sends.
#[derive(Debug)]
pub(super) struct Link {
    framer: Framer,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Answers may be under way that nobody asked for any more.
    Lost,
    /// Dropping bytes up to a delimiter.
    Hunting { id: u64 },
    /// After a delimiter: the next object should be the reply to the synchronisation.
    Delimited { id: u64 },
    /// Nothing is under way.
    Settled,
    /// The next object answers the one question asked.
    Asked,
}

impl Link {
    pub(super) fn new() -> Self {
        Self { framer: Framer::new(MAX_ANSWER_BYTES), step: Step::Lost }
    }

    pub(super) fn is_in_step(&self) -> bool {
        self.step == Step::Settled
    }

    pub(super) fn lose_step(&mut self) {
        self.step = Step::Lost;
    }

    pub(super) fn hunt(&mut self, id: u64) {
        self.framer.reset();
        self.step = Step::Hunting { id };
    }

    pub(super) fn question_asked(&mut self) {
        self.step = Step::Asked;
    }

    /// Takes bytes; returns the answer to the question asked once it is complete.
    pub(super) fn feed(
        &mut self,
        mut bytes: &[u8],
    ) -> Result<Option<Result<Value, Failure>>, FrameError> {
        let mut answer = None;
        while !bytes.is_empty() {
            let delimiter = bytes.iter().position(|byte| *byte == DELIMITER);
            let upto = delimiter.unwrap_or(bytes.len());
            answer = answer.or(self.text(&bytes[..upto])?);
            bytes = &bytes[upto..];
            if delimiter.is_some() {
                bytes = &bytes[1..];
                self.delimiter();
            }
        }
        Ok(answer)
    }

    fn delimiter(&mut self) {
        self.framer.reset();
        match self.step {
            Step::Hunting { id } | Step::Delimited { id } => self.step = Step::Delimited { id },
            // The reply to a synchronisation given up long ago: what follows is not for us.
            _ => self.step = Step::Lost,
        }
    }

    fn text(&mut self, mut bytes: &[u8]) -> Result<Option<Result<Value, Failure>>, FrameError> {
        while !bytes.is_empty() {
            if let Step::Hunting { .. } | Step::Lost = self.step {
                return Ok(None);
            }
            match (self.framer.push(bytes), self.step) {
                (Ok((used, None)), _) => bytes = &bytes[used..],
                (Ok((used, Some(value))), step) => {
                    bytes = &bytes[used..];
                    if let Some(answer) = self.object(&value, step) {
                        if !bytes.trim_ascii().is_empty() {
                            self.lose_step();
                        }
                        return Ok(Some(answer));
                    }
                }
                (Err(_), Step::Delimited { id }) => self.hunt(id),
                (Err(error), _) => {
                    self.lose_step();
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    fn object(&mut self, value: &Value, step: Step) -> Option<Result<Value, Failure>> {
        match step {
            Step::Delimited { id } if value.get("return") == Some(&json!(id)) => {
                self.step = Step::Settled;
                None
            }
            Step::Delimited { id } => {
                self.step = Step::Hunting { id };
                None
            }
            Step::Asked => {
                self.step = Step::Settled;
                Some(answer(value))
            }
            Step::Lost | Step::Hunting { .. } | Step::Settled => {
                self.step = Step::Lost;
                None
            }
        }
    }
}

fn answer(value: &Value) -> Result<Value, Failure> {
    if let Some(value) = value.get("return") {
        return Ok(value.clone());
    }
    let error = value.get("error");
    let text = |key: &str| {
        error
            .and_then(|error| error.get(key))
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    Err(Failure { class: text("class"), desc: text("desc") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hunting(id: u64) -> Link {
        let mut link = Link::new();
        link.hunt(id);
        link
    }

    #[test]
    fn only_the_awaited_id_brings_into_step() {
        let mut link = hunting(7);
        assert_eq!(link.feed(b"{\"return\": 7}\n\xff{\"return\": 8}\n{\"return\": 7}\n"), Ok(None));
        assert!(!link.is_in_step(), "the id counts only after a delimiter");
        assert_eq!(link.feed(b"\xff{\"return\": 7}\n"), Ok(None));
        assert!(link.is_in_step());
    }

    #[test]
    fn more_than_one_answer_is_out_of_step() {
        let mut link = hunting(7);
        link.feed(b"\xff{\"return\": 7}\n").unwrap();
        link.question_asked();
        let answer = link.feed(b"{\"return\": 1}\n{\"return\": 2}\n").unwrap();
        assert_eq!(answer, Some(Ok(json!(1))));
        assert!(!link.is_in_step());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// Whatever lies in the channel (no delimiter but stale ones with other ids), and however
        /// it is cut, the synchronisation is found and the next answer is the next answer.
        #[test]
        fn any_rubbish_is_drained(
            rubbish in prop::collection::vec(prop_oneof![
                prop::collection::vec(0u8..0xff, 0..30),
                Just(b"\xff{\"return\": 41}\n".to_vec()),
                Just(b"{\"return\": 42}\n".to_vec()),
                Just(b"\xff{\"return\": {\"return\": 42".to_vec()),
            ], 0..8),
            cut in 1usize..20,
        ) {
            let mut link = hunting(42);
            let mut bytes = rubbish.concat();
            bytes.extend(b"\xff{\"return\": 42}\n");
            for piece in bytes.chunks(cut) {
                prop_assert_eq!(link.feed(piece), Ok(None));
            }
            prop_assert!(link.is_in_step());
            link.question_asked();
            let mut answer = None;
            for piece in b"{\"return\": [\"a\"]}\n".chunks(cut) {
                answer = answer.or(link.feed(piece).unwrap());
            }
            prop_assert_eq!(answer, Some(Ok(json!(["a"]))));
        }
    }
}
