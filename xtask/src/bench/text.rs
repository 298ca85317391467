//! Endless bytes like text: half prose, half log lines, of words as frequent as in a language.

use super::random::Random;

const WORDS: usize = 40_000;
const WORDS_IN_PROSE: usize = 9000;
const LOG_LINES: usize = 500;
const ONSETS: [&str; 19] = [
    "b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "ch",
    "pl",
];
const VOWELS: [&str; 5] = ["a", "e", "i", "o", "u"];
const CODAS: [&str; 5] = ["", "n", "r", "s", "l"];
const SYLLABLES: [u8; 8] = [1, 1, 2, 2, 2, 3, 3, 4];

/// A source of text.
#[derive(Debug)]
pub struct Text {
    random: Random,
    words: Vec<String>,
    /// Running sums of the words' weights, by Zipf's law.
    sums: Vec<f64>,
    ready: Vec<u8>,
    clock: u64,
}

impl Text {
    /// A source whose output depends only on `seed`.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let words = (0..WORDS).map(|_| word(&mut random)).collect();
        let weights = (0..WORDS).map(|rank| 1.0 / (rank as f64 + 3.0).powf(0.95));
        let sums = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Self { random, words, sums: sums.collect(), ready: Vec::new(), clock: 1_700_000_000 }
    }

    /// Fills `bytes` with what follows.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        while self.ready.len() < bytes.len() {
            if self.random.below(2) == 0 { self.prose() } else { self.log() }
        }
        let rest = self.ready.split_off(bytes.len());
        bytes.copy_from_slice(&self.ready);
        self.ready = rest;
    }

    fn next_word(&mut self) -> usize {
        let total = self.sums.last().copied().unwrap_or_default();
        let at = self.random.below(1 << 53) as f64 / (1u64 << 53) as f64 * total;
        self.sums.partition_point(|sum| *sum <= at).min(WORDS - 1)
    }

    fn prose(&mut self) {
        for nth in 0..WORDS_IN_PROSE {
            let word = self.next_word();
            let text = &self.words[word];
            if nth % 17 == 0 {
                self.ready.extend(text[..1].to_uppercase().bytes().chain(text[1..].bytes()));
            } else {
                self.ready.extend(text.bytes());
            }
            self.ready.extend(if nth % 17 == 16 { ". " } else { " " }.bytes());
        }
        self.ready.push(b'\n');
    }

    fn log(&mut self) {
        for _ in 0..LOG_LINES {
            self.clock += self.random.below(3);
            let [unit, what, dir, name] = [(); 4].map(|()| self.next_word());
            let words = |at: usize| self.words[at].as_str();
            let (v, clock) = (self.random.bits(), self.clock);
            let line = format!(
                "{clock} host{} {}[{}]: INFO 10.{}.{}.{} \"{} /{}/{}?id={}\" 200 {}\n",
                v & 7,
                words(unit),
                v >> 3 & 32767,
                v >> 18 & 3,
                v >> 20 & 255,
                v >> 28 & 255,
                words(what),
                words(dir),
                words(name),
                v >> 36,
                v >> 40 & 65535,
            );
            self.ready.extend(line.bytes());
        }
    }
}

fn word(random: &mut Random) -> String {
    let syllables = random.pick(&SYLLABLES);
    (0..syllables)
        .flat_map(|_| [random.pick(&ONSETS), random.pick(&VOWELS), random.pick(&CODAS)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_repeatable_and_goes_on() {
        let (mut one, mut other) = (Text::new(5), Text::new(5));
        let (mut a, mut b, mut c) = ([0; 70_000], [0; 40_000], [0; 30_000]);
        one.fill(&mut a);
        other.fill(&mut b);
        other.fill(&mut c);
        assert_eq!(a[..], [&b[..], &c[..]].concat());
        assert!(a.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()));
    }
}
