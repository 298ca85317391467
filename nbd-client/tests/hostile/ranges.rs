//! Data, holes and errors outside of what was asked for.

use icecore_nbd_client::proto::chunk;
use icecore_nbd_client::{Errno, ProtocolError};

use crate::{DIALECTS, read_breaks};

fn outside(error: &ProtocolError) -> bool {
    matches!(error, ProtocolError::OutsideRequest { .. })
}

#[tokio::test]
async fn data_outside_of_the_request_ends_the_connection() {
    for dialect in DIALECTS {
        for offset in [0, 4095, 4097, 1 << 40, u64::MAX - 100] {
            let error = read_breaks(dialect, move |dialect, request| {
                request.data(dialect, chunk::FLAG_DONE, offset, &[1; 8192])
            })
            .await;
            assert!(outside(&error), "{offset}: {error}");
        }
    }
}

#[tokio::test]
async fn holes_outside_of_the_request_end_the_connection() {
    for dialect in DIALECTS {
        for (offset, length) in [(0, 512), (4096, 8193), (4096, u32::MAX), (u64::MAX, 1)] {
            let error = read_breaks(dialect, move |dialect, request| {
                request.hole(dialect, chunk::FLAG_DONE, offset, length)
            })
            .await;
            assert!(outside(&error), "{offset}+{length}: {error}");
        }
    }
}

#[tokio::test]
async fn errors_outside_of_the_request_end_the_connection() {
    for dialect in DIALECTS {
        let error = read_breaks(dialect, |dialect, request| {
            let mut body = icecore_nbd_client::testing::error_body(Errno::EIO, "bad");
            body.extend_from_slice(&(4096_u64 + 8192).to_be_bytes());
            request.chunk(dialect, chunk::FLAG_DONE, chunk::ERROR_OFFSET, &body)
        });
        assert!(outside(&error.await));
    }
}
