//! Runs every target over its checked-in inputs and over simple mutations of them, the same ones
//! each time.

use std::path::Path;
use std::time::{Duration, Instant};

use icecore_fuzz::{CORPUS, TARGETS, Target, inputs};

/// Per target; mutations end then, the inputs themselves always all run.
const TIME_PER_TARGET: Duration = Duration::from_secs(5);
/// Mutations of each input, at most.
const MUTATIONS: u64 = 20_000;

fn main() {
    let corpus = Path::new(CORPUS);
    for (name, target) in TARGETS {
        let inputs = inputs(&corpus.join(name));
        assert!(!inputs.is_empty(), "no inputs for {name}");
        inputs.iter().for_each(|input| target(input));
        let start = Instant::now();
        let mut runs = 0u64;
        'time: for round in 0..MUTATIONS {
            for input in &inputs {
                if start.elapsed() > TIME_PER_TARGET {
                    break 'time;
                }
                let mutant = mutate(input, round.wrapping_mul(0x9e37_79b9_7f4a_7c15) + runs);
                run_one(name, target, &mutant);
                runs += 1;
            }
        }
        println!("{name}: {} inputs, {runs} mutations", inputs.len());
    }
}

fn run_one(name: &str, target: Target, input: &[u8]) {
    if std::panic::catch_unwind(|| target(input)).is_err() {
        let file = format!("crash-{name}");
        let _ = std::fs::write(&file, input);
        eprintln!("{name} failed; its input is in {file}");
        std::process::exit(1);
    }
}

/// One to four edits: a bit flipped, a byte set to an edge, a run repeated or taken out, an end cut.
fn mutate(input: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len().saturating_sub(1));
        match random.below(6) {
            _ if bytes.is_empty() => bytes.push(0),
            0 => bytes[at] ^= 1 << random.below(7),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(4)],
            2 => drop(bytes.drain(at..(at + 1 + random.below(16)).min(bytes.len()))),
            3 => bytes.truncate(at),
            4 => {
                let run = bytes[at..(at + 1 + random.below(40)).min(bytes.len())].to_vec();
                bytes.splice(at..at, run);
            }
            _ => {
                let end = (at + 8).min(bytes.len());
                bytes[at..end].fill(if random.below(1) == 0 { 0xff } else { 0 });
            }
        }
    }
    bytes
}

/// xorshift64*: enough to choose edits, and the same everywhere.
struct Random(u64);

impl Random {
    /// 0 to `max`, both included.
    fn below(&mut self, max: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % (max + 1)
    }
}
