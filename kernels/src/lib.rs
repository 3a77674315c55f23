//! rill's kernels: packed linear layers, paged attention and fused row operations behind one [`Backend`] trait.

mod backend;
mod cpu;
pub mod cuda;
pub mod limits;
mod low_rank;
mod memory;
mod packed;
mod paired;
mod pool;
mod quants;
pub mod reference;

pub use backend::{
    Activation, AttentionShape, Backend, BestLogits, CacheShape, ColumnRuns, DeviceError, KvDtype, LogitFinish,
    Ranking, Rope, RowDtype, StepInput,
};
pub use cpu::{CpuBackend, Form, Isa, KvCache, Linear, Matrix, Rows, Step};
pub use low_rank::{LowRank, LowRankError, LowRankMemory, LowRankUpdate};
pub use packed::{PackError, Stored, packed_bytes};
pub use pool::Pool;
pub use quants::{DTYPES, Dtype, dequantize};
