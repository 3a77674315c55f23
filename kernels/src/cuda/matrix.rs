//! f32 activations and parameters in device memory.

use super::memory::{Device, DeviceBuffer};

/// f32 parameters.
pub struct Vector {
    pub(super) data: DeviceBuffer,
    pub(super) len: usize,
}

/// `rows × width` f32, row after row; memory is kept from step to step.
#[derive(Default)]
pub struct Matrix {
    pub(super) data: DeviceBuffer,
    pub(super) rows: usize,
    pub(super) width: usize,
}

impl Matrix {
    /// Makes room for `rows × width`, contents undefined.
    pub(super) fn reset(&mut self, device: &Device, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        device.reserve(&mut self.data, rows * width * 4);
    }
}
