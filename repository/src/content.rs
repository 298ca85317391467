//! The content tree: one hash per disk over block ids alone, in a shape that never changes. Pure.
//!
//! Four levels of 256 children cover the 2^32 blocks that a disk may have. A node whose children
//! are all zero is the constant zero, so that empty space costs nothing and growth changes only the
//! top. Size and block size are mixed in there.

use crate::geometry::{BlockIndex, BlockSize, DISK_BLOCKS_MAX};
use crate::ids::{BlockId, ContentRoot};

/// Children of a node, and blocks of a span.
pub(crate) const FANOUT: usize = 256;
/// Levels of the tree: 256^4 is the largest number of blocks.
const LEVELS: usize = 4;
const NODE_CONTEXT: &[u8] = b"icecore content node v1";
const ROOT_CONTEXT: &[u8] = b"icecore content root v1";

/// Hash of a subtree; level 0 nodes cover 256 blocks, level 1 nodes 65,536.
pub(crate) type NodeHash = [u8; 32];
/// Any subtree without data.
pub(crate) const ZERO_NODE: NodeHash = [0; 32];

const _: () = assert!(FANOUT.pow(LEVELS as u32) as u64 == DISK_BLOCKS_MAX);

/// A node of the tree from its children.
pub(crate) fn node(level: u8, children: &[NodeHash; FANOUT]) -> NodeHash {
    if children.iter().all(|child| child == &ZERO_NODE) {
        return ZERO_NODE;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(NODE_CONTEXT).update(&[level]).update(children.as_flattened());
    *hasher.finalize().as_bytes()
}

struct Level {
    /// Number of the node whose children are being collected.
    number: Option<u64>,
    children: Box<[NodeHash; FANOUT]>,
}

/// Builds a tree from nodes of mixed levels, given in ascending order of what they cover.
pub(crate) struct TreeBuilder {
    levels: [Level; LEVELS],
    top: NodeHash,
}

impl TreeBuilder {
    pub(crate) fn new() -> Self {
        let level = || Level { number: None, children: Box::new([ZERO_NODE; FANOUT]) };
        Self { levels: [level(), level(), level(), level()], top: ZERO_NODE }
    }

    /// Adds child `number` of `level` (a block id is a child of level 0, a span's hash of level 1).
    pub(crate) fn push(&mut self, level: usize, number: u64, hash: &NodeHash) {
        for lower in 0..level {
            self.flush(lower);
        }
        self.put(level, number, hash);
    }

    /// The hash of all that was pushed, with the disk's geometry.
    pub(crate) fn finish(mut self, size_bytes: u64, block_size: BlockSize) -> ContentRoot {
        for level in 0..LEVELS {
            self.flush(level);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(ROOT_CONTEXT).update(&size_bytes.to_le_bytes());
        hasher.update(&block_size.bytes().to_le_bytes()).update(&self.top);
        ContentRoot(*hasher.finalize().as_bytes())
    }

    fn put(&mut self, level: usize, number: u64, hash: &NodeHash) {
        if hash == &ZERO_NODE {
            return;
        }
        let fanout = FANOUT as u64;
        let Some(slot) = self.levels.get(level) else {
            self.top = *hash;
            return;
        };
        if slot.number != Some(number / fanout) {
            self.flush(level);
            self.levels[level].number = Some(number / fanout);
        }
        self.levels[level].children[(number % fanout) as usize] = *hash;
    }

    fn flush(&mut self, level: usize) {
        let Some(number) = self.levels[level].number.take() else { return };
        let hash = node(level as u8, &self.levels[level].children);
        self.levels[level].children.fill(ZERO_NODE);
        self.put(level + 1, number, &hash);
    }
}

/// Computes the content root of a disk from its block ids.
pub struct ContentHasher {
    tree: TreeBuilder,
    size_bytes: u64,
    block_size: BlockSize,
}

impl ContentHasher {
    /// For a disk of `size_bytes` cut into blocks of `block_size`.
    #[must_use]
    pub fn new(size_bytes: u64, block_size: BlockSize) -> Self {
        Self { tree: TreeBuilder::new(), size_bytes, block_size }
    }

    /// Adds a block; indices ascend, zero blocks may be left out.
    pub fn push(&mut self, index: BlockIndex, id: &BlockId) {
        self.tree.push(0, index.0, &id.0);
    }

    /// The content root.
    #[must_use]
    pub fn finish(self) -> ContentRoot {
        self.tree.finish(self.size_bytes, self.block_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> BlockId {
        BlockId(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    fn root(blocks: &[u64], size: u64) -> ContentRoot {
        let mut hasher = ContentHasher::new(size, BlockSize::DEFAULT);
        for &block in blocks {
            hasher.push(BlockIndex(block), &id(block));
        }
        hasher.finish()
    }

    #[test]
    fn root_depends_on_place_content_and_size() {
        let all = [root(&[], 1), root(&[], 2), root(&[0], 1), root(&[1], 1), root(&[0, 1], 1)];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| other != one));
        }
    }

    #[test]
    fn zero_blocks_may_be_given_or_left_out() {
        let mut hasher = ContentHasher::new(9, BlockSize::DEFAULT);
        hasher.push(BlockIndex(0), &BlockId::ZERO);
        hasher.push(BlockIndex(70_000), &id(70_000));
        hasher.push(BlockIndex(1 << 31), &BlockId::ZERO);
        assert_eq!(hasher.finish(), root(&[70_000], 9));
    }

    #[test]
    fn whole_subtrees_may_stand_for_their_blocks() {
        let blocks: Vec<u64> = vec![3, 255, 256, 65_535, 65_536, 1 << 24, (1 << 32) - 1];
        let mut spans = TreeBuilder::new();
        for span in [0_u64, 1, 255, 256, 1 << 16, (1 << 24) - 1] {
            let mut children = [ZERO_NODE; FANOUT];
            for &block in blocks.iter().filter(|&&block| block / 256 == span) {
                children[(block % 256) as usize] = id(block).0;
            }
            // Mixed levels: every second span is given as its blocks.
            if span % 2 == 0 {
                spans.push(1, span, &node(0, &children));
            } else {
                for &block in blocks.iter().filter(|&&block| block / 256 == span) {
                    spans.push(0, block, &id(block).0);
                }
            }
        }
        assert_eq!(spans.finish(5, BlockSize::DEFAULT), root(&blocks, 5));
    }
}
