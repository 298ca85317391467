//! Properties over generated input: any legal reply gives the right bytes and extents.
#![allow(clippy::panic, reason = "test code outside of #[test] functions")]

use icecore_nbd_client::proto::chunk;
use icecore_nbd_client::testing::{
    RequestHeader, chunk_header, fuzz::fuzz_extents, fuzz::fuzz_uri, status_body,
};
use icecore_nbd_client::{
    BlockSizes, Context, ContextId, Dialect, Endpoint, ExportInfo, Extent, Op, Session,
    Transmission, Uri, Want,
};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

fn wire(dialect: Dialect) -> Transmission {
    let context = |name: &str, id| Context { name: name.to_owned(), id: ContextId(id) };
    Transmission::new(Session {
        export: ExportInfo {
            name: String::new(),
            canonical_name: None,
            description: None,
            size_bytes: SIZE,
            flags: 0,
            block: BlockSizes { minimum: 1, announced: true, ..BlockSizes::default() },
        },
        dialect,
        contexts: vec![context("a", 7), context("b", 3)],
    })
}

/// A disk's byte: zero in every third 100-byte stripe, so that holes are legal there.
fn byte(at: u64) -> u8 {
    if (at / 100).is_multiple_of(3) { 0 } else { (at % 251) as u8 + 1 }
}

/// One read: its range, the places where its reply is cut, and how to shuffle the pieces.
#[derive(Debug, Clone)]
struct Read {
    offset: u64,
    length: u32,
    cuts: Vec<u32>,
}

fn read() -> impl Strategy<Value = Read> {
    let cuts = prop::collection::vec(1..2000_u32, 0..12);
    (0..SIZE - 2000, 1..2000_u32, cuts).prop_map(|(offset, length, cuts)| Read {
        offset,
        length,
        cuts,
    })
}

/// The chunks of a reply; the last of those sent has to carry DONE, or an empty chunk follows.
fn pieces(read: &Read) -> Vec<(u64, u32)> {
    let mut cuts: Vec<u32> = read.cuts.iter().map(|cut| cut % read.length).collect();
    cuts.extend([0, read.length]);
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|w| (read.offset + u64::from(w[0]), w[1] - w[0])).collect()
}

fn header(read: &Read, cookie: u64) -> RequestHeader {
    let length = u64::from(read.length);
    RequestHeader { flags: 0, command: 0, cookie, offset: read.offset, length }
}

/// Feeds bytes to the machine the way a driver does, and gives the results by tag.
fn feed(wire: &mut Transmission, mut bytes: &[u8], buffers: &mut [Vec<u8>]) -> Vec<u64> {
    let mut finished = Vec::new();
    while !bytes.is_empty() {
        match wire.want() {
            Want::Header(n) => {
                wire.header(&bytes[..n]).expect("legal");
                bytes = &bytes[n..];
            }
            Want::Payload { tag, at, len } => {
                let (at, len) = (at as usize, len as usize);
                buffers[tag as usize][at..at + len].copy_from_slice(&bytes[..len]);
                bytes = &bytes[len..];
                wire.payload_done().expect("legal");
            }
            Want::Closed => panic!("closed"),
        }
        while let Some((tag, at, len)) = wire.zero_fill() {
            buffers[tag as usize][at as usize..][..len as usize].fill(0);
        }
        while let Some((tag, result)) = wire.completed() {
            result.expect("success");
            finished.push(tag);
        }
    }
    finished
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Chunks of several reads, cut anywhere, in any order, interleaved, holes where they are legal.
    #[test]
    fn any_legal_replies_fill_the_buffers(
        extended: bool,
        reads in prop::collection::vec(read(), 1..6),
        order in prop::collection::vec(any::<u32>(), 80),
    ) {
        let dialect = if extended { Dialect::Extended } else { Dialect::Structured };
        let mut wire = wire(dialect);
        let mut sending = Vec::new();
        for (tag, read) in reads.iter().enumerate() {
            wire.submit(tag as u64, Op::Read, read.offset, read.length).expect("submit");
            sending.extend(pieces(read).into_iter().map(|piece| (tag, piece)));
        }
        let mut shuffled: Vec<_> = sending.iter().zip(order.iter().cycle()).collect();
        shuffled.sort_by_key(|(piece, key)| (**key, **piece));
        let mut left: Vec<usize> = reads.iter().map(|read| pieces(read).len()).collect();
        let mut bytes = Vec::new();
        for ((tag, (offset, length)), key) in shuffled {
            let request = header(&reads[*tag], *tag as u64 + 1);
            left[*tag] -= 1;
            let end = left[*tag] == 0;
            let separate_end = key % 2 == 0;
            let flags = if end && !separate_end { chunk::FLAG_DONE } else { 0 };
            let content: Vec<u8> = (*offset..*offset + u64::from(*length)).map(byte).collect();
            bytes.extend(match content.iter().all(|byte| *byte == 0) {
                true => request.hole(dialect, flags, *offset, *length),
                false => request.data(dialect, flags, *offset, &content),
            });
            if end && separate_end {
                bytes.extend(request.done(dialect));
            }
        }
        let mut buffers: Vec<_> = reads.iter().map(|r| vec![0xee; r.length as usize]).collect();
        let mut finished = feed(&mut wire, &bytes, &mut buffers);
        finished.sort_unstable();
        prop_assert_eq!(finished, (0..reads.len() as u64).collect::<Vec<_>>());
        prop_assert_eq!(wire.in_flight(), 0);
        for (read, buffer) in reads.iter().zip(&buffers) {
            let expected: Vec<u8> =
                (read.offset..read.offset + u64::from(read.length)).map(byte).collect();
            prop_assert_eq!(&expected, buffer);
        }
    }

    /// Extents come out as they were sent, cut at the request's end, for both contexts.
    #[test]
    fn any_legal_extents_are_reported(
        extended: bool,
        offset in 0..SIZE / 2,
        length in 1..SIZE / 2,
        runs in prop::collection::vec((1..90_000_u64, 0..4_u64), 1..20),
    ) {
        let dialect = if extended { Dialect::Extended } else { Dialect::Structured };
        let mut wire = wire(dialect);
        wire.submit_status(5, offset, length, &[]).expect("submit");
        let (mut at, mut sent) = (offset, Vec::new());
        for (run, flags) in runs {
            if at < offset + length {
                let length = run.min(SIZE - at);
                sent.push(Extent { offset: at, length, flags });
                at += length;
            }
        }
        let mut bytes = Vec::new();
        for (id, flags) in [(3, 0), (7, chunk::FLAG_DONE)] {
            let (kind, body) = status_body(dialect, ContextId(id), &sent);
            let size = body.len() as u64;
            bytes.extend(chunk_header(dialect, flags, kind, 1, offset, size));
            bytes.extend(body);
        }
        prop_assert_eq!(feed(&mut wire, &bytes, &mut []), [5]);
        let mut seen = [Vec::new(), Vec::new()];
        while let Some(run) = wire.status_run() {
            seen[usize::from(run.context == ContextId(7))].push(run.extent);
        }
        for extent in &mut sent {
            extent.length = extent.length.min(offset + length - extent.offset);
        }
        prop_assert_eq!(&seen[0], &sent);
        prop_assert_eq!(&seen[1], &sent);
    }

    /// The algebra against arrays of flags (the model is in the fuzz entry).
    #[test]
    fn extent_algebra_agrees_with_arrays(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        fuzz_extents(&bytes);
    }

    /// A URI that is written parses to itself.
    #[test]
    fn uris_survive_being_written(path in "/[^\0]{1,40}", host in "[a-z0-9.-]{1,20}", port: u16, export in "[^\0]{0,40}") {
        let unix = Endpoint::Unix(path.into());
        for endpoint in [unix, Endpoint::Tcp { host, port }] {
            let uri = Uri { endpoint, export: export.clone() };
            let text = uri.to_string();
            prop_assert_eq!(text.parse::<Uri>(), Ok(uri));
            fuzz_uri(text.as_bytes());
        }
    }
}
