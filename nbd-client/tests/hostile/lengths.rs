//! Lengths that do not fit. None of them is ever allocated or waited for.

use icecore_nbd_client::proto::chunk;
use icecore_nbd_client::testing::chunk_header;
use icecore_nbd_client::{Dialect, ProtocolError};

use crate::{DIALECTS, read_breaks};

#[tokio::test]
async fn a_chunk_length_that_does_not_fit_its_type_ends_the_connection() {
    let kinds = [
        (chunk::NONE, 1),
        (chunk::OFFSET_DATA, 0),
        (chunk::OFFSET_DATA, 8),
        (chunk::OFFSET_DATA, 8 + 8193),
        (chunk::OFFSET_DATA, u64::from(u32::MAX)),
        (chunk::OFFSET_HOLE, 11),
        (chunk::OFFSET_HOLE, 13),
        (chunk::ERROR, 5),
        (chunk::ERROR, 1 << 20),
        (chunk::ERROR | 0x70, 1 << 20),
    ];
    for dialect in DIALECTS {
        for (kind, length) in kinds {
            let error = read_breaks(dialect, move |dialect, request| {
                let done = chunk::FLAG_DONE;
                let (cookie, offset) = (request.cookie, request.offset);
                let mut out = chunk_header(dialect, done, kind, cookie, offset, length);
                out.extend_from_slice(&[0; 64]);
                out
            })
            .await;
            assert!(matches!(error, ProtocolError::ChunkLength { .. }), "{kind} {length}: {error}");
        }
    }
}

#[tokio::test]
async fn a_64_bit_length_is_refused_at_once() {
    for length in [1 << 32, 1 << 62, u64::MAX] {
        let error = read_breaks(Dialect::Extended, move |dialect, request| {
            let (cookie, offset) = (request.cookie, request.offset);
            chunk_header(dialect, 1, chunk::OFFSET_DATA, cookie, offset, length)
        });
        assert!(matches!(error.await, ProtocolError::ChunkLength { .. }));
    }
}

#[tokio::test]
async fn a_hole_of_no_size_ends_the_connection() {
    for dialect in DIALECTS {
        let error = read_breaks(dialect, |dialect, request| {
            request.hole(dialect, chunk::FLAG_DONE, request.offset, 0)
        });
        assert!(matches!(error.await, ProtocolError::ChunkLength { .. }));
    }
}

#[tokio::test]
async fn an_error_message_longer_than_its_chunk_ends_the_connection() {
    for dialect in DIALECTS {
        let error = read_breaks(dialect, |dialect, request| {
            let body = [0, 0, 0, 5, 0, 200, b'x'];
            request.chunk(dialect, chunk::FLAG_DONE, chunk::ERROR, &body)
        });
        assert!(matches!(error.await, ProtocolError::ChunkLength { .. }));
    }
}
