//! Block status that breaks the rules, and block status that is odd but legal.

use icecore_nbd_client::proto::chunk;
use icecore_nbd_client::testing::{Act, RequestHeader, error_body, status_body};
use icecore_nbd_client::{
    Cause, Changed, ChangedKind, ContextId, Dialect, Errno, Extent, Flow, ProtocolError,
};

use crate::{DIALECTS, SIZE, open};

const A: ContextId = ContextId(1);
const B: ContextId = ContextId(2);

type Runs = &'static [(u64, u64)];

/// A chunk of extents `(length, flags)`.
fn status(
    dialect: Dialect,
    request: &RequestHeader,
    flags: u16,
    context: ContextId,
    runs: &[(u64, u64)],
) -> Vec<u8> {
    let extent = |&(length, flags): &(u64, u64)| Extent { offset: 0, length, flags };
    let extents: Vec<Extent> = runs.iter().map(extent).collect();
    let (kind, body) = status_body(dialect, context, &extents);
    request.chunk(dialect, flags, kind, &body)
}

/// The contexts that a request wants: a payload picks them.
fn asked(payload: &[u8]) -> Vec<ContextId> {
    match payload.get(8..) {
        None => vec![A, B],
        Some(ids) => ids.chunks(4).map(|id| ContextId(u32::from(id[3]))).collect(),
    }
}

/// Asks for context `a` of the whole disk; every context is answered with these extents.
async fn ask(dialect: Dialect, runs: Runs) -> Result<Vec<Extent>, Cause> {
    let (mut control, _server) = open(dialect, move |dialect, request, payload| {
        let contexts = asked(payload);
        let chunk = |(index, context): (usize, &ContextId)| {
            let flags = if index + 1 == contexts.len() { chunk::FLAG_DONE } else { 0 };
            status(dialect, request, flags, *context, runs)
        };
        vec![Act::Send(contexts.iter().enumerate().flat_map(chunk).collect())]
    })
    .await;
    let mut seen = Vec::new();
    let receive = |extent| {
        seen.push(extent);
        Flow::Continue(())
    };
    let result = control.extents(A, [Extent::new(0, SIZE)], receive).await;
    result.map(|()| seen).map_err(|error| error.cause)
}

#[tokio::test]
async fn extents_that_cannot_be_end_the_connection() {
    let bad: [(Runs, &str); 5] = [
        (&[(4096, 1), (0, 0), (SIZE - 4096, 0)], "length 0"),
        (&[(SIZE, 0), (4096, 1)], "beyond the request"),
        (&[(SIZE + 1, 0)], "beyond the end of the export"),
        (&[(SIZE / 2, 0), (u32::MAX as u64, 1)], "beyond the end of the export"),
        (&[], "nothing at all"),
    ];
    for dialect in DIALECTS {
        for (runs, why) in bad {
            let cause = ask(dialect, runs).await.expect_err(why);
            assert!(matches!(cause, Cause::Protocol(_)), "{why}: {cause}");
        }
    }
    let cause = ask(Dialect::Extended, &[(u64::MAX, 1)]).await.expect_err("2^64");
    assert!(matches!(cause, Cause::Protocol(ProtocolError::Status(_))), "{cause}");
    let cause = ask(Dialect::Extended, &[(4096, 1), (u64::MAX - 4000, 1)]).await;
    assert!(matches!(cause, Err(Cause::Protocol(ProtocolError::Status(_)))), "{cause:?}");
}

#[tokio::test]
async fn short_answers_are_continued_and_equal_neighbours_merged() {
    for dialect in DIALECTS {
        let seen = ask(dialect, &[(4096, 1), (4096, 1), (8192, 0)]).await.expect("legal");
        assert_eq!(seen.len(), (SIZE / 16_384) as usize * 2);
        assert_eq!(seen[0], Extent { offset: 0, length: 8192, flags: 1 });
        assert_eq!(seen[1], Extent { offset: 8192, length: 8192, flags: 0 });
        assert_eq!(seen.last().map(Extent::end), Some(SIZE));
    }
}

/// Answers every request with these chunks.
async fn chunks_break(
    dialect: Dialect,
    chunks: impl Fn(Dialect, &RequestHeader) -> Vec<u8> + Send + 'static,
) -> Cause {
    let (mut control, _server) =
        open(dialect, move |dialect, request, _| vec![Act::Send(chunks(dialect, request))]).await;
    let mut seen = 0;
    let receive = |_| {
        seen += 1;
        Flow::Continue(())
    };
    let error = control.extents(A, [Extent::new(0, SIZE)], receive).await;
    let error = error.expect_err("a broken status");
    assert_eq!(seen, 0, "nothing is reported before it is known to be whole");
    error.cause
}

#[tokio::test]
async fn contexts_must_come_once_each_and_only_those_asked_for() {
    const ALL: Runs = &[(SIZE, 0)];
    let done = chunk::FLAG_DONE;
    for dialect in DIALECTS {
        let twice = chunks_break(dialect, move |dialect, request| {
            let chunk = |flags| status(dialect, request, flags, A, ALL);
            [chunk(0), chunk(done)].concat()
        });
        assert!(matches!(twice.await, Cause::Protocol(ProtocolError::Status(_))));
        let foreign = chunks_break(dialect, move |dialect, request| {
            status(dialect, request, done, ContextId(99), ALL)
        });
        assert!(matches!(foreign.await, Cause::Protocol(ProtocolError::Status(_))));
        let none = chunks_break(dialect, |dialect, request| request.done(dialect));
        assert!(matches!(none.await, Cause::Protocol(ProtocolError::Status(_))));
    }
}

#[tokio::test]
async fn lengths_and_counts_of_status_chunks_are_checked() {
    let done = chunk::FLAG_DONE;
    let kind = |dialect| match dialect {
        Dialect::Extended => chunk::BLOCK_STATUS_EXT,
        _ => chunk::BLOCK_STATUS,
    };
    for dialect in DIALECTS {
        for bytes in [0, 4, 7, 13, 27] {
            let cause = chunks_break(dialect, move |dialect, request| {
                request.chunk(dialect, done, kind(dialect), &vec![0; bytes])
            })
            .await;
            assert!(matches!(cause, Cause::Protocol(_)), "{bytes}: {cause}");
        }
        let huge = chunks_break(dialect, move |dialect, request| {
            let (cookie, offset) = (request.cookie, request.offset);
            let length = 8 + 16 * ((1 << 20) + 1);
            icecore_nbd_client::testing::chunk_header(
                dialect,
                done,
                kind(dialect),
                cookie,
                offset,
                length,
            )
        });
        assert!(matches!(huge.await, Cause::Protocol(ProtocolError::ChunkLength { .. })));
    }
    let count = chunks_break(Dialect::Extended, move |dialect, request| {
        let (kind, mut body) = status_body(dialect, A, &[Extent::new(0, SIZE)]);
        body[7] = 2;
        request.chunk(dialect, done, kind, &body)
    });
    assert!(matches!(count.await, Cause::Protocol(ProtocolError::Status(_))));
}

/// The part of absolute runs that a request asks for.
fn cut(request: &RequestHeader, payload: &[u8], runs: Runs) -> Vec<(u64, u64)> {
    let length = payload.first_chunk().map_or(request.length, |bytes| u64::from_be_bytes(*bytes));
    let (start, end, mut at) = (request.offset, request.offset + length, 0);
    let part = runs.iter().map(|(length, flags)| {
        let from = at;
        at += length;
        (at.min(end).saturating_sub(from.max(start)), *flags)
    });
    part.filter(|(length, _)| *length > 0).collect()
}

/// What `changed` says with `a` as the bitmap and `b` as the allocation; `bad` is answered with EIO.
async fn changed(
    dialect: Dialect,
    runs: Runs,
    bad: Option<ContextId>,
) -> Result<Vec<Changed>, Cause> {
    let (mut control, _server) = open(dialect, move |dialect, request, payload| {
        let (contexts, runs) = (asked(payload), cut(request, payload, runs));
        if contexts.iter().any(|context| Some(*context) == bad) && contexts.len() == 1 {
            let body = error_body(Errno::EIO, "no extents");
            return vec![Act::Send(request.chunk(dialect, chunk::FLAG_DONE, chunk::ERROR, &body))];
        }
        let chunk = |(index, context): (usize, &ContextId)| {
            let flags = if index + 1 == contexts.len() { chunk::FLAG_DONE } else { 0 };
            status(dialect, request, flags, *context, &runs)
        };
        vec![Act::Send(contexts.iter().enumerate().flat_map(chunk).collect())]
    })
    .await;
    let mut seen = Vec::new();
    let receive = |item| {
        seen.push(item);
        Flow::Continue(())
    };
    let whole = Extent::new(0, SIZE);
    let result = control.changed(whole, Some(A), Some(B), receive).await;
    result.map(|()| seen).map_err(|error| error.cause)
}

#[tokio::test]
async fn a_failing_bitmap_fails_and_a_failing_allocation_degrades_to_data() {
    const DIRTY: Runs = &[(SIZE, 1)];
    let cause = changed(Dialect::Extended, DIRTY, Some(A)).await.expect_err("bitmap");
    assert!(matches!(&cause, Cause::Request(error) if error.errno == Errno::EIO), "{cause}");
    let seen = changed(Dialect::Extended, DIRTY, Some(B)).await.expect("degrades");
    assert_eq!(seen, [Changed { offset: 0, length: SIZE, kind: ChangedKind::Data }]);
}

#[tokio::test]
async fn unknown_dirty_bits_are_dirty_and_a_hole_that_is_not_zero_is_read() {
    // As bitmap flags: 1 dirty, 4 unknown. As allocation flags: 1 a hole alone, 4 unknown.
    const RUNS: Runs = &[(4096, 1), (4096, 0), (4096, 4), (SIZE - 12_288, 0)];
    for dialect in DIALECTS {
        let seen = changed(dialect, RUNS, None).await.expect("legal");
        let places: Vec<_> = seen.iter().map(|item| (item.offset, item.kind)).collect();
        assert_eq!(places, [(0, ChangedKind::Data), (8192, ChangedKind::Data)]);
    }
}
