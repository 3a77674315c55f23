//! What benches know of the default model: its shapes, weights like its own, and batches.

#![allow(dead_code, reason = "no bench needs all of it")]

use rill_kernels::{AttentionShape, Dtype, StepInput};

pub const HEADS: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    value_dim: 64,
    scale: 0.125,
    window: None,
    softcap: None,
};
pub const HIDDEN: usize = 576;
pub const WIDE: usize = 1536;
pub const LAYERS: usize = 30;
pub const VOCABULARY: usize = 49_152;
pub const BLOCK_SIZE: usize = 32;

/// Bytes that are sound blocks: small scales, any codes.
pub fn weights(dtype: Dtype, rows: usize, cols: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut block = vec![0_u8; dtype.block_bytes()];
    let mut data = Vec::with_capacity(rows * dtype.row_bytes(cols).expect("whole blocks"));
    for _ in 0..rows * cols / dtype.block_len() {
        for b in &mut block {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *b = (state >> 56) as u8;
        }
        // The scale and, in Q4_1, the minimum: half-precision 2^-10.
        if dtype == Dtype::BF16 {
            block[1] = 0x3f;
        } else {
            block[..2].copy_from_slice(&0x1400_u16.to_le_bytes());
        }
        if dtype == Dtype::Q4_1 {
            block[2..4].copy_from_slice(&0x9400_u16.to_le_bytes());
        }
        data.extend_from_slice(&block);
    }
    data
}

/// One step's input: of each sequence, the last `tokens` of `context`.
pub struct Batch {
    positions: Vec<u32>,
    slots: Vec<u32>,
    starts: Vec<u32>,
    lens: Vec<u32>,
    tables: Vec<u32>,
    table_starts: Vec<u32>,
}

impl Batch {
    /// Sequences take turns at blocks, as they do when they grow together.
    pub fn new(sequences: usize, context: usize, tokens: usize) -> Batch {
        let blocks = context.div_ceil(BLOCK_SIZE);
        let block = |sequence: usize, index: usize| (index * sequences + sequence) as u32;
        let mut batch = Batch {
            positions: Vec::new(),
            slots: Vec::new(),
            starts: vec![0],
            lens: vec![context as u32; sequences],
            tables: Vec::new(),
            table_starts: vec![0],
        };
        for sequence in 0..sequences {
            for position in context - tokens..context {
                batch.positions.push(position as u32);
                let offset = (position % BLOCK_SIZE) as u32;
                batch.slots.push(block(sequence, position / BLOCK_SIZE) * BLOCK_SIZE as u32 + offset);
            }
            batch.starts.push(batch.positions.len() as u32);
            batch.tables.extend((0..blocks).map(|index| block(sequence, index)));
            batch.table_starts.push(batch.tables.len() as u32);
        }
        batch
    }

    /// Blocks that `sequences` of `context` tokens take.
    pub fn blocks(sequences: usize, context: usize) -> usize {
        sequences * context.div_ceil(BLOCK_SIZE)
    }

    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// The last row of each sequence.
    pub fn last_rows(&self) -> Vec<u32> {
        self.starts[1..].iter().map(|end| end - 1).collect()
    }

    pub fn input(&self) -> StepInput<'_> {
        StepInput {
            positions: &self.positions,
            slot_mapping: &self.slots,
            query_starts: &self.starts,
            context_lens: &self.lens,
            block_tables: &self.tables,
            block_table_starts: &self.table_starts,
        }
    }
}
