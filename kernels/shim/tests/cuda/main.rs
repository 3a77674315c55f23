//! Every CUDA kernel on the CPU against its plain reference, over shapes and schedules, and bugs that must be seen.

mod attention;
mod graphs;
mod inputs;
mod linear;
mod low_rank;
mod planted;
mod rows;
mod sampling;
