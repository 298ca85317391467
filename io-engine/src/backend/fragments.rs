//! The stream state machine against every way in which bytes can be cut, without sockets.

use proptest::prelude::*;

use super::conformance::pattern;
use super::stream::Stream;
use super::toy::{Between, Script, Server, Toy, ToyDisk};
use super::*;

const DISK: usize = 1 << 20;

#[derive(Debug, Clone)]
struct Ask {
    op: Op,
    offset: u64,
    len: u32,
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        3 => Just(Op::Write),
        2 => Just(Op::WriteZeroes { may_trim: true }),
        1 => Just(Op::Flush),
    ];
    // Each has a range of its own, so that the order among them does not matter.
    prop::collection::vec((op, 1u32..40_000), 1..24).prop_map(|parts| {
        let place = |(index, (op, len))| Ask { op, offset: index as u64 * 40_000, len };
        parts.into_iter().enumerate().map(place).collect()
    })
}

fn request(ask: &Ask) -> Request<Ask> {
    let carries = matches!(ask.op, Op::Read | Op::Write);
    let mut buf = carries.then(|| Buffer::fixed(ask.len as usize).unwrap());
    buf.iter_mut().for_each(|buf| buf.fill(0xC3));
    let (op, offset) = (ask.op, ask.offset);
    let len = if op == Op::Flush { 0 } else { ask.len };
    Request { op, offset, len, buf, note: ask.clone() }
}

fn check(done: &Completion<Ask>, before: &[u8], disk: &ToyDisk) {
    let Ask { op, offset, len } = done.request.note;
    let range = offset as usize..offset as usize + len as usize;
    let now = disk.bytes.lock().unwrap()[range.clone()].to_vec();
    match op {
        Op::Read if done.hole => assert!(before[range].iter().all(|byte| *byte == 0)),
        Op::Read => assert!(done.request.buf.as_deref().unwrap() == &before[range]),
        Op::Write => assert!(now.iter().all(|byte| *byte == 0xC3)),
        Op::WriteZeroes { .. } => assert!(now.iter().all(|byte| *byte == 0)),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn however_the_bytes_are_cut(
        asks in asks(),
        cuts in prop::collection::vec(1usize..50_000, 1..20),
        no_zeroes in any::<bool>(),
        depth in 1u32..16,
    ) {
        let before = pattern(DISK);
        let disk = ToyDisk::new(before.clone());
        let mut server = Server::new(disk.clone(), Script { no_zeroes, ..Script::default() });
        let mut stream = Stream::new(0, Box::new(Toy::new(16, 1 << 20)), depth).unwrap();
        let (mut between, mut left, mut done) = (Between::default(), asks.iter(), 0);
        let mut cuts = cuts.iter().copied().cycle();
        for turn in 0.. {
            prop_assert!(turn < 200_000, "it hangs");
            let cut = cuts.next().unwrap();
            if stream.slots.has_room() && let Some(ask) = left.next() {
                stream.submit(request(ask)).unwrap();
            }
            if let Some((bytes, _)) = stream.sending() {
                prop_assert!(!bytes.is_empty(), "an empty send would never complete");
                let bytes = bytes[..cut.min(bytes.len())].to_vec();
                between.requests.extend(&bytes);
                stream.sent(bytes.len());
            }
            server.answer(&mut between);
            if let Some(place) = stream.receiving().unwrap() {
                let n = cut.min(place.len()).min(between.replies.len());
                if n > 0 {
                    place[..n].iter_mut().zip(between.replies.drain(..n)).for_each(|(a, b)| *a = b);
                    stream.received(n).unwrap();
                }
            }
            while let Some(complete) = stream.take_done().unwrap() {
                check(&complete, &before, &disk);
                done += 1;
            }
            if done == asks.len() && stream.idle() {
                break;
            }
        }
    }
}
