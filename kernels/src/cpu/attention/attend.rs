//! The second half of attention: every query row's softmax over its context.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::super::activation::cap_lanes;
use super::super::kv_cache::View;
use super::super::rows::RowsOut;
use super::super::simd::{Isa, LANES, Simd, dispatch};
use super::plan::{Item, PARTITION, Piece, Plan, ROWS_MAX, SPAN};
use super::state::{Memory, State};
use crate::backend::{AttentionShape, StepInput};
use crate::memory::Shared;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// 16-token parts a span.
const PARTS: usize = SPAN / LANES;

/// Operands.
pub(super) struct Attend<'a> {
    pub queries: &'a [u16],
    pub heads: AttentionShape,
    pub input: StepInput<'a>,
    pub view: View,
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
    /// Their queries; the rows after the last one are not set.
    of_row: [*const u16; ROWS_MAX],
    /// Positions each row sees: both ends ascend.
    seen: [Range<usize>; ROWS_MAX],
    rows: usize,
}

impl Queries {
    #[inline(always)]
    fn new(job: &Attend<'_>, item: &Item, head: usize) -> Queries {
        let (padded, group) = (job.view.head_dim, job.heads.heads / job.heads.kv_heads);
        let window = job.heads.window.unwrap_or(usize::MAX);
        let mut of_row = [std::ptr::null::<u16>(); ROWS_MAX];
        let mut seen = [const { 0..0 }; ROWS_MAX];
        for (r, pair) in item.rows.clone().enumerate() {
            let row = item.first_row + pair / group;
            let query = row * job.heads.heads + head * group + pair % group;
            of_row[r] = job.queries[query * padded..][..padded].as_ptr();
            let end = job.input.positions[row] as usize + 1;
            seen[r] = end.saturating_sub(window)..end;
        }
        Queries { of_row, seen, rows: item.rows.len() }
    }
}

/// A span of one sequence and KV head: where its parts lie.
struct Span {
    start: usize,
    keys: [*const u16; PARTS],
    values: [*const u16; PARTS],
    /// Keys of the span after this one.
    next_keys: [*const u16; PARTS],
}

/// Where the keys or values of a sequence and KV head lie.
struct Context<'a> {
    view: View,
    table: &'a [u32],
    head: usize,
    /// Tokens.
    len: usize,
}

impl Context<'_> {
    /// Block and offset of the parts of the span at `start`. Parts past the end repeat the first: every token of theirs
    /// is masked.
    #[inline(always)]
    fn parts(&self, start: usize) -> [(usize, usize); PARTS] {
        std::array::from_fn(|p| {
            let at = if start + p * LANES < self.len { start + p * LANES } else { start };
            (self.table[at / self.view.block_size] as usize, at % self.view.block_size)
        })
    }

    #[inline(always)]
    fn keys(&self, start: usize) -> [*const u16; PARTS] {
        let parts = self.parts(start);
        std::array::from_fn(|p| self.view.keys(parts[p].0, self.head, parts[p].1))
    }

    #[inline(always)]
    fn values(&self, start: usize) -> [*const u16; PARTS] {
        let parts = self.parts(start);
        std::array::from_fn(|p| self.view.values(parts[p].0, self.head, parts[p].1))
    }
}

/// Scores, softmax update and weighted values of `R` rows from `first` on over `P` parts of one span. Keys are read
/// while the span's values are on their way, and values while the next keys are.
#[inline(always)]
unsafe fn update<S: Simd, const R: usize, const P: usize>(
    job: &Attend<'_>,
    span: &Span,
    queries: &Queries,
    (state, first): (State, usize),
) {
    let dim = job.view.head_dim;
    let mut weights = [[0_u16; SPAN]; R];
    // SAFETY: parts hold `dim` × 16 keys and values, queries `dim` values; the state holds `first + R` rows.
    unsafe {
        let q: [*const u8; R] = std::array::from_fn(|r| queries.of_row[first + r].cast());
        let mut scores = [[S::zero(); P]; R];
        for i in 0..dim / 2 {
            let mut k = [S::load_b(span.keys[0].add(i * 2 * LANES).cast()); P];
            for p in 1..P {
                k[p] = S::load_b(span.keys[p].add(i * 2 * LANES).cast());
            }
            for p in 0..P {
                S::prefetch(span.values[p].add(i * 2 * LANES).cast());
            }
            for r in 0..R {
                let q = S::splat_b(q[r].add(4 * i));
                for p in 0..P {
                    scores[r][p] = S::dot_bf16(scores[r][p], k[p], q);
                }
            }
        }
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
                let weight = S::exp2(S::sub(scores[r][p], S::splat(max)));
                sum = S::add(sum, weight);
                S::store_bf16(weights[r].as_mut_ptr().add(p * LANES), weight);
            }
            S::store(state.sum(row), sum);
        }
        let tokens = (P * LANES).min(queries.seen[first + R - 1].end - span.start);
        let values = state.values(first, dim);
        let mut d = 0;
        while d < dim {
            d += if dim - d >= 4 * LANES {
                weigh::<S, R, 4>((span, tokens), (dim, d), &weights, &shrink, values);
                4 * LANES
            } else {
                weigh::<S, R, 2>((span, tokens), (dim, d), &weights, &shrink, values);
                2 * LANES
            };
        }
    }
}

/// Adds the weighted values of a span's first `tokens` to dimensions `d..d + 16 V` of `R` rows.
#[inline(always)]
unsafe fn weigh<S: Simd, const R: usize, const V: usize>(
    (span, tokens): (&Span, usize),
    (dim, d): (usize, usize),
    weights: &[[u16; SPAN]; R],
    shrink: &[S::F; R],
    values: *mut f32,
) {
    // SAFETY: as in `update`; `dim` is a multiple of 32, so `d + 16 V <= dim`.
    unsafe {
        let mut acc = [[S::zero(); V]; R];
        for r in 0..R {
            for v in 0..V {
                acc[r][v] = S::mul(S::load(values.add(r * dim + d + v * LANES)), shrink[r]);
            }
        }
        let pairs = tokens.div_ceil(2);
        for p in 0..PARTS {
            let first = p * LANES / 2;
            for pair in first..pairs.min(first + LANES / 2) {
                let offset = ((pair - first) * dim + d) * 2;
                let at = span.values[p].add(offset);
                let mut x = [S::load_b(at.cast()); V];
                for (v, x) in x.iter_mut().enumerate().skip(1) {
                    *x = S::load_b(at.add(v * 2 * LANES).cast());
                }
                for v in 0..V {
                    S::prefetch(span.next_keys[p].wrapping_add(offset + v * 2 * LANES).cast());
                }
                for r in 0..R {
                    let w = S::splat_b(weights[r].as_ptr().add(2 * pair).cast());
                    for v in 0..V {
                        acc[r][v] = S::dot_bf16(acc[r][v], x[v], w);
                    }
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                S::store(values.add(r * dim + d + v * LANES), acc[r][v]);
            }
        }
    }
}

/// Takes one partition of the context into `state`, which is cleared first.
#[inline(always)]
unsafe fn go_through<S: Simd>(
    job: &Attend<'_>,
    context: &Context<'_>,
    queries: &Queries,
    partition: usize,
    state: State,
) {
    let begin = (queries.seen[0].start / SPAN * SPAN).max(partition * PARTITION);
    let end = context.len.min((partition + 1) * PARTITION);
    let mut first = 0;
    // SAFETY: `S` is available; tables cover the context; see `update`.
    unsafe {
        state.clear::<S>(queries.rows, job.view.head_dim);
        for start in (begin..end).step_by(SPAN) {
            let next = if start + SPAN < context.len { start + SPAN } else { start };
            let (keys, values, next_keys) = (context.keys(start), context.values(start), context.keys(next));
            let span = Span { start, keys, values, next_keys };
            while queries.seen[first].end <= start {
                first += 1;
            }
            let mut row = first;
            while row < queries.rows {
                let left = queries.rows - row;
                row += if S::TILE_QUERIES >= 6 && left >= 6 {
                    some_parts::<S, 6>(job, &span, queries, (state, row))
                } else if S::TILE_QUERIES >= 4 && left >= 4 {
                    some_parts::<S, 4>(job, &span, queries, (state, row))
                } else if S::TILE_QUERIES >= 3 && left >= 3 {
                    some_parts::<S, 3>(job, &span, queries, (state, row))
                } else if left >= 2 {
                    some_parts::<S, 2>(job, &span, queries, (state, row))
                } else {
                    some_parts::<S, 1>(job, &span, queries, (state, row))
                };
            }
        }
    }
}

/// [`update`] over as many parts as any of the rows sees; the number of rows.
#[inline(always)]
unsafe fn some_parts<S: Simd, const R: usize>(
    job: &Attend<'_>,
    span: &Span,
    queries: &Queries,
    (state, first): (State, usize),
) -> usize {
    // SAFETY: forwarded.
    unsafe {
        if queries.seen[first + R - 1].end - span.start > SPAN / 2 {
            update::<S, R, PARTS>(job, span, queries, (state, first));
        } else {
            update::<S, R, { PARTS / 2 }>(job, span, queries, (state, first));
        }
    }
    R
}

/// Divides by the sums and hands the rows on.
#[inline(always)]
unsafe fn finish<S: Simd>(job: &Attend<'_>, item: &Item, head: usize, state: State) {
    let (dim, padded) = (job.heads.head_dim, job.view.head_dim);
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
unsafe fn attend<S: Simd>(job: &Attend<'_>, piece: &Piece) {
    let item = &job.plan.items[piece.item];
    let (rows, dim, partitions) = (item.rows.len(), job.view.head_dim, item.partitions());
    let tables = &job.input.block_table_starts[item.sequence..];
    let table = &job.input.block_tables[tables[0] as usize..tables[1] as usize];
    let (mut memory, mut merged) = (Memory::new(), Memory::new());
    let (state, merged) = (memory.state(), merged.state());
    for head in piece.heads.clone() {
        let queries = Queries::new(job, item, head);
        let context = Context { view: job.view, table, head, len: item.context.end };
        // SAFETY: `S` is available; both memories and every place in `states` have room for the item's rows; a
        // partition's state is written by its piece alone, and read after the counter said that all are.
        unsafe {
            let Some(part) = &piece.part else {
                let alone = partitions.len() == 1;
                if !alone {
                    merged.clear::<S>(rows, dim);
                }
                for partition in partitions.clone() {
                    go_through::<S>(job, &context, &queries, partition, state);
                    if !alone {
                        merged.merge::<S>(state, rows, dim);
                    }
                }
                finish::<S>(job, item, head, if alone { state } else { merged });
                continue;
            };
            let at = |partition: usize| {
                State::at(job.states.at(part.states + (partition - partitions.start) * State::len(rows, dim)))
            };
            go_through::<S>(job, &context, &queries, part.partition, at(part.partition));
            if job.plan.pending[part.counter].0.fetch_sub(1, Ordering::AcqRel) == 1 {
                merged.clear::<S>(rows, dim);
                for partition in partitions.clone() {
                    merged.merge::<S>(at(partition), rows, dim);
                }
                finish::<S>(job, item, head, merged);
            }
        }
    }
}

/// # Safety
/// `isa` is available; the piece is one of this step's; its output rows of these heads are nobody else's.
pub(super) unsafe fn attend_piece(isa: Isa, job: &Attend<'_>, piece: &Piece) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn attend(job: &Attend<'_>, piece: &Piece)) }
}
