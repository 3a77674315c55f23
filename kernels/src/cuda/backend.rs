//! The backend itself: every operation as the launches it is made of.
//!
//! Operations have no way to fail: after the first error nothing more is launched, results are meaningless, and
//! [`Backend::check`] says what happened. Whoever runs a step asks it before using what came out.

use super::attention::Step;
use super::cache::KvCache;
use super::graphs::{Graphs, bucket};
use super::launch::{Arg, DevicePointer, Launch, Launcher};
use super::linear::{Linear, STAGED_BLOCKS_MIN};
use super::logits::Logits;
use super::low_rank::LowRankLists;
use super::matrix::{Matrix, Vector};
use super::memory::{Bytes, BytesMut, Device, DeviceBuffer};
use super::rows::Rows;
use crate::backend::{
    Activation, AttentionShape, Backend, BestLogits, CacheShape, ColumnRuns, DeviceError, KvDtype, LogitFinish,
    Ranking, Rope, StepInput,
};
use crate::cpu::Form;
use crate::low_rank::{LowRankMemory, LowRankUpdate};
use crate::packed::{PackError, Stored};
use crate::pool::Pool;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of shared memory the norms use.
const NORM_SHARED: usize = 8 * 4;

/// Runs on a CUDA device, or on whatever stands in for one.
pub struct CudaBackend {
    pub(super) device: Device,
    /// Repacks weights at load.
    pool: Pool,
    kv_dtype: KvDtype,
    /// Rows and work lists are filled up to sizes that come again.
    padded: bool,
    pub(super) staged_blocks_min: usize,
    /// Token ids, selected rows, scales of rows: one upload at a time, used by the next launch.
    ids: DeviceBuffer,
    scales: DeviceBuffer,
    pub(super) logits: Logits,
    low_rank: LowRankLists,
}

/// A block for each row.
pub(super) fn launch(kernel: &'static str, rows: usize, threads: u32) -> Launch {
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
            logits: Logits::default(),
            low_rank: LowRankLists::default(),
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
        x.read(&self.device)
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
        let out = out.reset(&self.device, rows, x.width, form);
        let mut args = vec![x.data.pointer().into(), select];
        args.extend_from_slice(parameters);
        args.extend::<[Arg; _]>([x.width.into(), eps.into()]);
        args.extend(out);
        // SAFETY: `x` holds its rows, selected ones are among them, parameters are as wide (checked by the callers),
        // and room was made for the output.
        unsafe { self.device.launch(Launch { shared_bytes: NORM_SHARED, ..launch(kernel, rows, 256) }, &args) };
    }

    fn apply(&mut self, activation: Activation, x: &Matrix, cols: usize, (out, form): (&mut Rows, Form)) {
        let out = out.reset(&self.device, x.rows, cols, form);
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
        Linear::load(&self.device, &mut self.pool, parts)
    }

    fn load_vector(&mut self, values: &[f32]) -> Vector {
        Vector { data: self.device.upload_new(values.bytes()), len: values.len() }
    }

    fn new_kv_cache(&mut self, shape: CacheShape, heads: AttentionShape) -> KvCache {
        KvCache::new(&self.device, self.kv_dtype, shape, heads)
    }

    fn kv_bytes_per_token(&self, heads: AttentionShape) -> usize {
        KvCache::bytes_per_token(self.kv_dtype, heads)
    }

    fn copy_blocks(&mut self, cache: &mut KvCache, pairs: &[(u32, u32)]) {
        cache.copy_blocks(&self.device, pairs);
    }

    fn block_bytes(&self, cache: &KvCache) -> usize {
        cache.block_bytes()
    }

    fn read_block(&mut self, cache: &KvCache, block: u32, out: &mut Vec<u8>) {
        cache.read_block(&self.device, block, out);
    }

    fn write_block(&mut self, cache: &mut KvCache, block: u32, bytes: &[u8]) {
        cache.write_block(&self.device, block, bytes);
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
        layer.form()
    }

    fn prepare(&mut self, input: StepInput<'_>, rope: &Rope, heads: AttentionShape, step: &mut Step) {
        self.low_rank.restart();
        step.prepare(&self.device, input, (rope, heads), self.padded);
    }

    fn embed(&mut self, table: &Linear, ids: &[u32], scale: f32, out: &mut Matrix) {
        let table = &table.parts[0];
        assert!(ids.iter().all(|&id| (id as usize) < table.rows), "a token id beyond the embedding table");
        out.reset(&self.device, ids.len(), table.cols);
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
        out.reset(&self.device, x.rows, layer.rows());
        self.multiply(layer, x, out, false);
    }

    fn linear_add(&mut self, layer: &Linear, x: &Rows, out: &mut Matrix) {
        assert!(out.rows == x.rows && out.width == layer.rows(), "the residual stream has another shape");
        self.multiply(layer, x, out, true);
    }

    fn low_rank_memory(&self) -> LowRankMemory {
        LowRankMemory::Device(self.device.launcher().clone())
    }

    fn add_low_rank(&mut self, x: &Rows, updates: &[LowRankUpdate<'_>], out: &mut Matrix) {
        self.low_rank.add(&self.device, x, updates, out);
    }

    fn logits(&mut self, layer: &Linear, x: &Rows, finish: LogitFinish<'_, Vector>, out: &mut Vec<f32>) {
        self.start_logits(layer, x, finish, None);
        self.wait_logits(out);
    }

    fn bucket(&self, rows: usize) -> usize {
        if self.padded { bucket(rows) } else { rows }
    }

    fn runs_aside(&self) -> bool {
        true
    }

    fn start_logits(
        &mut self,
        layer: &Linear,
        x: &Rows,
        finish: LogitFinish<'_, Vector>,
        ranking: Option<&Ranking>,
    ) {
        let mut logits = std::mem::take(&mut self.logits);
        self.linear(layer, x, &mut logits.rows);
        logits.finish(&self.device, finish);
        if let Some(ranking) = ranking {
            logits.rank(&self.device, ranking);
        }
        self.logits = logits;
        self.device.begin();
    }

    fn wait_logits(&mut self, out: &mut Vec<f32>) {
        let logits = &self.logits.rows;
        out.resize(logits.rows * logits.width, 0.0);
        self.device.download(&logits.data, 0, out.bytes_mut());
    }

    fn best_logits_max(&self, layer: &Linear) -> usize {
        Logits::ranked_max(layer.rows())
    }

    fn wait_best(&mut self) -> Vec<BestLogits> {
        self.logits.best(&self.device)
    }

    fn ranked_row(&self, row: usize) -> Vec<f32> {
        let logits = &self.logits.rows;
        assert!(row < logits.rows, "row {row} of {}", logits.rows);
        self.read(logits, row..row + 1)
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
        step.attend(&self.device, qkv, (heads, input), cache);
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
        let out = out.reset(&self.device, rows, x.width, form);
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

    fn read(&self, x: &Matrix, range: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; range.len() * x.width];
        self.device.download(&x.data, range.start * x.width * 4, out.bytes_mut());
        out
    }
}
