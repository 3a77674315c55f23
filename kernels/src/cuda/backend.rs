//! The backend itself: every operation as the launches it is made of.
//!
//! Operations have no way to fail: after the first error nothing more is launched, results are meaningless, and
//! [`Backend::check`] says what happened. Whoever runs a step asks it before using what came out.

use super::attention::{JOB_WORDS, MERGE_WORDS, WorkList, cache_dim, shared_kernel, split_kernel};
use super::launch::{Arg, DevicePointer, Launch, Launcher};
use super::memory::{Bytes, Device, DeviceBuffer, float_bytes_mut};
use super::weights::{Kind, Weights, upload};
use crate::backend::{Activation, AttentionShape, Backend, CacheShape, DeviceError, Rope, StepInput};
use crate::cpu::Form;
use crate::packed::{GROUP, PackError, Packed, Stored};
use crate::pool::Pool;
use std::ops::Range;
use std::sync::Arc;

/// Rows of activations are allocated in multiples of this: linear kernels read whole tiles.
const ROW_TILE: usize = 32;
/// Up to this many rows the small tile of the linear kernels is used. Both give the same bits.
const SMALL_ROWS_MAX: usize = 8;
/// Bytes of shared memory the norms use.
const NORM_SHARED: usize = 8 * 4;

/// Runs on a CUDA device, or on whatever stands in for one.
pub struct CudaBackend {
    device: Device,
    /// Repacks weights at load.
    pool: Pool,
    /// Token ids, selected rows, scales of rows: one upload at a time, used by the next launch.
    ids: DeviceBuffer,
    scales: DeviceBuffer,
    /// Logits before they are copied to the host.
    logits: Matrix,
}

/// Weights of one linear layer.
pub struct Linear {
    parts: Vec<Weights>,
}

/// f32 parameters.
pub struct Vector {
    data: DeviceBuffer,
    len: usize,
}

/// `rows × width` f32, row after row; memory is kept from step to step.
#[derive(Default)]
pub struct Matrix {
    data: DeviceBuffer,
    rows: usize,
    width: usize,
}

/// Rows ready for a linear layer; kernels/cuda/rows.cuh draws them.
#[derive(Default)]
pub struct Rows {
    rows: usize,
    cols: usize,
    form: Form,
    values: DeviceBuffer,
    q: DeviceBuffer,
    scale: DeviceBuffer,
    sum: DeviceBuffer,
}

/// Keys and values of one layer; kernels/cuda/rope.cu draws them.
pub struct KvCache {
    keys: DeviceBuffer,
    values: DeviceBuffer,
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
    /// Turned queries, bf16: `[row][head][dim]`.
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

fn launch(kernel: &'static str, rows: usize, threads: u32) -> Launch {
    Launch { kernel, grid: [rows as u32, 1, 1], threads, shared_bytes: 0 }
}

impl CudaBackend {
    /// Repacks weights on `threads` threads.
    pub fn new(launcher: Arc<dyn Launcher>, threads: usize) -> CudaBackend {
        CudaBackend {
            device: Device::new(launcher),
            pool: Pool::new(threads),
            ids: DeviceBuffer::default(),
            scales: DeviceBuffer::default(),
            logits: Matrix::default(),
        }
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
            self.device.download(&x.values, 0, float_bytes_mut(&mut values));
            cut(values)
        });
        let quantised = x.form.q8.then(|| {
            let (mut q, mut scale) = (vec![0; x.rows * groups * GROUP], vec![0.0; x.rows * groups]);
            self.device.download(&x.q, 0, &mut q);
            self.device.download(&x.scale, 0, float_bytes_mut(&mut scale));
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

    fn multiply(&self, layer: &Linear, x: &Rows, out: &Matrix, add: bool) {
        let mut first = 0;
        for part in &layer.parts {
            let ready = if part.kind.quantised() { x.form.q8 } else { x.form.f32 };
            assert!(part.cols == x.cols && ready, "rows in the wrong form");
            let small = x.rows <= SMALL_ROWS_MAX;
            let kernel = match (part.kind, small) {
                (Kind::Four, true) => "linear_four_1x1",
                (Kind::Four, false) => "linear_four_2x4",
                (Kind::Eight, true) => "linear_eight_1x1",
                (Kind::Eight, false) => "linear_eight_2x4",
                (Kind::Brain, true) => "linear_brain_1x1",
                (Kind::Brain, false) => "linear_brain_2x4",
                (Kind::Half, true) => "linear_half_1x1",
                (Kind::Half, false) => "linear_half_2x4",
                (Kind::Single, true) => "linear_single_1x1",
                (Kind::Single, false) => "linear_single_2x4",
            };
            let (mt, nt) = if small { (1, 1) } else { (2, 4) };
            let launch = Launch {
                kernel,
                grid: [part.tiles.div_ceil(mt) as u32, x.rows.div_ceil(8 * nt) as u32, 1],
                threads: 256,
                shared_bytes: mt * nt * 128 * 4,
            };
            let codes: Arg = part.codes.pointer().into();
            let sizes: [Arg; 2] = [part.steps.into(), part.tiles.into()];
            let output: [Arg; 6] = [
                out.data.pointer().into(),
                x.rows.into(),
                part.rows.into(),
                out.width.into(),
                first.into(),
                u32::from(add).into(),
            ];
            let mut args = vec![codes];
            if part.kind.quantised() {
                args.push(part.scales.pointer().into());
                args.extend(sizes);
                args.extend([&x.q, &x.scale, &x.sum].map(|b| Arg::from(b.pointer())));
            } else {
                args.extend(sizes);
                args.extend::<[Arg; _]>([x.values.pointer().into(), x.cols.next_multiple_of(GROUP).into()]);
            }
            args.extend(output);
            // SAFETY: weights hold `tiles` tiles of `steps`, rows whole tiles of rows in the form asked for above, and
            // `out` `x.rows` rows of `out.width`, which `first + part.rows` does not pass.
            unsafe { self.device.launch(launch, &args) };
            first += part.rows;
        }
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
        let bytes = shape.blocks * shape.block_size * self.kv_bytes_per_token(heads) / 2;
        KvCache { keys: self.device.allocate(bytes), values: self.device.allocate(bytes), shape }
    }

    fn kv_bytes_per_token(&self, heads: AttentionShape) -> usize {
        2 * size_of::<u16>() * heads.kv_heads * cache_dim(heads.head_dim)
    }

    fn copy_blocks(&mut self, cache: &mut KvCache, pairs: &[(u32, u32)]) {
        for half in [&mut cache.keys, &mut cache.values] {
            let size = half.len() / cache.shape.blocks;
            for &(from, to) in pairs {
                self.device.copy_within(half, from as usize * size, to as usize * size, size);
            }
        }
    }

    fn block_bytes(&self, cache: &KvCache) -> usize {
        (cache.keys.len() + cache.values.len()) / cache.shape.blocks
    }

    fn read_block(&mut self, cache: &KvCache, block: u32, out: &mut Vec<u8>) {
        for half in [&cache.keys, &cache.values] {
            let (size, start) = (half.len() / cache.shape.blocks, out.len());
            out.resize(start + size, 0);
            self.device.download(half, block as usize * size, &mut out[start..]);
        }
    }

    fn write_block(&mut self, cache: &mut KvCache, block: u32, bytes: &[u8]) {
        let (keys, values) = bytes.split_at(cache.keys.len() / cache.shape.blocks);
        self.device.upload_at(&mut cache.keys, block as usize * keys.len(), keys);
        self.device.upload_at(&mut cache.values, block as usize * values.len(), values);
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
        let (rows, dim) = (input.positions.len(), cache_dim(heads.head_dim));
        (step.rows, step.heads, step.frequencies) = (rows, Some(heads), n);
        step.work.fill(input, heads);
        let work = &step.work;
        let frequencies: Vec<u32> = rope.inverse_frequencies.iter().map(|f| f.to_bits()).collect();
        let parts: [&[u32]; 7] = [
            input.positions,
            input.slot_mapping,
            input.block_tables,
            &work.split,
            &work.shared,
            &work.merges,
            &frequencies,
        ];
        self.device.upload(&mut step.words, parts.concat().bytes());
        let mut offset = 0;
        let at = parts.map(|part| {
            let pointer = step.words.pointer().offset(4 * offset);
            offset += part.len();
            pointer
        });
        [step.positions, step.slots, step.tables, step.split, step.shared, step.merges, _] = at;
        self.device.reserve(&mut step.rotations, rows * 2 * n * 4);
        self.device.reserve(&mut step.queries, rows * heads.heads * dim * 2);
        let partial = work.partial_rows * heads.kv_heads;
        self.device.reserve(&mut step.partial, partial * dim * 4);
        self.device.reserve(&mut step.partial_state, partial * 2 * 4);
        if n > 0 {
            let args = [at[0].into(), at[6].into(), n.into(), rope.factor.into(), step.rotations.pointer().into()];
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
        self.device.download(&logits.data, 0, float_bytes_mut(out));
        self.logits = logits;
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
        let slots = cache.shape.blocks * size;
        assert!(input.slot_mapping.iter().all(|&slot| (slot as usize) < slots), "a slot beyond the cache");
        assert!(input.block_tables.iter().all(|&b| (b as usize) < cache.shape.blocks), "a block beyond the cache");
        for s in 0..input.context_lens.len() {
            let held = (input.block_table_starts[s + 1] - input.block_table_starts[s]) as usize * size;
            assert!(input.context_lens[s] as usize <= held, "a block table shorter than its context");
        }
        let write = [
            qkv.data.pointer().into(),
            step.rotations.pointer().into(),
            step.frequencies.into(),
            step.slots.into(),
            heads.heads.into(),
            heads.kv_heads.into(),
            heads.head_dim.into(),
            dim.into(),
            size.into(),
            step.queries.pointer().into(),
            cache.keys.pointer().into(),
            cache.values.pointer().into(),
        ];
        // SAFETY: shapes and slots were checked; rotations and queries were made room for in `prepare`.
        unsafe { self.device.launch(launch("rope_write", rows, 256), &write) };

        self.reset(&mut step.attended, rows, heads.heads * heads.head_dim);
        let call: [Arg; 15] = [
            step.queries.pointer().into(),
            cache.keys.pointer().into(),
            cache.values.pointer().into(),
            step.tables.into(),
            step.positions.into(),
            step.attended.data.pointer().into(),
            step.partial.pointer().into(),
            step.partial_state.pointer().into(),
            heads.heads.into(),
            heads.kv_heads.into(),
            heads.head_dim.into(),
            size.into(),
            u32::try_from(heads.window.unwrap_or(usize::MAX)).unwrap_or(u32::MAX).into(),
            heads.scale.into(),
            heads.softcap.unwrap_or(0.0).into(),
        ];
        let kv_heads = heads.kv_heads as u32;
        let (split, shared) = (step.work.split.len() / JOB_WORDS, step.work.shared.len() / JOB_WORDS);
        let (kernel, warps, shared_bytes) = split_kernel(dim);
        let grid = [split.div_ceil(warps as usize) as u32, kv_heads, 1];
        let mut args = call.to_vec();
        args.extend::<[Arg; _]>([step.split.into(), split.into()]);
        // SAFETY: jobs name rows and tables of this step, whose blocks were checked; partial states have room.
        unsafe { self.device.launch(Launch { kernel, grid, threads: 32 * warps, shared_bytes }, &args) };
        let (kernel, shared_bytes) = shared_kernel(dim);
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
            heads.head_dim.into(),
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
        self.device.download(&x.data, range.start * x.width * 4, float_bytes_mut(&mut out));
        out
    }
}
