//! The second half of attention: every query row's softmax over its context.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::activation::cap_lanes;
use super::super::rows::{Batch, RowsOut};
use super::super::simd::{Apart, Isa, LANES, Simd, dispatch};
use super::brain::Brain;
use super::cached::{Cached, PARTS, Span};
use super::int8::Int8;
use super::plan::{Item, PARTITION, Piece, Plan, ROWS_MAX, SPAN};
use super::query;
use super::state::{Memory, State};
use super::store::{Store, store};
use crate::backend::{AttentionShape, StepInput};
use crate::memory::Shared;
use crate::packed::GROUP;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Operands.
pub(super) struct Attend<'a, C> {
    pub cache: C,
    pub heads: AttentionShape,
    pub input: StepInput<'a>,
    /// What pieces store first, where the plan says so.
    pub store: Store<'a, C>,
    pub out: RowsOut,
    pub scores: Scores,
    pub plan: &'a Plan,
    /// Of partitions that threads share.
    pub states: Shared<f32>,
}

/// How dot products become powers of two.
pub(super) struct Scores {
    /// See [`cap_lanes`]; what comes of it is in powers of two.
    cap: Option<Cap>,
    /// Of what is left.
    factor: f32,
}

struct Cap {
    inner: f32,
    outer: f32,
}

impl Scores {
    pub(super) fn new(heads: AttentionShape) -> Scores {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        match heads.softcap {
            None => Scores { cap: None, factor: heads.scale * LOG2_E },
            Some(cap) => {
                let cap = Cap { inner: 2.0 * LOG2_E * heads.scale / cap, outer: cap * LOG2_E };
                Scores { cap: Some(cap), factor: 1.0 }
            }
        }
    }
}

/// The rows of an item under one KV head.
struct Queries {
    /// The first one's number; the others' follow.
    first: usize,
    /// Positions each row sees: both ends ascend.
    seen: [Range<usize>; ROWS_MAX],
    rows: usize,
}

impl Queries {
    #[inline(always)]
    fn new<C>(job: &Attend<'_, C>, item: &Item, head: usize) -> Queries {
        let group = job.heads.heads / job.heads.kv_heads;
        let window = job.heads.window.unwrap_or(usize::MAX);
        let mut seen = [const { 0..0 }; ROWS_MAX];
        for (seen, (row, _)) in seen.iter_mut().zip(item.pairs(group)) {
            let end = job.input.positions[row] as usize + 1;
            *seen = end.saturating_sub(window)..end;
        }
        let first = query(job.heads, job.input.positions.len(), item.first_row, head * group) + item.rows.start;
        Queries { first, seen, rows: item.rows.len() }
    }
}

/// Where the tokens of a sequence lie.
struct Context<'a> {
    table: &'a [u32],
    block_size: usize,
    /// Tokens.
    len: usize,
}

impl Context<'_> {
    #[inline(always)]
    fn parts(&self, start: usize) -> [(usize, usize); PARTS] {
        std::array::from_fn(|p| {
            let at = if start + p * LANES < self.len { start + p * LANES } else { start };
            (self.table[at / self.block_size] as usize, at % self.block_size)
        })
    }
}

/// Scores, softmax update and weighted values of `R` rows from `first` on over `P` parts of one span. Keys are read
/// while the span's values are on their way, and values while the next keys are.
struct Update<'a, C, const R: usize, const P: usize> {
    job: &'a Attend<'a, C>,
    span: &'a Span,
    queries: &'a Queries,
    state: State,
    first: usize,
}

impl<C: Cached, const R: usize, const P: usize> Apart for Update<'_, C, R, P> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Update { job, span, queries, state, first } = self;
        // SAFETY: `S` is available; the span and the queries are inside the cache and the step; the state holds `first + R`
        // rows, and a maximum for each lane from the first one on.
        unsafe {
            let mut scores = job.cache.scores::<S, R, P>(span, queries.first + first);
            let mut highest = [S::splat(f32::NEG_INFINITY); LANES];
            for r in 0..R {
                let seen = &queries.seen[first + r];
                let (from, until) = (seen.start.saturating_sub(span.start), seen.end.saturating_sub(span.start));
                for p in 0..P {
                    if let Some(cap) = &job.scores.cap {
                        scores[r][p] = cap_lanes::<S>(scores[r][p], cap.inner, cap.outer);
                    }
                    if until < (p + 1) * LANES || from > p * LANES {
                        let at = |token: usize| token.saturating_sub(p * LANES).min(LANES);
                        scores[r][p] = S::mask_range(scores[r][p], at(from), at(until));
                    }
                    highest[r] = S::max(highest[r], scores[r][p]);
                }
            }
            // What concerns a whole row is a lane. Those of other rows stay as they are: nothing exceeds their maxima.
            let factor = S::splat(job.scores.factor);
            let before = S::load(state.max(first));
            let max = S::max(before, S::mul(maxima::<S, R>(highest), factor));
            S::store(state.max(first), max);
            let (mut less, mut shrinks) = ([0.0_f32; LANES], [0.0_f32; LANES]);
            S::store(less.as_mut_ptr(), S::sub(S::zero(), max));
            S::store(shrinks.as_mut_ptr(), S::exp2(S::sub(before, max)));
            let mut shrink = [S::zero(); R];
            for r in 0..R {
                shrink[r] = S::splat(shrinks[r]);
                let (less, sum) = (S::splat(less[r]), state.sum(first + r));
                let mut total = S::mul(S::load(sum), shrink[r]);
                for p in 0..P {
                    scores[r][p] = S::exp2(S::fma(scores[r][p], factor, less));
                    total = S::add(total, scores[r][p]);
                }
                S::store(sum, total);
            }
            let tokens = (P * LANES).min(queries.seen[first + R - 1].end - span.start);
            let values = state.values(first, job.cache.geometry().head_dim);
            job.cache.add_values::<S, R, P>((span, tokens), &scores, &shrink, values);
        }
    }
}

/// The largest lane of each of the first `R` vectors; of the others negative infinity, as their lanes are.
#[inline(always)]
unsafe fn maxima<S: Simd, const R: usize>(vectors: [S::F; LANES]) -> S::F {
    // SAFETY: `S` is available.
    unsafe {
        if R > 4 {
            return S::maxima(vectors);
        }
        let mut largest = [f32::NEG_INFINITY; LANES];
        for r in 0..R {
            largest[r] = S::reduce_max(vectors[r]);
        }
        S::load(largest.as_ptr())
    }
}

/// Takes one partition of the context into `state`, which is cleared first.
#[inline(always)]
unsafe fn go_through<S: Simd, C: Cached>(
    job: &Attend<'_, C>,
    context: &Context<'_>,
    (queries, head): (&Queries, usize),
    partition: usize,
    state: State,
) {
    let begin = (queries.seen[0].start / SPAN * SPAN).max(partition * PARTITION);
    let end = context.len.min((partition + 1) * PARTITION);
    let mut first = 0;
    // SAFETY: `S` is available; tables cover the context; see `Update`.
    unsafe {
        state.clear::<S>(queries.rows, job.cache.geometry().head_dim);
        for start in (begin..end).step_by(SPAN) {
            let next = if start + SPAN < context.len { start + SPAN } else { start };
            let span = Span { start, head, parts: context.parts(start), next: context.parts(next) };
            while queries.seen[first].end <= start {
                first += 1;
            }
            let mut row = first;
            while row < queries.rows {
                let left = queries.rows - row;
                let (most, at) = (left.min(C::tile_rows::<S>()), (state, row));
                row += match most {
                    12.. => some_parts::<S, C, 12>(job, &span, queries, at),
                    6.. => some_parts::<S, C, 6>(job, &span, queries, at),
                    4.. => some_parts::<S, C, 4>(job, &span, queries, at),
                    3.. => some_parts::<S, C, 3>(job, &span, queries, at),
                    2 => some_parts::<S, C, 2>(job, &span, queries, at),
                    _ => some_parts::<S, C, 1>(job, &span, queries, at),
                };
            }
        }
    }
}

/// [`Update`] over as many parts as any of the rows sees; the number of rows.
#[inline(always)]
unsafe fn some_parts<S: Simd, C: Cached, const R: usize>(
    job: &Attend<'_, C>,
    span: &Span,
    queries: &Queries,
    (state, first): (State, usize),
) -> usize {
    // SAFETY: forwarded.
    unsafe {
        if queries.seen[first + R - 1].end - span.start > SPAN / 2 {
            S::apart(Update::<C, R, PARTS> { job, span, queries, state, first });
        } else {
            S::apart(Update::<C, R, { PARTS / 2 }> { job, span, queries, state, first });
        }
    }
    R
}

/// Divides by the sums and hands the rows on: groups to `batch`.
#[inline(always)]
unsafe fn finish<S: Simd, C: Cached>(
    job: &Attend<'_, C>,
    item: &Item,
    head: usize,
    state: State,
    batch: &mut Batch,
) {
    let (dim, padded) = (job.heads.value_dim, job.cache.geometry().head_dim);
    let group = job.heads.heads / job.heads.kv_heads;
    for (r, (row, in_group)) in item.pairs(group).enumerate() {
        let column = (head * group + in_group) * dim;
        // SAFETY: `S` is available; each output row and head belongs to this item.
        unsafe {
            let inverse = S::splat(1.0 / S::reduce_add(S::load(state.sum(r))));
            let values = state.values(r, padded);
            for d in (0..padded).step_by(LANES) {
                S::store(values.add(d), S::mul(S::load(values.add(d)), inverse));
            }
            job.out.put_floats::<S>(row, column, values, dim);
            if job.out.form.grouped() {
                for first in (0..dim).step_by(GROUP) {
                    batch.put::<S>(&job.out, (row, column + first), values.add(first));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn attend<S: Simd, C: Cached>(job: &Attend<'_, C>, piece: &Piece) {
    let item = &job.plan.items[piece.item];
    let (rows, dim, partitions) = (item.rows.len(), job.cache.geometry().head_dim, item.partitions());
    let tables = &job.input.block_table_starts[item.sequence..];
    let table = &job.input.block_tables[tables[0] as usize..tables[1] as usize];
    let context = Context { table, block_size: job.cache.geometry().block_size, len: item.context.end };
    let (mut memory, mut merged) = (Memory::new(), Memory::new());
    let (state, merged) = (memory.state(), merged.state());
    let mut batch = Batch::new();
    if job.plan.stores {
        // SAFETY: `S` is available; the row and its slot are in the batch, and these heads of it nobody else's.
        unsafe { store::<S, C>(&job.store, item.first_row, piece.heads.clone()) }
    }
    for head in piece.heads.clone() {
        let queries = Queries::new(job, item, head);
        // SAFETY: `S` is available; both memories and every place in `states` have room for the item's rows; a
        // partition's state is written by its piece alone, and read after the counter said that all are.
        unsafe {
            let queries = (&queries, head);
            let Some(part) = &piece.part else {
                let alone = partitions.len() == 1;
                if !alone {
                    merged.clear::<S>(rows, dim);
                }
                for partition in partitions.clone() {
                    go_through::<S, C>(job, &context, queries, partition, state);
                    if !alone {
                        merged.merge::<S>(state, rows, dim);
                    }
                }
                finish::<S, C>(job, item, head, if alone { state } else { merged }, &mut batch);
                continue;
            };
            let at = |partition: usize| {
                State::at(job.states.at(part.states + (partition - partitions.start) * State::len(rows, dim)))
            };
            go_through::<S, C>(job, &context, queries, part.partition, at(part.partition));
            if job.plan.pending[part.counter].0.fetch_sub(1, Ordering::AcqRel) == 1 {
                merged.clear::<S>(rows, dim);
                for partition in partitions.clone() {
                    merged.merge::<S>(at(partition), rows, dim);
                }
                finish::<S, C>(job, item, head, merged, &mut batch);
            }
        }
    }
    // SAFETY: what was put there is written to the item's rows and heads.
    unsafe { batch.finish::<S>(&job.out) }
}

#[inline(always)]
unsafe fn attend_brain<S: Simd>(job: &Attend<'_, Brain>, piece: &Piece) {
    // SAFETY: forwarded.
    unsafe { attend::<S, Brain>(job, piece) }
}

#[inline(always)]
unsafe fn attend_int8<S: Simd>(job: &Attend<'_, Int8>, piece: &Piece) {
    // SAFETY: forwarded.
    unsafe { attend::<S, Int8>(job, piece) }
}

impl Attend<'_, Brain> {
    /// # Safety
    /// `isa` is available; the piece is one of this step's; its output rows of these heads are nobody else's.
    pub(super) unsafe fn brain(&self, isa: Isa, piece: &Piece) {
        let job = self;
        // SAFETY: forwarded.
        unsafe { dispatch!(isa, fn attend_brain(job: &Attend<'_, Brain>, piece: &Piece)) }
    }
}

impl Attend<'_, Int8> {
    /// # Safety
    /// As for the bf16 cache.
    pub(super) unsafe fn int8(&self, isa: Isa, piece: &Piece) {
        let job = self;
        // SAFETY: forwarded.
        unsafe { dispatch!(isa, fn attend_int8(job: &Attend<'_, Int8>, piece: &Piece)) }
    }
}
