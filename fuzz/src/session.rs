//! A hostile QMP server.

use icecore_qmp::session::Session;
use serde_json::Map;

/// The first byte says how the bytes after it are cut into pieces.
pub fn qmp_session(data: &[u8]) {
    let Some((piece, bytes)) = data.split_first() else { return };
    let mut session = Session::new(7);
    let cancelled = session.execute("query-status", Map::new());
    let _ = session.execute("query-block", Map::new());
    if let Ok(id) = cancelled {
        session.cancel(id);
    }
    for chunk in bytes.chunks(usize::from(*piece).max(1)) {
        loop {
            let count = session.transmit().len();
            if count == 0 {
                break;
            }
            session.transmitted(count);
        }
        if session.feed(chunk).is_err() {
            assert!(session.feed(b"{}").is_err(), "a failed session went on");
            return;
        }
    }
    session.eof();
}
