//! What a QEMU can do, remembered for as long as that very process lives: its answer to
//! `query-qmp-schema` is some 200 KiB, takes it 60 to 90 ms and never changes.
//!
//! Only a cache: whatever is doubtful or wrong about an entry, QEMU is asked again.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use icecore_qmp::features::Features;
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::GuardianError;
use icecore_qmp::guardian::protocol::Greeted;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};
use crate::state::State;
use crate::state::locks::LockKey;

/// No entry is larger; a larger file is not one of ours.
const ENTRY_BYTES_MAX: u64 = 64 << 10;

/// What the programs of QEMU are called. A socket that another program listened on (libvirt passes
/// its QEMUs sockets that are open already) says nothing about the process that answers.
const QEMU_PROGRAMS: &str = "qemu-";

/// A process, told apart from all others that had its number and from itself before an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Process {
    boot: String,
    namespace: PathBuf,
    pid: i32,
    /// Clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)).
    started: u64,
    program: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    changed_ns: (i64, i64),
}

impl Process {
    /// The QEMU that listened; none where that cannot be told.
    fn of_qemu(pid: i32) -> Option<Self> {
        let folder = Path::new("/proc").join(pid.to_string());
        let program = std::fs::read_link(folder.join("exe")).ok()?;
        if !program.file_name()?.to_str()?.starts_with(QEMU_PROGRAMS) {
            return None;
        }
        let file = std::fs::metadata(folder.join("exe")).ok()?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(Self {
            boot: boot.trim().to_owned(),
            namespace: std::fs::read_link("/proc/self/ns/pid").ok()?,
            pid,
            started: started(&std::fs::read_to_string(folder.join("stat")).ok()?)?,
            program,
            device: file.dev(),
            inode: file.ino(),
            bytes: file.size(),
            changed_ns: (file.ctime(), file.ctime_nsec()),
        })
    }
}

fn started(stat: &str) -> Option<u64> {
    // The second field, the name, may hold spaces and parentheses; count after its end.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// What is on disk, one file for each monitor socket.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// The program that understood the schema; another one may see more in it.
    icecore: String,
    process: Process,
    features: Features,
}

/// Sees to it that the guardian knows what its QEMU can do, from memory where that is safe.
pub async fn learn(
    guardian: &GuardianClient,
    state: &State,
    socket: &Path,
    greeted: Greeted,
) -> Result<(), GuardianError> {
    let Some(process) = greeted.peer.and_then(Process::of_qemu) else { return Ok(()) };
    let path = path(state, socket);
    if let Some(features) = recall(&path, &process, greeted) {
        return guardian.know(features).await;
    }
    let features = guardian.features().await?;
    let entry = Entry { icecore: env!("CARGO_PKG_VERSION").into(), process, features };
    if let Err(error) = remember(state, &path, &entry) {
        tracing::debug!(%error, "QEMU will be asked again what it can do");
    }
    Ok(())
}

fn path(state: &State, socket: &Path) -> PathBuf {
    state.root().join("cache").join("qemu").join(LockKey::file(socket).as_str())
}

fn recall(path: &Path, process: &Process, greeted: Greeted) -> Option<Features> {
    if std::fs::metadata(path).ok()?.len() > ENTRY_BYTES_MAX {
        return None;
    }
    let entry: Entry = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let same = entry.icecore == env!("CARGO_PKG_VERSION")
        && &entry.process == process
        && entry.features.version == greeted.version;
    same.then_some(entry.features)
}

fn remember(state: &State, path: &Path, entry: &Entry) -> Outcome<()> {
    state.dir("cache/qemu")?;
    let tried = format!("remember what QEMU can do in {}", path.display());
    // Two commands may write at once: each its own file, the last rename wins.
    let fresh = path.with_extension(std::process::id().to_string());
    let json = serde_json::to_vec(entry).map_err(|e| Failure::failed(&tried, e))?;
    let written = std::fs::write(&fresh, json).and_then(|()| std::fs::rename(&fresh, path));
    written.map_err(|e| Failure::failed(tried, e))
}

#[cfg(test)]
mod tests {
    use icecore_qmp::features::QemuVersion;

    use super::*;

    const VERSION: QemuVersion = QemuVersion { major: 10, minor: 0, micro: 2 };

    fn process() -> Process {
        Process {
            boot: "b".into(),
            namespace: "pid:[1]".into(),
            pid: 7,
            started: 8,
            program: "/usr/bin/qemu-system-x86_64".into(),
            device: 1,
            inode: 2,
            bytes: 3,
            changed_ns: (4, 5),
        }
    }

    fn entry() -> Entry {
        let features = Features {
            version: VERSION,
            missing_commands: Vec::new(),
            cbw_on_error: true,
            cbw_timeout: true,
            snapshot_access: true,
            export_bitmaps: true,
            export_iothread: true,
            cbw_min_cluster_size: true,
        };
        Entry { icecore: env!("CARGO_PKG_VERSION").into(), process: process(), features }
    }

    #[test]
    fn only_the_same_process_with_the_same_greeting_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::new(folder.path());
        let path = path(&state, Path::new("/run/qmp.sock"));
        let greeted = Greeted { version: VERSION, peer: Some(7) };
        assert_eq!(recall(&path, &process(), greeted), None, "nothing is there yet");
        remember(&state, &path, &entry()).unwrap();
        assert_eq!(recall(&path, &process(), greeted), Some(entry().features));
        let others = [
            Process { boot: "c".into(), ..process() },
            Process { namespace: "pid:[2]".into(), ..process() },
            Process { pid: 9, ..process() },
            Process { started: 9, ..process() },
            Process { program: "/opt/bin/qemu-system-x86_64".into(), ..process() },
            Process { device: 9, ..process() },
            Process { inode: 9, ..process() },
            Process { bytes: 9, ..process() },
            Process { changed_ns: (4, 6), ..process() },
        ];
        for other in others {
            assert_eq!(recall(&path, &other, greeted), None, "{other:?}");
        }
        let newer = QemuVersion { minor: 1, ..VERSION };
        assert_eq!(recall(&path, &process(), Greeted { version: newer, ..greeted }), None);
        remember(&state, &path, &Entry { icecore: "0".into(), ..entry() }).unwrap();
        assert_eq!(recall(&path, &process(), greeted), None, "an older program's");
        std::fs::write(&path, b"{").unwrap();
        assert_eq!(recall(&path, &process(), greeted), None, "a torn one");
    }

    #[test]
    fn a_process_that_is_no_qemu_is_not_remembered() {
        assert_eq!(Process::of_qemu(std::process::id().cast_signed()), None);
        assert_eq!(Process::of_qemu(0), None, "of another namespace");
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 1234 20";
        assert_eq!(started(stat), Some(1234));
    }
}
