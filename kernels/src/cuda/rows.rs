//! Rows of activations in the form a linear layer reads: kernels/cuda/rows.cuh draws them.

use super::kernels::STAGED_ROWS;
use super::launch::{Arg, DevicePointer};
use super::memory::{BytesMut, Device, DeviceBuffer};
use crate::cpu::Form;
use crate::packed::GROUP;

/// Rows are allocated in multiples of this: linear kernels read whole tiles.
const ROW_TILE: usize = STAGED_ROWS;

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

impl Rows {
    /// Makes room for rows and returns the kernels' arguments for it.
    pub(super) fn reset(&mut self, device: &Device, rows: usize, cols: usize, form: Form) -> [Arg; 4] {
        (self.rows, self.cols, self.form) = (rows, cols, form);
        let places = rows.next_multiple_of(ROW_TILE) * cols.div_ceil(GROUP);
        let mut given = [Arg::Pointer(DevicePointer::default()); 4];
        if form.f32 {
            device.reserve(&mut self.values, places * GROUP * 4);
            given[0] = self.values.pointer().into();
        }
        if form.q8 {
            device.reserve(&mut self.q, places * GROUP);
            device.reserve(&mut self.scale, places * 4);
            device.reserve(&mut self.sum, places * 4);
            given[1..].copy_from_slice(&[&self.q, &self.scale, &self.sum].map(|b| b.pointer().into()));
        }
        given
    }

    /// Rows as a linear layer sees them, in host memory: those of the f32 form, and scale · code of the 8-bit form,
    /// whichever there are.
    pub(super) fn read(&self, device: &Device) -> [Option<Vec<f32>>; 2] {
        let groups = self.cols.div_ceil(GROUP);
        let cut = |padded: Vec<f32>| -> Vec<f32> {
            padded.chunks_exact(groups * GROUP).flat_map(|row| row[..self.cols].to_vec()).collect()
        };
        let values = self.form.f32.then(|| {
            let mut values = vec![0.0; self.rows * groups * GROUP];
            device.download(&self.values, 0, values.bytes_mut());
            cut(values)
        });
        let quantised = self.form.q8.then(|| {
            let (mut q, mut scale) = (vec![0; self.rows * groups * GROUP], vec![0.0; self.rows * groups]);
            device.download(&self.q, 0, &mut q);
            device.download(&self.scale, 0, scale.bytes_mut());
            cut(q.iter().enumerate().map(|(i, &q)| f32::from(q.cast_signed()) * scale[i / GROUP]).collect())
        });
        [values, quantised]
    }
}
