//! A hostile server's replies in the NBD transmission phase.

use icecore_nbd_client::{
    BlockSizes, Context, ContextId, Dialect, ExportInfo, Op, Session, Transmission, Want,
};

use crate::take;

/// The requests in flight: their tag is their place here. (Cookies count from 1.)
const REQUESTS: [(Op, u64, u32); 5] = [
    (Op::Read, 0, 4096),
    (Op::Read, 8192, 65536),
    (Op::Write, 4096, 512),
    (Op::WriteZeroes { may_trim: true }, 0, 1 << 20),
    (Op::Flush, 0, 0),
];
const STATUS_TAG: u64 = 5;
const STATUS_BYTES: u64 = 16 << 20;
/// More than any header or chunk head that is parsed at once.
const WANT_BYTES_MAX: usize = 64 << 10;
/// All optional commands, and bitmaps in the status.
const FLAGS: u16 = 0x11ff & !2;

/// The first byte picks the dialect, the rest is what the server says.
pub fn nbd_transmission(mut data: &[u8]) {
    let Some(choice) = take(&mut data, 1).map(|byte| byte[0]) else { return };
    let mut wire = Transmission::new(session(choice));
    for (tag, (op, offset, length)) in REQUESTS.iter().enumerate() {
        let _ = wire.submit(tag as u64, *op, *offset, *length);
    }
    let _ = wire.submit_status(STATUS_TAG, 0, STATUS_BYTES, &[]);
    let mut done = 0;
    while step(&mut wire, &mut data) {
        drain(&mut wire, &mut done);
    }
    drain(&mut wire, &mut done);
}

fn session(choice: u8) -> Session {
    let dialect = match choice & 3 {
        0 => Dialect::Simple,
        1 => Dialect::Structured,
        _ => Dialect::Extended,
    };
    let contexts = match dialect {
        Dialect::Simple => Vec::new(),
        _ => vec![context("base:allocation", 1), context("qemu:dirty-bitmap:p0", 2)],
    };
    let export = ExportInfo {
        name: "disk".to_owned(),
        canonical_name: None,
        description: None,
        size_bytes: 64 << 20,
        flags: FLAGS,
        block: BlockSizes::default(),
    };
    Session { export, dialect, contexts }
}

fn context(name: &str, id: u32) -> Context {
    Context { name: name.to_owned(), id: ContextId(id) }
}

fn step(wire: &mut Transmission, data: &mut &[u8]) -> bool {
    match wire.want() {
        Want::Closed => false,
        Want::Header(count) => {
            assert!(count > 0 && count <= WANT_BYTES_MAX, "it wants {count} bytes at once");
            take(data, count).is_some_and(|bytes| wire.header(bytes).is_ok())
        }
        Want::Payload { tag, at, len } => {
            require_inside(tag, at, len);
            take(data, len as usize).is_some() && wire.payload_done().is_ok()
        }
    }
}

/// Only a read has a buffer, and nothing may point outside of it.
fn require_inside(tag: u64, at: u32, len: u32) {
    let (op, _, length) = REQUESTS[usize::try_from(tag).expect("a small tag")];
    assert_eq!(op, Op::Read, "a payload for {op:?}");
    assert!(at.checked_add(len).is_some_and(|end| end <= length), "{at}+{len} of {length}");
}

fn drain(wire: &mut Transmission, done: &mut usize) {
    while let Some((tag, at, len)) = wire.zero_fill() {
        require_inside(tag, at, len);
    }
    while let Some(run) = wire.status_run() {
        assert_eq!(run.tag, STATUS_TAG);
        assert!(run.extent.end() <= STATUS_BYTES, "{:?} beyond the request", run.extent);
    }
    while wire.completed().is_some() {
        *done += 1;
        assert!(*done <= REQUESTS.len() + 1, "more answers than requests");
    }
}
