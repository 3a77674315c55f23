//! A step's attention: what all layers need, prepared once, and the launches of one layer.

use super::backend::launch;
use super::cache::KvCache;
use super::kernels::{attention, cache_dim, rope_write};
use super::launch::{Arg, DevicePointer, Launch};
use super::matrix::Matrix;
use super::memory::{Bytes, Device, DeviceBuffer};
use super::work_list::{JOB_WORDS, MERGE_WORDS, WorkList};
use crate::backend::{AttentionShape, Rope, StepInput};

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
    pub(super) attended: Matrix,
}

impl Step {
    /// See [`Backend::prepare`](crate::Backend::prepare); `padded`: work lists are filled up to sizes that come again.
    pub(super) fn prepare(
        &mut self,
        device: &Device,
        input: StepInput<'_>,
        (rope, heads): (&Rope, AttentionShape),
        padded: bool,
    ) {
        let n = rope.inverse_frequencies.len();
        assert!(2 * n <= heads.head_dim, "{n} frequencies turn more than {} dimensions", heads.head_dim);
        assert!(heads.kv_heads > 0 && heads.heads.is_multiple_of(heads.kv_heads), "heads in whole groups");
        assert!(heads.value_dim <= heads.head_dim, "values are at most as wide as keys");
        let (rows, dim) = (input.positions.len(), cache_dim(heads.head_dim));
        (self.rows, self.heads, self.frequencies) = (rows, Some(heads), n);
        self.work.fill(input, heads);
        if padded {
            self.work.pad();
            // Nobody attends for the rows beyond the sequences': what is there must be numbers.
            let bytes = (rows * heads.out_width() * 4).next_multiple_of(4096);
            if self.attended.data.len() < bytes {
                device.zero(&mut self.attended.data, bytes);
            }
        }
        let work = &self.work;
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
        device.reserve(&mut self.words, (4 * words.len()).next_power_of_two());
        device.upload(&mut self.words, words.bytes());
        let mut offset = 0;
        let at = parts.map(|part| {
            let pointer = self.words.pointer().offset(4 * offset);
            offset += part.len();
            pointer
        });
        let frequencies;
        [self.positions, self.slots, frequencies, self.split, self.merges, self.shared, self.tables] = at;
        device.reserve(&mut self.rotations, rows * 2 * n * 4);
        device.reserve(&mut self.queries, rows * heads.heads * dim * 2);
        let partial = work.partial_rows * heads.kv_heads;
        device.reserve(&mut self.partial, partial * dim * 4);
        device.reserve(&mut self.partial_state, partial * 2 * 4);
        if n > 0 {
            let args =
                [at[0].into(), frequencies.into(), n.into(), rope.factor.into(), self.rotations.pointer().into()];
            // SAFETY: a position for each row and `n` frequencies were uploaded; room was made for the table.
            unsafe { device.launch(launch("rope_table", rows, 128), &args) };
        }
    }

    /// Leaves what the rows of `qkv` attend to in `attended`: see [`Backend::attention`](crate::Backend::attention).
    pub(super) fn attend(
        &mut self,
        device: &Device,
        qkv: &Matrix,
        (heads, input): (AttentionShape, StepInput<'_>),
        cache: &mut KvCache,
    ) {
        let rows = qkv.rows;
        assert!(self.heads == Some(heads) && self.rows == rows, "a step prepared for other rows or heads");
        assert!(
            input.positions.len() == rows && qkv.width == heads.qkv_width(),
            "queries, keys and values of each row"
        );
        let (dim, size) = (cache_dim(heads.head_dim), cache.shape.block_size);
        input.check(heads, cache.shape);
        let write = [
            qkv.data.pointer().into(),
            self.rotations.pointer().into(),
            self.frequencies.into(),
            self.slots.into(),
            heads.heads.into(),
            heads.kv_heads.into(),
            heads.head_dim.into(),
            heads.value_dim.into(),
            dim.into(),
            size.into(),
            self.queries.pointer().into(),
            cache.keys.pointer().into(),
            cache.values.pointer().into(),
            cache.scales.pointer().into(),
        ];
        // SAFETY: shapes and slots were checked; rotations and queries were made room for in `prepare`.
        unsafe { device.launch(launch(rope_write(cache.dtype), rows, 256), &write) };

        self.attended.reset(device, rows, heads.out_width());
        let call: [Arg; 16] = [
            self.queries.pointer().into(),
            cache.keys.pointer().into(),
            cache.values.pointer().into(),
            cache.scales.pointer().into(),
            self.tables.into(),
            self.positions.into(),
            self.attended.data.pointer().into(),
            self.partial.pointer().into(),
            self.partial_state.pointer().into(),
            heads.heads.into(),
            heads.kv_heads.into(),
            heads.value_dim.into(),
            size.into(),
            u32::try_from(heads.window.unwrap_or(usize::MAX)).unwrap_or(u32::MAX).into(),
            heads.scale.into(),
            heads.softcap.unwrap_or(0.0).into(),
        ];
        let kv_heads = heads.kv_heads as u32;
        let (split, shared) = (self.work.split.len() / JOB_WORDS, self.work.shared.len() / JOB_WORDS);
        let kernels = attention(cache.dtype, dim);
        let (kernel, warps, shared_bytes) = (kernels.split, kernels.split_warps, kernels.split_shared);
        let grid = [split.div_ceil(warps as usize) as u32, kv_heads, 1];
        let mut args = call.to_vec();
        args.extend::<[Arg; _]>([self.split.into(), split.into()]);
        // SAFETY: jobs name rows and tables of this step, whose blocks were checked; partial states have room.
        unsafe { device.launch(Launch { kernel, grid, threads: 32 * warps, shared_bytes }, &args) };
        let (kernel, shared_bytes) = (kernels.shared, kernels.shared_shared);
        let mut args = call.to_vec();
        args.extend::<[Arg; _]>([self.shared.into(), shared.into()]);
        let grid = [shared as u32, kv_heads, 1];
        // SAFETY: as above.
        unsafe { device.launch(Launch { kernel, grid, threads: 128, shared_bytes }, &args) };
        let merge = [
            self.partial.pointer().into(),
            self.partial_state.pointer().into(),
            self.merges.into(),
            heads.kv_heads.into(),
            (heads.heads / heads.kv_heads).into(),
            heads.heads.into(),
            heads.value_dim.into(),
            dim.into(),
            self.attended.data.pointer().into(),
        ];
        let grid = [(self.work.merges.len() / MERGE_WORDS) as u32, kv_heads, 1];
        let launch = Launch { kernel: "merge_partitions", grid, threads: 128, shared_bytes: 0 };
        // SAFETY: merges name partial states just written, and rows of the output.
        unsafe { device.launch(launch, &merge) };
    }
}
