//! Low-rank updates on the device: factors in its memory, the list of jobs of a layer's updates, and their two launches.
//! kernels/cuda/low_rank.cu draws both.

use super::kernels::{GROW_SHARED, SHRINK_SHARED};
use super::launch::{Arg, CudaError, DevicePointer, Launch, Launcher};
use super::linear::Linear;
use super::matrix::Matrix;
use super::memory::{Bytes, Device, DeviceBuffer};
use super::rows::Rows;
use super::weights::{Kind, Weights};
use crate::low_rank::{LowRankError, LowRankUpdate};
use crate::packed::{GROUP, Stored};
use crate::pool::Pool;
use crate::quants::Dtype;
use half::bf16;
use std::sync::Arc;

/// As in low_rank.cu.
const JOB_WORDS: usize = 19;
const JOB_ROWS: usize = 8;
const SLICE: usize = 512;
const GROW_OUTPUTS: usize = 256;
const TILE: usize = 16;
/// Lists of jobs remembered: one for each linear layer of a step. What comes beyond takes the place of the first.
const LISTS_MAX: usize = 1024;

/// Both factors of an update, as [`Linear`] has weights; given back when dropped, by whichever thread.
pub(crate) struct DeviceFactors {
    a: Linear,
    b: Linear,
}

impl DeviceFactors {
    /// Uploads rows of A, `inputs` wide, and of B, `rank` wide, as bf16 if `brain` says that they are such numbers.
    pub(crate) fn upload(
        launcher: &Arc<dyn Launcher>,
        brain: bool,
        (a, inputs): (&[f32], usize),
        (b, rank): (&[f32], usize),
    ) -> Result<DeviceFactors, LowRankError> {
        // A device of its own: one adapter that finds no room does not end the backend.
        let device = Device::new(launcher.clone());
        let mut pool = Pool::new(1);
        let mut load = |values: &[f32], cols: usize| {
            let (dtype, data): (Dtype, Vec<u8>) = if brain {
                (Dtype::BF16, values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect())
            } else {
                (Dtype::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect())
            };
            Linear::load(&device, &mut pool, &[Stored { dtype, rows: values.len() / cols, cols, data: &data }])
        };
        let factors = DeviceFactors { a: load(a, inputs)?, b: load(b, rank)? };
        match device.error() {
            Some(error) => Err(error.into()),
            None => Ok(factors),
        }
    }

    /// Bytes of device memory.
    pub(crate) fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }

    /// Each is one matrix.
    fn parts(&self) -> [&Weights; 2] {
        [&self.a.parts[0], &self.b.parts[0]]
    }
}

impl From<CudaError> for LowRankError {
    fn from(error: CudaError) -> LowRankError {
        LowRankError::Device(error.to_string())
    }
}

/// Lists of jobs of a step's linear layers, one after another, and what updates hold between their two products.
///
/// A layer's list is uploaded only where it is not the one of the step before: while the same sequences decode, nothing
/// comes between a step's launches, and they can be a graph.
#[derive(Default)]
pub(super) struct LowRankLists {
    lists: Vec<List>,
    next: usize,
    inner: DeviceBuffer,
}

#[derive(Default)]
struct List {
    words: Vec<u32>,
    on_device: DeviceBuffer,
}

/// A layer's updates as jobs, and the largest of each size.
#[derive(Default)]
struct Jobs {
    words: Vec<u32>,
    count: usize,
    /// Values of `inner`.
    inner: usize,
    tiles_max: usize,
    outputs_max: usize,
}

fn word(value: usize) -> u32 {
    u32::try_from(value).expect("a kernel's sizes fit 32 bits")
}

impl Jobs {
    fn of(updates: &[LowRankUpdate<'_>], slices: usize) -> Jobs {
        let mut jobs = Jobs::default();
        for update in updates {
            let weights = update.weights;
            let [a, b] = weights.on_device().parts();
            let tiles = weights.rank.div_ceil(TILE);
            jobs.tiles_max = jobs.tiles_max.max(tiles);
            jobs.outputs_max = jobs.outputs_max.max(weights.outputs);
            for rows in update.rows.chunks(JOB_ROWS) {
                jobs.words.extend(
                    [a, b].map(|w| w.codes.pointer().0).iter().flat_map(|p| [*p as u32, (p >> 32) as u32]),
                );
                jobs.words.extend([u32::from(a.kind == Kind::Single), word(tiles), weights.scale.to_bits()]);
                jobs.words.extend([weights.outputs, update.first, rows.len(), jobs.inner].map(word));
                jobs.words.extend_from_slice(rows);
                jobs.count += 1;
                jobs.words.resize(jobs.count * JOB_WORDS, 0);
                jobs.inner += rows.len() * slices * tiles * TILE;
            }
        }
        jobs
    }
}

impl LowRankLists {
    /// A step begins: the next list is its first layer's.
    pub(super) fn restart(&mut self) {
        self.next = 0;
    }

    /// See [`Backend::add_low_rank`](crate::Backend::add_low_rank).
    pub(super) fn add(&mut self, device: &Device, x: &Rows, updates: &[LowRankUpdate<'_>], out: &mut Matrix) {
        assert!(x.form.f32 && x.rows == out.rows, "low-rank updates read rows in f32");
        for update in updates {
            let weights = update.weights;
            assert_eq!(weights.inputs, x.cols, "an update has the layer's inputs");
            assert!(update.first + weights.outputs <= out.width, "an update's outputs are among the layer's");
            assert!(update.rows.iter().all(|&row| (row as usize) < x.rows), "a row beyond the batch");
            assert!(update.rows.is_sorted_by(|a, b| a < b), "an update names a row once");
        }
        let slices = x.cols.div_ceil(SLICE);
        let jobs = Jobs::of(updates, slices);
        if jobs.count == 0 {
            return;
        }
        device.reserve(&mut self.inner, 4 * jobs.inner);
        let (count, tiles, blocks) = (jobs.count, jobs.tiles_max, jobs.outputs_max.div_ceil(GROW_OUTPUTS));
        let list: Arg = self.upload(device, jobs.words).into();
        let inner: Arg = self.inner.pointer().into();
        let launch = |kernel, y: usize, z: usize, shared_bytes| Launch {
            kernel,
            grid: [word(count), word(y), word(z)],
            threads: 256,
            shared_bytes,
        };
        let stride = x.cols.next_multiple_of(GROUP);
        let args = [list, x.values.pointer().into(), stride.into(), x.cols.div_ceil(TILE).into(), inner];
        // SAFETY: jobs name live factors of this width and rows of `x`, which are filled up to whole steps; `inner` has
        // room for every row's slices and ranks.
        unsafe { device.launch(launch("low_rank_shrink", slices, tiles, SHRINK_SHARED), &args) };
        let args = [list, inner, slices.into(), out.data.pointer().into(), out.width.into()];
        // SAFETY: as above; `inner` was just written, and rows and outputs are among those of `out`, each in one job.
        unsafe { device.launch(launch("low_rank_grow", blocks, 1, GROW_SHARED), &args) };
    }

    /// The words of the step's next list in device memory.
    fn upload(&mut self, device: &Device, words: Vec<u32>) -> DevicePointer {
        let number = self.next % LISTS_MAX;
        self.next = number + 1;
        if number == self.lists.len() {
            self.lists.push(List::default());
        }
        let list = &mut self.lists[number];
        if list.words != words {
            device.upload(&mut list.on_device, words.bytes());
            list.words = words;
        }
        list.on_device.pointer()
    }
}
