//! What a database does to its disk: `random-writer DEVICE BYTES STOP-FILE` writes 4 KiB at random
//! places of the first BYTES, each followed by fsync, until the file is there. Prints how many
//! writes there were, the seconds, and the median, 99th percentile and longest in microseconds.
//! Built by itself and without libraries, for a guest that has none.

use std::error::Error;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

const BLOCK: u64 = 4096;
/// Looking for the file costs a guest more than a write's share of it should.
const LOOK: Duration = Duration::from_millis(20);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, device, bytes, stop] = &arguments[..] else {
        return Err("usage: random-writer DEVICE BYTES STOP-FILE".into());
    };
    let disk = OpenOptions::new().write(true).open(device)?;
    let blocks = bytes.parse::<u64>()? / BLOCK;
    let (mut block, mut random) = ([0u8; BLOCK as usize], 0x9e37_79b9_7f4a_7c15u64);
    let (mut took, started) = (Vec::new(), Instant::now());
    let mut looked = started;
    loop {
        // xorshift64: any sequence without a pattern will do.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        block[..8].copy_from_slice(&random.to_le_bytes());
        let began = Instant::now();
        disk.write_all_at(&block, random % blocks * BLOCK)?;
        disk.sync_data()?;
        let now = Instant::now();
        took.push(u64::try_from((now - began).as_micros())?);
        if now - looked > LOOK {
            looked = now;
            if Path::new(stop).exists() {
                break;
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    println!("{} {seconds:.3} {} {} {}", took.len(), at(50), at(99), at(100));
    Ok(())
}
