//! The blocks of one sequence, in order: position in the sequence → slot in the KV cache.

use super::BlockId;

/// Blocks it takes to hold `tokens` tokens.
pub fn blocks_for(tokens: usize, block_size: usize) -> usize {
    tokens.div_ceil(block_size)
}

/// Entry `i` holds positions `i * block_size .. (i + 1) * block_size`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    pub fn push(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    pub fn pop(&mut self) -> Option<BlockId> {
        self.blocks.pop()
    }

    /// Puts another block with the same content in place of entry `index`.
    pub fn replace(&mut self, index: usize, block: BlockId) {
        self.blocks[index] = block;
    }

    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

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
    fn partial_blocks_count_whole() {
        for (tokens, blocks) in [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)] {
            assert_eq!(blocks_for(tokens, 4), blocks, "{tokens} tokens");
        }
    }
}
