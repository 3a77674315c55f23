//! The CUDA backend: the kernels of kernels/cuda behind the [`Backend`](crate::Backend) trait, launched by the driver
//! or by whatever stands in for it.

mod arena;
mod attention;
mod backend;
mod driver;
mod graphs;
mod kernels;
mod launch;
mod linear;
mod memory;
mod rank;
mod staging;
mod weights;

pub use backend::{CudaBackend, KvCache, Linear, Matrix, Rows, Step, Vector};
pub use driver::{Driver, DriverOptions};
pub use kernels::kernels;
pub use launch::{Arg, CudaError, DevicePointer, Graph, Launch, Launcher, Launches, Memory};
