//! The CUDA backend: the kernels of kernels/cuda behind the [`Backend`](crate::Backend) trait, launched by the driver
//! or by whatever stands in for it.

mod arena;
mod attention;
mod backend;
mod cache;
mod driver;
mod graphs;
mod kernels;
mod launch;
mod linear;
mod logits;
mod low_rank;
mod matrix;
mod memory;
mod rows;
mod staging;
mod weights;
mod work_list;

pub use attention::Step;
pub use backend::CudaBackend;
pub use cache::KvCache;
pub use driver::{Driver, DriverOptions};
pub use kernels::kernels;
pub use launch::{Arg, CudaError, DevicePointer, Graph, Launch, Launcher, Launches, Memory};
pub use linear::Linear;
pub(crate) use low_rank::DeviceFactors;
pub use matrix::{Matrix, Vector};
pub use rows::Rows;
