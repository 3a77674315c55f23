//! Low-rank updates of linear layers (LoRA: Hu et al. 2021, arXiv:2106.09685): x · Wᵀ becomes
//! x · Wᵀ + scale · (x · Aᵀ) · Bᵀ, where A has as few rows, and B as few columns, as the rank says.
//!
//! In host memory both factors lie with a vector's worth of neighbours side by side, the rest of a row filled up with
//! zeros; in a device's as kernels/cuda/low_rank.cu draws them:
//!
//! ```text
//! a  [rank, up to a multiple of 4][inputs, up to a multiple of 16]
//! b  [rank][outputs, up to a multiple of 16]
//! ```

use crate::cpu::simd::LANES;
use crate::cuda::{DeviceFactors, Launcher};
use crate::memory::Buffer;
use crate::packed::{PackError, Stored};
use crate::quants::{Dtype, dequantize};
use half::bf16;
use std::sync::Arc;

/// Rows of A a kernel takes at once.
pub(crate) const RANK_TILE: usize = 4;

/// One update's factors and scale.
pub struct LowRank {
    pub(crate) rank: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) scale: f32,
    factors: Factors,
}

/// A and B.
enum Factors {
    Host([Factor; 2]),
    Device(DeviceFactors),
}

/// Where a backend has low-rank updates. They are put there when they are loaded, by whichever thread does that.
#[derive(Clone)]
pub enum LowRankMemory {
    Host,
    Device(Arc<dyn Launcher>),
}

impl std::fmt::Debug for LowRankMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LowRankMemory::Host => f.write_str("Host"),
            LowRankMemory::Device(launcher) => f.debug_tuple("Device").field(&launcher.name()).finish(),
        }
    }
}

/// Why an update could not be put in its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowRankError {
    #[error(transparent)]
    Stored(#[from] PackError),
    /// The device has no room for it, or failed.
    #[error("{0}")]
    Device(String),
}

/// bf16 if that is how both came, f32 otherwise.
pub(crate) enum Factor {
    Single(Buffer<f32>),
    Brain(Buffer<u16>),
}

/// An update of some rows and columns of a linear layer's output.
#[derive(Clone, Copy)]
pub struct LowRankUpdate<'a> {
    pub weights: &'a LowRank,
    /// Rows of the batch, ascending.
    pub rows: &'a [u32],
    /// The output column its first output is added to.
    pub first: usize,
}

impl LowRank {
    /// `a` is rank × inputs, `b` outputs × rank; output `o` is row `source(o)` of `b`. Lies in `memory`.
    ///
    /// # Panics
    /// If the two are of different ranks, or of none.
    pub fn new(
        a: Stored<'_>,
        b: Stored<'_>,
        scale: f32,
        source: impl Fn(usize) -> usize,
        memory: &LowRankMemory,
    ) -> Result<LowRank, LowRankError> {
        a.check()?;
        b.check()?;
        assert!(a.rows == b.cols && a.rows > 0, "two factors of one rank");
        let (rank, inputs, outputs) = (a.rows, a.cols, b.rows);
        let values = |stored: Stored<'_>| {
            let mut values = vec![0.0; stored.rows * stored.cols];
            dequantize(stored.dtype, stored.data, &mut values);
            values
        };
        let brain = a.dtype == Dtype::BF16 && b.dtype == Dtype::BF16;
        let (a, b) = (values(a), values(b));
        let factors = match memory {
            LowRankMemory::Host => Factors::Host([
                Factor::new(brain, (rank.next_multiple_of(RANK_TILE), inputs), |k, i| {
                    if k < rank { a[k * inputs + i] } else { 0.0 }
                }),
                Factor::new(brain, (rank, outputs), |k, o| b[source(o) * rank + k]),
            ]),
            LowRankMemory::Device(launcher) => {
                let b: Vec<f32> =
                    (0..outputs).flat_map(|o| b[source(o) * rank..][..rank].iter().copied()).collect();
                Factors::Device(DeviceFactors::upload(launcher, brain, (&a, inputs), (&b, rank))?)
            }
        };
        Ok(LowRank { rank, inputs, outputs, scale, factors })
    }

    /// Both factors.
    ///
    /// # Panics
    /// If they lie in a device's memory.
    pub(crate) fn on_host(&self) -> &[Factor; 2] {
        match &self.factors {
            Factors::Host(factors) => factors,
            Factors::Device(_) => panic!("a low-rank update lies in a device's memory"),
        }
    }

    /// Both factors.
    ///
    /// # Panics
    /// If they lie in host memory.
    pub(crate) fn on_device(&self) -> &DeviceFactors {
        match &self.factors {
            Factors::Host(_) => panic!("a low-rank update lies in host memory"),
            Factors::Device(factors) => factors,
        }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes of memory the factors take.
    pub fn bytes(&self) -> usize {
        match &self.factors {
            Factors::Host(factors) => factors.iter().map(Factor::bytes).sum(),
            Factors::Device(factors) => factors.bytes(),
        }
    }

    /// Ranks there is room for in A, and in what x · Aᵀ is.
    pub(crate) fn padded_rank(&self) -> usize {
        self.rank.next_multiple_of(RANK_TILE)
    }
}

impl Factor {
    fn new(brain: bool, (rows, width): (usize, usize), value: impl Fn(usize, usize) -> f32) -> Factor {
        let stride = width.next_multiple_of(LANES);
        let places = (0..rows).flat_map(|row| (0..width).map(move |col| (row, col)));
        if brain {
            let mut data = Buffer::zeroed(rows * stride);
            places.for_each(|(row, col)| data[row * stride + col] = bf16::from_f32(value(row, col)).to_bits());
            return Factor::Brain(data);
        }
        let mut data = Buffer::zeroed(rows * stride);
        places.for_each(|(row, col)| data[row * stride + col] = value(row, col));
        Factor::Single(data)
    }

    fn bytes(&self) -> usize {
        match self {
            Factor::Single(data) => size_of_val(&data[..]),
            Factor::Brain(data) => size_of_val(&data[..]),
        }
    }
}
