//! Pieces decoders share; an architecture's own file puts them together.

mod attention;
mod block;
mod decoder;
mod dense;
mod feed_forward;
mod hidden;
mod loader;
mod moe;
mod norm;
mod rope;

pub(crate) use attention::{Attention, HeadNorm, QkvOrder};
pub(crate) use block::{Block, Join};
pub(crate) use decoder::{Decoder, Layer, Run};
pub(crate) use feed_forward::{FeedForward, Mlp};
pub(crate) use loader::LayerLoader;
pub(crate) use norm::{Norm, NormKind};
