//! The tensor types a GGUF file can name, with the block each is stored in.

use std::fmt;

/// How a tensor's values are encoded. Values are grouped in blocks of [`GgmlType::block_len`] consecutive ones
/// along a row, each block taking [`GgmlType::block_bytes`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // ggml's own spelling: what users see in file names and messages
pub enum GgmlType {
    F32,
    F16,
    BF16,
    F64,
    I8,
    I16,
    I32,
    I64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ1_S,
    IQ1_M,
    IQ2_XXS,
    IQ2_XS,
    IQ2_S,
    IQ3_XXS,
    IQ3_S,
    IQ4_NL,
    IQ4_XS,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
    Q1_0,
}

/// Id in the file, type, name, values a block, bytes a block.
const TYPES: [(u32, GgmlType, &str, usize, usize); 34] = [
    (0, GgmlType::F32, "F32", 1, 4),
    (1, GgmlType::F16, "F16", 1, 2),
    (2, GgmlType::Q4_0, "Q4_0", 32, 18),
    (3, GgmlType::Q4_1, "Q4_1", 32, 20),
    (6, GgmlType::Q5_0, "Q5_0", 32, 22),
    (7, GgmlType::Q5_1, "Q5_1", 32, 24),
    (8, GgmlType::Q8_0, "Q8_0", 32, 34),
    (9, GgmlType::Q8_1, "Q8_1", 32, 36),
    (10, GgmlType::Q2_K, "Q2_K", 256, 84),
    (11, GgmlType::Q3_K, "Q3_K", 256, 110),
    (12, GgmlType::Q4_K, "Q4_K", 256, 144),
    (13, GgmlType::Q5_K, "Q5_K", 256, 176),
    (14, GgmlType::Q6_K, "Q6_K", 256, 210),
    (15, GgmlType::Q8_K, "Q8_K", 256, 292),
    (16, GgmlType::IQ2_XXS, "IQ2_XXS", 256, 66),
    (17, GgmlType::IQ2_XS, "IQ2_XS", 256, 74),
    (18, GgmlType::IQ3_XXS, "IQ3_XXS", 256, 98),
    (19, GgmlType::IQ1_S, "IQ1_S", 256, 50),
    (20, GgmlType::IQ4_NL, "IQ4_NL", 32, 18),
    (21, GgmlType::IQ3_S, "IQ3_S", 256, 110),
    (22, GgmlType::IQ2_S, "IQ2_S", 256, 82),
    (23, GgmlType::IQ4_XS, "IQ4_XS", 256, 136),
    (24, GgmlType::I8, "I8", 1, 1),
    (25, GgmlType::I16, "I16", 1, 2),
    (26, GgmlType::I32, "I32", 1, 4),
    (27, GgmlType::I64, "I64", 1, 8),
    (28, GgmlType::F64, "F64", 1, 8),
    (29, GgmlType::IQ1_M, "IQ1_M", 256, 56),
    (30, GgmlType::BF16, "BF16", 1, 2),
    (34, GgmlType::TQ1_0, "TQ1_0", 256, 54),
    (35, GgmlType::TQ2_0, "TQ2_0", 256, 66),
    (39, GgmlType::MXFP4, "MXFP4", 32, 17),
    (40, GgmlType::NVFP4, "NVFP4", 64, 36),
    (41, GgmlType::Q1_0, "Q1_0", 128, 18),
];

/// Ids that once were types: files holding them must be converted again.
const REMOVED: [(u32, &str); 8] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
];

impl GgmlType {
    /// The type a file's `id` stands for, or why there is none.
    pub fn from_id(id: u32) -> Result<GgmlType, String> {
        if let Some(&(_, dtype, ..)) = TYPES.iter().find(|row| row.0 == id) {
            return Ok(dtype);
        }
        Err(match REMOVED.iter().find(|row| row.0 == id) {
            Some((_, name)) => {
                format!("type {name}, which ggml has dropped; convert the model again")
            }
            None => format!("unknown tensor type {id}"),
        })
    }

    fn row(self) -> &'static (u32, GgmlType, &'static str, usize, usize) {
        TYPES.iter().find(|row| row.1 == self).expect("every type has a row")
    }

    /// ggml's name: `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Values in one block; a row's length is a multiple of it.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes one block takes.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_id() {
        for (id, dtype, name, len, bytes) in TYPES {
            assert_eq!(GgmlType::from_id(id), Ok(dtype));
            assert_eq!((dtype.name(), dtype.block_len(), dtype.block_bytes()), (name, len, bytes));
        }
    }

    #[test]
    fn removed_and_unknown_types_are_refused_by_name() {
        assert!(GgmlType::from_id(31).unwrap_err().contains("Q4_0_4_4"));
        assert!(GgmlType::from_id(u32::MAX).unwrap_err().contains("4294967295"));
    }
}
