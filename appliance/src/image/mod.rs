//! Disk images at rest, through QEMU's own tools: what they are, whether a VM holds them, and
//! access to their content over NBD.

mod format;
mod info;
mod run_dir;
mod stamp;
mod storage_daemon;

pub use format::{Format, of_file};
pub use info::{
    ImageBitmap, ImageInfo, add_bitmap, chain, create_qcow2, info, remove_bitmap, require_unlocked,
    resize, utf8,
};
pub use run_dir::RunDir;
pub use stamp::Stamp;
pub use storage_daemon::{Served, StorageDaemon};
