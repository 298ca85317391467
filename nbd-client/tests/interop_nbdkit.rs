//! Against nbdkit: old and crippled handshakes, injected faults.
#![allow(clippy::panic, reason = "test code outside of #[test] functions")]

mod common;

use std::time::Duration;

use common::{MIB, nbdkit};
use icecore_nbd_client::proto::BASE_ALLOCATION;
use icecore_nbd_client::{
    Cause, Changed, ChangedKind, Control, Dialect, Errno, Extent, Flow, HandshakeError, Options,
};

fn with_allocation() -> Options {
    Options { contexts: vec![BASE_ALLOCATION.to_owned()], ..Options::default() }
}

/// The first bytes of nbdkit's pattern plugin: big-endian offsets.
fn assert_pattern(buffer: &[u8], offset: u64) {
    for (at, word) in (offset..).step_by(8).zip(buffer.chunks_exact(8)) {
        assert_eq!(word, at.to_be_bytes());
    }
}

async fn read_pattern(control: &mut Control) {
    let mut buffer = vec![0; (3 * MIB) as usize];
    control.read(MIB, &mut buffer).await.expect("read");
    assert_pattern(&buffer, MIB);
}

#[tokio::test]
async fn plain_nbdkit_serves_data_and_extents() {
    let peer = nbdkit(&["data", "@0x100000 1 @0x200000 2", "size=8M"]);
    for dialect_max in [Dialect::Structured, Dialect::Extended] {
        let options = Options { dialect_max, ..with_allocation() };
        let mut control = Control::connect(&peer.uri(""), &options).await.expect("connect");
        let allocation = control.context(BASE_ALLOCATION);
        let mut seen = Vec::new();
        let receive = |item: Changed| {
            seen.push((item.offset, item.length, item.kind));
            Flow::Continue(())
        };
        let whole = Extent::new(0, 8 * MIB);
        control.changed(whole, None, allocation, receive).await.expect("extents");
        let data: Vec<_> = seen.iter().filter(|item| item.2 == ChangedKind::Data).collect();
        assert_eq!(data.len(), 2, "{seen:?}");
        assert_eq!(seen.iter().map(|item| item.1).sum::<u64>(), 8 * MIB);
    }
}

#[tokio::test]
async fn without_structured_replies_data_works_and_extents_are_refused() {
    let peer = nbdkit(&["--no-sr", "pattern", "size=8M"]);
    let uri = peer.uri("");
    let mut control = Control::connect(&uri, &Options::default()).await.expect("connect");
    assert_eq!(control.session().dialect, Dialect::Simple);
    read_pattern(&mut control).await;
    let error = Control::connect(&uri, &with_allocation()).await.expect_err("no contexts");
    assert!(
        matches!(error.cause, Cause::Handshake(HandshakeError::ContextMissing { .. })),
        "{error}"
    );
}

#[tokio::test]
async fn oldstyle_is_refused_with_a_word() {
    let peer = nbdkit(&["-o", "pattern", "size=8M"]);
    let error = Control::connect(&peer.uri(""), &Options::default()).await.expect_err("oldstyle");
    assert!(matches!(error.cause, Cause::Handshake(HandshakeError::OldStyle)), "{error}");
    assert!(error.to_string().contains("oldstyle"), "{error}");
}

#[tokio::test]
async fn a_handshake_that_is_not_fixed_allows_only_export_name() {
    for mask in ["--mask-handshake=0", "--mask-handshake=2"] {
        let peer = nbdkit(&[mask, "pattern", "size=8M"]);
        let uri = peer.uri("");
        let mut control = Control::connect(&uri, &Options::default()).await.expect("connect");
        assert_eq!(control.session().dialect, Dialect::Simple);
        assert!(!control.export().block.announced);
        read_pattern(&mut control).await;
        let error = Control::connect(&uri, &with_allocation()).await.expect_err("no contexts");
        assert!(
            matches!(error.cause, Cause::Handshake(HandshakeError::ContextMissing { .. })),
            "{error}"
        );
        assert!(Control::list_exports(&uri.endpoint, &Options::default()).await.is_err());
    }
}

#[tokio::test]
async fn the_legacy_way_can_be_asked_for() {
    let peer = nbdkit(&["pattern", "size=8M"]);
    let options = Options { legacy: true, ..Options::default() };
    let mut control = Control::connect(&peer.uri(""), &options).await.expect("connect");
    read_pattern(&mut control).await;
}

#[tokio::test]
async fn a_failed_range_is_named_and_the_connection_lives() {
    let peer = nbdkit(&[
        "--filter=error",
        "pattern",
        "size=8M",
        "error-pread=EIO",
        "error-pread-rate=100%",
    ]);
    let mut control = Control::connect(&peer.uri(""), &Options::default()).await.expect("connect");
    let error = control.read(2 * MIB, &mut [0; 4096]).await.expect_err("injected");
    match &error.cause {
        Cause::Request(request) => {
            assert_eq!((request.errno, request.offset), (Errno::EIO, 2 * MIB));
        }
        other => panic!("{other}"),
    }
    control.disconnect().await.expect("still in step");
}

/// A fifth of all reads fails: success always means the right data.
#[tokio::test]
async fn random_errors_never_give_wrong_data() {
    let peer = nbdkit(&["--filter=error", "pattern", "size=64M", "error-pread-rate=20%"]);
    let mut control = Control::connect(&peer.uri(""), &Options::default()).await.expect("connect");
    let (mut good, mut bad) = (0, 0);
    for round in 0..200 {
        let (mut buffer, offset) = (vec![0xee; 65_536], round * 262_144);
        match control.read(offset, &mut buffer).await {
            Ok(()) => {
                assert_pattern(&buffer, offset);
                good += 1;
            }
            Err(error) => {
                assert!(matches!(error.cause, Cause::Request(_)), "{error}");
                bad += 1;
            }
        }
    }
    assert!(good > 0 && bad > 0, "{good} good, {bad} bad");
}

#[tokio::test]
async fn failing_extents_degrade_to_data() {
    let peer = nbdkit(&["--filter=error", "memory", "size=8M", "error-extents-rate=100%"]);
    let mut control = Control::connect(&peer.uri(""), &with_allocation()).await.expect("connect");
    let allocation = control.context(BASE_ALLOCATION).expect("context");
    let whole = Extent::new(0, 8 * MIB);
    let asked = control.extents(allocation, [whole], |_| Flow::Continue(())).await;
    assert!(matches!(asked.expect_err("injected").cause, Cause::Request(_)));
    let mut seen = Vec::new();
    let receive = |item| {
        seen.push(item);
        Flow::Continue(())
    };
    control.changed(whole, None, Some(allocation), receive).await.expect("degrades");
    assert_eq!(seen, [Changed { offset: 0, length: 8 * MIB, kind: ChangedKind::Data }]);
}

#[tokio::test]
async fn a_slow_server_meets_the_progress_deadline() {
    let peer = nbdkit(&["--filter=delay", "pattern", "size=8M", "delay-read=5"]);
    let options = Options { progress_deadline: Duration::from_millis(300), ..Options::default() };
    let mut control = Control::connect(&peer.uri(""), &options).await.expect("connect");
    let error = control.read(0, &mut [0; 512]).await.expect_err("too slow");
    assert!(matches!(error.cause, Cause::TimedOut(_)), "{error}");
}

#[tokio::test]
async fn a_server_killed_in_mid_read_is_an_error() {
    let peer = nbdkit(&["--filter=delay", "pattern", "size=8M", "delay-read=1"]);
    let mut control = Control::connect(&peer.uri(""), &Options::default()).await.expect("connect");
    let mut buffer = [0; 512];
    let (result, ()) = tokio::join!(control.read(0, &mut buffer), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        drop(peer);
    });
    let error = result.expect_err("killed");
    assert!(matches!(error.cause, Cause::Io(_)), "{error}");
}

#[tokio::test]
async fn odd_sizes_are_read_to_the_last_byte() {
    for (dialect_max, size) in
        [(Dialect::Simple, 4097), (Dialect::Structured, 1), (Dialect::Extended, 0)]
    {
        let peer = nbdkit(&["pattern", &format!("size={size}")]);
        let options = Options { dialect_max, ..Options::default() };
        let mut control = Control::connect(&peer.uri(""), &options).await.expect("connect");
        let export = control.export().clone();
        assert_eq!((export.size_bytes, export.reachable_bytes()), (size, size));
        let mut buffer = vec![0xee; size as usize];
        control.read(0, &mut buffer).await.expect("read");
        assert_pattern(&buffer, 0);
    }
}
