//! Errors of single requests: odd ones fail the request and nothing else.

use icecore_nbd_client::proto::chunk;
use icecore_nbd_client::testing::{Act, RequestHeader, Script, Scripted, error_body, simple};
use icecore_nbd_client::{Cause, Control, Dialect, Errno, Options, ProtocolError, RequestError};

use crate::{DIALECTS, SIZE, client, open, read_breaks};

/// Reads at 4096 with an error and then, well answered, at 0.
async fn failed_read(
    dialect: Dialect,
    answer: fn(Dialect, &RequestHeader) -> Vec<u8>,
) -> RequestError {
    let (mut control, _server) = open(dialect, move |dialect, request, _| {
        vec![Act::Send(match (request.offset, dialect) {
            (4096, _) => answer(dialect, request),
            (_, Dialect::Simple) => [simple(request.cookie, None), vec![7; 512]].concat(),
            _ => request.data(dialect, chunk::FLAG_DONE, 0, &[7; 512]),
        })]
    })
    .await;
    let error = control.read(4096, &mut [0; 8192]).await.expect_err("the server said so");
    let mut buffer = [0; 512];
    control.read(0, &mut buffer).await.expect("the connection lives");
    assert_eq!(buffer, [7; 512]);
    match error.cause {
        Cause::Request(error) => error,
        other => panic!("not the request's own error: {other}"),
    }
}

#[tokio::test]
async fn an_error_after_data_fails_the_read() {
    for dialect in DIALECTS {
        let error = failed_read(dialect, |dialect, request| {
            let mut body = error_body(Errno::EIO, "medium\u{1b}[31m error");
            body.extend_from_slice(&(request.offset + 4096).to_be_bytes());
            [
                request.data(dialect, 0, request.offset, &[1; 4096]),
                request.chunk(dialect, 0, chunk::ERROR_OFFSET, &body),
                request.done(dialect),
            ]
            .concat()
        })
        .await;
        assert_eq!((error.errno, error.offset), (Errno::EIO, 8192));
        assert_eq!(error.message, "medium [31m error", "control characters are removed");
    }
}

#[tokio::test]
async fn unknown_error_chunks_and_numbers_fail_the_request_only() {
    for dialect in DIALECTS {
        let error = failed_read(dialect, |dialect, request| {
            let mut body = vec![0, 0, 0xff, 0xff];
            body.extend_from_slice(&[0, 2, b'h', b'i', 9, 9, 9]);
            request.chunk(dialect, chunk::FLAG_DONE, chunk::ERROR_BIT | 77, &body)
        })
        .await;
        assert_eq!((error.errno, error.message.as_str()), (Errno::EINVAL, "hi"));
    }
    let error =
        failed_read(Dialect::Simple, |_, request| simple(request.cookie, Some(Errno::ENOMEM)));
    assert_eq!(error.await.errno, Errno::ENOMEM);
}

#[tokio::test]
async fn an_error_without_a_number_ends_the_connection() {
    for dialect in DIALECTS {
        let error = read_breaks(dialect, |dialect, request| {
            request.chunk(dialect, chunk::FLAG_DONE, chunk::ERROR, &[0; 6])
        });
        assert_eq!(error.await, ProtocolError::ErrorZero);
    }
}

/// Servers may refuse an effect above their payload limit; it is done again in smaller pieces.
#[tokio::test]
async fn a_large_effect_that_is_refused_is_split() {
    for errno in [Errno::EINVAL, Errno::EOVERFLOW] {
        let limit = 65_536;
        let mut script = Script::new(SIZE);
        script.features.maximum_block = limit;
        let (tx, sent) = std::sync::mpsc::channel();
        let mut server = Scripted::start(script, move |dialect, request, _| {
            let reply = if request.length > u64::from(limit) {
                let body = error_body(errno, "too long");
                request.chunk(dialect, chunk::FLAG_DONE, chunk::ERROR, &body)
            } else {
                tx.send((request.offset, request.length)).expect("channel");
                request.done(dialect)
            };
            vec![Act::Send(reply)]
        })
        .expect("server");
        let socket = client(&mut server);
        let mut control = Control::over(socket, "disk", &Options::default()).await.expect("open");
        control.write_zeroes(0, SIZE).await.expect("in pieces");
        let pieces: Vec<_> = sent.try_iter().collect();
        let expected: Vec<_> = (0..16).map(|n| (n * 65_536, 65_536)).collect();
        assert_eq!(pieces, expected);
    }
}

#[tokio::test]
async fn after_a_shutdown_notice_nothing_more_is_sent() {
    for dialect in DIALECTS {
        let (mut control, _server) = open(dialect, |dialect, request, _| {
            let body = error_body(Errno::ESHUTDOWN, "");
            vec![Act::Send(request.chunk(dialect, chunk::FLAG_DONE, chunk::ERROR, &body))]
        })
        .await;
        let error = control.read(0, &mut [0; 512]).await.expect_err("shutdown");
        assert!(matches!(&error.cause, Cause::Request(e) if e.errno == Errno::ESHUTDOWN));
        let error = control.read(0, &mut [0; 512]).await.expect_err("nothing more");
        assert!(matches!(error.cause, Cause::Submit(_)), "{error}");
    }
}
