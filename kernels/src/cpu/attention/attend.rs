//! The second half of attention: every query row's softmax over its context.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::activation::cap_lanes;
use super::super::rows::RowsOut;
use super::super::simd::{Isa, LANES, Simd, dispatch};
use super::brain::Brain;
use super::cached::{Cached, Gathered, PARTS, Span, Tile};
use super::int8::Int8;
use super::plan::{Item, PARTITION, Piece, Plan, ROWS_MAX, SPAN};
use super::state::{Memory, State};
use crate::backend::{AttentionShape, StepInput};
use crate::memory::Shared;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Operands.
pub(super) struct Attend<'a, C> {
    pub cache: C,
    pub heads: AttentionShape,
    pub input: StepInput<'a>,
    pub out: RowsOut,
    pub scores: Scores,
    pub plan: &'a Plan,
    /// Of partitions that threads share.
    pub states: Shared<f32>,
}

/// How dot products become powers of two.
pub(super) struct Scores {
    /// Factor on them; with a cap, on the exponent inside its tanh.
    scale: f32,
    /// In powers of two.
    cap: Option<f32>,
}

impl Scores {
    pub(super) fn new(heads: AttentionShape) -> Scores {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        match heads.softcap {
            None => Scores { scale: heads.scale * LOG2_E, cap: None },
            Some(cap) => Scores { scale: 2.0 * LOG2_E * heads.scale / cap, cap: Some(cap * LOG2_E) },
        }
    }
}

/// The rows of an item under one KV head.
struct Queries {
    /// Their queries' numbers; what comes after the last one means nothing.
    of_row: [usize; ROWS_MAX],
    /// Positions each row sees: both ends ascend.
    seen: [Range<usize>; ROWS_MAX],
    rows: usize,
}

impl Queries {
    #[inline(always)]
    fn new<C>(job: &Attend<'_, C>, item: &Item, head: usize) -> Queries {
        let group = job.heads.heads / job.heads.kv_heads;
        let window = job.heads.window.unwrap_or(usize::MAX);
        let mut of_row = [0; ROWS_MAX];
        let mut seen = [const { 0..0 }; ROWS_MAX];
        for (r, pair) in item.rows.clone().enumerate() {
            let row = item.first_row + pair / group;
            of_row[r] = row * job.heads.heads + head * group + pair % group;
            let end = job.input.positions[row] as usize + 1;
            seen[r] = end.saturating_sub(window)..end;
        }
        Queries { of_row, seen, rows: item.rows.len() }
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
#[inline(always)]
unsafe fn update<S: Simd, C: Cached, const R: usize, const P: usize>(
    job: &Attend<'_, C>,
    span: &Span,
    (queries, gathered): (&Queries, *const f32),
    (state, first): (State, usize),
) {
    // SAFETY: `S` is available; the span and the queries are inside the cache and the step; the state holds `first + R`
    // rows.
    unsafe {
        let tile = Tile { of_row: &queries.of_row, gathered, first };
        let mut scores = job.cache.scores::<S, R, P>(span, tile);
        let mut max = [0.0_f32; R];
        for r in 0..R {
            let seen = &queries.seen[first + r];
            let (from, until) = (seen.start.saturating_sub(span.start), seen.end.saturating_sub(span.start));
            for p in 0..P {
                scores[r][p] = match job.scores.cap {
                    None => S::mul(scores[r][p], S::splat(job.scores.scale)),
                    Some(cap) => cap_lanes::<S>(scores[r][p], job.scores.scale, cap),
                };
                if until < (p + 1) * LANES || from > p * LANES {
                    let at = |token: usize| token.saturating_sub(p * LANES).min(LANES);
                    scores[r][p] = S::mask_range(scores[r][p], at(from), at(until));
                }
            }
            let mut highest = scores[r][0];
            for p in 1..P {
                highest = S::max(highest, scores[r][p]);
            }
            max[r] = S::reduce_max(highest);
        }
        let mut shrink = [S::zero(); R];
        for r in 0..R {
            let row = first + r;
            let before = *state.max(row);
            let max = if before > max[r] { before } else { max[r] };
            *state.max(row) = max;
            shrink[r] = S::exp2(S::splat(before - max));
            let mut sum = S::mul(S::load(state.sum(row)), shrink[r]);
            for p in 0..P {
                scores[r][p] = S::exp2(S::sub(scores[r][p], S::splat(max)));
                sum = S::add(sum, scores[r][p]);
            }
            S::store(state.sum(row), sum);
        }
        let tokens = (P * LANES).min(queries.seen[first + R - 1].end - span.start);
        let values = state.values(first, job.cache.geometry().head_dim);
        job.cache.add_values::<S, R, P>((span, tokens), &scores, &shrink, values);
    }
}

/// Takes one partition of the context into `state`, which is cleared first.
#[inline(always)]
unsafe fn go_through<S: Simd, C: Cached>(
    job: &Attend<'_, C>,
    context: &Context<'_>,
    (queries, gathered, head): (&Queries, *const f32, usize),
    partition: usize,
    state: State,
) {
    let begin = (queries.seen[0].start / SPAN * SPAN).max(partition * PARTITION);
    let end = context.len.min((partition + 1) * PARTITION);
    let mut first = 0;
    // SAFETY: `S` is available; tables cover the context; see `update`.
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
                let (most, queries, at) = (left.min(C::tile_rows::<S>()), (queries, gathered), (state, row));
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

/// [`update`] over as many parts as any of the rows sees; the number of rows.
#[inline(always)]
unsafe fn some_parts<S: Simd, C: Cached, const R: usize>(
    job: &Attend<'_, C>,
    span: &Span,
    queries: (&Queries, *const f32),
    (state, first): (State, usize),
) -> usize {
    // SAFETY: forwarded.
    unsafe {
        if queries.0.seen[first + R - 1].end - span.start > SPAN / 2 {
            update::<S, C, R, PARTS>(job, span, queries, (state, first));
        } else {
            update::<S, C, R, { PARTS / 2 }>(job, span, queries, (state, first));
        }
    }
    R
}

/// Divides by the sums and hands the rows on.
#[inline(always)]
unsafe fn finish<S: Simd, C: Cached>(job: &Attend<'_, C>, item: &Item, head: usize, state: State) {
    let (dim, padded) = (job.heads.value_dim, job.cache.geometry().head_dim);
    let group = job.heads.heads / job.heads.kv_heads;
    for (r, pair) in item.rows.clone().enumerate() {
        // SAFETY: `S` is available; each output row and head belongs to this item.
        unsafe {
            let sum = S::splat(S::reduce_add(S::load(state.sum(r))));
            let values = state.values(r, padded);
            for d in (0..padded).step_by(LANES) {
                S::store(values.add(d), S::div(S::load(values.add(d)), sum));
            }
            job.out.put::<S>(item.first_row + pair / group, (head * group + pair % group) * dim, values, dim);
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
    let mut gathered = Gathered::new();
    for head in piece.heads.clone() {
        let queries = Queries::new(job, item, head);
        // SAFETY: `S` is available; both memories and every place in `states` have room for the item's rows; a
        // partition's state is written by its piece alone, and read after the counter said that all are.
        unsafe {
            job.cache.gather::<S>(&queries.of_row[..rows], &mut gathered);
            let queries = (&queries, gathered.as_mut_ptr().cast_const(), head);
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
                finish::<S, C>(job, item, head, if alone { state } else { merged });
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
                finish::<S, C>(job, item, head, merged);
            }
        }
    }
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
