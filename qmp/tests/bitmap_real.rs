//! Sentinels and flaws of real bitmaps, in a storage daemon.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use icecore_qmp::Monitor;
use icecore_qmp::bitmap::{Granularity, SentinelClean, Sentinels};
use icecore_qmp::testing::{Process, daemon_command};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(20);
const SIZE: u64 = (64 << 20) + 512;
const NAME: &str = "icecore:r:c:p1:vda";

struct Rig {
    monitor: Monitor,
    _daemon: Process,
    folder: tempfile::TempDir,
}

impl Rig {
    /// A disk of an odd size with one bitmap, whose sentinels are set by merging a bitmap of a
    /// null-co node that was written through an export.
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let create = ["create", "-q", "-f", "qcow2", "disk.qcow2", &SIZE.to_string()];
        run(folder.path(), "qemu-img", &create);
        let daemon = Process::start(daemon_command(), folder.path()).unwrap();
        let monitor = Monitor::connect(daemon.monitor(), DEADLINE).await.unwrap();
        let rig = Self { monitor, _daemon: daemon, folder };
        let disk = json!({"driver": "qcow2", "node-name": "disk",
            "file": {"driver": "file", "filename": "disk.qcow2"}});
        rig.ask("blockdev-add", disk).await;
        let null = json!({"driver": "null-co", "node-name": "null", "size": SIZE});
        rig.ask("blockdev-add", null).await;
        for (node, name) in [("disk", NAME), ("null", "marks")] {
            let bitmap = json!({"node": node, "name": name,
                "granularity": Granularity::DEFAULT.bytes()});
            rig.ask("block-dirty-bitmap-add", bitmap).await;
        }
        let address = json!({"addr": {"type": "unix", "data": {"path": "nbd.sock"}}});
        rig.ask("nbd-server-start", address).await;
        rig.set_sentinels().await;
        rig
    }

    async fn ask(&self, command: &str, arguments: Value) -> Value {
        self.monitor.execute_raw(command, arguments, DEADLINE).await.unwrap()
    }

    async fn set_sentinels(&self) {
        let export = json!({"id": "e", "type": "nbd", "node-name": "null", "writable": true});
        self.ask("block-export-add", export).await;
        for range in Sentinels::new(SIZE, Granularity::DEFAULT).ranges() {
            let write = format!("write {} {}", range.start, range.end - range.start);
            let export = "nbd+unix:///null?socket=nbd.sock";
            run(self.folder.path(), "qemu-io", &["-f", "raw", "-c", &write, export]);
        }
        self.ask("block-export-del", json!({"id": "e", "mode": "hard"})).await;
        let merge = json!({"node": "disk", "target": NAME,
            "bitmaps": [{"node": "null", "name": "marks"}]});
        self.ask("block-dirty-bitmap-merge", merge).await;
    }

    /// Reads the bitmap by a copy on another node, as a backup does.
    async fn sentinels(&self) -> Result<(), SentinelClean> {
        let copy = json!({"node": "null", "name": "copy", "disabled": true,
            "granularity": Granularity::DEFAULT.bytes()});
        self.ask("block-dirty-bitmap-add", copy).await;
        let merge = json!({"node": "null", "target": "copy",
            "bitmaps": [{"node": "disk", "name": NAME}]});
        self.ask("block-dirty-bitmap-merge", merge).await;
        let export = json!({"id": "x", "type": "nbd", "node-name": "null", "bitmaps": ["copy"]});
        self.ask("block-export-add", export).await;
        let image = "driver=nbd,server.type=unix,server.path=nbd.sock,export=null,\
            x-dirty-bitmap=qemu:dirty-bitmap:copy";
        let map =
            run(self.folder.path(), "qemu-img", &["map", "--output=json", "--image-opts", image]);
        let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
        self.ask("block-export-del", json!({"id": "x", "mode": "hard"})).await;
        let gone = json!({"node": "null", "name": "copy"});
        self.ask("block-dirty-bitmap-remove", gone).await;
        let mut watch = Sentinels::new(SIZE, Granularity::DEFAULT).watch();
        // qemu-img shows the context's flag, dirty, as "no data" (QEMU docs/interop/nbd.txt).
        for extent in map.iter().filter(|extent| extent["data"] == false) {
            let start = extent["start"].as_u64().unwrap();
            watch.dirty(start..start + extent["length"].as_u64().unwrap());
        }
        watch.finish()
    }

    async fn resize(&self, size_bytes: u64) {
        self.ask("block_resize", json!({"node-name": "disk", "size": size_bytes})).await;
    }
}

fn run(folder: &Path, program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).current_dir(folder).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output.stdout
}

#[tokio::test]
async fn sentinels_stay_until_the_disk_shrinks_and_grows_back() {
    let rig = Rig::start().await;
    assert_eq!(rig.sentinels().await, Ok(()));
    rig.resize(32 << 20).await;
    rig.resize(SIZE).await;
    let clean = rig.sentinels().await.unwrap_err();
    assert_eq!(clean.range, 64 << 20..SIZE);
}

#[tokio::test]
async fn growth_leaves_the_sentinels_alone() {
    let rig = Rig::start().await;
    rig.resize(96 << 20).await;
    // The copy must have the disk's size now.
    rig.ask("block-dirty-bitmap-remove", json!({"node": "null", "name": "marks"})).await;
    rig.ask("blockdev-del", json!({"node-name": "null"})).await;
    let null = json!({"driver": "null-co", "node-name": "null", "size": 96 << 20});
    rig.ask("blockdev-add", null).await;
    assert_eq!(rig.sentinels().await, Ok(()));
}

#[tokio::test]
async fn a_cleared_bitmap_shows_it() {
    let rig = Rig::start().await;
    rig.ask("block-dirty-bitmap-clear", json!({"node": "disk", "name": NAME})).await;
    let clean = rig.sentinels().await.unwrap_err();
    assert_eq!(clean.range, 0..65536);
}
