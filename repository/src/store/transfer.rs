//! Memory for what is under way between this process and a server.

use super::Access;

/// How much of it there is. A directory takes none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferMemory(u64);

impl TransferMemory {
    /// With less nothing moves: a part of an upload being gathered and one being sent, a window and a
    /// planned read.
    pub const LEAST: Self = Self(24 << 20);
    /// More gains nothing (measured on one host; a fast line at a usual distance is filled, too).
    pub const MOST: Self = Self(64 << 20);

    /// As many bytes as there are for it, within what makes sense.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self(bytes.clamp(Self::LEAST.0, Self::MOST.0))
    }

    /// All of it.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// What is read may take so much. Whoever writes reads little beside.
    pub(super) const fn reading(self, access: Access) -> u64 {
        match access {
            Access::ReadOnly => self.0,
            Access::ReadWrite => self.0 / 4,
        }
    }

    /// What is written may take so much.
    pub(super) const fn writing(self) -> u64 {
        self.0 - self.reading(Access::ReadWrite)
    }
}

impl Default for TransferMemory {
    fn default() -> Self {
        Self::MOST
    }
}
