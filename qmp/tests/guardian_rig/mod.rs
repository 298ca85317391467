//! A guest-less QEMU, and a guardian for it.
#![allow(dead_code)] // Each test file uses a part.

use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use icecore_qmp::Monitor;
use icecore_qmp::bitmap::Granularity;
use icecore_qmp::capture::plan::{Base, DiskPlan, NewBitmap, Scratch};
use icecore_qmp::capture::{Observed, RunId, scratch};
use icecore_qmp::guardian::probe::ProbeCommand;
use icecore_qmp::guardian::protocol::{
    Expose, ExposeDisk, Exposed, Form, Freeze, InstantPlan, InstantReport, Prepare, Then,
};
use icecore_qmp::guardian::{GuardianClient, serve};
use icecore_qmp::inventory::Inventory;
use serde_json::{Value, json};

pub const MIB: u64 = 1 << 20;
pub const RUN: RunId = RunId(0xabcd);
const WAIT: Duration = Duration::from_secs(10);

/// How a QEMU is started: program, its data folder, and the devices.
pub struct Machine {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub disks: Vec<(&'static str, &'static str, u64)>,
    pub devices: Vec<&'static str>,
    pub in_iothread: bool,
}

impl Machine {
    /// Two disks on virtio-blk, one qcow2 and one raw.
    pub fn plain() -> Self {
        Self {
            program: icecore_qmp::testing::binary_under_test().into(),
            args: Vec::new(),
            disks: vec![("disk0", "qcow2", 64 * MIB), ("disk1", "raw", 32 * MIB)],
            devices: vec!["virtio-blk-pci,id=vd0,drive=disk0", "virtio-blk-pci,id=vd1,drive=disk1"],
            in_iothread: false,
        }
    }

    /// One disk.
    pub fn single() -> Self {
        let mut machine = Self::plain();
        machine.disks.truncate(1);
        machine.devices.truncate(1);
        machine
    }

    /// Two disks on virtio-scsi in an iothread.
    pub fn iothread() -> Self {
        Self {
            devices: vec![
                "virtio-scsi-pci,id=sc0,iothread=io0",
                "scsi-hd,id=sd0,bus=sc0.0,drive=disk0",
                "scsi-hd,id=sd1,bus=sc0.0,drive=disk1",
            ],
            in_iothread: true,
            ..Self::plain()
        }
    }
}

pub struct Qemu {
    pub child: Child,
    pub dir: tempfile::TempDir,
    pub side: Monitor,
    pub disks: usize,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    pub async fn start(machine: &Machine) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new(&machine.program);
        command.args(&machine.args).args(["-M", "q35", "-S", "-accel", "tcg", "-m", "32"]);
        command.args(["-display", "none", "-nodefaults", "-object", "iothread,id=io0"]);
        for (node, format, size) in &machine.disks {
            let file = dir.path().join(node);
            run("qemu-img", &["create", "-q", "-f", format, text(&file), &size.to_string()]);
            run("qemu-io", &["-f", format, "-c", "write -q -P 1 0 1M", text(&file)]);
            let file = text(&file).to_owned();
            let options = format!(
                "driver={format},node-name={node},discard=unmap,file.driver=file,\
                         file.filename={file}"
            );
            command.args(["-blockdev", &options]);
        }
        for device in &machine.devices {
            command.args(["-device", device]);
        }
        for socket in ["qmp", "side"] {
            let path = dir.path().join(socket);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).current_dir(dir.path());
        let child = command.spawn().expect("QEMU starts");
        let side = connect(&dir.path().join("side")).await;
        Self { child, dir, side, disks: machine.disks.len() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn ask(&self, command: &str, arguments: Value) -> Value {
        self.side.execute_raw(command, arguments, WAIT).await.expect(command)
    }

    pub async fn try_ask(&self, command: &str, arguments: Value) -> Result<Value, String> {
        self.side.execute_raw(command, arguments, WAIT).await.map_err(|error| error.to_string())
    }

    /// Whether disks in an iothread may be exported; else there is nothing to test but refusal.
    pub fn exports_from_iothreads(&self) -> bool {
        self.side.version() >= icecore_qmp::features::SAFE_IOTHREAD_EXPORTS
    }

    pub async fn seen(&self) -> Observed {
        Observed::query(&self.side).await.expect("queries")
    }

    pub async fn inventory(&self) -> Inventory {
        icecore_qmp::inventory::inventory(&self.side, WAIT).await.expect("inventory")
    }

    /// Writes as the guest would: through the device's own backend.
    pub async fn write(&self, disk: usize, byte: u8, range: Range<u64>) {
        let path = &self.inventory().await.disks[disk].drive_path;
        let (offset, len) = (range.start, range.end - range.start);
        let line = format!("qemu-io -d {path} \"write -q -P {byte} {offset} {len}\"");
        let said = self.ask("human-monitor-command", json!({"command-line": line})).await;
        assert_eq!(said, json!(""), "the guest's write");
    }

    /// Reads as the guest would and compares with a pattern.
    pub async fn holds(&self, disk: usize, byte: u8, range: Range<u64>) -> bool {
        let path = &self.inventory().await.disks[disk].drive_path;
        let (offset, len) = (range.start, range.end - range.start);
        let line = format!("qemu-io -d {path} \"read -q -P {byte} {offset} {len}\"");
        let said = self.ask("human-monitor-command", json!({"command-line": line})).await;
        said == json!("")
    }

    /// A guardian in a thread of this process. Its scratch storage answers.
    pub fn guardian(&self) -> (GuardianClient, std::thread::JoinHandle<()>) {
        self.guardian_with("true")
    }

    /// A guardian whose probe is this command of the shell.
    pub fn guardian_with(&self, probe: &str) -> (GuardianClient, std::thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let arguments = vec!["-c".into(), probe.into()];
        let probe = ProbeCommand { program: "sh".into(), arguments };
        let thread = std::thread::spawn(move || serve(theirs, probe).expect("serves"));
        (GuardianClient::connect_to(ours, &[]).expect("a client"), thread)
    }

    /// A guardian that is connected.
    pub async fn connected(&self) -> (GuardianClient, std::thread::JoinHandle<()>) {
        self.connected_with("true").await
    }

    /// A guardian that is connected, with a probe as in [`Self::guardian_with`].
    pub async fn connected_with(
        &self,
        probe: &str,
    ) -> (GuardianClient, std::thread::JoinHandle<()>) {
        let (client, thread) = self.guardian_with(probe);
        client.connect(self.path("qmp"), None).await.expect("connected");
        (client, thread)
    }

    pub async fn prepare(&self, cap_bytes: u64, point: &str) -> Prepare {
        let mut disks = Vec::new();
        for (index, disk) in self.inventory().await.disks.iter().enumerate() {
            let path = self.path(&format!("scratch{index}"));
            let file = std::fs::File::create(&path).expect("a scratch file");
            file.set_len(cap_bytes).expect("its size");
            scratch::format(&file, disk.size_bytes).expect("an image");
            let name = bitmap(point, &disk.id);
            let bitmap = Some(NewBitmap { name, granularity: Granularity::DEFAULT });
            disks.push(DiskPlan::new(disk, Scratch { path, cap_bytes }, bitmap));
        }
        Prepare {
            run: RUN,
            disks,
            server_socket: self.path("nbd"),
            scratch_dir: self.dir.path().to_owned(),
        }
    }

    /// Prepare, instant, expose.
    pub async fn capture(
        &self,
        client: &GuardianClient,
        point: &str,
        base: Option<&str>,
    ) -> (InstantReport, Exposed) {
        client.prepare(self.prepare(64 * MIB, point).await).await.expect("prepared");
        let report = client.instant(instant(Then::Continue)).await.expect("instant");
        let expose = self.expose_plan(Form::Pull, base).await;
        (report, client.expose(expose).await.expect("exposed"))
    }

    pub async fn expose_plan(&self, form: Form, base: Option<&str>) -> Expose {
        let base = |id: &str| {
            let bitmap = bitmap(base?, id);
            Some(Base { bitmap, granularity: Granularity::DEFAULT })
        };
        let disks = self.inventory().await.disks;
        let disks = disks.iter().map(|disk| ExposeDisk { form, base: base(&disk.id) }).collect();
        Expose { disks, trim: true }
    }

    /// Reads an export into memory.
    pub async fn read(&self, export: &str) -> Result<Vec<u8>, String> {
        let out = self.path("out.raw");
        let source = format!("nbd:unix:{}:exportname={export}", self.path("nbd").display());
        let done = tokio::process::Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "raw", &source, text(&out)])
            .output()
            .await
            .expect("qemu-img runs");
        if !done.status.success() {
            return Err(String::from_utf8_lossy(&done.stderr).into_owned());
        }
        Ok(std::fs::read(out).expect("what was read"))
    }

    /// The dirty ranges that an export shows.
    pub async fn dirty(&self, export: &str, context: &str) -> Vec<Range<u64>> {
        let socket = self.path("nbd");
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},export={export},x-dirty-bitmap={context}",
            socket.display()
        );
        let done = tokio::process::Command::new("qemu-img")
            .args(["map", "--output=json", "--image-opts", &options])
            .output()
            .await
            .expect("qemu-img runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let runs: Vec<Value> = serde_json::from_slice(&done.stdout).expect("a map");
        let start = |run: &Value| run["start"].as_u64().expect("a start");
        let end = |run: &Value| start(run) + run["length"].as_u64().expect("a length");
        // qemu-img shows dirty as "no data" (docs/interop/nbd.rst, x-dirty-bitmap).
        let dirty = runs.iter().filter(|run| run["data"] == json!(false));
        dirty.map(|run| start(run)..end(run)).collect()
    }

    /// Nothing of ours is left but the named bitmaps; the devices are on their own disks.
    pub async fn assert_clean(&self, bitmaps: &[String]) {
        let seen = self.seen().await;
        assert_eq!(seen.runs(), [], "leftovers in {seen:?}");
        let mut ours: Vec<_> =
            seen.bitmaps.iter().map(|b| b.name.clone()).filter(|n| n.starts_with("ic")).collect();
        ours.sort();
        let mut wanted = bitmaps.to_vec();
        wanted.sort();
        assert_eq!(ours, wanted);
        for disk in self.inventory().await.disks {
            assert_eq!(disk.root, disk.node, "{} is on its own disk", disk.id);
        }
        assert!(!self.path("nbd").exists(), "no socket is left");
    }
}

/// A worker that is alive, as seen by its guardian.
pub fn keep_alive(client: &GuardianClient) -> tokio::task::JoinHandle<()> {
    let pulse = client.pulse();
    tokio::spawn(async move {
        for counter in 1.. {
            pulse.beat(counter);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

/// Waits for a guardian's end, with a limit. The client has to be dropped before.
pub async fn ended(thread: std::thread::JoinHandle<()>) {
    let joined = tokio::task::spawn_blocking(move || thread.join());
    let within = Duration::from_secs(30);
    tokio::time::timeout(within, joined).await.expect("in time").expect("joined").expect("well");
}

pub fn instant(then: Then) -> InstantPlan {
    InstantPlan { freeze: Freeze::No, then }
}

pub fn bitmap(point: &str, disk: &str) -> String {
    format!("icecore:r:c:{point}:{disk}")
}

async fn connect(path: &Path) -> Monitor {
    let mut last = None;
    for _ in 0..200 {
        match Monitor::connect(path, WAIT).await {
            Ok(monitor) => last = Some(Ok(monitor)),
            Err(error) => last = Some(Err(error)),
        }
        if matches!(last, Some(Ok(_))) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    last.expect("tried").expect("QEMU answers")
}

pub fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().expect(program);
    assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
