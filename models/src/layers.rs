//! Pieces decoders share; an architecture's own file puts them together.

mod attention;
mod block;
mod decoder;
mod dense;
mod feed_forward;
mod head;
mod hidden;
mod latent;
mod loader;
mod moe;
mod norm;
mod parallel;
mod rope;
mod updates;

pub(crate) use attention::{Attention, HeadNorm, QkvOrder};
pub(crate) use block::{Block, Join};
pub(crate) use decoder::Decoder;
pub(crate) use feed_forward::{FeedForward, Mlp};
pub(crate) use loader::LayerLoader;
pub(crate) use norm::{Norm, NormKind};
pub(crate) use parallel::Parallel;
