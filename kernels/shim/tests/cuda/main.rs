//! Every CUDA kernel on the CPU against its plain reference, over shapes and schedules, bugs that must be seen, and what
//! is said of kernels elsewhere.

mod attention;
mod documented;
mod graphs;
mod inputs;
mod linear;
mod low_rank;
#[path = "../../../tests/kernels/numbers.rs"]
mod numbers;
mod planted;
mod rows;
mod sampling;
