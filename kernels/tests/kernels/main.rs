//! The kernels against their plain definitions, and against themselves: every ISA, thread count, batch and chunking
//! must give the same bits. Through the public interface alone.

mod attention;
mod inputs;
mod linear;
mod low_rank;
mod numbers;
mod quants;
mod refusals;
mod rows;
