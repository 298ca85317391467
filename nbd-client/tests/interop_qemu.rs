//! Against QEMU's own server.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use common::{MIB, image_with_bitmap, qemu_nbd, run};
use icecore_nbd_client::proto::BASE_ALLOCATION;
use icecore_nbd_client::{
    Blocking, Cause, Changed, ChangedKind, Control, Dialect, Extent, Flow, HandshakeError, Op,
    Options, Want, is_dirty,
};

const BITMAP: &str = "qemu:dirty-bitmap:b0";

fn with_contexts(dialect_max: Dialect) -> Options {
    let contexts = vec![BITMAP.to_owned(), BASE_ALLOCATION.to_owned()];
    Options { contexts, dialect_max, ..Options::default() }
}

#[tokio::test]
async fn dirty_and_written_are_told_apart_in_both_dialects() {
    let peer = qemu_nbd(&["-r", "-x", "disk0", "-f", "qcow2", "-B", "b0"], image_with_bitmap);
    for dialect in [Dialect::Structured, Dialect::Extended] {
        let mut control =
            Control::connect(&peer.uri("disk0"), &with_contexts(dialect)).await.expect("connect");
        assert_eq!(control.session().dialect, dialect);
        assert_eq!(control.export().size_bytes, 64 * MIB);
        assert!(control.export().read_only() && control.export().multi_conn());
        let bitmap = control.context(BITMAP).expect("bitmap context");
        let allocation = control.context(BASE_ALLOCATION);
        let whole = Extent::new(0, 64 * MIB);

        let mut dirty = Vec::new();
        let receive = |extent: Extent| {
            if is_dirty(extent.flags) {
                dirty.push((extent.offset, extent.length));
            }
            Flow::Continue(())
        };
        control.extents(bitmap, [whole], receive).await.expect("extents");
        assert_eq!(dirty, [(8 * MIB, 128 << 10), (16 * MIB, 64 << 10)]);

        let mut changed = Vec::new();
        let receive = |item: Changed| {
            changed.push((item.offset, item.length, item.kind));
            Flow::Continue(())
        };
        control.changed(whole, Some(bitmap), allocation, receive).await.expect("changed");
        let expected =
            [(8 * MIB, 128 << 10, ChangedKind::Data), (16 * MIB, 64 << 10, ChangedKind::Zero)];
        assert_eq!(changed, expected);
        control.disconnect().await.expect("disconnect");
    }
}

#[tokio::test]
async fn a_bitmap_that_is_not_there_is_an_error_and_not_clean() {
    let peer = qemu_nbd(&["-r", "-x", "disk0", "-f", "qcow2"], image_with_bitmap);
    let error = Control::connect(&peer.uri("disk0"), &with_contexts(Dialect::Extended))
        .await
        .expect_err("there is no bitmap");
    let missing = |name: &str| name == BITMAP;
    assert!(
        matches!(&error.cause, Cause::Handshake(HandshakeError::ContextMissing { name, .. }) if missing(name)),
        "{error}"
    );
    let options = Options { dialect_max: Dialect::Simple, ..with_contexts(Dialect::Simple) };
    let error = Control::connect(&peer.uri("disk0"), &options).await.expect_err("no contexts");
    assert!(
        matches!(error.cause, Cause::Handshake(HandshakeError::ContextMissing { .. })),
        "{error}"
    );
}

#[tokio::test]
async fn reads_bring_data_and_holes_in_every_dialect() {
    let peer = qemu_nbd(&["-r", "-x", "disk0", "-f", "qcow2"], image_with_bitmap);
    for dialect_max in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let options = Options { dialect_max, ..Options::default() };
        let mut control = Control::connect(&peer.uri("disk0"), &options).await.expect("connect");
        let mut buffer = vec![0xee; (10 * MIB) as usize];
        control.read(0, &mut buffer).await.expect("read");
        for (at, byte) in buffer.iter().enumerate() {
            let at = at as u64;
            let expected = match at {
                _ if (MIB..MIB + 65536).contains(&at) => 0x11,
                _ if (8 * MIB..8 * MIB + 131_072).contains(&at) => 0x33,
                _ => 0,
            };
            assert_eq!(*byte, expected, "byte {at} with {dialect_max:?}");
        }
    }
}

#[tokio::test]
async fn writes_zeroes_and_flushes_arrive() {
    let image = |dir: &std::path::Path| {
        let path = dir.join("disk.raw").display().to_string();
        run("qemu-img", &["create", "-q", "-f", "raw", &path, "8M"]);
        path
    };
    for dialect_max in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let peer = qemu_nbd(&["-f", "raw"], image);
        let options = Options { dialect_max, ..Options::default() };
        let mut control = Control::connect(&peer.uri(""), &options).await.expect("connect");
        control.write(0, &vec![0xab; (4 * MIB) as usize]).await.expect("write");
        control.write_zeroes(MIB, MIB).await.expect("zeroes");
        control.trim(3 * MIB, 65536).await.expect("trim");
        control.flush().await.expect("flush");
        control.disconnect().await.expect("disconnect");
        let disk = std::fs::read(peer.dir.path().join("disk.raw")).expect("image");
        let is = |range: std::ops::Range<u64>, byte| {
            disk[range.start as usize..range.end as usize].iter().all(|b| *b == byte)
        };
        assert!(is(0..MIB, 0xab) && is(MIB..2 * MIB, 0) && is(2 * MIB..3 * MIB, 0xab));
        assert!(is(4 * MIB..8 * MIB, 0));
    }
}

#[tokio::test]
async fn refusals_leave_the_connection_usable() {
    let peer = qemu_nbd(&["-r", "-f", "qcow2"], image_with_bitmap);
    let mut control = Control::connect(&peer.uri(""), &Options::default()).await.expect("connect");
    let error = control.write(0, &[1; 512]).await.expect_err("read-only");
    assert!(matches!(error.cause, Cause::Submit(_)), "{error}");
    let error = control.read(64 * MIB, &mut [0; 512]).await.expect_err("beyond the end");
    assert!(matches!(error.cause, Cause::Submit(_)), "{error}");
    control.read(0, &mut [0; 512]).await.expect("still usable");
}

/// The data plane's way: blocking reads straight into the caller's buffers.
#[tokio::test]
async fn a_data_plane_takes_the_connection_over() {
    let peer = qemu_nbd(&["-r", "-f", "qcow2"], image_with_bitmap);
    let control = Control::connect(&peer.uri(""), &Options::default()).await.expect("connect");
    let (fd, mut wire) = control.into_stream(Blocking::Yes).expect("hand over");
    let mut socket = UnixStream::from(fd);
    let mut buffers = vec![vec![0xee_u8; MIB as usize]; 3];
    for (tag, offset) in [(0, 0), (1, MIB), (2, 40 * MIB)] {
        wire.submit(tag, Op::Read, offset, MIB as u32).expect("submit");
    }
    socket.write_all(wire.transmit()).expect("send");
    wire.transmitted(wire.transmit().len());
    let mut finished = 0;
    while finished < 3 {
        match wire.want() {
            Want::Header(n) => {
                let mut header = vec![0; n];
                socket.read_exact(&mut header).expect("header");
                wire.header(&header).expect("valid header");
            }
            Want::Payload { tag, at, len } => {
                let part = &mut buffers[tag as usize][at as usize..][..len as usize];
                socket.read_exact(part).expect("payload");
                wire.payload_done().expect("payload");
            }
            Want::Closed => panic!("closed"),
        }
        while let Some((tag, at, len)) = wire.zero_fill() {
            buffers[tag as usize][at as usize..][..len as usize].fill(0);
        }
        while let Some((_, result)) = wire.completed() {
            result.expect("read");
            finished += 1;
        }
    }
    assert!(buffers[0].iter().all(|b| *b == 0));
    assert!(buffers[1][..65536].iter().all(|b| *b == 0x11));
    assert!(buffers[2].iter().all(|b| *b == 0x22));
}

#[tokio::test]
async fn exports_and_contexts_are_listed() {
    let peer = qemu_nbd(
        &["-r", "-x", "disk0", "-D", "a disk", "-f", "qcow2", "-B", "b0"],
        image_with_bitmap,
    );
    let uri = peer.uri("disk0");
    let options = Options::default();
    let exports = Control::list_exports(&uri.endpoint, &options).await.expect("list");
    assert_eq!((exports[0].name.as_str(), exports[0].description.as_str()), ("disk0", "a disk"));
    let names = Control::list_contexts(&uri, &["qemu:"], &options).await.expect("contexts");
    assert!(names.iter().any(|name| name == BITMAP), "{names:?}");
    let session = Control::describe(&uri, &options).await.expect("describe");
    assert_eq!(session.export.size_bytes, 64 * MIB);
    let unknown = Control::connect(&peer.uri("nope"), &options).await.expect_err("no such export");
    let cause = unknown.cause;
    assert!(matches!(cause, Cause::Handshake(HandshakeError::UnknownExport { .. })), "{cause}");
}
