//! Pieces decoders share: what a configuration means for the kernels.

pub(crate) mod rope;
