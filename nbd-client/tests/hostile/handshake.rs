//! Greetings and option replies that break the rules.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use icecore_nbd_client::proto::{
    INIT_MAGIC, OLDSTYLE_MAGIC, OPTION_REPLIES_MAX, info, option, reply,
};
use icecore_nbd_client::testing::{Scripted, greeting, put_option_reply};
use icecore_nbd_client::{Cause, Control, HandshakeError, Options, ProtocolError};

use crate::client;

/// Connects to a server that runs `body`, wanting the context `a`.
async fn connect(
    body: impl FnOnce(&mut UnixStream) -> io::Result<()> + Send + 'static,
) -> Result<Control, Cause> {
    let mut server = Scripted::raw(move |mut socket| {
        let result = body(&mut socket);
        // Keep the socket open: it is the client that must give up.
        let _ = socket.read_to_end(&mut Vec::new());
        result
    })
    .expect("server");
    let options = Options {
        contexts: vec!["a".to_owned()],
        connect_deadline: Duration::from_secs(20),
        ..Options::default()
    };
    Control::over(client(&mut server), "disk", &options).await.map_err(|error| error.cause)
}

/// Greets, and answers each option with what `answer` says to its code.
async fn haggle(answer: impl Fn(u32) -> Vec<u8> + Send + 'static) -> Result<Control, Cause> {
    connect(move |socket| {
        socket.write_all(&greeting(3))?;
        socket.read_exact(&mut [0; 4])?;
        loop {
            let mut header = [0; 16];
            if socket.read_exact(&mut header).is_err() {
                return Ok(());
            }
            let word = |at: usize| {
                u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
            };
            socket.read_exact(&mut vec![0; word(12) as usize])?;
            socket.write_all(&answer(word(8)))?;
        }
    })
    .await
}

fn one(option: u32, code: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_option_reply(&mut out, option, code, body);
    out
}

fn info_reply(kind: u16, body: &[u8]) -> Vec<u8> {
    one(option::GO, reply::INFO, &[&kind.to_be_bytes(), body].concat())
}

fn context(id: u8, name: &str) -> Vec<u8> {
    let body = [&[0, 0, 0, id], name.as_bytes()].concat();
    one(option::SET_META_CONTEXT, reply::META_CONTEXT, &body)
}

/// An honest answer up to GO, whose replies are given.
fn honest_until_go(go: Vec<u8>) -> impl Fn(u32) -> Vec<u8> + Send + 'static {
    move |code| match code {
        option::SET_META_CONTEXT => [context(1, "a"), one(code, reply::ACK, &[])].concat(),
        option::GO => go.clone(),
        _ => one(code, reply::ACK, &[]),
    }
}

fn protocol(result: Result<Control, Cause>) -> ProtocolError {
    match result {
        Err(Cause::Handshake(HandshakeError::Protocol(error))) => error,
        other => panic!("not a protocol error: {other:?}"),
    }
}

#[tokio::test]
async fn wrong_magics_and_oldstyle_are_told_apart() {
    let oldstyle = connect(|socket| {
        let mut bytes = INIT_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&OLDSTYLE_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&[0; 136]);
        socket.write_all(&bytes)
    });
    assert!(matches!(oldstyle.await, Err(Cause::Handshake(HandshakeError::OldStyle))));
    let http = connect(|socket| socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
    assert!(matches!(protocol(http.await), ProtocolError::Magic { expected: "NBDMAGIC", .. }));
    let reply = haggle(|_| vec![0x11; 64]).await;
    assert!(matches!(protocol(reply), ProtocolError::Magic { expected: "option reply", .. }));
}

#[tokio::test]
async fn option_replies_must_echo_their_option_and_be_short() {
    let result = haggle(|_| one(option::LIST, reply::ACK, &[])).await;
    assert!(matches!(protocol(result), ProtocolError::Option { .. }));
    let result = haggle(|code| {
        let mut out = one(code, reply::ERR_UNSUP, &[]);
        out[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        out
    });
    assert!(matches!(protocol(result.await), ProtocolError::Option { .. }));
    let result = haggle(|code| one(code, reply::ACK, b"surprise")).await;
    assert!(matches!(protocol(result), ProtocolError::Option { .. }));
    let result = haggle(|code| one(code, reply::SERVER, &[0; 4])).await;
    assert!(matches!(protocol(result), ProtocolError::Option { .. }));
}

#[tokio::test]
async fn a_list_of_replies_without_end_is_cut() {
    let endless =
        honest_until_go((0..=OPTION_REPLIES_MAX).flat_map(|_| info_reply(99, &[])).collect());
    assert!(matches!(protocol(haggle(endless).await), ProtocolError::Option { .. }));
}

#[tokio::test]
async fn an_export_without_a_size_or_with_an_impossible_one_is_refused() {
    let ack = || one(option::GO, reply::ACK, &[]);
    let result = haggle(honest_until_go(ack())).await;
    assert!(matches!(protocol(result), ProtocolError::Option { .. }));
    let huge = [info_reply(info::EXPORT, &[0xff; 10]), ack()].concat();
    assert!(matches!(protocol(haggle(honest_until_go(huge)).await), ProtocolError::Export(_)));
    let short = [info_reply(info::EXPORT, &[0; 9]), ack()].concat();
    assert!(matches!(protocol(haggle(honest_until_go(short)).await), ProtocolError::Option { .. }));
}

#[tokio::test]
async fn block_sizes_are_checked() {
    let bad: [[u32; 3]; 6] = [
        [0, 4096, 1 << 25],
        [3, 4096, 1 << 25],
        [1 << 17, 1 << 17, 1 << 25],
        [4096, 512, 1 << 25],
        [512, 4096, 2048],
        [512, 4096, (1 << 25) + 1],
    ];
    for sizes in bad {
        let body: Vec<u8> = sizes.iter().flat_map(|size| size.to_be_bytes()).collect();
        let result = haggle(honest_until_go(info_reply(info::BLOCK_SIZE, &body))).await;
        assert!(matches!(protocol(result), ProtocolError::Export(_)), "{sizes:?}");
    }
}

#[tokio::test]
async fn contexts_that_were_not_asked_for_or_come_twice_are_refused() {
    for pair in [("a", "a", 2), ("a", "b", 2), ("b", "a", 2)] {
        let result = haggle(move |code| match code {
            option::SET_META_CONTEXT => [context(1, pair.0), context(pair.2, pair.1)].concat(),
            _ => one(code, reply::ACK, &[]),
        });
        assert!(matches!(protocol(result.await), ProtocolError::Option { .. }), "{pair:?}");
    }
}

#[tokio::test]
async fn a_required_context_that_is_not_chosen_is_an_error() {
    for code in [reply::ACK, reply::ERR_UNSUP, reply::ERR_INVALID, reply::ERROR_BIT | 1234] {
        let result = haggle(move |option| match option {
            option::SET_META_CONTEXT => one(option, code, &[]),
            _ => one(option, reply::ACK, &[]),
        });
        let result = result.await;
        assert!(
            matches!(result, Err(Cause::Handshake(HandshakeError::ContextMissing { .. }))),
            "{result:?}"
        );
    }
}

#[tokio::test]
async fn tls_required_is_said_at_every_option() {
    for refused in [option::EXTENDED_HEADERS, option::SET_META_CONTEXT, option::GO] {
        let result = haggle(move |option| match option {
            _ if option == refused => one(option, reply::ERR_TLS_REQD, &[]),
            option::SET_META_CONTEXT => [context(1, "a"), one(option, reply::ACK, &[])].concat(),
            _ => one(option, reply::ACK, &[]),
        });
        let result = result.await;
        assert!(
            matches!(result, Err(Cause::Handshake(HandshakeError::TlsRequired { .. }))),
            "{result:?}"
        );
    }
}

#[tokio::test]
async fn extended_headers_never_fall_back_to_export_name() {
    let result = haggle(honest_until_go(one(option::GO, reply::ERR_UNSUP, b"no"))).await;
    assert!(
        matches!(&result, Err(Cause::Handshake(HandshakeError::Refused { option: "GO", .. }))),
        "{result:?}"
    );
}
