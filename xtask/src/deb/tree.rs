//! The files of a package before they are packed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::step::{Result, captured, program};

/// Who may do what with a file.
#[derive(Clone, Copy)]
pub enum Mode {
    /// 0644
    Plain,
    /// 0755
    Program,
}

/// A folder that stands for the root of a file system.
pub struct Tree(PathBuf);

impl Tree {
    /// An empty one.
    pub fn new(root: PathBuf) -> Result<Self> {
        if root.exists() {
            std::fs::remove_dir_all(&root)?;
        }
        let tree = Self(root);
        tree.directory("")?;
        Ok(tree)
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn path(&self, place: &str) -> PathBuf {
        self.0.join(place)
    }

    /// A folder in it, made with all above it, each with mode 0755 whatever the umask says.
    pub fn directory(&self, place: &str) -> Result<PathBuf> {
        let path = self.path(place);
        std::fs::create_dir_all(&path)?;
        for folder in path.ancestors().take_while(|folder| folder.starts_with(&self.0)) {
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(path)
    }

    /// Writes a file.
    pub fn write(&self, place: &str, text: &str, mode: Mode) -> Result<()> {
        self.prepare(place)?;
        std::fs::write(self.path(place), text)?;
        self.set_mode(place, mode)
    }

    /// Copies a file.
    pub fn copy(&self, source: &Path, place: &str, mode: Mode) -> Result<()> {
        self.prepare(place)?;
        std::fs::copy(source, self.path(place))?;
        self.set_mode(place, mode)
    }

    fn prepare(&self, place: &str) -> Result<()> {
        match place.rsplit_once('/') {
            Some((folder, _)) => self.directory(folder).map(drop),
            None => Ok(()),
        }
    }

    fn set_mode(&self, place: &str, mode: Mode) -> Result<()> {
        let bits = match mode {
            Mode::Plain => 0o644,
            Mode::Program => 0o755,
        };
        Ok(std::fs::set_permissions(self.path(place), std::fs::Permissions::from_mode(bits))?)
    }

    /// Compresses a file, without the time of its making.
    pub fn compress(&self, place: &str) -> Result<()> {
        captured(program("gzip").arg("-9n").arg(self.path(place))).map(drop)
    }

    /// Compresses all files of a folder.
    pub fn compress_all(&self, place: &str) -> Result<()> {
        for file in std::fs::read_dir(self.path(place))? {
            let path = file?.path();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
            captured(program("gzip").arg("-9n").arg(path))?;
        }
        Ok(())
    }

    /// What it takes on a disk, rounded up file by file.
    pub fn kibibytes(&self) -> Result<u64> {
        let mut sum = 0;
        for file in self.files()? {
            sum += std::fs::metadata(self.path(&file))?.len().div_ceil(1024);
        }
        Ok(sum)
    }

    /// As `md5sum` writes them, of every file.
    pub fn md5sums(&self) -> Result<String> {
        let mut command = program("md5sum");
        command.current_dir(&self.0).args(self.files()?);
        captured(&mut command)
    }

    /// Paths of all files, relative to the root, in order.
    fn files(&self) -> Result<Vec<String>> {
        let mut find = program("find");
        find.current_dir(&self.0).args([".", "-type", "f", "-not", "-path", "./DEBIAN/*"]);
        let said = captured(find.args(["-printf", "%P\\n"]))?;
        let mut files: Vec<String> = said.lines().map(str::to_owned).collect();
        files.sort();
        Ok(files)
    }
}
