//! A million scattered changes on a disk of 1 TiB: their map alone, and a point of them.

use std::path::PathBuf;

use icecore_nbd_client::{Control, Options, Uri, is_dirty};
use serde_json::json;

use super::lab::{Lab, blank_qcow2};
use super::measure::Children;
use super::server::{self, Vm};
use super::{Bench, MAP, MAP_LIBNBD, MILLION};
use crate::step::{Failure, Result, captured, program};

const SIZE: u64 = 1 << 40;
const STRIDE: u64 = 1 << 20;
/// A node that no device holds, so that it can be written to over NBD, and its bitmap.
const NODE: &str = "pattern";

/// What is measured here.
pub const ROWS: [&str; 3] = [MAP_LIBNBD, MAP, MILLION];

/// A QEMU with such a disk and a repository with its first point.
pub struct Wide {
    vm: Vm,
    repository: PathBuf,
    socket: PathBuf,
}

impl Wide {
    /// Takes the first point of the empty disk.
    pub fn new(bench: &mut Bench) -> Option<Self> {
        bench.prepare("map of a million extents", |lab| {
            let image = lab.path("wide.qcow2");
            blank_qcow2(&image, SIZE)?;
            let repository = lab.repository("wide")?;
            let vm = Vm::start(&image, &lab.fresh("vm-wide")?)?;
            captured(&mut lab.backup_live(&vm, &repository))?;
            Ok(Self { vm, repository, socket: lab.path("map.sock") })
        })
    }

    /// All rows, once.
    pub fn round(&mut self, bench: &mut Bench) -> Result<()> {
        if let Err(error) = self.change(&bench.lab) {
            bench.table.skip(MAP, error.to_string());
            return Ok(());
        }
        let (uri, pid) = (server::uri(&self.socket, "map"), Some(self.vm.pid()));
        let context = format!("qemu:dirty-bitmap:{NODE}");
        bench.row(MAP_LIBNBD, |lab| {
            let mut command = program("nbdinfo");
            command.arg(format!("--map={context}")).arg("--totals").arg(&uri);
            lab.measure(command, Children::Client, pid, None)
        });
        bench.row(MAP, |lab| {
            let helper = crate::step::cargo_target().join("release/xtask");
            let mut command = std::process::Command::new(helper);
            command.args(["bench-map", &uri, &context]);
            lab.measure(command, Children::Client, pid, None)
        });
        self.vm.execute("nbd-server-stop", json!({}))?;
        self.vm.execute("block-dirty-bitmap-remove", json!({ "node": NODE, "name": NODE }))?;
        self.vm.execute("blockdev-del", json!({ "node-name": NODE }))?;
        bench.row(MILLION, |lab| {
            let command = lab.backup_live(&self.vm, &self.repository);
            lab.measure(command, Children::Client, pid, Some(&self.repository))
        });
        Ok(())
    }

    /// Makes one granule of every MiB dirty in a bitmap, adds that to Icecore's, and serves it.
    ///
    /// The disk itself stays empty: its zeroes are a million ranges that may have changed.
    fn change(&mut self, lab: &Lab) -> Result<()> {
        let node = json!({ "driver": "null-co", "node-name": NODE, "size": SIZE });
        self.vm.execute("blockdev-add", node)?;
        let bitmap = json!({ "node": NODE, "name": NODE, "granularity": 65536 });
        self.vm.execute("block-dirty-bitmap-add", bitmap)?;
        let address = json!({ "type": "unix", "data": { "path": self.socket } });
        self.vm.execute("nbd-server-start", json!({ "addr": address }))?;
        self.export("write", true)?;
        let mut fio = program("fio");
        fio.args(["--name=changes", "--ioengine=nbd", "--bs=4k", "--iodepth=64"]);
        fio.arg(format!("--rw=write:{}k", STRIDE / 1024 - 4));
        fio.arg(format!("--io_size={}", SIZE / STRIDE * 4096)).arg(format!("--size={SIZE}"));
        let uri = server::uri(&self.socket, "write");
        captured(fio.arg(format!("--uri={uri}")).current_dir(lab.path("")))?;
        self.vm.execute("block-dirty-bitmap-disable", json!({ "node": NODE, "name": NODE }))?;
        self.vm.execute("block-export-del", json!({ "id": "write", "mode": "hard" }))?;
        let name = self.recording()?;
        let from = json!([{ "node": NODE, "name": NODE }]);
        let merge = json!({ "node": "disk", "target": name, "bitmaps": from });
        self.vm.execute("block-dirty-bitmap-merge", merge)?;
        // Only now: a bitmap that is exported is in use.
        self.export("map", false)
    }

    fn export(&mut self, id: &str, writable: bool) -> Result<()> {
        let bitmaps = if writable { json!([]) } else { json!([NODE]) };
        let export = json!({ "type": "nbd", "id": id, "node-name": NODE, "name": id,
                             "writable": writable, "bitmaps": bitmaps });
        self.vm.execute("block-export-add", export).map(drop)
    }

    /// The name of Icecore's bitmap on the disk.
    fn recording(&mut self) -> Result<String> {
        let nodes = self.vm.execute("query-named-block-nodes", json!({ "flat": true }))?;
        let bitmaps = nodes
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|node| node["dirty-bitmaps"].as_array().into_iter().flatten());
        let mut names = bitmaps.filter_map(|bitmap| bitmap["name"].as_str());
        let found = names.find(|name| name.starts_with("icecore:"));
        found.map(str::to_owned).ok_or_else(|| Failure::new("Icecore left no bitmap on the disk"))
    }
}

/// The measured client: fetches a map as Icecore does, and counts.
pub fn client(uri: &str, context: &str) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(format!("{uri}: {error}"));
    let address: Uri = uri.parse().map_err(|error| failed(&error))?;
    let options = Options { contexts: vec![context.to_owned()], ..Options::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut control =
            Control::connect(&address, &options).await.map_err(|error| failed(&error))?;
        let id = control.context(context).ok_or_else(|| failed(&"no such context"))?;
        let whole = icecore_nbd_client::Extent::new(0, control.export().size_bytes);
        let (mut extents, mut bytes) = (0u64, 0u64);
        let count = |extent: icecore_nbd_client::Extent| {
            if is_dirty(extent.flags) {
                (extents, bytes) = (extents + 1, bytes + extent.length);
            }
            std::ops::ControlFlow::Continue(())
        };
        control.extents(id, [whole], count).await.map_err(|error| failed(&error))?;
        println!("{extents} dirty extents, {bytes} bytes");
        Ok(())
    })
}
