//! Quantising float matrices while they are loaded (`--quantize`): which, to how many bits, and what came of it.

use super::Matrix;
use super::encode::{BLOCK, EIGHT_BYTES, FOUR_BYTES, fill_rows, put_eight, put_four};
use rill_kernels::{Dtype, dequantize};
use std::borrow::Cow;

/// Writes a block's values as its bytes.
type Put = fn(&[f32], &mut [u8]);

/// What float matrices are quantised to; embeddings and the output projection are never below 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// 4 bits with a scale and a minimum for every 32 weights: 5 bits a weight.
    Q4,
    /// 8 bits with a scale for every 32: 8.5 bits a weight.
    Q8,
}

/// How many matrices went which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub four: usize,
    pub eight: usize,
    /// Floats whose columns do not fill blocks.
    pub left: usize,
}

impl Quantize {
    /// What GGUF tensor `name` becomes, if it has `cols` columns; `None`: it stays as it is.
    pub(crate) fn target(self, name: &str, cols: usize) -> Option<Dtype> {
        let table = ["token_embd.", "output."].iter().any(|start| name.starts_with(start));
        // Routers are small, and what they decide is not.
        let linear = name.starts_with("blk.") && !name.contains(".ffn_gate_inp");
        match self {
            _ if !cols.is_multiple_of(BLOCK) || !(table || linear) => None,
            Quantize::Q4 if linear => Some(Dtype::Q4_1),
            _ => Some(Dtype::Q8_0),
        }
    }

    /// Float matrix `name` in as many bits as it is to have.
    pub(super) fn apply<'a>(self, name: &str, matrix: Matrix<'a>, counts: &mut Counts) -> Matrix<'a> {
        if matrix.dtype.block_len() > 1 {
            return matrix;
        }
        let Some(dtype) = self.target(name, matrix.cols) else {
            counts.left += usize::from(!matrix.cols.is_multiple_of(BLOCK));
            return matrix;
        };
        let (put, block_bytes): (Put, usize) = match dtype {
            Dtype::Q4_1 => (put_four, FOUR_BYTES),
            _ => (put_eight, EIGHT_BYTES),
        };
        if dtype == Dtype::Q4_1 {
            counts.four += 1;
        } else {
            counts.eight += 1;
        }
        let row_bytes = matrix.cols / BLOCK * block_bytes;
        let stored = matrix.stored();
        let width = matrix.dtype.block_bytes() * matrix.cols;
        let data = fill_rows(matrix.rows, row_bytes, |first, bytes| {
            let mut values = vec![0.0; stored.cols];
            for (r, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                dequantize(stored.dtype, &stored.data[(first + r) * width..][..width], &mut values);
                put(&values, out);
            }
        });
        Matrix { dtype, rows: matrix.rows, cols: matrix.cols, data: Cow::Owned(data) }
    }
}

impl Counts {
    pub(super) fn words(self) -> String {
        let part = |count: usize, what: &str| (count > 0).then(|| format!("{count} {what}"));
        let parts = [
            part(self.four, "matrices quantised to 4 bits"),
            part(self.eight, "matrices quantised to 8 bits"),
            part(self.left, "matrices left as floats, since their columns are no multiple of 32"),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_shrink_most_tables_less_and_routers_not_at_all() {
        for (name, cols, four, eight) in [
            ("blk.3.attn_q.weight", 64, Some(Dtype::Q4_1), Some(Dtype::Q8_0)),
            ("blk.3.ffn_up.7.weight", 64, Some(Dtype::Q4_1), Some(Dtype::Q8_0)),
            ("blk.3.ffn_gate_inp.weight", 64, None, None),
            ("blk.3.attn_q.weight", 72, None, None),
            ("token_embd.weight", 64, Some(Dtype::Q8_0), Some(Dtype::Q8_0)),
            ("output.weight", 64, Some(Dtype::Q8_0), Some(Dtype::Q8_0)),
            ("position_embd.weight", 64, None, None),
        ] {
            assert_eq!(Quantize::Q4.target(name, cols), four, "{name}");
            assert_eq!(Quantize::Q8.target(name, cols), eight, "{name}");
        }
    }
}
