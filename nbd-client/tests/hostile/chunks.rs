//! Chunks of a wrong kind, of a wrong form, or without end.

use icecore_nbd_client::proto::{CHUNKS_PER_REPLY_MAX, chunk};
use icecore_nbd_client::testing::{Act, simple};
use icecore_nbd_client::{Cause, Dialect, Errno, ProtocolError};

use crate::{DIALECTS, open, read_breaks};

#[tokio::test]
async fn an_unknown_chunk_type_ends_the_connection() {
    for dialect in DIALECTS {
        for kind in [3, 4, 7, 0x7fff, chunk::BLOCK_STATUS, chunk::BLOCK_STATUS_EXT] {
            let error = read_breaks(dialect, move |dialect, request| {
                request.chunk(dialect, chunk::FLAG_DONE, kind, &[0; 32])
            });
            assert_eq!(error.await, ProtocolError::ChunkType(kind));
        }
    }
}

#[tokio::test]
async fn data_for_a_request_that_reads_nothing_ends_the_connection() {
    for dialect in DIALECTS {
        let (mut control, _server) = open(dialect, |dialect, request, _| {
            vec![Act::Send(request.data(dialect, chunk::FLAG_DONE, 0, &[1; 512]))]
        })
        .await;
        let error = control.write(0, &[1; 512]).await.expect_err("data in answer to a write");
        let kind = chunk::OFFSET_DATA;
        assert!(matches!(error.cause, Cause::Protocol(ProtocolError::ChunkType(k)) if k == kind));
    }
}

#[tokio::test]
async fn an_empty_chunk_must_be_the_last() {
    for dialect in DIALECTS {
        let error =
            read_breaks(dialect, |dialect, request| request.chunk(dialect, 0, chunk::NONE, &[]));
        assert_eq!(error.await, ProtocolError::EmptyChunk);
    }
}

#[tokio::test]
async fn forms_that_were_not_negotiated_end_the_connection() {
    let error = read_breaks(Dialect::Structured, |_, request| simple(request.cookie, None));
    assert!(matches!(error.await, ProtocolError::ReplyForm { form: "simple", .. }));
    let error = read_breaks(Dialect::Simple, |_, request| request.done(Dialect::Structured));
    assert!(matches!(error.await, ProtocolError::ReplyForm { form: "structured", .. }));
    let error = read_breaks(Dialect::Structured, |_, request| request.done(Dialect::Extended));
    assert!(matches!(error.await, ProtocolError::ReplyForm { form: "extended", .. }));
    let error = read_breaks(Dialect::Extended, |_, request| {
        [simple(request.cookie, None), vec![0; 32]].concat()
    });
    assert!(matches!(error.await, ProtocolError::ReplyForm { form: "simple", .. }));
    let error = read_breaks(Dialect::Extended, |_, _| vec![0xba; 64]);
    assert!(matches!(error.await, ProtocolError::Magic { .. }));
}

#[tokio::test]
async fn a_reply_without_end_is_cut() {
    for dialect in DIALECTS {
        let (mut control, _server) = open(dialect, |dialect, request, _| {
            let body = icecore_nbd_client::testing::error_body(Errno::EIO, "again");
            vec![Act::Flood(request.chunk(dialect, 0, chunk::ERROR, &body))]
        })
        .await;
        let error = control.read(0, &mut [0; 512]).await.expect_err("an endless reply");
        let expected = ProtocolError::TooManyChunks(CHUNKS_PER_REPLY_MAX);
        assert!(matches!(&error.cause, Cause::Protocol(e) if *e == expected), "{error}");
    }
}
