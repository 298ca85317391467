//! Servers that are silent, trickle, leave, or answer too late.

use std::time::{Duration, Instant};

use icecore_nbd_client::proto::chunk;
use icecore_nbd_client::testing::{Act, Scripted};
use icecore_nbd_client::{Blocking, Cause, Control, Dialect, Options};

use crate::{DIALECTS, client, open};

#[tokio::test]
async fn a_silent_server_times_out_and_its_late_answer_is_not_taken() {
    for dialect in DIALECTS {
        let (mut control, _server) = open(dialect, |dialect, request, _| {
            let late = request.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 512]);
            vec![Act::Pause(Duration::from_millis(700)), Act::Send(late)]
        })
        .await;
        let error = control.read(0, &mut [0; 512]).await.expect_err("silence");
        assert!(matches!(error.cause, Cause::TimedOut(_)), "{error}");
        tokio::time::sleep(Duration::from_millis(300)).await;
        let error = control.read(0, &mut [0; 512]).await.expect_err("never in step again");
        assert!(matches!(error.cause, Cause::Poisoned), "{error}");
        let error = control.into_stream(Blocking::Yes).expect_err("nor for others");
        assert!(matches!(error.cause, Cause::Poisoned), "{error}");
    }
}

#[tokio::test]
async fn a_trickle_is_no_progress() {
    let (mut control, _server) = open(Dialect::Extended, |dialect, request, _| {
        let reply = request.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 512]);
        vec![Act::Trickle(reply, Duration::from_millis(50))]
    })
    .await;
    let start = Instant::now();
    let error = control.read(0, &mut [0; 512]).await.expect_err("a trickle");
    assert!(matches!(error.cause, Cause::TimedOut(_)), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_server_that_leaves_in_mid_reply_is_an_error() {
    for dialect in DIALECTS {
        for sent in [0, 7, 20, 45, 200] {
            let (mut control, _server) = open(dialect, move |dialect, request, _| {
                let reply = request.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 512]);
                vec![Act::Send(reply[..sent].to_vec()), Act::Close]
            })
            .await;
            let error = control.read(0, &mut [0; 512]).await.expect_err("half a reply");
            assert!(matches!(error.cause, Cause::Io(_)), "{error}");
        }
    }
}

#[tokio::test]
async fn a_silent_handshake_times_out() {
    let mut server = Scripted::raw(|socket| {
        std::thread::sleep(Duration::from_millis(600));
        drop(socket);
        Ok(())
    })
    .expect("server");
    let options = Options { connect_deadline: Duration::from_millis(200), ..Options::default() };
    let error = Control::over(client(&mut server), "", &options).await.expect_err("silence");
    assert!(matches!(error.cause, Cause::TimedOut(_)), "{error}");
}

#[tokio::test]
async fn a_cancelled_call_poisons_the_connection() {
    let (mut control, _server) = open(Dialect::Extended, |dialect, request, _| {
        let reply = request.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 512]);
        vec![Act::Pause(Duration::from_millis(200)), Act::Send(reply)]
    })
    .await;
    let mut buffer = [0; 512];
    let cancelled = tokio::time::timeout(Duration::from_millis(50), control.read(0, &mut buffer));
    assert!(cancelled.await.is_err());
    let error = control.read(0, &mut [0; 512]).await.expect_err("in mid-reply");
    assert!(matches!(error.cause, Cause::Poisoned), "{error}");
}
