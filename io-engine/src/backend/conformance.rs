//! One suite for both backends and both kinds of lanes.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::toy::{Script, ToyDisk};
use super::*;
use crate::buffer::Pool;
use crate::control::Control;
use crate::lane::Lane;

const MIB: usize = 1 << 20;

pub(crate) fn engines() -> Vec<EngineChoice> {
    match EngineChoice::Uring.resolve() {
        Ok(_) => vec![EngineChoice::Uring, EngineChoice::Threads],
        Err(_) => vec![EngineChoice::Threads],
    }
}

/// Bytes that differ everywhere, with some holes of zeroes.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let hole = (out.len() >> 17) % 5 == 3 || (out.len() >> 20) % 7 == 5;
        out.extend_from_slice(&if hole { [0; 8] } else { (state ^ (state >> 29)).to_le_bytes() });
    }
    out.truncate(len);
    out
}

fn file_with(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Every kind of source of `bytes`.
fn sources(bytes: &[u8]) -> Vec<(&'static str, Vec<Lane>)> {
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(bytes.len() as u64).unwrap();
    for (index, chunk) in bytes.chunks(4096).enumerate().filter(|(_, c)| c.iter().any(|b| *b != 0))
    {
        std::os::unix::fs::FileExt::write_all_at(&sparse, chunk, index as u64 * 4096).unwrap();
    }
    let odd = Script { reversed: true, ..Script::default() };
    vec![
        ("file", Lane::files(file_with(bytes), 3).unwrap()),
        ("sparse file", Lane::files(sparse, 2).unwrap()),
        ("one stream", ToyDisk::new(bytes.to_vec()).lanes(1, &Script::default())),
        ("reordering streams", ToyDisk::new(bytes.to_vec()).lanes(4, &odd)),
    ]
}

/// Offsets and bytes of completed requests.
type Parts = Vec<(u64, Vec<u8>)>;

/// Runs `requests` (op, offset, len, payload) on `set`; completions in order of arrival.
fn drive(
    set: &mut LaneSet,
    control: &Control,
    requests: Vec<(Op, u64, u32, Option<Vec<u8>>)>,
) -> (Parts, Result<(), EngineError>) {
    let halt = Halt::new(control.clone());
    let pool = Pool::new(24 * MIB as u64);
    let (feed, intake) = queue(set.threads()).unwrap();
    let complete = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let feed = feed;
            for (op, offset, len, payload) in requests {
                let carries = matches!(op, Op::Read | Op::Write);
                let buffer = || pool.get(len as usize, || halt.stopped());
                let Ok(mut buf) = carries.then(buffer).transpose() else { return };
                match (&mut buf, payload) {
                    (Some(buf), Some(payload)) => buf.copy_from_slice(&payload),
                    (Some(buf), None) => buf.fill(0xEE),
                    _ => {}
                }
                if feed.send(Request { op, offset, len, buf, note: () }, &halt).is_err() {
                    return;
                }
            }
        });
        set.run(intake, &halt, &|done: Completion<()>| {
            let Request { offset, len, buf, .. } = done.request;
            let bytes =
                if done.hole { vec![0; len as usize] } else { buf.map_or(vec![], |b| b.to_vec()) };
            complete.lock().unwrap().push((offset, bytes));
        });
    });
    (complete.into_inner().unwrap(), halt.outcome())
}

fn reads(total: usize, step: usize) -> Vec<(Op, u64, u32, Option<Vec<u8>>)> {
    (0..total)
        .step_by(step)
        .map(|at| (Op::Read, at as u64, (total - at).min(step) as u32, None))
        .collect()
}

fn quick(millis: u64) -> Control {
    Control { stall_after: Duration::from_millis(millis), ..Control::default() }
}

#[test]
fn reads_are_whole_and_right() {
    let bytes = pattern(9 * MIB + 777);
    for choice in engines() {
        for (name, lanes) in sources(&bytes) {
            let control = Control::default();
            let mut set = LaneSet::new(lanes, choice).unwrap();
            for step in [MIB, 64 << 10] {
                let (mut parts, outcome) = drive(&mut set, &control, reads(bytes.len(), step));
                outcome.unwrap_or_else(|e| panic!("{choice:?} {name}: {e}"));
                parts.sort();
                let got: Vec<u8> = parts.into_iter().flat_map(|(_, part)| part).collect();
                assert!(got == bytes, "{choice:?} {name} step {step}");
            }
            assert!(control.pulse.load(Relaxed) > 0);
        }
    }
}

fn writes(bytes: &[u8]) -> Vec<(Op, u64, u32, Option<Vec<u8>>)> {
    let mut out = vec![(Op::WriteZeroes { may_trim: true }, 0, 3 * MIB as u32 + 5, None)];
    let at = 4 * MIB;
    out.extend(bytes[at..].chunks(MIB).enumerate().map(|(index, chunk)| {
        let offset = (at + index * MIB) as u64;
        (Op::Write, offset, chunk.len() as u32, Some(chunk.to_vec()))
    }));
    out.push((Op::Trim, 3 * MIB as u64 + 8192, 4096, None));
    out
}

#[test]
fn writes_zeroes_and_flushes_arrive() {
    let (new, old) = (pattern(9 * MIB + 777), vec![0xAB; 9 * MIB + 777]);
    let mut want = old.clone();
    want[4 * MIB..].copy_from_slice(&new[4 * MIB..]);
    want[..3 * MIB + 5].fill(0);
    for choice in engines() {
        for no_zeroes in [false, true] {
            let disk = ToyDisk::new(old.clone());
            let script = Script { no_zeroes, ..Script::default() };
            let mut set = LaneSet::new(disk.lanes(2, &script), choice).unwrap();
            drive(&mut set, &Control::default(), writes(&new)).1.unwrap();
            drive(&mut set, &Control::default(), vec![(Op::Flush, 0, 0, None)]).1.unwrap();
            assert!(*disk.bytes.lock().unwrap() == want, "{choice:?} {no_zeroes}");
            assert_eq!(*disk.flushes.lock().unwrap(), u64::from(!no_zeroes));
        }
        let file = file_with(&old);
        let mut set =
            LaneSet::new(Lane::files(file.try_clone().unwrap(), 2).unwrap(), choice).unwrap();
        drive(&mut set, &Control::default(), writes(&new)).1.unwrap();
        drive(&mut set, &Control::default(), vec![(Op::Flush, 0, 0, None)]).1.unwrap();
        let mut got = vec![0; want.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, 0).unwrap();
        let hole = 3 * MIB + 8192..3 * MIB + 12288;
        got[hole.clone()].copy_from_slice(&want[hole]);
        assert!(got == want, "{choice:?} file");
    }
}

#[test]
fn an_error_names_its_range_and_ends_the_run() {
    let bytes = pattern(8 * MIB);
    for choice in engines() {
        for reversed in [false, true] {
            let script = Script { error_at: Some(5 << 20), reversed, ..Script::default() };
            let lanes = ToyDisk::new(bytes.clone()).lanes(2, &script);
            let mut set = LaneSet::new(lanes, choice).unwrap();
            let (parts, outcome) = drive(&mut set, &quick(5000), reads(bytes.len(), MIB));
            let Err(EngineError::Io { op: Op::Read, span, .. }) = outcome else {
                panic!("{choice:?}: {outcome:?}")
            };
            assert_eq!(span, Span::new(5 << 20, 1 << 20));
            assert!(parts.iter().all(|(at, _)| *at != 5 << 20), "no data from an error");
            let again = drive(&mut set, &Control::default(), reads(MIB, MIB)).1;
            assert!(matches!(again, Err(EngineError::Lanes(_))), "closed after a failure");
        }
    }
}

#[test]
fn a_write_refused_before_its_payload_is_sent_frees_nothing_early() {
    for choice in engines() {
        let script = Script { error_at: Some(2 << 20), refuse_early: true, ..Script::default() };
        let disk = ToyDisk::new(vec![0; 8 * MIB]);
        let mut set = LaneSet::new(disk.lanes(1, &script), choice).unwrap();
        let requests = (0..8)
            .map(|n| (Op::Write, n << 20, MIB as u32, Some(vec![n as u8 + 1; MIB])))
            .collect();
        let outcome = drive(&mut set, &quick(5000), requests).1;
        assert!(matches!(outcome, Err(EngineError::Io { op: Op::Write, .. })), "{outcome:?}");
    }
}

#[test]
fn a_dead_peer_and_a_short_reply_are_errors() {
    let bytes = pattern(8 * MIB);
    for choice in engines() {
        let dies = Script { die_at_read: Some(3), ..Script::default() };
        let short = Script { short_at_read: Some(2), ..Script::default() };
        for script in [dies, short] {
            let lanes = ToyDisk::new(bytes.clone()).lanes(2, &script);
            let mut set = LaneSet::new(lanes, choice).unwrap();
            let outcome = drive(&mut set, &quick(5000), reads(bytes.len(), MIB)).1;
            assert!(matches!(outcome, Err(EngineError::Lane { .. })), "{script:?} {outcome:?}");
        }
    }
}

#[test]
fn a_silent_peer_is_given_up() {
    for choice in engines() {
        let script = Script { stall_at: Some(2), ..Script::default() };
        let lanes = ToyDisk::new(vec![1; 8 * MIB]).lanes(1, &script);
        let (mut set, started) = (LaneSet::new(lanes, choice).unwrap(), Instant::now());
        let outcome = drive(&mut set, &quick(300), reads(8 * MIB, MIB)).1;
        let Err(EngineError::Stalled { span, .. }) = outcome else { panic!("{outcome:?}") };
        assert_eq!(span, Span::new(1 << 20, 1 << 20), "the oldest request");
        assert!(started.elapsed() < Duration::from_secs(3));
    }
}

#[test]
fn a_slow_peer_is_not_given_up_while_it_moves() {
    for choice in engines() {
        let script = Script { delay: Duration::from_millis(120), ..Script::default() };
        let lanes = ToyDisk::new(pattern(6 * MIB)).lanes(1, &script);
        let mut set = LaneSet::new(lanes, choice).unwrap();
        drive(&mut set, &quick(500), reads(6 * MIB, MIB)).1.unwrap();
    }
}

#[test]
fn cancelling_ends_a_run_in_flight() {
    for choice in engines() {
        let script = Script { stall_at: Some(3), ..Script::default() };
        let lanes = ToyDisk::new(vec![1; 40 * MIB]).lanes(2, &script);
        let (mut set, control) = (LaneSet::new(lanes, choice).unwrap(), Control::default());
        let started = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                control.cancel.store(true, Relaxed);
            });
            let outcome = drive(&mut set, &control, reads(40 * MIB, MIB)).1;
            assert!(matches!(outcome, Err(EngineError::Cancelled)), "{outcome:?}");
        });
        assert!(started.elapsed() < Duration::from_secs(2), "{choice:?}");
    }
}

#[test]
fn the_pulse_goes_on_while_nothing_arrives() {
    for choice in engines() {
        let script = Script { stall_at: Some(1), ..Script::default() };
        let lanes = ToyDisk::new(vec![1; MIB]).lanes(1, &script);
        let (mut set, control) = (LaneSet::new(lanes, choice).unwrap(), quick(1500));
        drive(&mut set, &control, reads(MIB, MIB)).1.unwrap_err();
        assert!(control.pulse.load(Relaxed) >= 5, "a wake each 200 ms");
    }
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    for choice in engines() {
        let lanes = Lane::files(file_with(&[1; 5000]), 1).unwrap();
        let mut set = LaneSet::new(lanes, choice).unwrap();
        let outcome = drive(&mut set, &Control::default(), reads(8192, 8192)).1;
        let Err(EngineError::Io { cause: crate::Cause::EndOfFile, .. }) = outcome else {
            panic!("{outcome:?}")
        };
    }
}

#[test]
fn depth_is_obeyed_and_lanes_share_the_load() {
    for choice in engines() {
        let script = Script { delay: Duration::from_millis(5), shallow: true, ..Script::default() };
        let lanes = ToyDisk::new(vec![3; 16 * MIB]).lanes(4, &script);
        let (mut set, control) = (LaneSet::new(lanes, choice).unwrap(), Control::default());
        let started = Instant::now();
        drive(&mut set, &control, reads(16 * MIB, 64 << 10)).1.unwrap();
        let took = started.elapsed();
        assert!(took < Duration::from_millis(256 * 5), "{choice:?}: one lane did it all: {took:?}");
    }
}
