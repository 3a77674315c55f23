//! Which KV-cache block is whose: ids and counts only, never a tensor.
//!
//! ```text
//!            allocate                       publish (full)
//!   free ───────────────▶ held, private ───────────────────▶ held, cached ◀─┐
//!     ▲                        │                                  │         │ acquire (hit)
//!     │        release         │                  last release    ▼         │
//!     ├────────────────────────┘                            evictable ──────┘
//!     └───────────────────────────── evict (oldest first) ────────┘
//! ```

mod block_pool;
mod block_table;
mod prefix_cache;

pub use block_pool::{BlockId, BlockPool, BlockUsage};
pub use block_table::{BlockTable, blocks_for};
pub use prefix_cache::{Digest, PrefixCache, Salt};
