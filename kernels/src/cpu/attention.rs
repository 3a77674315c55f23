//! Paged attention: rotate and store this step's keys and values, then attend through the block tables. Where each row is the only
//! one of its sequence, nobody else waits for its keys, and a thread does both in one go.
//!
//! Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135) over spans of 64
//! tokens at absolute positions. Spans belong to partitions of 256 tokens; each partition starts afresh and the
//! partitions are merged in order. All query heads of one KV head go through a span together. Where a few long contexts
//! would leave threads without work, partitions go to different threads, and the last one to finish merges them all.
//!
//! A row's arithmetic is a function of its own context alone: the spans, partitions and their order come from absolute
//! positions, and a span beyond a row's last token leaves its state as it was, bit for bit. So prefill in any chunks,
//! decode, and recomputation after a preemption agree exactly.

mod attend;
mod brain;
mod cached;
mod int8;
mod plan;
mod state;
mod store;

pub(super) use plan::Plan;

use super::CpuBackend;
use super::kv_cache::{KvCache, Storage};
use super::rows::{Form, Rows};
use super::{Matrix, Step};
use crate::backend::{AttentionShape, StepInput};
use crate::memory::Shared;
use crate::packed::GROUP;
use attend::{Attend, Scores};
use brain::Brain;
use int8::Int8;
use store::Store;

/// The number of a row's query: those of one KV head lie together, row after row, so that an item's are consecutive.
#[inline(always)]
fn query(heads: AttentionShape, rows: usize, row: usize, head: usize) -> usize {
    let group = heads.heads / heads.kv_heads;
    (head / group * rows + row) * group + head % group
}

/// A layer's cache, of either kind.
#[derive(Clone, Copy)]
enum Either {
    Brain(Brain),
    Int8(Int8),
}

/// See [`Backend::attention`](crate::backend::Backend::attention).
pub(super) fn attention(
    backend: &mut CpuBackend,
    qkv: &Matrix,
    heads: AttentionShape,
    input: StepInput<'_>,
    step: &mut Step,
    cache: &mut KvCache,
    (out, form): (&mut Rows, Form),
) {
    let rows = input.positions.len();
    let (dim, padded) = (heads.head_dim, heads.padded_dim());
    assert!(dim <= AttentionShape::HEAD_DIM_MAX, "heads of {dim} dimensions");
    assert!(heads.value_dim <= dim, "values of {} dimensions, heads of {dim}", heads.value_dim);
    assert!(cache.kv_heads == heads.kv_heads && cache.head_dim == padded, "the cache has another shape");
    assert!(qkv.rows == rows && qkv.width == heads.qkv_width(), "queries, keys and values have another shape");
    let prepared = step.positions == input.positions && step.query_starts == input.query_starts;
    assert!(prepared && step.heads == Some(heads), "the step was prepared for another batch");
    input.check(heads, cache.shape);
    let isa = backend.isa;
    let geometry = cache.geometry();
    let cache = match &mut cache.storage {
        Storage::Brain { keys, values } => {
            let queries = Shared::new(&mut step.queries);
            Either::Brain(Brain { keys: Shared::new(keys), values: Shared::new(values), queries, geometry })
        }
        Storage::Int8 { keys, values, scales } => {
            let queries = step.query_rows.reset(rows * heads.heads, padded, Form::Q8);
            let (keys, values, scales) = (Shared::new(keys), Shared::new(values), Shared::new(scales));
            Either::Int8(Int8 { keys, values, scales, queries, geometry })
        }
    };

    let (frequencies, rotations) = (step.frequencies, &step.rotations[..]);

    // Heads that are no whole groups of the 8-bit form are put side by side in f32 first.
    let whole = !form.grouped() || heads.value_dim.is_multiple_of(GROUP);
    let target = if whole { &mut *out } else { &mut step.compact };
    let target = target.reset(rows, heads.out_width(), if whole { form } else { Form::F32 });
    let (plan, states) = step.plan.begin();
    let (scores, out_rows) = (Scores::new(heads), target);
    match cache {
        Either::Brain(cache) => {
            let store = Store { cache, qkv, heads, input, frequencies, rotations };
            if !plan.stores {
                // SAFETY: the ISA is available; sizes are asserted above; rows and slots belong to one chunk each.
                backend.for_rows(rows, &|rows| rows.for_each(|row| unsafe { store.brain(isa, row) }));
            }
            let job = Attend { cache, heads, input, store, out: out_rows, scores, plan, states };
            // SAFETY: the ISA is available; what is read of block tables is inside the cache; every output row and head is written by
            // one piece, or by the last of those that share a counter.
            backend
                .pool
                .run(plan.chunks(), &|chunk| plan.chunk(chunk).for_each(|piece| unsafe { job.brain(isa, piece) }));
        }
        Either::Int8(cache) => {
            let store = Store { cache, qkv, heads, input, frequencies, rotations };
            if !plan.stores {
                // SAFETY: as above.
                backend.for_rows(rows, &|rows| rows.for_each(|row| unsafe { store.int8(isa, row) }));
            }
            let job = Attend { cache, heads, input, store, out: out_rows, scores, plan, states };
            // SAFETY: as above.
            backend
                .pool
                .run(plan.chunks(), &|chunk| plan.chunk(chunk).for_each(|piece| unsafe { job.int8(isa, piece) }));
        }
    }
    if whole {
        out.level(isa, &mut backend.pool);
    } else {
        backend.copy_rows(&step.compact.values, &|row| row, (rows, heads.out_width()), (out, form));
    }
}
