//! What a directory can do, found by trying: every promise of the store above it rests on a few calls
//! of the file system that some file systems only pretend to have.

use std::fmt;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::{FileSystem, OsFileSystem};

/// Tried here: no object lies in it, and gc removes what a probe that died has left.
const PLACE: &str = ".incomplete";

/// What a place for a repository was found to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// The file system by name.
    pub file_system: String,
    /// Whether it lies on another machine.
    pub network: bool,
    /// Free bytes.
    pub free_bytes: u64,
    /// How a name is given only if it is free.
    pub create_only: CreateOnly,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// How a name is given only if it is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CreateOnly {
    /// By a hard link.
    Link,
    /// By renaming without replacing.
    Rename,
}

/// A promise that could not be kept at a place.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A call does not do what it must.
    #[error("{promise}: {why}")]
    Broken {
        /// What has to hold, and does not.
        promise: &'static str,
        /// What was found.
        why: String,
    },
    /// It could not even be looked at.
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn broken(promise: &'static str, why: impl fmt::Display) -> Unfit {
    Unfit::Broken { promise, why: why.to_string() }
}

/// Looks at a directory, which must be there and writable, and tries what a store needs of it.
///
/// # Errors
/// [`Unfit`] when a repository there could lose what it reported as stored.
pub fn probe_directory(root: &Path) -> Result<Found, Unfit> {
    let fs = OsFileSystem::open(root)?;
    let create_only = exercise(&fs)?;
    let (magic, free_bytes) = fs.magic_and_room()?;
    let kind = Kind::of(magic);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = std::fs::canonicalize(root)?;
    let options = options_of(&mounts, &path);
    let notes = kind.judge(&options)?;
    let (file_system, network) = (kind.name(magic), kind.is_network());
    Ok(Found { file_system, network, free_bytes, create_only, notes })
}

const EXCLUSIVE: &str = "a file that exists must not be created again";
const CREATE_ONLY: &str = "a name that is taken must not be given to another file";
const DURABLE: &str = "fsync must make files and directories durable";
const READ_BACK: &str = "what was written must be read back";

/// Tries every kind of call that the store makes.
fn exercise(fs: &dyn FileSystem) -> Result<CreateOnly, Unfit> {
    match fs.make_directory(PLACE) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => (),
    }
    fs.sync_directory("").map_err(|error| broken(DURABLE, error))?;
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let name = format!("{PLACE}/probe-{:032x}", u128::from_le_bytes(random));
    let names = [format!("{name}-1"), format!("{name}-2"), format!("{name}-3")];
    let outcome = exercise_names(fs, &names);
    let removed: Vec<io::Result<()>> = names.iter().map(|name| fs.remove(name)).collect();
    let create_only = outcome?;
    for removed in removed {
        removed.or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
    }
    fs.sync_directory(PLACE).map_err(|error| broken(DURABLE, error))?;
    Ok(create_only)
}

fn exercise_names(fs: &dyn FileSystem, names: &[String; 3]) -> Result<CreateOnly, Unfit> {
    let [first, second, target] = names;
    for (name, content) in [(first, b"first "), (second, b"second")] {
        let mut file = fs.create_new(name)?;
        file.append(content)?;
        file.sync().map_err(|error| broken(DURABLE, error))?;
    }
    must_exist(fs.create_new(first).map(drop), EXCLUSIVE)?;
    fs.publish(first, target).map_err(|error| {
        broken(CREATE_ONLY, format!("there are neither hard links nor such renames ({error})"))
    })?;
    must_exist(fs.publish(second, target), CREATE_ONLY)?;
    let mut content = [0; 6];
    let count = fs.read_at(target, 0, &mut content)?;
    if count != content.len() || &content != b"first " {
        return Err(broken(READ_BACK, "the bytes of a file that was just written are others"));
    }
    let entries = fs.entries(PLACE)?;
    let listed =
        |name: &str| entries.iter().any(|entry| format!("{PLACE}/{}", entry.name) == *name);
    if !listed(target) {
        return Err(broken(READ_BACK, "a file that was just written is not listed"));
    }
    fs.sync_directory(PLACE).map_err(|error| broken(DURABLE, error))?;
    Ok(if listed(first) { CreateOnly::Link } else { CreateOnly::Rename })
}

fn must_exist(outcome: io::Result<()>, promise: &'static str) -> Result<(), Unfit> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(broken(promise, format!("it fails in another way ({error})"))),
        Ok(()) => Err(broken(promise, "it was done all the same")),
    }
}

/// File systems that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Local(&'static str),
    Memory(&'static str),
    Fuse,
    Nfs,
    Network(&'static str),
    Unknown,
}

impl Kind {
    /// By the number that statfs gives (linux/magic.h).
    fn of(magic: u64) -> Self {
        match magic {
            0xef53 => Self::Local("ext4"),
            0x5846_5342 => Self::Local("xfs"),
            0x9123_683e => Self::Local("btrfs"),
            0x2fc1_2fc1 => Self::Local("zfs"),
            0xf2f5_2010 => Self::Local("f2fs"),
            0xca45_1a4e => Self::Local("bcachefs"),
            0x794c_7630 => Self::Local("overlay"),
            0x4d44 => Self::Local("vfat"),
            0x2011_bab0 => Self::Local("exfat"),
            0x0102_1994 => Self::Memory("tmpfs"),
            0x8584_58f6 => Self::Memory("ramfs"),
            0x6573_5546 => Self::Fuse,
            0x6969 => Self::Nfs,
            0xff53_4d42 | 0xfe53_4d42 => Self::Network("cifs"),
            0x00c3_6400 => Self::Network("ceph"),
            0x0102_1997 => Self::Network("9p"),
            _ => Self::Unknown,
        }
    }

    fn name(self, magic: u64) -> String {
        match self {
            Self::Local(name) | Self::Memory(name) | Self::Network(name) => name.to_owned(),
            Self::Fuse => "fuse".to_owned(),
            Self::Nfs => "nfs".to_owned(),
            Self::Unknown => format!("{magic:#x}"),
        }
    }

    fn is_network(self) -> bool {
        matches!(self, Self::Nfs | Self::Network(_))
    }

    /// What the operator should know of it, mounted like this.
    fn judge(self, options: &[&str]) -> Result<Vec<String>, Unfit> {
        let mut notes = Vec::new();
        match self {
            Self::Memory(name) => {
                notes.push(format!("{name} is memory: the repository is gone when this host stops"))
            }
            Self::Fuse => notes.push(
                "what fsync is worth on a FUSE file system is its server's affair: ask its manual"
                    .to_owned(),
            ),
            Self::Network(name) => notes.push(format!(
                "{name} may show other hosts' changes late: let one host alone write to it"
            )),
            Self::Nfs => judge_nfs(options, &mut notes)?,
            Self::Local(_) | Self::Unknown => (),
        }
        Ok(notes)
    }
}

/// A host that lists a directory from its cache does not see the writers of other hosts, and its gc
/// would delete what they build on.
fn judge_nfs(options: &[&str], notes: &mut Vec<String>) -> Result<(), Unfit> {
    let fresh = options.iter().any(|option| matches!(*option, "noac" | "acdirmax=0"));
    if !fresh {
        return Err(broken(
            "every host must see at once what others have written",
            "this NFS mount caches directories; mount it with actimeo=0,lookupcache=positive",
        ));
    }
    let positive = ["lookupcache=none", "lookupcache=pos", "lookupcache=positive"];
    if !options.iter().any(|option| positive.contains(option)) {
        notes.push(
            "mount it with lookupcache=positive, so that new objects are found at once".into(),
        );
    }
    if options.contains(&"soft") || options.contains(&"softerr") {
        notes.push("the mount is soft: a server that is away for long fails backups".into());
    }
    notes
        .push("the server's export must be 'sync': with 'async' its fsync is worth nothing".into());
    Ok(())
}

/// The options of the mount in which a path lies, of the mount and of its file system.
fn options_of<'a>(mountinfo: &'a str, path: &Path) -> Vec<&'a str> {
    let mut best: (usize, Vec<&str>) = (0, Vec::new());
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let (Some(point), Some(of_mount)) = (left.get(4), left.get(5)) else { continue };
        // Blanks in it are written as \040: such a mount is not recognised, and nothing is noted.
        let depth = Path::new(point).components().count();
        if path.starts_with(point) && depth >= best.0 {
            let of_super = right.split(' ').nth(2).unwrap_or_default();
            best = (depth, of_mount.split(',').chain(of_super.split(',')).collect());
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{CallFault, DirEntry, FsFile, SimFileSystem};
    use rustix::io::Errno;

    /// A file system with one bad habit.
    #[derive(Debug)]
    struct Odd {
        fs: SimFileSystem,
        habit: Habit,
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Habit {
        Replaces,
        NoLinks,
        NoDirectorySync,
        Forgets,
    }

    impl FileSystem for Odd {
        fn create_new(&self, path: &str) -> io::Result<Box<dyn FsFile>> {
            self.fs.create_new(path)
        }
        fn read_at(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
            self.fs.read_at(path, offset, buffer)
        }
        fn file_bytes(&self, path: &str) -> io::Result<u64> {
            self.fs.file_bytes(path)
        }
        fn publish(&self, from: &str, to: &str) -> io::Result<()> {
            match self.habit {
                Habit::NoLinks => return Err(Errno::OPNOTSUPP.into()),
                Habit::Replaces => drop(self.fs.vanish(to)),
                _ => (),
            }
            self.fs.publish(from, to)
        }
        fn remove(&self, path: &str) -> io::Result<()> {
            self.fs.remove(path)
        }
        fn make_directory(&self, path: &str) -> io::Result<()> {
            self.fs.make_directory(path)
        }
        fn sync_directory(&self, path: &str) -> io::Result<()> {
            if self.habit == Habit::NoDirectorySync {
                return Err(Errno::INVAL.into());
            }
            self.fs.sync_directory(path)
        }
        fn entries(&self, path: &str) -> io::Result<Vec<DirEntry>> {
            let entries = self.fs.entries(path)?;
            Ok(if self.habit == Habit::Forgets { Vec::new() } else { entries })
        }
    }

    #[test]
    fn a_sound_file_system_passes_and_keeps_nothing_of_it() {
        let fs = SimFileSystem::new();
        assert_eq!(exercise(&fs).unwrap(), CreateOnly::Link);
        assert!(fs.paths().is_empty());
        assert_eq!(exercise(&fs).unwrap(), CreateOnly::Link);
    }

    #[test]
    fn each_bad_habit_is_found_and_named() {
        for (habit, promise) in [
            (Habit::Replaces, CREATE_ONLY),
            (Habit::NoLinks, CREATE_ONLY),
            (Habit::NoDirectorySync, DURABLE),
            (Habit::Forgets, READ_BACK),
        ] {
            let odd = Odd { fs: SimFileSystem::new(), habit };
            let unfit = exercise(&odd).unwrap_err();
            assert!(unfit.to_string().starts_with(promise), "{habit:?}: {unfit}");
            assert!(odd.fs.paths().is_empty(), "{habit:?}");
        }
    }

    #[test]
    fn a_failing_call_is_never_taken_for_a_sound_place() {
        let healthy = SimFileSystem::new();
        exercise(&healthy).unwrap();
        for call in 0..healthy.calls() {
            let fs = SimFileSystem::new();
            fs.inject(call, CallFault::Fail(Errno::IO));
            assert!(exercise(&fs).is_err(), "call {call}");
        }
    }

    #[test]
    fn an_nfs_mount_that_caches_directories_is_refused() {
        let options = |text: &'static str| text.split(',').collect::<Vec<_>>();
        let cached = Kind::Nfs.judge(&options("rw,vers=4.2,hard,local_lock=none"));
        assert!(cached.unwrap_err().to_string().contains("actimeo=0"));
        let fresh = options("rw,acregmin=0,acregmax=0,acdirmin=0,acdirmax=0,lookupcache=pos,hard");
        assert_eq!(Kind::Nfs.judge(&fresh).unwrap().len(), 1);
        assert_eq!(Kind::Nfs.judge(&options("rw,noac,soft")).unwrap().len(), 3);
        assert_eq!(Kind::of(0x6969), Kind::Nfs);
        assert!(Kind::of(0xef53).judge(&[]).unwrap().is_empty());
    }

    #[test]
    fn the_deepest_mount_is_the_one_that_counts() {
        let mounts = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n\
             40 21 0:50 / /backup rw,nosuid shared:9 - nfs4 nas:/x rw,acdirmax=0,hard\n\
             broken line\n";
        let of = |path: &str| options_of(mounts, Path::new(path));
        assert_eq!(of("/backup/r"), ["rw", "nosuid", "rw", "acdirmax=0", "hard"]);
        assert_eq!(of("/backups")[2..], ["rw", "errors=remount-ro"]);
        assert!(options_of("", Path::new("/x")).is_empty());
    }

    #[test]
    fn a_real_directory_is_described() {
        let folder = tempfile::tempdir().unwrap();
        let found = probe_directory(folder.path()).unwrap();
        assert!(!found.file_system.is_empty() && found.free_bytes > 0);
        let left: Vec<_> = std::fs::read_dir(folder.path().join(PLACE)).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
