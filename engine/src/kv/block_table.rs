//! The blocks of one sequence, in order: position in the sequence → slot in the KV cache.

use super::BlockId;

/// Blocks it takes to hold `tokens` tokens.
pub fn blocks_for(tokens: usize, block_size: usize) -> usize {
    tokens.div_ceil(block_size)
}

/// In place of a block that was given back because nothing reads it any more.
const PASSED: BlockId = BlockId::MAX;

/// Entry `i` holds positions `i * block_size .. (i + 1) * block_size`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    /// Entries at the beginning whose blocks have been given back.
    passed: usize,
}

impl BlockTable {
    pub fn push(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    /// The last block, if it is held.
    pub fn pop(&mut self) -> Option<BlockId> {
        (self.blocks.len() > self.passed).then(|| self.blocks.pop()).flatten()
    }

    /// Takes out the first block that is held, but leaves its entry: later ones stay where they are.
    pub fn pass(&mut self) -> Option<BlockId> {
        let first = self.blocks.get_mut(self.passed)?;
        self.passed += 1;
        Some(std::mem::replace(first, PASSED))
    }

    /// Entries whose blocks have been taken out.
    pub fn passed(&self) -> usize {
        self.passed
    }

    /// The blocks that are there, in order.
    pub fn held(&self) -> &[BlockId] {
        &self.blocks[self.passed..]
    }

    /// The first `entries` entries.
    pub fn first(&self, entries: usize) -> BlockTable {
        BlockTable { blocks: self.blocks[..entries].to_vec(), passed: self.passed.min(entries) }
    }

    pub fn clear(&mut self) {
        self.blocks.clear();
        self.passed = 0;
    }

    /// Puts another block with the same content in place of entry `index`.
    pub fn replace(&mut self, index: usize, block: BlockId) {
        self.blocks[index] = block;
    }

    /// All entries; those that have been [passed](BlockTable::pass) are of no block.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Entries, held or not.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Where the token at `position` keeps its keys and values.
    pub fn slot(&self, position: usize, block_size: usize) -> u32 {
        self.blocks[position / block_size] * block_size as u32 + (position % block_size) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_map_through_the_table() {
        let mut table = BlockTable::default();
        table.push(7);
        table.push(2);
        assert_eq!(table.slot(0, 4), 28);
        assert_eq!(table.slot(3, 4), 31);
        assert_eq!(table.slot(4, 4), 8);
        table.replace(1, 5);
        assert_eq!(table.slot(6, 4), 22);
    }

    #[test]
    fn passed_blocks_leave_the_rest_in_place() {
        let mut table = BlockTable::default();
        [7, 2, 5].into_iter().for_each(|block| table.push(block));
        assert_eq!((table.pass(), table.passed(), table.held()), (Some(7), 1, &[2, 5][..]));
        assert_eq!((table.len(), table.slot(4, 4)), (3, 8));
        assert_eq!((table.first(2).held(), table.first(2).passed()), (&[2][..], 1));
        assert_eq!((table.pop(), table.pop(), table.pop(), table.pass()), (Some(5), Some(2), None, None));
        table.clear();
        assert!(table.is_empty() && table.passed() == 0);
    }

    #[test]
    fn partial_blocks_count_whole() {
        for (tokens, blocks) in [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)] {
            assert_eq!(blocks_for(tokens, 4), blocks, "{tokens} tokens");
        }
    }
}
