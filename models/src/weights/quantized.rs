//! Which tensors of a quantised checkpoint make one matrix: GPTQ's and AWQ's qweight, qzeros, scales and g_idx, and the
//! weight_packed or weight with weight_scale of compressed-tensors and of FP8 files.

use super::coded::{Coded, Groups, Layout, NIBBLE_OF_ROW, Zeros};
use super::quantization::Method;
use super::safetensors::{Raw, Safetensors};
use crate::ModelError;
use rill_kernels::{Dtype, dequantize};
use safetensors::Dtype as Stored;

/// A matrix, and the tensors it is made of.
pub(super) struct Found<'a> {
    pub coded: Coded<'a>,
    pub names: Vec<String>,
}

/// The tensors of one module, and what has been read of them.
struct Module<'a> {
    files: &'a Safetensors,
    stem: String,
    rows: usize,
    cols: usize,
    names: Vec<String>,
}

impl Safetensors {
    /// Whether the module of tensor `name` has its weight as codes.
    pub(super) fn has_codes(&self, name: &str) -> bool {
        let has = |stem: &str, part: &str| self.raw(&format!("{stem}.{part}")).is_some();
        self.quantization.is_some()
            && name.strip_suffix(".weight").is_some_and(|stem| has(stem, "qweight") || has(stem, "weight_packed"))
    }

    /// The weight of the module of tensor `name`, where it is kept as codes.
    pub(super) fn coded(&self, name: &str, rows: usize, cols: usize) -> Result<Option<Found<'_>>, ModelError> {
        let Some((quantization, stem)) = self.quantization.as_ref().zip(name.strip_suffix(".weight")) else {
            return Ok(None);
        };
        let mut module = Module { files: self, stem: stem.to_owned(), rows, cols, names: Vec::new() };
        let coded = match quantization.method {
            Method::Gptq { group_size, zero_offset } => module.gptq(group_size, zero_offset),
            Method::Awq => module.awq(),
            Method::Scaled { block } => module.scaled(block),
        }?;
        let names = module.names;
        Ok(coded.map(|coded| Found { coded, names }))
    }
}

impl<'a> Module<'a> {
    fn wrong(&self, part: &str, reason: String) -> ModelError {
        let path = self.files.path.display().to_string();
        ModelError::Format { path, reason: format!("tensor {}.{part} {reason}", self.stem) }
    }

    /// A tensor of the module, if it is there.
    fn find(&mut self, part: &str) -> Option<Raw<'a>> {
        let name = format!("{}.{part}", self.stem);
        let found = self.files.raw(&name)?;
        self.names.push(name);
        Some(found)
    }

    /// A tensor that must be there with this type and shape.
    fn require(&mut self, part: &str, dtype: Stored, shape: &[usize]) -> Result<&'a [u8], ModelError> {
        let found = self.find(part).ok_or_else(|| self.wrong(part, "is missing".to_owned()))?;
        if found.dtype == dtype && found.shape == shape {
            return Ok(found.data);
        }
        Err(self.wrong(
            part,
            format!(
                "is {:?} of {:?}; the other tensors of a {} × {} matrix make it {dtype:?} of {shape:?}",
                found.dtype, found.shape, self.rows, self.cols
            ),
        ))
    }

    /// A tensor of scales and its shape.
    fn scales(&mut self, part: &str) -> Result<(Vec<f32>, &'a [usize]), ModelError> {
        let found = self.find(part).ok_or_else(|| self.wrong(part, "is missing".to_owned()))?;
        let dtype = match found.dtype {
            Stored::F32 => Dtype::F32,
            Stored::F16 => Dtype::F16,
            Stored::BF16 => Dtype::BF16,
            other => return Err(self.wrong(part, format!("is {other:?}; scales are F32, F16 or BF16"))),
        };
        let mut values = vec![0.0; found.data.len() / dtype.block_bytes()];
        dequantize(dtype, found.data, &mut values);
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(self.wrong(part, format!("holds {value}, which is no scale")));
        }
        Ok((values, found.shape))
    }

    /// Bits a code has when `words` 32-bit words hold `codes` of them.
    fn bits(&self, part: &str, words: usize, codes: usize) -> Result<usize, ModelError> {
        [4, 8].into_iter().find(|bits| (codes * bits).div_ceil(32) == words).ok_or_else(|| {
            self.wrong(part, format!("has {words} words for {codes} codes; 4 or 8 bits each are read"))
        })
    }

    /// Zero points packed by rows, `[groups][rows in words]`, as a code for each `[row][group]`; row `i` of a word is code
    /// `place(i)` in it.
    fn zeros(
        &self,
        data: &[u8],
        group_count: usize,
        bits: usize,
        place: impl Fn(usize) -> u32,
        offset: u8,
    ) -> Zeros {
        let (a_word, mask) = (32 / bits, (1_u32 << bits) - 1);
        let width = self.rows / a_word;
        let mut zeros = vec![0; self.rows * group_count];
        for (index, bytes) in data.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let (group, first) = (index / width, index % width * a_word);
            for i in 0..a_word {
                let code = ((word >> (bits as u32 * place(i))) & mask) + u32::from(offset);
                zeros[(first + i) * group_count + group] = (code & mask) as u8;
            }
        }
        Zeros::Each(zeros)
    }

    /// `[groups][rows]` → `[rows][groups]`.
    fn by_rows(&self, values: &[f32], group_count: usize) -> Vec<f32> {
        (0..self.rows * group_count).map(|i| values[i % group_count * self.rows + i / group_count]).collect()
    }

    /// The number of groups a `[groups][rows]` tensor of scales has.
    fn group_count(&self, part: &str, shape: &[usize]) -> Result<usize, ModelError> {
        match *shape {
            [groups, rows] if rows == self.rows && (1..=self.cols).contains(&groups) => Ok(groups),
            _ => Err(self.wrong(part, format!("is {shape:?}; one scale for each group and row is wanted"))),
        }
    }

    /// Columns a group has when there are `count` of them.
    fn run(&self, part: &str, count: usize, stated: Option<usize>) -> Result<usize, ModelError> {
        let size = if count == 1 { self.cols } else { stated.unwrap_or(self.cols / count) };
        if size > 0 && self.cols.div_ceil(size) == count {
            return Ok(size);
        }
        Err(self.wrong(
            part,
            format!("has {count} groups for {} columns, which groups of {size} do not make", self.cols),
        ))
    }

    /// Columns in order, or the groups `part` names for them.
    fn groups(&mut self, part: &str, size: usize, count: usize) -> Result<Groups, ModelError> {
        let name = format!("{}.{part}", self.stem);
        if self.files.raw(&name).is_none() {
            return Ok(Groups::Runs(size));
        }
        let data = self.require(part, Stored::I32, &[self.cols])?;
        let listed: Vec<i32> =
            data.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        // compressed-tensors writes −1 where nothing is reordered.
        if listed.iter().all(|&g| g == -1) || listed.iter().enumerate().all(|(k, &g)| g as usize == k / size) {
            return Ok(Groups::Runs(size));
        }
        let wanted = |&g: &i32| u32::try_from(g).ok().filter(|&g| (g as usize) < count);
        match listed.iter().map(wanted).collect::<Option<Vec<u32>>>() {
            Some(groups) => Ok(Groups::Listed(groups)),
            None => Err(self.wrong(part, format!("names a group that is none of the {count} there are"))),
        }
    }

    fn gptq(&mut self, group_size: Option<usize>, zero_offset: u8) -> Result<Option<Coded<'a>>, ModelError> {
        let Some(codes) = self.find("qweight") else { return Ok(None) };
        let words = match *codes.shape {
            [words, rows] if rows == self.rows => words,
            _ => return Err(self.wrong("qweight", format!("is {:?}; {} rows are wanted", codes.shape, self.rows))),
        };
        let bits = self.bits("qweight", words, self.cols)?;
        self.check_words("qweight", codes.dtype)?;
        let (scales, shape) = self.scales("scales")?;
        let group_count = self.group_count("scales", shape)?;
        let size = self.run("scales", group_count, group_size)?;
        self.check_rows(32 / bits)?;
        let zeros = self.require("qzeros", Stored::I32, &[group_count, self.rows * bits / 32])?;
        Ok(Some(Coded {
            rows: self.rows,
            cols: self.cols,
            layout: Layout::InputWords,
            bits,
            codes: codes.data,
            scales: self.by_rows(&scales, group_count),
            zeros: self.zeros(zeros, group_count, bits, |i| i as u32, zero_offset),
            group_count,
            groups: self.groups("g_idx", size, group_count)?,
        }))
    }

    fn awq(&mut self) -> Result<Option<Coded<'a>>, ModelError> {
        if self.files.raw(&format!("{}.qweight", self.stem)).is_none() {
            return Ok(None);
        }
        self.check_rows(8)?;
        let codes = self.require("qweight", Stored::I32, &[self.cols, self.rows / 8])?;
        let (scales, shape) = self.scales("scales")?;
        let group_count = self.group_count("scales", shape)?;
        let zeros = self.require("qzeros", Stored::I32, &[group_count, self.rows / 8])?;
        Ok(Some(Coded {
            rows: self.rows,
            cols: self.cols,
            layout: Layout::InterleavedWords,
            bits: 4,
            codes,
            scales: self.by_rows(&scales, group_count),
            zeros: self.zeros(zeros, group_count, 4, |row| NIBBLE_OF_ROW[row], 0),
            group_count,
            groups: Groups::Runs(self.run("scales", group_count, None)?),
        }))
    }

    fn scaled(&mut self, block: Option<[usize; 2]>) -> Result<Option<Coded<'a>>, ModelError> {
        if let Some(codes) = self.find("weight_packed") {
            let width = match *codes.shape {
                [rows, width] if rows == self.rows => width,
                _ => {
                    let reason = format!("is {:?}; {} rows are wanted", codes.shape, self.rows);
                    return Err(self.wrong("weight_packed", reason));
                }
            };
            let bits = self.bits("weight_packed", width, self.cols)?;
            self.check_words("weight_packed", codes.dtype)?;
            let shape = self.require("weight_shape", Stored::I64, &[2])?;
            let wanted: Vec<u8> = [self.rows, self.cols].iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
            if shape != wanted {
                let reason = format!("does not say {} × {}, as the configuration does", self.rows, self.cols);
                return Err(self.wrong("weight_shape", reason));
            }
            return self.with_scales(Layout::RowWords, bits, codes.data, block).map(Some);
        }
        let name = format!("{}.weight", self.stem);
        let Some(codes) = self.files.raw(&name) else { return Ok(None) };
        let layout = match codes.dtype {
            Stored::I8 => Layout::Bytes,
            Stored::F8_E4M3 => Layout::Float8,
            _ => return Ok(None),
        };
        let codes = self.require("weight", codes.dtype, &[self.rows, self.cols])?;
        self.with_scales(layout, 8, codes, block).map(Some)
    }

    /// Row-major codes with their weight_scale, for the whole matrix, each row, each group of a row or each block.
    fn with_scales(
        &mut self,
        layout: Layout,
        bits: usize,
        codes: &'a [u8],
        block: Option<[usize; 2]>,
    ) -> Result<Coded<'a>, ModelError> {
        let inverse = format!("{}.weight_scale_inv", self.stem);
        // DeepSeek's name for the same thing.
        let part = if self.files.raw(&inverse).is_some() { "weight_scale_inv" } else { "weight_scale" };
        let (stored, shape) = self.scales(part)?;
        let (rows, cols) = (self.rows, self.cols);
        let blocks = block.map(|[r, c]| [rows.div_ceil(r), cols.div_ceil(c)]);
        let (scales, size) = match *shape {
            [] | [1] | [1, 1] => (vec![stored[0]; rows], cols),
            [r] if r == rows => (stored, cols),
            [a, b] if Some([a, b]) == blocks => {
                let [rows_each, cols_each] = block.unwrap_or([1, 1]);
                let expanded = (0..rows * b).map(|i| stored[i / b / rows_each * b + i % b]).collect();
                (expanded, cols_each)
            }
            [r, groups] if r == rows && (1..=cols).contains(&groups) => {
                let size = self.run(part, groups, None)?;
                (stored, size)
            }
            _ => {
                let reason =
                    format!("is {shape:?}; one for the matrix, each row, each group or each block is wanted");
                return Err(self.wrong(part, reason));
            }
        };
        let group_count = scales.len() / rows;
        let zeros = match self.find("weight_zero_point") {
            None => Zeros::Same(1 << (bits - 1)),
            Some(found) if found.dtype == Stored::I8 && found.data.len() == rows * group_count => {
                Zeros::Each(found.data.iter().map(|&byte| byte ^ 0x80).collect())
            }
            // Symmetric matrices may carry one that says nothing.
            Some(found) if found.data.iter().all(|&byte| byte == 0) && found.data.len() <= 8 => {
                Zeros::Same(1 << (bits - 1))
            }
            Some(_) => {
                self.check_rows(32 / bits)?;
                let data = self.require("weight_zero_point", Stored::I32, &[rows * bits / 32, group_count])?;
                self.zeros_of_columns(data, group_count, bits)
            }
        };
        let groups = self.groups("weight_g_idx", size, group_count)?;
        Ok(Coded { rows, cols, layout, bits, codes, scales, zeros, group_count, groups })
    }

    /// Zero points packed down the rows: `[rows in words][groups]`.
    fn zeros_of_columns(&self, data: &[u8], group_count: usize, bits: usize) -> Zeros {
        let (a_word, mask) = (32 / bits, (1_u32 << bits) - 1);
        let mut zeros = vec![0; self.rows * group_count];
        for (index, bytes) in data.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            for i in 0..a_word {
                let row = index / group_count * a_word + i;
                zeros[row * group_count + index % group_count] = ((word >> (bits * i)) & mask) as u8;
            }
        }
        Zeros::Each(zeros)
    }

    fn check_words(&self, part: &str, dtype: Stored) -> Result<(), ModelError> {
        if dtype == Stored::I32 {
            return Ok(());
        }
        Err(self.wrong(part, format!("is {dtype:?}; packed codes are I32")))
    }

    /// Zero points are packed by rows, `multiple` to a word.
    fn check_rows(&self, multiple: usize) -> Result<(), ModelError> {
        if self.rows.is_multiple_of(multiple) {
            return Ok(());
        }
        Err(self.wrong("qzeros", format!("cannot pack {} rows, {multiple} to a word", self.rows)))
    }
}
