//! Linear layers: which kernel, and its launches. kernels/cuda/linear.cuh says why any of them gives the same bits.

use super::backend::CudaBackend;
use super::kernels::{STAGED_ROWS, STAGED_TILES, shared_bytes};
use super::launch::{Arg, Launch};
use super::matrix::Matrix;
use super::memory::Device;
use super::rows::Rows;
use super::weights::{Packed, Weights, upload};
use crate::cpu::Form;
use crate::packed::{GROUP, Grouped, PackError, Stored};
use crate::pool::Pool;

/// Up to this many rows the small tile of the linear kernels is used. All tiles give the same bits.
const SMALL_ROWS_MAX: usize = 8;
/// Large tiles, staged in shared memory, are used where there are at least so many: about one for each SM of an H100, and
/// more than one for each of an L4.
pub(super) const STAGED_BLOCKS_MIN: usize = 96;

/// Weights of one linear layer.
pub struct Linear {
    pub(super) parts: Vec<Weights>,
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

    /// The form of rows it reads.
    pub(super) fn form(&self) -> Form {
        self.parts
            .iter()
            .fold(Form::default(), |form, part| form.and(if part.kind.quantised() { Form::Q8 } else { Form::F32 }))
    }

    /// Packs matrices on the host, as the CPU does, and uploads them.
    pub(super) fn load(device: &Device, pool: &mut Pool, parts: &[Stored<'_>]) -> Result<Linear, PackError> {
        let mut matrices = Vec::with_capacity(parts.len());
        for part in parts {
            part.check()?;
            if part.cols != parts[0].cols {
                return Err(PackError::Mixed { first: parts[0].cols, other: part.cols });
            }
            matrices.push(Packed::new(*part, pool, Grouped::new));
        }
        Ok(Linear { parts: upload(device, &matrices) })
    }
}

impl CudaBackend {
    /// `out`, or what is added to it, becomes x · layerᵀ.
    pub(super) fn multiply(&self, layer: &Linear, x: &Rows, out: &Matrix, add: bool) {
        let mut first = 0;
        for part in &layer.parts {
            let ready = if part.kind.quantised() { x.form.q8 } else { x.form.f32 };
            assert!(part.cols == x.cols && ready, "rows in the wrong form");
            let blocks = |tiles: usize, rows: usize| [part.tiles.div_ceil(tiles), x.rows.div_ceil(rows)];
            let [small, large, staged] = part.kind.kernels();
            let of_staged = blocks(STAGED_TILES, STAGED_ROWS);
            let (kernel, [across, down]) = if x.rows <= SMALL_ROWS_MAX {
                (small, blocks(1, 8))
            } else if of_staged[0] * of_staged[1] < self.staged_blocks_min {
                (large, blocks(2, 32))
            } else {
                (staged, of_staged)
            };
            let launch = Launch {
                kernel,
                grid: [across as u32, down as u32, 1],
                threads: 256,
                shared_bytes: shared_bytes(kernel),
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
}
