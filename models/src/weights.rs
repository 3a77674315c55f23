//! Weights by name, whichever format they lie in: checked against the shape the model expects.

mod coded;
mod encode;
mod names;
mod quantization;
mod quantized;
mod safetensors;
mod shrink;

use self::coded::Fate;
use crate::ModelError;
use crate::gguf::GgufFile;
pub(crate) use names::Names;
use rill_kernels::{Dtype, Stored, dequantize};
pub(crate) use safetensors::Safetensors;
pub use shrink::Quantize;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

/// A model's tensors. Names are GGUF's (`blk.0.attn_q.weight`); safetensors files answer to them too.
pub(crate) struct Weights {
    files: Files,
    /// What has been read, by the names the files use.
    used: RefCell<HashSet<String>>,
    /// How many matrices of codes became what.
    fates: RefCell<BTreeMap<Fate, usize>>,
    quantize: Option<Quantize>,
    shrunk: RefCell<shrink::Counts>,
}

enum Files {
    Gguf(Box<GgufFile>),
    Safetensors(Safetensors),
}

/// A matrix on its way to a backend: as it lies in the file, or rearranged.
pub(crate) struct Matrix<'a> {
    dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    data: Cow<'a, [u8]>,
}

/// Where a tensor is, as the file says.
struct Found<'a> {
    /// In the file's own spelling.
    name: String,
    dtype: Dtype,
    shape: &'a [usize],
    data: &'a [u8],
}

impl Weights {
    pub(crate) fn from_gguf(file: GgufFile) -> Weights {
        Self::new(Files::Gguf(Box::new(file)))
    }

    pub(crate) fn from_safetensors(files: Safetensors) -> Weights {
        Self::new(Files::Safetensors(files))
    }

    fn new(files: Files) -> Weights {
        Weights {
            files,
            used: RefCell::default(),
            fates: RefCell::default(),
            quantize: None,
            shrunk: RefCell::default(),
        }
    }

    /// The same, with float matrices quantised as they are asked for.
    pub(crate) fn with_quantize(self, quantize: Option<Quantize>) -> Weights {
        Weights { quantize, ..self }
    }

    /// What became of matrices that are not run as the files hold them, in words; `None` where there are none.
    ///
    /// # Errors
    /// If matrices were to be quantised and none is kept as floats.
    pub(crate) fn conversions(&self) -> Result<Option<String>, ModelError> {
        let mut all = Vec::new();
        if let Files::Safetensors(Safetensors { quantization: Some(quantization), .. }) = &self.files {
            let fates = self.fates.borrow();
            let part = |(fate, count): (&Fate, &usize)| format!("{count} matrices {}", fate.words());
            let parts: Vec<String> = fates.iter().map(part).collect();
            all.push(format!("{} weights ({})", quantization.name, parts.join(", ")));
        }
        if self.quantize.is_some() {
            let counts = *self.shrunk.borrow();
            if counts.four + counts.eight == 0 {
                return Err(ModelError::Unsupported(format!(
                    "{}: none of its matrices can be quantised: they are kept in fewer bits already, or have columns that are no multiple of 32",
                    self.path()
                )));
            }
            all.push(counts.words());
        }
        Ok((!all.is_empty()).then(|| all.join(", ")))
    }

    /// A float matrix as it is to be run.
    fn shrink<'a>(&self, name: &str, matrix: Matrix<'a>) -> Matrix<'a> {
        match self.quantize {
            Some(quantize) => quantize.apply(name, matrix, &mut self.shrunk.borrow_mut()),
            None => matrix,
        }
    }

    /// Names one warning's worth of tensors outside the decoder's layers that nothing has read.
    pub(crate) fn warn_of_unused(&self) {
        let used = self.used.borrow();
        let names: Vec<&str> = match &self.files {
            Files::Gguf(file) => file.tensors().iter().map(|info| info.name.as_str()).collect(),
            Files::Safetensors(files) => files.names().collect(),
        };
        // A head that is not used is a copy of the embedding table.
        let head = |name: &str| ["output.weight", "lm_head.weight", "embed_out.weight"].contains(&name);
        let unused: Vec<&str> =
            names.into_iter().filter(|&name| !used.contains(name) && !is_buffer(name) && !head(name)).collect();
        if let Some(first) = unused.first() {
            let path = self.path();
            tracing::warn!(
                path,
                tensors = unused.len(),
                first,
                "tensors that this model does not use are left out"
            );
        }
    }

    /// Tensors lie as transformers saves them, not as llama.cpp's converter rearranges them.
    pub(crate) fn are_from_hub(&self) -> bool {
        matches!(self.files, Files::Safetensors(_))
    }

    fn path(&self) -> String {
        match &self.files {
            Files::Gguf(file) => file.path().display().to_string(),
            Files::Safetensors(files) => files.path.display().to_string(),
        }
    }

    fn wrong(&self, reason: String) -> ModelError {
        ModelError::Format { path: self.path(), reason }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        match &self.files {
            Files::Gguf(file) => file.tensor(name).is_some(),
            Files::Safetensors(files) => files.has(name),
        }
    }

    fn find(&self, name: &str) -> Result<Found<'_>, ModelError> {
        let found = match &self.files {
            Files::Gguf(file) => {
                let info = file.require_tensor(name)?;
                let stored = info.dtype.name();
                let dtype = Dtype::from_name(stored).ok_or_else(|| {
                    ModelError::Unsupported(format!(
                        "{}: tensor {name} is stored as {stored}, which rill does not read; it reads {}",
                        self.path(),
                        rill_kernels::DTYPES.map(Dtype::name).join(", ")
                    ))
                })?;
                Found { name: name.to_owned(), dtype, shape: &info.shape, data: file.tensor_data(info) }
            }
            Files::Safetensors(files) => {
                let hub = files
                    .hub_name(name)
                    .ok_or_else(|| self.wrong(format!("tensor {name} has no name in this format")))?;
                let (dtype, shape, data) = files.read(&hub)?;
                Found { name: hub, dtype, shape, data }
            }
        };
        self.used.borrow_mut().insert(found.name.clone());
        Ok(found)
    }

    fn misshapen(&self, found: &Found<'_>, wanted: &[usize]) -> ModelError {
        self.wrong(format!(
            "tensor {} is {:?}; the model's configuration makes it {wanted:?}",
            found.name, found.shape
        ))
    }

    /// A `rows × cols` matrix.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix<'_>, ModelError> {
        if let Some(matrix) = self.coded_matrix(name, rows, cols)? {
            return Ok(matrix);
        }
        let found = self.find(name)?;
        let input_major = match &self.files {
            Files::Safetensors(files) => files.names.transposed && name.starts_with("blk."),
            Files::Gguf(_) => false,
        };
        let wanted = if input_major { [cols, rows] } else { [rows, cols] };
        if found.shape != wanted {
            return Err(self.misshapen(&found, &wanted));
        }
        let matrix =
            Matrix { dtype: found.dtype, rows: wanted[0], cols: wanted[1], data: Cow::Borrowed(found.data) };
        matrix.stored().check().map_err(|error| self.wrong(format!("tensor {}: {error}", found.name)))?;
        Ok(self.shrink(name, if input_major { matrix.transposed() } else { matrix }))
    }

    /// A matrix that its file keeps as codes and scales.
    fn coded_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Option<Matrix<'_>>, ModelError> {
        let Files::Safetensors(files) = &self.files else { return Ok(None) };
        let Some(hub) = files.hub_name(name) else { return Ok(None) };
        let Some(found) = files.coded(&hub, rows, cols)? else { return Ok(None) };
        let (dtype, data, fate) = found.coded.encode();
        self.used.borrow_mut().extend(found.names);
        *self.fates.borrow_mut().entry(fate).or_default() += 1;
        Ok(Some(Matrix { dtype, rows, cols, data: Cow::Owned(data) }))
    }

    /// `count` matrices of `rows × cols` stacked in one tensor.
    pub(crate) fn stack(
        &self,
        name: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<Matrix<'_>>, ModelError> {
        let found = self.find(name)?;
        if found.shape != [count, rows, cols] {
            return Err(self.misshapen(&found, &[count, rows, cols]));
        }
        let all = Stored { dtype: found.dtype, rows: count * rows, cols, data: found.data };
        all.check().map_err(|error| self.wrong(format!("tensor {}: {error}", found.name)))?;
        let each = found.data.chunks_exact(found.data.len() / count);
        let matrix = |data| Matrix { dtype: found.dtype, rows, cols, data: Cow::Borrowed(data) };
        Ok(each.map(|data| self.shrink(name, matrix(data))).collect())
    }

    /// A vector of `len` values.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let found = self.find(name)?;
        let stored = Stored { dtype: found.dtype, rows: 1, cols: len, data: found.data };
        if found.shape.iter().product::<usize>() != len || stored.check().is_err() {
            return Err(self.misshapen(&found, &[len]));
        }
        let mut values = vec![0.0; len];
        dequantize(found.dtype, found.data, &mut values);
        Ok(values)
    }

    /// Refuses files with a layer tensor nobody has read: the architecture they were made for is not quite the one
    /// that was run.
    pub(crate) fn check_all_used(&self, layers: usize) -> Result<(), ModelError> {
        let used = self.used.borrow();
        let unknown = |names: &mut dyn Iterator<Item = (&str, Option<usize>)>| {
            names
                .filter(|(name, layer)| {
                    layer.is_some_and(|layer| layer < layers) && !used.contains(*name) && !is_buffer(name)
                })
                .map(|(name, _)| name.to_owned())
                .collect::<Vec<_>>()
        };
        let unused = match &self.files {
            Files::Gguf(file) => unknown(&mut file.tensors().iter().map(|info| {
                let number = info.name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
                (info.name.as_str(), number)
            })),
            Files::Safetensors(files) => {
                unknown(&mut files.names().map(|name| (name, files.names.layer_of(files.root, name))))
            }
        };
        match unused.first() {
            None => Ok(()),
            Some(first) => Err(ModelError::Unsupported(format!(
                "{}: {} tensors of the decoder's layers have no place in this architecture as rill runs it, among them {first}",
                self.path(),
                unused.len()
            ))),
        }
    }
}

/// Constants that old checkpoints carry along and nobody learns.
pub(crate) fn is_buffer(name: &str) -> bool {
    // The last are how others store activations and caches; rill scales both as it computes them.
    const ENDS: [&str; 14] = [
        ".inv_freq",
        ".attn.bias",
        ".masked_bias",
        ".attention.bias",
        ".attn_rot_embd.weight",
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
        ".input_scale",
        ".input_zero_point",
        ".output_scale",
        ".q_scale",
        ".k_scale",
        ".v_scale",
    ];
    ENDS.iter().any(|end| name.ends_with(end))
}

impl<'a> Matrix<'a> {
    /// One row of f32.
    pub(crate) fn row(values: &[f32]) -> Matrix<'static> {
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Matrix { dtype: Dtype::F32, rows: 1, cols: values.len(), data: Cow::Owned(data) }
    }

    pub(crate) fn stored(&self) -> Stored<'_> {
        Stored { dtype: self.dtype, rows: self.rows, cols: self.cols, data: &self.data }
    }

    fn row_bytes(&self) -> usize {
        self.data.len() / self.rows
    }

    /// Row `r` of the result is row `source(r)`.
    pub(crate) fn reordered(self, source: impl Fn(usize) -> usize) -> Matrix<'static> {
        self.picked(self.rows, source)
    }

    /// `rows` rows: row `r` of the result is row `source(r)`.
    pub(crate) fn picked(&self, rows: usize, source: impl Fn(usize) -> usize) -> Matrix<'static> {
        let row = self.row_bytes();
        let mut data = Vec::with_capacity(rows * row);
        for r in 0..rows {
            let at = source(r) * row;
            data.extend_from_slice(&self.data[at..at + row]);
        }
        Matrix { dtype: self.dtype, rows, cols: self.cols, data: Cow::Owned(data) }
    }

    /// One on top of the other; they have one width and one type.
    pub(crate) fn stacked<'b>(parts: impl IntoIterator<Item = Matrix<'b>>) -> Matrix<'static> {
        let mut all = Matrix { dtype: Dtype::F32, rows: 0, cols: 0, data: Cow::Borrowed(&[][..]) };
        for part in parts {
            (all.dtype, all.cols) = (part.dtype, part.cols);
            all.rows += part.rows;
            all.data.to_mut().extend_from_slice(&part.data);
        }
        all
    }

    /// The same numbers in f32.
    pub(crate) fn to_f32(&self) -> Matrix<'static> {
        let mut values = vec![0.0; self.rows * self.cols];
        dequantize(self.dtype, &self.data, &mut values);
        Matrix { rows: self.rows, cols: self.cols, ..Matrix::row(&values) }
    }

    /// Columns become rows; floats only, since blocks run along rows.
    pub(crate) fn transposed(self) -> Matrix<'static> {
        let width = self.dtype.block_bytes();
        let mut data = Vec::with_capacity(self.data.len());
        for col in 0..self.cols {
            for row in 0..self.rows {
                let at = (row * self.cols + col) * width;
                data.extend_from_slice(&self.data[at..at + width]);
            }
        }
        Matrix { dtype: self.dtype, rows: self.cols, cols: self.rows, data: Cow::Owned(data) }
    }
}

/// Where row `r` of a matrix whose heads turn halves lies in one whose heads turn neighbours: the first `turning` rows
/// of each head are interleaved there.
pub(crate) fn interleaved_row(r: usize, head_dim: usize, turning: usize) -> usize {
    let (head, i) = (r / head_dim, r % head_dim);
    let half = turning / 2;
    head * head_dim + if i < turning { 2 * (i % half) + i / half } else { i }
}

#[cfg(test)]
mod tests {
    use super::{Matrix, interleaved_row};
    use rill_kernels::Dtype;
    use std::borrow::Cow;

    fn numbers(matrix: &Matrix<'_>) -> Vec<f32> {
        let four = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
        matrix.data.chunks_exact(4).map(four).collect()
    }

    fn counted(rows: usize, cols: usize) -> Matrix<'static> {
        let data = (0..rows * cols).flat_map(|x| (x as f32).to_le_bytes()).collect();
        Matrix { dtype: Dtype::F32, rows, cols, data: Cow::Owned(data) }
    }

    #[test]
    fn neighbours_become_halves() {
        // Two heads of four rows, one column: pairs (0, 1) and (2, 3) of each head are what turns together.
        let turned = counted(8, 1).reordered(|r| interleaved_row(r, 4, 4));
        assert_eq!(numbers(&turned), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        let partly = counted(6, 1).reordered(|r| interleaved_row(r, 6, 4));
        assert_eq!(numbers(&partly), [0.0, 2.0, 1.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn input_major_matrices_are_turned() {
        let turned = counted(2, 3).transposed();
        assert_eq!((turned.rows, turned.cols), (3, 2));
        assert_eq!(numbers(&turned), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    }
}
