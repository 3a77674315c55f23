//! The CUDA backend: the kernels of kernels/cuda behind the [`Backend`](crate::Backend) trait, launched by the driver
//! or by whatever stands in for it.

mod arena;
mod attention;
mod backend;
mod driver;
mod kernels;
mod launch;
mod memory;
mod weights;

pub use backend::{CudaBackend, KvCache, Linear, Matrix, Rows, Step, Vector};
pub use driver::{Driver, DriverOptions};
pub use kernels::KERNELS;
pub use launch::{Arg, CudaError, DevicePointer, Launch, Launcher, Memory};
