//! A hostile server's side of the NBD handshake.

use icecore_nbd_client::Dialect;
use icecore_nbd_client::handshake::{Client, Goal, Request};

use crate::take;

/// More than any message that the handshake may ask for at once.
const WANT_BYTES_MAX: usize = 64 << 10;
/// More than all that a client sends in a handshake.
const SENT_BYTES_MAX: usize = 1 << 20;

/// The first byte picks what the client asks for, the rest is what the server says.
pub fn nbd_handshake(mut data: &[u8]) {
    let Some(choice) = take(&mut data, 1).map(|byte| byte[0]) else { return };
    let Ok(mut client) = Client::new(request(choice)) else { return };
    let mut sent = 0;
    loop {
        let count = client.transmit().len();
        client.transmitted(count);
        sent += count;
        assert!(sent < SENT_BYTES_MAX, "it sends without end");
        if client.outcome().is_some() {
            return;
        }
        let want = client.want();
        assert!(want > 0, "it wants nothing and has no outcome");
        assert!(want <= WANT_BYTES_MAX, "it wants {want} bytes at once");
        let Some(bytes) = take(&mut data, want) else { return };
        if client.receive(bytes).is_err() {
            return;
        }
    }
}

fn request(choice: u8) -> Request {
    let mut request = Request::open("disk");
    request.goal = match choice & 3 {
        0 => Goal::Open,
        1 => Goal::Describe,
        2 => Goal::ListExports,
        _ => Goal::ListContexts(vec!["qemu:".to_owned()]),
    };
    request.dialect_max = match choice >> 2 & 3 {
        0 => Dialect::Simple,
        1 => Dialect::Structured,
        _ => Dialect::Extended,
    };
    if choice & 16 != 0 {
        request.contexts.push("base:allocation".to_owned());
    }
    if choice & 32 != 0 {
        request.optional_contexts.push("qemu:dirty-bitmap:p0".to_owned());
    }
    request.legacy = choice & 64 != 0;
    request
}
