//! The backend itself: every operation as the launches it is made of.
//!
//! Operations have no way to fail: after the first error nothing more is launched, results are meaningless, and
//! [`Backend::check`] says what happened. Whoever runs a step asks it before using what came out.

use super::attention::{JOB_WORDS, MERGE_WORDS, WorkList};
use super::graphs::Graphs;
use super::kernels::{STAGED_ROWS, attention, cache_dim, rope_write};
use super::launch::{Arg, DevicePointer, Launch, Launcher};
use super::linear::STAGED_BLOCKS_MIN;
use super::memory::{Bytes, BytesMut, Device, DeviceBuffer};
use super::rank::ranked_max;
use super::weights::{Weights, upload};
use crate::backend::{
    Activation, AttentionShape, Backend, BestLogits, CacheShape, ColumnRuns, DeviceError, KvDtype, Rope, StepInput,
};
use crate::cpu::Form;
use crate::packed::{GROUP, PackError, Packed, Stored};
use crate::pool::Pool;
use std::ops::Range;
use std::sync::Arc;

/// Rows of activations are allocated in multiples of this: linear kernels read whole tiles.
const ROW_TILE: usize = STAGED_ROWS;
/// Bytes of shared memory the norms use.
const NORM_SHARED: usize = 8 * 4;

/// Runs on a CUDA device, or on whatever stands in for one.
pub struct CudaBackend {
    pub(super) device: Device,
    /// Repacks weights at load.
    pool: Pool,
    kv_dtype: KvDtype,
    /// Work lists are filled up to sizes that come again.
    padded: bool,
    pub(super) staged_blocks_min: usize,
    /// Token ids, selected rows, scales of rows: one upload at a time, used by the next launch.
    ids: DeviceBuffer,
    scales: DeviceBuffer,
    /// Logits before they are copied to the host.
    pub(super) logits: Matrix,
    /// Ranks of chunks of logits, and of rows.
    pub(super) candidates: DeviceBuffer,
    pub(super) best: DeviceBuffer,
}

/// Weights of one linear layer.
pub struct Linear {
    pub(super) parts: Vec<Weights>,
}

/// f32 parameters.
pub struct Vector {
    data: DeviceBuffer,
    len: usize,
}

/// `rows × width` f32, row after row; memory is kept from step to step.
#[derive(Default)]
pub struct Matrix {
    pub(super) data: DeviceBuffer,
    pub(super) rows: usize,
    pub(super) width: usize,
}

/// Rows ready for a linear layer; kernels/cuda/rows.cuh draws them.
#[derive(Default)]
pub struct Rows {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) form: Form,
    pub(super) values: DeviceBuffer,
    pub(super) q: DeviceBuffer,
    pub(super) scale: DeviceBuffer,
    pub(super) sum: DeviceBuffer,
}

/// Keys and values of one layer; kernels/cuda/kv.cuh draws them.
pub struct KvCache {
    keys: DeviceBuffer,
    values: DeviceBuffer,
    /// Of both, where bytes have scales.
    scales: DeviceBuffer,
    dtype: KvDtype,
    shape: CacheShape,
}

/// What one step's attention needs, for all layers.
#[derive(Default)]
pub struct Step {
    rows: usize,
    heads: Option<AttentionShape>,
    frequencies: usize,
    work: WorkList,
    /// All words below, one after another.
    words: DeviceBuffer,
    positions: DevicePointer,
    slots: DevicePointer,
    tables: DevicePointer,
    split: DevicePointer,
    shared: DevicePointer,
    merges: DevicePointer,
    /// `[row][cosines, sines][n]`.
    rotations: DeviceBuffer,
    /// Turned queries, bf16 or f16: `[row][head][dim]`.
    queries: DeviceBuffer,
    /// Partitions' outputs, and their maxima and sums.
    partial: DeviceBuffer,
    partial_state: DeviceBuffer,
    /// f32: `[row][head][head_dim]`.
    attended: Matrix,
}

impl Linear {
    /// Outputs a row.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// Bytes of device memory the weights take.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

/// Bytes of a number in a cache.
fn number_bytes(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::Bf16 | KvDtype::F16 => 2,
        KvDtype::Int8 | KvDtype::Fp8 => 1,
    }
}

/// Bytes of a group's scale; 0: there are none.
fn scale_bytes(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::Int8 => 2,
        KvDtype::Bf16 | KvDtype::F16 | KvDtype::Fp8 => 0,
    }
}

fn launch(kernel: &'static str, rows: usize, threads: u32) -> Launch {
    Launch { kernel, grid: [rows as u32, 1, 1], threads, shared_bytes: 0 }
}

impl CudaBackend {
    /// Repacks weights on `threads` threads.
    pub fn new(launcher: Arc<dyn Launcher>, threads: usize) -> CudaBackend {
        CudaBackend {
            device: Device::new(launcher),
            pool: Pool::new(threads),
            kv_dtype: KvDtype::default(),
            padded: false,
            staged_blocks_min: STAGED_BLOCKS_MIN,
            ids: DeviceBuffer::default(),
            scales: DeviceBuffer::default(),
            logits: Matrix::default(),
            candidates: DeviceBuffer::default(),
            best: DeviceBuffer::default(),
        }
    }

    /// The same with KV caches of `dtype`.
    pub fn with_kv_dtype(mut self, dtype: KvDtype) -> CudaBackend {
        self.set_kv_dtype(dtype);
        self
    }

    /// Caches made from now on are of `dtype`.
    pub fn set_kv_dtype(&mut self, dtype: KvDtype) {
        self.kv_dtype = dtype;
    }

    /// The same, taking the kernels for many rows where they have at least `blocks` blocks. Results are the same bits.
    pub fn with_staged_from(self, blocks: usize) -> CudaBackend {
        CudaBackend { staged_blocks_min: blocks, ..self }
    }

    /// The same, replaying launches that come again as graphs. Results are the same bits.
    pub fn with_graphs(self) -> CudaBackend {
        let graphs = Graphs::new(self.device.launcher().clone());
        CudaBackend { device: Device::new(Arc::new(graphs)), padded: true, ..self }
    }

    /// The device in words.
    pub fn name(&self) -> String {
        self.device.launcher().name()
    }

    /// Rows as a linear layer sees them, in host memory: those of the f32 form, and scale · code of the 8-bit form,
    /// whichever there are.
    pub fn read_rows(&self, x: &Rows) -> [Option<Vec<f32>>; 2] {
        let groups = x.cols.div_ceil(GROUP);
        let cut = |padded: Vec<f32>| -> Vec<f32> {
            padded.chunks_exact(groups * GROUP).flat_map(|row| row[..x.cols].to_vec()).collect()
        };
        let values = x.form.f32.then(|| {
            let mut values = vec![0.0; x.rows * groups * GROUP];
            self.device.download(&x.values, 0, values.bytes_mut());
            cut(values)
        });
        let quantised = x.form.q8.then(|| {
            let (mut q, mut scale) = (vec![0; x.rows * groups * GROUP], vec![0.0; x.rows * groups]);
            self.device.download(&x.q, 0, &mut q);
            self.device.download(&x.scale, 0, scale.bytes_mut());
            cut(q.iter().enumerate().map(|(i, &q)| f32::from(q.cast_signed()) * scale[i / GROUP]).collect())
        });
        [values, quantised]
    }

    fn reset(&self, x: &mut Matrix, rows: usize, width: usize) {
        (x.rows, x.width) = (rows, width);
        self.device.reserve(&mut x.data, rows * width * 4);
    }

    /// Makes room for rows and returns the kernels' arguments for it.
    fn reset_rows(&self, out: &mut Rows, rows: usize, cols: usize, form: Form) -> [Arg; 4] {
        (out.rows, out.cols, out.form) = (rows, cols, form);
        let places = rows.next_multiple_of(ROW_TILE) * cols.div_ceil(GROUP);
        let mut given = [Arg::Pointer(DevicePointer::default()); 4];
        if form.f32 {
            self.device.reserve(&mut out.values, places * GROUP * 4);
            given[0] = out.values.pointer().into();
        }
        if form.q8 {
            self.device.reserve(&mut out.q, places * GROUP);
            self.device.reserve(&mut out.scale, places * 4);
            self.device.reserve(&mut out.sum, places * 4);
            given[1..].copy_from_slice(&[&out.q, &out.scale, &out.sum].map(|b| b.pointer().into()));
        }
        given
    }

    /// Uploads the selection, if there is one; returns the number of rows and the kernels' argument.
    fn select(&mut self, all: usize, select: Option<&[u32]>) -> (usize, Arg) {
        let Some(select) = select else { return (all, DevicePointer::default().into()) };
        assert!(select.iter().all(|&row| (row as usize) < all), "a selected row beyond the batch");
        self.device.upload(&mut self.ids, select.bytes());
        (select.len(), self.ids.pointer().into())
    }

    fn norm(
        &mut self,
        kernel: &'static str,
        (x, select): (&Matrix, Option<&[u32]>),
        parameters: &[Arg],
        eps: f32,
        (out, form): (&mut Rows, Form),
    ) {
        let (rows, select) = self.select(x.rows, select);
        let out = self.reset_rows(out, rows, x.width, form);
        let mut args = vec![x.data.pointer().into(), select];
        args.extend_from_slice(parameters);
        args.extend::<[Arg; _]>([x.width.into(), eps.into()]);
        args.extend(out);
        // SAFETY: `x` holds its rows, selected ones are among them, parameters are as wide (checked by the callers),
        // and room was made for the output.
        unsafe { self.device.launch(Launch { shared_bytes: NORM_SHARED, ..launch(kernel, rows, 256) }, &args) };
    }

    fn apply(&mut self, activation: Activation, x: &Matrix, cols: usize, (out, form): (&mut Rows, Form)) {
        let out = self.reset_rows(out, x.rows, cols, form);
        let mut args = vec![x.data.pointer().into(), x.width.into(), cols.into(), (activation as u32).into()];
        args.push(u32::from(cols < x.width).into());
        args.extend(out);
        // SAFETY: rows of `x` hold `cols` values, or twice as many where they are gated; room was made for the output.
        unsafe { self.device.launch(launch("activate", x.rows, 256), &args) };
    }
}

impl Backend for CudaBackend {
    type Linear = Linear;
    type Vector = Vector;
    type Matrix = Matrix;
    type Rows = Rows;
    type KvCache = KvCache;
    type Step = Step;

    fn load_linear(&mut self, parts: &[Stored<'_>]) -> Result<Linear, PackError> {
        let mut matrices = Vec::with_capacity(parts.len());
        for part in parts {
            part.check()?;
            if part.cols != parts[0].cols {
                return Err(PackError::Mixed { first: parts[0].cols, other: part.cols });
            }
            matrices.push(Packed::new(*part, &mut self.pool));
        }
        Ok(Linear { parts: upload(&self.device, &matrices) })
    }

    fn load_vector(&mut self, values: &[f32]) -> Vector {
        Vector { data: self.device.upload_new(values.bytes()), len: values.len() }
    }

    fn new_kv_cache(&mut self, shape: CacheShape, heads: AttentionShape) -> KvCache {
        assert!(shape.block_size.is_multiple_of(16), "blocks hold a multiple of 16 tokens");
        let numbers = shape.blocks * shape.block_size * heads.kv_heads * cache_dim(heads.head_dim);
        let bytes = numbers * number_bytes(self.kv_dtype);
        KvCache {
            keys: self.device.allocate(bytes),
            values: self.device.allocate(bytes),
            scales: self.device.allocate(2 * numbers * scale_bytes(self.kv_dtype) / GROUP),
            dtype: self.kv_dtype,
            shape,
        }
    }

    fn kv_bytes_per_token(&self, heads: AttentionShape) -> usize {
        let numbers = 2 * heads.kv_heads * cache_dim(heads.head_dim);
        numbers * number_bytes(self.kv_dtype) + numbers / GROUP * scale_bytes(self.kv_dtype)
    }

    fn copy_blocks(&mut self, cache: &mut KvCache, pairs: &[(u32, u32)]) {
        for part in [&mut cache.keys, &mut cache.values, &mut cache.scales] {
            let size = part.len() / cache.shape.blocks;
            for &(from, to) in pairs {
                self.device.copy_within(part, from as usize * size, to as usize * size, size);
            }
        }
    }

    fn block_bytes(&self, cache: &KvCache) -> usize {
        [&cache.keys, &cache.values, &cache.scales].map(|part| part.len() / cache.shape.blocks).iter().sum()
    }

    fn read_block(&mut self, cache: &KvCache, block: u32, out: &mut Vec<u8>) {
        for part in [&cache.keys, &cache.values, &cache.scales] {
            let (size, start) = (part.len() / cache.shape.blocks, out.len());
            out.resize(start + size, 0);
            self.device.download(part, block as usize * size, &mut out[start..]);
        }
    }

    fn write_block(&mut self, cache: &mut KvCache, block: u32, bytes: &[u8]) {
        let mut rest = bytes;
        for part in [&mut cache.keys, &mut cache.values, &mut cache.scales] {
            let (own, others) = rest.split_at(part.len() / cache.shape.blocks);
            self.device.upload_at(part, block as usize * own.len(), own);
            rest = others;
        }
    }

    fn memory_free(&self) -> Option<usize> {
        Some(self.device.launcher().memory().free)
    }

    fn check(&self) -> Result<(), DeviceError> {
        match self.device.error() {
            Some(error) => Err(DeviceError(error.to_string())),
            None => Ok(()),
        }
    }

    fn form(&self, layer: &Linear) -> Form {
        layer
            .parts
            .iter()
            .fold(Form::default(), |form, part| form.and(if part.kind.quantised() { Form::Q8 } else { Form::F32 }))
    }

    fn prepare(&mut self, input: StepInput<'_>, rope: &Rope, heads: AttentionShape, step: &mut Step) {
        let n = rope.inverse_frequencies.len();
        assert!(2 * n <= heads.head_dim, "{n} frequencies turn more than {} dimensions", heads.head_dim);
        assert!(heads.kv_heads > 0 && heads.heads.is_multiple_of(heads.kv_heads), "heads in whole groups");
        assert!(heads.value_dim <= heads.head_dim, "values are at most as wide as keys");
        let (rows, dim) = (input.positions.len(), cache_dim(heads.head_dim));
        (step.rows, step.heads, step.frequencies) = (rows, Some(heads), n);
        step.work.fill(input, heads);
        if self.padded {
            step.work.pad();
        }
        let work = &step.work;
        let frequencies: Vec<u32> = rope.inverse_frequencies.iter().map(|f| f.to_bits()).collect();
        // What grows from step to step comes last, so that the rest stays where it is.
        let parts: [&[u32]; 7] = [
            input.positions,
            input.slot_mapping,
            &frequencies,
            &work.split,
            &work.merges,
            &work.shared,
            input.block_tables,
        ];
        let words = parts.concat();
        self.device.reserve(&mut step.words, (4 * words.len()).next_power_of_two());
        self.device.upload(&mut step.words, words.bytes());
        let mut offset = 0;
        let at = parts.map(|part| {
            let pointer = step.words.pointer().offset(4 * offset);
            offset += part.len();
            pointer
        });
        let frequencies;
        [step.positions, step.slots, frequencies, step.split, step.merges, step.shared, step.tables] = at;
        self.device.reserve(&mut step.rotations, rows * 2 * n * 4);
        self.device.reserve(&mut step.queries, rows * heads.heads * dim * 2);
        let partial = work.partial_rows * heads.kv_heads;
        self.device.reserve(&mut step.partial, partial * dim * 4);
        self.device.reserve(&mut step.partial_state, partial * 2 * 4);
        if n > 0 {
            let args =
                [at[0].into(), frequencies.into(), n.into(), rope.factor.into(), step.rotations.pointer().into()];
            // SAFETY: a position for each row and `n` frequencies were uploaded; room was made for the table.
            unsafe { self.device.launch(launch("rope_table", rows, 128), &args) };
        }
    }

    fn embed(&mut self, table: &Linear, ids: &[u32], scale: f32, out: &mut Matrix) {
        let table = &table.parts[0];
        assert!(ids.iter().all(|&id| (id as usize) < table.rows), "a token id beyond the embedding table");
        self.reset(out, ids.len(), table.cols);
        self.device.upload(&mut self.ids, ids.bytes());
        let args = [
            table.codes.pointer().into(),
            table.scales.pointer().into(),
            (table.kind as u32).into(),
            table.steps.into(),
            self.ids.pointer().into(),
            scale.into(),
            table.cols.into(),
            out.data.pointer().into(),
        ];
        // SAFETY: ids are below the table's rows; room was made for the output.
        unsafe { self.device.launch(launch("embed", ids.len(), 256), &args) };
    }

    fn rms_norm(&mut self, x: &Matrix, select: Option<&[u32]>, weight: &Vector, eps: f32, out: (&mut Rows, Form)) {
        assert_eq!(weight.len, x.width, "a norm's weight has the width of its input");
        self.norm("rms_norm", (x, select), &[weight.data.pointer().into()], eps, out);
    }

    fn linear(&mut self, layer: &Linear, x: &Rows, out: &mut Matrix) {
        self.reset(out, x.rows, layer.rows());
        self.multiply(layer, x, out, false);
    }

    fn linear_add(&mut self, layer: &Linear, x: &Rows, out: &mut Matrix) {
        assert!(out.rows == x.rows && out.width == layer.rows(), "the residual stream has another shape");
        self.multiply(layer, x, out, true);
    }

    fn logits(&mut self, layer: &Linear, x: &Rows, out: &mut Vec<f32>) {
        let mut logits = std::mem::take(&mut self.logits);
        self.linear(layer, x, &mut logits);
        out.resize(x.rows * logits.width, 0.0);
        self.device.download(&logits.data, 0, out.bytes_mut());
        self.logits = logits;
    }

    fn best_logits_max(&self, layer: &Linear) -> usize {
        ranked_max(layer.rows())
    }

    fn best_logits(&mut self, layer: &Linear, x: &Rows, scale: f32, count: usize) -> Option<Vec<BestLogits>> {
        Some(self.rank(layer, x, scale, count))
    }

    fn ranked_row(&self, row: usize) -> Vec<f32> {
        assert!(row < self.logits.rows, "row {row} of {}", self.logits.rows);
        self.read(&self.logits, row..row + 1)
    }

    fn attention(
        &mut self,
        qkv: &Matrix,
        heads: AttentionShape,
        input: StepInput<'_>,
        step: &mut Step,
        cache: &mut KvCache,
        out: (&mut Rows, Form),
    ) {
        let rows = qkv.rows;
        assert!(step.heads == Some(heads) && step.rows == rows, "a step prepared for other rows or heads");
        assert!(
            input.positions.len() == rows && qkv.width == heads.qkv_width(),
            "queries, keys and values of each row"
        );
        let (dim, size) = (cache_dim(heads.head_dim), cache.shape.block_size);
        input.check(heads, cache.shape);
        let write = [
            qkv.data.pointer().into(),
            step.rotations.pointer().into(),
            step.frequencies.into(),
            step.slots.into(),
            heads.heads.into(),
            heads.kv_heads.into(),
            heads.head_dim.into(),
            heads.value_dim.into(),
            dim.into(),
            size.into(),
            step.queries.pointer().into(),
            cache.keys.pointer().into(),
            cache.values.pointer().into(),
            cache.scales.pointer().into(),
        ];
        // SAFETY: shapes and slots were checked; rotations and queries were made room for in `prepare`.
        unsafe { self.device.launch(launch(rope_write(cache.dtype), rows, 256), &write) };

        self.reset(&mut step.attended, rows, heads.out_width());
        let call: [Arg; 16] = [
            step.queries.pointer().into(),
            cache.keys.pointer().into(),
            cache.values.pointer().into(),
            cache.scales.pointer().into(),
            step.tables.into(),
            step.positions.into(),
            step.attended.data.pointer().into(),
            step.partial.pointer().into(),
            step.partial_state.pointer().into(),
            heads.heads.into(),
            heads.kv_heads.into(),
            heads.value_dim.into(),
            size.into(),
            u32::try_from(heads.window.unwrap_or(usize::MAX)).unwrap_or(u32::MAX).into(),
            heads.scale.into(),
            heads.softcap.unwrap_or(0.0).into(),
        ];
        let kv_heads = heads.kv_heads as u32;
        let (split, shared) = (step.work.split.len() / JOB_WORDS, step.work.shared.len() / JOB_WORDS);
        let kernels = attention(cache.dtype, dim);
        let (kernel, warps, shared_bytes) = (kernels.split, kernels.split_warps, kernels.split_shared);
        let grid = [split.div_ceil(warps as usize) as u32, kv_heads, 1];
        let mut args = call.to_vec();
        args.extend::<[Arg; _]>([step.split.into(), split.into()]);
        // SAFETY: jobs name rows and tables of this step, whose blocks were checked; partial states have room.
        unsafe { self.device.launch(Launch { kernel, grid, threads: 32 * warps, shared_bytes }, &args) };
        let (kernel, shared_bytes) = (kernels.shared, kernels.shared_shared);
        let mut args = call.to_vec();
        args.extend::<[Arg; _]>([step.shared.into(), shared.into()]);
        let grid = [shared as u32, kv_heads, 1];
        // SAFETY: as above.
        unsafe { self.device.launch(Launch { kernel, grid, threads: 128, shared_bytes }, &args) };
        let merge = [
            step.partial.pointer().into(),
            step.partial_state.pointer().into(),
            step.merges.into(),
            heads.kv_heads.into(),
            (heads.heads / heads.kv_heads).into(),
            heads.heads.into(),
            heads.value_dim.into(),
            dim.into(),
            step.attended.data.pointer().into(),
        ];
        let grid = [(step.work.merges.len() / MERGE_WORDS) as u32, kv_heads, 1];
        let launch = Launch { kernel: "merge_partitions", grid, threads: 128, shared_bytes: 0 };
        // SAFETY: merges name partial states just written, and rows of the output.
        unsafe { self.device.launch(launch, &merge) };
        let attended = std::mem::take(&mut step.attended);
        self.to_rows(&attended, None, out);
        step.attended = attended;
    }

    fn gated(&mut self, activation: Activation, gate_up: &Matrix, out: (&mut Rows, Form)) {
        assert!(gate_up.width.is_multiple_of(2), "a gate and an up value for each output");
        self.apply(activation, gate_up, gate_up.width / 2, out);
    }

    fn activate(&mut self, activation: Activation, x: &Matrix, out: (&mut Rows, Form)) {
        self.apply(activation, x, x.width, out);
    }

    fn to_rows(&mut self, x: &Matrix, select: Option<&[u32]>, (out, form): (&mut Rows, Form)) {
        let (rows, select) = self.select(x.rows, select);
        let out = self.reset_rows(out, rows, x.width, form);
        let mut args = vec![x.data.pointer().into(), select, x.width.into()];
        args.extend(out);
        // SAFETY: selected rows are among those of `x`; room was made for the output.
        unsafe { self.device.launch(launch("to_rows", rows, 256), &args) };
    }

    fn rms_norm_in_place(&mut self, x: &mut Matrix, columns: Range<usize>, weight: &Vector, eps: f32) {
        let (len, width) = (columns.len(), weight.len);
        assert!(columns.end <= x.width && len.is_multiple_of(width), "a norm's weight fits the columns");
        let grid = [x.rows as u32, (len / width) as u32, 1];
        let launch = Launch { kernel: "rms_norm_in_place", grid, threads: 256, shared_bytes: NORM_SHARED };
        let args = [
            x.data.pointer().into(),
            weight.data.pointer().into(),
            x.width.into(),
            columns.start.into(),
            width.into(),
            eps.into(),
        ];
        // SAFETY: the parts are inside the rows of `x`.
        unsafe { self.device.launch(launch, &args) };
    }

    fn layer_norm(
        &mut self,
        x: &Matrix,
        select: Option<&[u32]>,
        (weight, bias): (&Vector, Option<&Vector>),
        eps: f32,
        out: (&mut Rows, Form),
    ) {
        let fits = |v: &Vector| v.len == x.width;
        assert!(fits(weight) && bias.is_none_or(fits), "a norm's weight and bias have the width of its rows");
        let bias = bias.map_or(DevicePointer::default(), |b| b.data.pointer());
        self.norm("layer_norm", (x, select), &[weight.data.pointer().into(), bias.into()], eps, out);
    }

    fn add_bias(&mut self, x: &mut Matrix, bias: &Vector) {
        assert_eq!(bias.len, x.width, "a bias has the width of its rows");
        let args = [x.data.pointer().into(), bias.data.pointer().into(), x.width.into()];
        // SAFETY: rows of `x` and the bias hold `x.width` values.
        unsafe { self.device.launch(launch("add_bias", x.rows, 256), &args) };
    }

    fn add_scaled(&mut self, x: &Matrix, scale: f32, out: &mut Matrix) {
        assert!(out.rows == x.rows && out.width == x.width, "the residual stream has another shape");
        let args = [out.data.pointer().into(), x.data.pointer().into(), scale.into(), x.width.into()];
        // SAFETY: both hold the same rows.
        unsafe { self.device.launch(launch("add_scaled", x.rows, 256), &args) };
    }

    fn copy_columns(&mut self, x: &Matrix, runs: ColumnRuns, out: &mut Matrix) {
        assert!(out.rows == x.rows && runs.fit(x.width, out.width), "columns beyond a matrix: {runs:?}");
        let ColumnRuns { count, width, from, to } = runs;
        let args = [
            out.data.pointer().into(),
            x.data.pointer().into(),
            out.width.into(),
            x.width.into(),
            count.into(),
            width.into(),
            to.0.into(),
            to.1.into(),
            from.0.into(),
            from.1.into(),
        ];
        // SAFETY: all runs lie inside the rows of both.
        unsafe { self.device.launch(launch("copy_columns", x.rows, 256), &args) };
    }

    fn clear(&mut self, x: &mut Matrix, rows: usize, width: usize) {
        (x.rows, x.width) = (rows, width);
        self.device.zero(&mut x.data, rows * width * 4);
    }

    fn scatter_add(&mut self, x: &Matrix, rows: &[u32], scales: &[f32], out: &mut Matrix) {
        assert!(rows.len() == x.rows && scales.len() == x.rows && x.width == out.width, "a row for each row");
        assert!(rows.iter().all(|&row| (row as usize) < out.rows), "a row beyond the batch");
        self.device.upload(&mut self.ids, rows.bytes());
        self.device.upload(&mut self.scales, scales.bytes());
        let args = [
            out.data.pointer().into(),
            x.data.pointer().into(),
            self.ids.pointer().into(),
            self.scales.pointer().into(),
            x.width.into(),
        ];
        // SAFETY: rows are among those of `out`, each once.
        unsafe { self.device.launch(launch("scatter_add", x.rows, 256), &args) };
    }

    fn scale_logits(&mut self, logits: &mut [f32], scale: f32, cap: Option<f32>) {
        match cap {
            Some(cap) => logits.iter_mut().for_each(|x| *x = cap * (*x * scale / cap).tanh()),
            None => logits.iter_mut().for_each(|x| *x *= scale),
        }
    }

    fn read(&self, x: &Matrix, range: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; range.len() * x.width];
        self.device.download(&x.data, range.start * x.width * 4, out.bytes_mut());
        out
    }
}
