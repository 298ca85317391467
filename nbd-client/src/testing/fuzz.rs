//! Entries of the fuzz targets: each takes any bytes, must not panic, and asserts what must hold.
//! They run under cargo-fuzz (`fuzz/`) and, over a corpus with seeded mutations, in the tests.

use crate::error::RequestError;
use crate::export_info::{BlockSizes, Context, ContextId, Dialect, ExportInfo, Session};
use crate::extents::{self, Extent};
use crate::handshake::{Client, Goal, Outcome, Request};
use crate::proto::{BASE_ALLOCATION, OPTION_REPLY_BYTES_MAX, export_flag};
use crate::server::negotiation::{Negotiation, Offer, Reaction};
use crate::server::requests::{header_bytes, parse};
use crate::server::{Access, Features};
use crate::transmission::{Op, Transmission, Want};
use crate::uri::Uri;

/// Takes any bytes.
pub type Entry = fn(&[u8]);

/// All entries by name.
pub const ENTRIES: [(&str, Entry); 5] = [
    ("handshake", fuzz_handshake),
    ("transmission", fuzz_transmission),
    ("server", fuzz_server),
    ("extents", fuzz_extents),
    ("uri", fuzz_uri),
];

/// Takes a piece off the front of the input; `None` when it is too short.
fn take<'a>(data: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = data.split_at_checked(n)?;
    *data = rest;
    Some(head)
}

fn dialect(byte: u8) -> Dialect {
    [Dialect::Simple, Dialect::Structured, Dialect::Extended][usize::from(byte % 3)]
}

/// The client's handshake against a server that sends these bytes. The first byte picks the goal.
pub fn fuzz_handshake(mut data: &[u8]) {
    let Some([pick]) = take(&mut data, 1) else { return };
    let goals =
        [Goal::Open, Goal::Describe, Goal::ListExports, Goal::ListContexts(vec!["base:".into()])];
    let request = Request {
        goal: goals[usize::from(pick & 3)].clone(),
        dialect_max: dialect(pick >> 2),
        contexts: if pick & 0x40 != 0 { vec![BASE_ALLOCATION.to_owned()] } else { Vec::new() },
        optional_contexts: if pick & 0x80 != 0 { vec!["x:y".to_owned()] } else { Vec::new() },
        ..Request::open("disk")
    };
    let required = request.contexts.clone();
    let Ok(mut client) = Client::new(request) else { return };
    while client.want() > 0 {
        assert!(client.want() <= OPTION_REPLY_BYTES_MAX, "a handshake wants too much");
        let Some(bytes) = take(&mut data, client.want()) else { return };
        if client.receive(bytes).is_err() {
            assert_eq!(client.want(), 0, "a failed handshake goes on");
            return;
        }
        client.transmitted(client.transmit().len());
    }
    if let Some(Outcome::Opened(session) | Outcome::Described(session)) = client.outcome() {
        assert!(session.export.size_bytes <= i64::MAX as u64, "a size above 2^63");
        assert!(required.iter().all(|name| session.context(name).is_some()), "a context is lost");
    }
}

/// A session of 1 MiB with two contexts and every feature.
fn session(dialect: Dialect) -> Session {
    let context = |name: &str, id| Context { name: name.to_owned(), id: ContextId(id) };
    Session {
        export: ExportInfo {
            name: "disk".to_owned(),
            canonical_name: None,
            description: None,
            size_bytes: 1 << 20,
            flags: !export_flag::READ_ONLY,
            block: BlockSizes { minimum: 1, announced: true, ..BlockSizes::default() },
        },
        dialect,
        contexts: match dialect {
            Dialect::Simple => Vec::new(),
            _ => vec![context("a", 1), context("b", 2)],
        },
    }
}

/// Requests of a transmission under test: the tag is the index.
const REQUESTS: [(Op, u64, u32); 6] = [
    (Op::Read, 0, 4096),
    (Op::Read, 65_536, 65_536),
    (Op::BlockStatus, 0, 1 << 20),
    (Op::Flush, 0, 0),
    (Op::WriteZeroes { may_trim: true }, 4096, 4096),
    (Op::Read, (1 << 20) - 512, 512),
];

/// The client's transmission against a server that sends these bytes. Cookies are 1 to 6, and the
/// first byte picks the dialect.
pub fn fuzz_transmission(mut data: &[u8]) {
    let Some([pick]) = take(&mut data, 1) else { return };
    let mut wire = Transmission::new(session(dialect(*pick)));
    for (tag, (op, offset, len)) in (0..).zip(REQUESTS) {
        let submitted = wire.submit(tag, op, offset, len);
        assert!(submitted.is_ok() || op == Op::BlockStatus, "{submitted:?}");
    }
    let mut filled = [0_u64; REQUESTS.len()];
    let mut next_run = [[0_u64; 3]; REQUESTS.len()];
    loop {
        let alive = match wire.want() {
            Want::Header(n) => {
                assert!(n <= 64 << 10, "a header that takes much memory");
                match take(&mut data, n) {
                    Some(bytes) => wire.header(bytes).is_ok(),
                    None => return,
                }
            }
            Want::Payload { tag, at, len } => {
                let (op, _, length) = REQUESTS[tag as usize];
                assert!(op == Op::Read && at + len <= length, "payload outside of the buffer");
                filled[tag as usize] += u64::from(len);
                // The data itself does not matter: do not make the fuzzer provide it.
                wire.payload_done().is_ok()
            }
            Want::Closed => return,
        };
        while let Some((tag, at, len)) = wire.zero_fill() {
            assert!(at + len <= REQUESTS[tag as usize].2, "a hole outside of the buffer");
            filled[tag as usize] += u64::from(len);
        }
        while let Some(run) = wire.status_run() {
            let next = &mut next_run[run.tag as usize][run.context.0 as usize];
            assert!(run.extent.offset == *next && run.extent.length > 0, "a gap between extents");
            *next = run.extent.end();
            assert!(*next <= 1 << 20, "an extent beyond the request");
        }
        while let Some((tag, result)) = wire.completed() {
            check_completed(tag, &result, &filled, &next_run);
        }
        if !alive {
            assert_eq!(wire.want(), Want::Closed, "a broken connection goes on");
            assert!(wire.submit(9, Op::Flush, 0, 0).is_err(), "a broken connection takes requests");
            return;
        }
    }
}

/// Success means that everything came, exactly once.
fn check_completed(
    tag: u64,
    result: &Result<(), RequestError>,
    filled: &[u64; REQUESTS.len()],
    next_run: &[[u64; 3]; REQUESTS.len()],
) {
    let (op, _, length) = REQUESTS[tag as usize];
    if result.is_err() {
        return;
    }
    match op {
        Op::Read => assert_eq!(filled[tag as usize], u64::from(length), "a read with gaps"),
        Op::BlockStatus => {
            let both = next_run[tag as usize][1] > 0 && next_run[tag as usize][2] > 0;
            assert!(both, "block status without a context");
        }
        _ => {}
    }
}

/// The server's haggling and request parsing against a client that sends these bytes.
pub fn fuzz_server(mut data: &[u8]) {
    let offer = Offer {
        name: "disk".to_owned(),
        features: Features::new(1 << 20, Access::Writable),
        contexts: vec![BASE_ALLOCATION.to_owned()],
    };
    let mut negotiation = Negotiation::new(vec![offer], Dialect::Extended, false);
    let dialect = loop {
        let Some([code, length]) = take(&mut data, 2) else { return };
        let Some(option) = take(&mut data, usize::from(*length)) else { return };
        match negotiation.option(u32::from(*code), option) {
            Ok(Reaction::Continue) => {}
            Ok(Reaction::Transmit { .. }) => break negotiation.dialect(),
            Ok(Reaction::Close) | Err(_) => return,
        }
        assert!(negotiation.take_replies().len() <= 64 << 10, "replies that take much memory");
    };
    while let Some(bytes) = take(&mut data, header_bytes(dialect)) {
        let Ok(request) = parse(bytes, dialect) else { return };
        let Ok(payload) = request.payload_bytes(dialect) else { return };
        let features = Features::new(1 << 20, Access::Writable);
        if request.check(&features, dialect).is_ok() {
            assert!(u64::from(payload) <= u64::from(features.maximum_block), "payload above limit");
        }
    }
}

/// Extent algebra against arrays of flags. Pairs of bytes are a gap and a length.
pub fn fuzz_extents(data: &[u8]) {
    const SIZE: usize = 512;
    let lists: Vec<Vec<Extent>> = data.split(|byte| *byte == 0xff).take(2).map(list).collect();
    let [a, b] = &lists[..] else { return };
    let model = |list: &[Extent]| {
        let mut flags = [None; SIZE];
        for extent in list {
            flags[extent.offset as usize..extent.end() as usize].fill(Some(extent.flags));
        }
        flags
    };
    let check = |result: Vec<Extent>, expected: [Option<u64>; SIZE]| {
        let separate = |w: &[Extent]| {
            w[0].end() < w[1].offset || (w[0].end() == w[1].offset && w[0].flags != w[1].flags)
        };
        assert!(result.windows(2).all(separate), "not ascending, disjoint and merged: {result:?}");
        assert!(result.iter().all(|extent| extent.length > 0), "an empty extent");
        assert_eq!(model(&result), expected);
    };
    let (in_a, in_b) = (model(a), model(b));
    let both = |f: fn(Option<u64>, Option<u64>) -> Option<u64>| {
        std::array::from_fn(|at| f(in_a[at], in_b[at]))
    };
    let (a, b) = (|| a.iter().copied(), || b.iter().copied());
    check(extents::union(a(), b()).collect(), both(|a, b| a.or(b).map(|_| 0)));
    check(extents::intersect(a(), b()).collect(), both(|a, b| a.filter(|_| b.is_some())));
    check(extents::subtract(a(), b()).collect(), both(|a, b| a.filter(|_| b.is_none())));
    let pieces: Vec<Extent> = extents::split(a(), 3).collect();
    assert!(pieces.iter().all(|piece| (1..=3).contains(&piece.length)));
    assert_eq!(model(&pieces), in_a);
    let aligned: Vec<Extent> = extents::align(a(), 8, 500).collect();
    let cover = model(&aligned);
    let expected = |at: usize| {
        let block = at - at % 8..at - at % 8 + 8;
        at < 500 && block.clone().any(|at| in_a[at].is_some())
    };
    assert!((0..SIZE).all(|at| cover[at].is_some() == expected(at)), "{aligned:?}");
}

fn list(bytes: &[u8]) -> Vec<Extent> {
    let (mut at, mut list) = (0, Vec::new());
    for pair in bytes.chunks_exact(2) {
        let (gap, length) = (u64::from(pair[0] % 16), u64::from(pair[1] % 16) + 1);
        if at + gap + length > 490 {
            break;
        }
        list.push(Extent { offset: at + gap, length, flags: u64::from(pair[1] >> 7) });
        at += gap + length;
    }
    extents::merge_equal(list).collect()
}

/// URIs: what parses is written so that it parses to the same.
pub fn fuzz_uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(uri) = text.parse::<Uri>() {
        assert_eq!(uri.to_string().parse::<Uri>().as_ref(), Ok(&uri), "{text:?}");
    }
}
