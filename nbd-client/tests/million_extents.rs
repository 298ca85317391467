//! A terabyte with a million dirty granules, alone in its process because it measures memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use icecore_nbd_client::server::{Access, Export, Features, Server, ServerOptions};
use icecore_nbd_client::{Control, Endpoint, Errno, Extent, Flow, Options, Uri};

const GRANULE: u64 = 64 << 10;
const SIZE: u64 = 1 << 40;
/// Every 16th granule is dirty: 2^20 of them.
const STRIDE: u64 = 16 * GRANULE;
/// What asking may take beyond the test's own start: windows, socket buffers and allocator slack.
const GROWTH_KIB_MAX: u64 = 32 << 10;

struct Scattered {
    calls: AtomicU64,
}

impl Export for Scattered {
    fn features(&self) -> Features {
        Features::new(SIZE, Access::ReadOnly)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EIO)
    }
    fn contexts(&self) -> Vec<String> {
        vec!["qemu:dirty-bitmap:x".to_owned(), "base:allocation".to_owned()]
    }
    fn extents(&self, context: &str, range: Extent, max: usize) -> Result<Vec<Extent>, Errno> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if context == "base:allocation" {
            return Ok(vec![Extent { flags: 0, ..range }]);
        }
        let (mut at, mut extents) = (range.offset, Vec::new());
        while at < range.end() && extents.len() < max {
            let into = at % STRIDE;
            let (end, flags) = if into < GRANULE { (GRANULE, 1) } else { (STRIDE, 0) };
            let length = (end - into).min(range.end() - at);
            extents.push(Extent { offset: at, length, flags });
            at += length;
        }
        Ok(extents)
    }
}

/// A memory figure of this process, KiB.
fn memory_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with(field)).expect("field");
    line.split_whitespace().nth(1).expect("number").parse().expect("number")
}

#[tokio::test]
async fn a_million_scattered_granules_pass_in_little_memory() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = Arc::new(Scattered { calls: AtomicU64::new(0) });
    let export: Arc<dyn Export> = disk.clone();
    let server = Server::new(vec![("d".to_owned(), export)], ServerOptions::default());
    let listening = server.listen_unix(&socket, 0o600).expect("listen");
    let uri = Uri { endpoint: Endpoint::Unix(socket), export: "d".to_owned() };
    let contexts = disk.contexts();
    let options = Options { contexts, ..Options::default() };
    let mut control = Control::connect(&uri, &options).await.expect("connect");
    let bitmap = control.context("qemu:dirty-bitmap:x");
    let allocation = control.context("base:allocation");
    let before = memory_kib("VmRSS");
    let (mut count, mut next) = (0_u64, 0);
    let receive = |item: icecore_nbd_client::Changed| {
        assert_eq!((item.offset, item.length), (next, GRANULE));
        next += STRIDE;
        count += 1;
        Flow::Continue(())
    };
    let whole = Extent::new(0, SIZE);
    control.changed(whole, bitmap, allocation, receive).await.expect("extents");
    assert_eq!(count, SIZE / STRIDE);
    let growth = memory_kib("VmHWM") - before;
    assert!(growth <= GROWTH_KIB_MAX, "{growth} KiB for {count} extents");
    let calls = disk.calls.load(Ordering::Relaxed);
    assert!(calls < 4096, "{calls} questions: nearby ranges are to be asked together");
    listening.stop().await;
}
