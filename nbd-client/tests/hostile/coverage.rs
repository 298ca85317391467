//! Reads that come incomplete or twice.

use icecore_nbd_client::ProtocolError;
use icecore_nbd_client::proto::chunk;

use crate::{DIALECTS, read_breaks};

#[tokio::test]
async fn success_with_a_gap_is_no_success() {
    for dialect in DIALECTS {
        let error = read_breaks(dialect, |dialect, request| {
            let end = request.offset + 4608;
            [
                request.data(dialect, 0, request.offset, &[1; 4096]),
                request.hole(dialect, chunk::FLAG_DONE, end, 8192 - 4608),
            ]
            .concat()
        });
        assert_eq!(error.await, ProtocolError::Incomplete { missing: 512, length: 8192 });
        let error = read_breaks(dialect, |dialect, request| request.done(dialect));
        assert_eq!(error.await, ProtocolError::Incomplete { missing: 8192, length: 8192 });
    }
}

#[tokio::test]
async fn bytes_that_come_twice_end_the_connection() {
    for dialect in DIALECTS {
        let error = read_breaks(dialect, |dialect, request| {
            [
                request.data(dialect, 0, request.offset, &[1; 4096]),
                request.data(dialect, chunk::FLAG_DONE, request.offset + 4095, &[2; 4097]),
            ]
            .concat()
        });
        assert!(matches!(error.await, ProtocolError::Overlap { .. }));
        let error = read_breaks(dialect, |dialect, request| {
            [
                request.hole(dialect, 0, request.offset + 512, 512),
                request.data(dialect, chunk::FLAG_DONE, request.offset, &[1; 8192]),
            ]
            .concat()
        });
        assert!(matches!(error.await, ProtocolError::Overlap { .. }));
    }
}
