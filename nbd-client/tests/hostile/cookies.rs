//! Replies to requests that are not in flight.

use icecore_nbd_client::proto::chunk;
use icecore_nbd_client::testing::{Act, RequestHeader, simple};
use icecore_nbd_client::{Cause, Dialect, ProtocolError};

use crate::{DIALECTS, open, read_breaks};

#[tokio::test]
async fn a_wrong_cookie_ends_the_connection() {
    for dialect in DIALECTS {
        let error = read_breaks(dialect, |dialect, request| {
            let other = RequestHeader { cookie: request.cookie ^ 1, ..*request };
            other.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 8192])
        });
        assert!(matches!(error.await, ProtocolError::UnknownCookie(_)));
    }
    let error = read_breaks(Dialect::Simple, |_, request| simple(request.cookie + 7, None));
    assert!(matches!(error.await, ProtocolError::UnknownCookie(_)));
}

#[tokio::test]
async fn a_second_reply_to_the_same_request_ends_the_connection() {
    for dialect in DIALECTS {
        let (mut control, _server) = open(dialect, |dialect, request, _| {
            let data = request.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 512]);
            vec![Act::Send([data.clone(), data].concat())]
        })
        .await;
        control.read(0, &mut [0; 512]).await.expect("the first reply is fine");
        let error = control.read(0, &mut [0; 512]).await.expect_err("the late one is not");
        assert!(matches!(error.cause, Cause::Protocol(ProtocolError::UnknownCookie(_))), "{error}");
    }
}

#[tokio::test]
async fn an_extended_reply_must_echo_the_offset() {
    let error = read_breaks(Dialect::Extended, |dialect, request| {
        let other = RequestHeader { offset: request.offset + 512, ..*request };
        other.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 8192])
    });
    assert_eq!(error.await, ProtocolError::OffsetEcho { expected: 4096, found: 4608 });
}
