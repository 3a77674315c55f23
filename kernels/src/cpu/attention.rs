//! Paged attention: rotate and store this step's keys and values, then attend through the block tables.
//!
//! Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135) over spans of 64
//! tokens at absolute positions. Spans belong to partitions of 256 tokens; each partition starts afresh and the
//! partitions are merged in order. All query heads of one KV head go through a span together.
//!
//! A row's arithmetic is a function of its own context alone: the spans, partitions and their order come from absolute
//! positions, and a span beyond a row's last token leaves its state as it was, bit for bit. So prefill in any chunks,
//! decode, and recomputation after a preemption agree exactly.

#![allow(clippy::needless_range_loop, reason = "an index walks several register arrays at once")]

use super::CpuBackend;
use super::activation::cap_lanes;
use super::kv_cache::{KvCache, View};
use super::rows::{Form, Rows, RowsOut};
use super::simd::{Isa, LANES, Simd, dispatch};
use super::{Matrix, Step};
use crate::backend::{AttentionShape, StepInput};
use crate::memory::Shared;
use std::ops::Range;

/// Tokens a softmax update covers.
const SPAN: usize = 64;
/// 16-token parts a span.
const PARTS: usize = SPAN / LANES;
/// Tokens whose softmax state is kept apart before it is merged.
const PARTITION: usize = 256;
/// Query rows (tokens × heads) that go through the context together.
const ROWS_MAX: usize = 24;
/// Their accumulators, in values: fits the first-level cache beside a span's keys and values.
const STATE_MAX: usize = 2048;
/// Smaller than any score: the maximum of no scores at all, finite so that differences are.
const NOTHING: f32 = -1e30;

/// Consecutive query tokens of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Item {
    sequence: usize,
    first_row: usize,
    tokens: usize,
}

/// Cuts every sequence's rows into items small enough to balance over threads.
pub(super) fn list_items(input: StepInput<'_>, heads: AttentionShape, items: &mut Vec<Item>) {
    items.clear();
    let group = heads.heads / heads.kv_heads;
    let tokens_max = (ROWS_MAX.min(STATE_MAX / heads.padded_dim()) / group).max(1);
    for (sequence, rows) in input.query_starts.windows(2).enumerate() {
        let (mut first_row, end) = (rows[0] as usize, rows[1] as usize);
        while first_row < end {
            let tokens = tokens_max.min(end - first_row);
            items.push(Item { sequence, first_row, tokens });
            first_row += tokens;
        }
    }
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
    assert!(cache.kv_heads == heads.kv_heads && cache.head_dim == padded, "the cache has another shape");
    assert!(qkv.rows == rows && qkv.width == heads.qkv_width(), "queries, keys and values have another shape");
    assert!(step.rows == rows && step.heads == Some(heads), "the step was prepared for another batch");
    let slots = cache.shape.blocks * cache.shape.block_size;
    assert!(input.slot_mapping.iter().all(|&slot| (slot as usize) < slots), "a slot beyond the cache");
    assert!(input.block_tables.iter().all(|&b| (b as usize) < cache.shape.blocks), "a block beyond the cache");
    let view = cache.view();
    let isa = backend.isa;

    let job = Store { qkv, heads, input, frequencies: step.frequencies, rotations: &step.rotations, view };
    let queries = Shared::new(&mut step.queries);
    backend.for_rows(rows, &|rows| {
        for row in rows {
            // SAFETY: the ISA is available; sizes are asserted above; rows and slots belong to one chunk each.
            unsafe { store_row(isa, &job, row, queries) }
        }
    });

    // Heads that are no whole groups of the 8-bit form are put side by side in f32 first.
    let whole = !form.q8 || dim == padded;
    let target = if whole { &mut *out } else { &mut step.compact };
    let target = target.reset(rows, heads.heads * dim, if whole { form } else { Form { q8: false, f32: true } });
    let queries = &step.queries[..rows * heads.heads * padded];
    let scores = Scores::new(heads);
    let job = Attend { queries, heads, input, view, out: target, scores };
    let items = &step.items;
    backend.pool.run(items.len() * heads.kv_heads, &|chunk| {
        let (item, head) = (items[chunk / heads.kv_heads], chunk % heads.kv_heads);
        // SAFETY: the ISA is available; block tables are inside the cache; every output row and head is one chunk's.
        unsafe { attend_item(isa, &job, item, head) }
    });
    if !whole {
        let out = out.reset(rows, heads.heads * dim, form);
        backend.copy_rows(&step.compact.values, (rows, &|row| row), out);
    }
}

/// Operands of the first half: rotation and KV write.
struct Store<'a> {
    qkv: &'a Matrix,
    heads: AttentionShape,
    input: StepInput<'a>,
    frequencies: usize,
    rotations: &'a [f32],
    view: View,
}

/// Rotates one head: pairs (i, i + n).
#[inline(always)]
unsafe fn rotate<S: Simd>(x: *const f32, dim: usize, n: usize, rotation: *const f32, out: *mut f32) {
    // SAFETY: the caller gives `dim` values in and out and `2 n` of rotation, `2 n <= dim`.
    unsafe {
        let mut i = 0;
        while i + LANES <= n {
            let (a, b) = (S::load(x.add(i)), S::load(x.add(n + i)));
            let (cos, sin) = (S::load(rotation.add(i)), S::load(rotation.add(n + i)));
            S::store(out.add(i), S::sub(S::mul(a, cos), S::mul(b, sin)));
            S::store(out.add(n + i), S::fma(b, cos, S::mul(a, sin)));
            i += LANES;
        }
        while i < n {
            let (a, b, cos, sin) = (*x.add(i), *x.add(n + i), *rotation.add(i), *rotation.add(n + i));
            *out.add(i) = a * cos - b * sin;
            *out.add(n + i) = b.mul_add(cos, a * sin);
            i += 1;
        }
        std::ptr::copy_nonoverlapping(x.add(2 * n), out.add(2 * n), dim - 2 * n);
    }
}

#[inline(always)]
unsafe fn to_bf16<S: Simd>(x: *const f32, len: usize, out: *mut u16) {
    for i in (0..len).step_by(LANES) {
        // SAFETY: the caller gives `len` values in and out, a multiple of 16.
        unsafe { S::store_bf16(out.add(i), S::load(x.add(i))) }
    }
}

#[inline(always)]
unsafe fn store_one<S: Simd>(job: &Store<'_>, row: usize, queries: Shared<u16>) {
    let (dim, padded, n) = (job.heads.head_dim, job.heads.padded_dim(), job.frequencies);
    // What a narrow head is filled up with stays zero.
    let mut turned = [0.0_f32; AttentionShape::HEAD_DIM_MAX];
    let mut key = [0_u16; AttentionShape::HEAD_DIM_MAX];
    let mut value = [0_u16; AttentionShape::HEAD_DIM_MAX];
    // SAFETY: `attention` asserted the widths; rotations hold `2 n` values a row.
    unsafe {
        let x = job.qkv.data.as_ptr().add(row * job.qkv.width);
        let rotation = job.rotations.as_ptr().add(row * 2 * n);
        for head in 0..job.heads.heads {
            rotate::<S>(x.add(head * dim), dim, n, rotation, turned.as_mut_ptr());
            to_bf16::<S>(turned.as_ptr(), padded, queries.at((row * job.heads.heads + head) * padded));
        }
        let slot = job.input.slot_mapping[row] as usize;
        let last = job.input.query_starts.binary_search(&(row as u32 + 1)).is_ok();
        for head in 0..job.heads.kv_heads {
            let k = x.add((job.heads.heads + head) * dim);
            let v = x.add((job.heads.heads + job.heads.kv_heads + head) * dim);
            rotate::<S>(k, dim, n, rotation, turned.as_mut_ptr());
            to_bf16::<S>(turned.as_ptr(), padded, key.as_mut_ptr());
            std::ptr::copy_nonoverlapping(v, turned.as_mut_ptr(), dim);
            to_bf16::<S>(turned.as_ptr(), padded, value.as_mut_ptr());
            job.view.write(slot, head, &key[..padded], &value[..padded], last);
        }
    }
}

/// # Safety
/// `isa` is available, `row` is inside the batch, and no other thread writes it or its slot.
unsafe fn store_row(isa: Isa, job: &Store<'_>, row: usize, queries: Shared<u16>) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn store_one(job: &Store<'_>, row: usize, queries: Shared<u16>)) }
}

/// Operands of the second half.
struct Attend<'a> {
    queries: &'a [u16],
    heads: AttentionShape,
    input: StepInput<'a>,
    view: View,
    out: RowsOut,
    scores: Scores,
}

/// How dot products become powers of two.
struct Scores {
    /// Factor on them; with a cap, on the exponent inside its tanh.
    scale: f32,
    /// In powers of two.
    cap: Option<f32>,
}

impl Scores {
    fn new(heads: AttentionShape) -> Scores {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        match heads.softcap {
            None => Scores { scale: heads.scale * LOG2_E, cap: None },
            Some(cap) => Scores { scale: 2.0 * LOG2_E * heads.scale / cap, cap: Some(cap * LOG2_E) },
        }
    }

    #[inline(always)]
    unsafe fn of<S: Simd>(&self, products: S::F) -> S::F {
        // SAFETY: no requirement.
        unsafe {
            match self.cap {
                None => S::mul(products, S::splat(self.scale)),
                Some(cap) => cap_lanes::<S>(products, self.scale, cap),
            }
        }
    }
}

/// Softmax state of the rows that go through the context together: maximum, 16 partial sums, weighted values.
struct State {
    max: [f32; ROWS_MAX],
    sum: [[f32; LANES]; ROWS_MAX],
    values: [f32; STATE_MAX],
}

impl State {
    fn new() -> State {
        State { max: [NOTHING; ROWS_MAX], sum: [[0.0; LANES]; ROWS_MAX], values: [0.0; STATE_MAX] }
    }

    fn clear(&mut self, rows: usize, dim: usize) {
        self.max[..rows].fill(NOTHING);
        self.sum[..rows].fill([0.0; LANES]);
        self.values[..rows * dim].fill(0.0);
    }

    /// Takes in the state of the next partition.
    #[inline(always)]
    unsafe fn merge<S: Simd>(&mut self, next: &State, rows: usize, dim: usize) {
        for r in 0..rows {
            let max = if self.max[r] > next.max[r] { self.max[r] } else { next.max[r] };
            // SAFETY: `S` is available; rows and dimensions are inside the arrays.
            unsafe {
                let ours = S::exp2(S::splat(self.max[r] - max));
                let theirs = S::exp2(S::splat(next.max[r] - max));
                let sum = self.sum[r].as_mut_ptr();
                S::store(sum, S::fma(S::load(next.sum[r].as_ptr()), theirs, S::mul(S::load(sum), ours)));
                let mut d = r * dim;
                while d < (r + 1) * dim {
                    let values = self.values.as_mut_ptr().add(d);
                    let next = S::load(next.values.as_ptr().add(d));
                    S::store(values, S::fma(next, theirs, S::mul(S::load(values), ours)));
                    d += LANES;
                }
            }
            self.max[r] = max;
        }
    }
}

/// A span of one sequence and KV head: where its parts lie, and how many of its tokens are there.
struct Span {
    start: usize,
    tokens: usize,
    keys: [*const u16; PARTS],
    values: [*const u16; PARTS],
}

/// Scores, softmax update and weighted values of `R` rows from `first` on over one span.
#[inline(always)]
unsafe fn update<S: Simd, const R: usize>(
    job: &Attend<'_>,
    span: &Span,
    queries: &[*const u16],
    seen: &[Range<usize>],
    (state, first): (&mut State, usize),
) {
    let dim = job.view.head_dim;
    let mut weights = [[0_u16; SPAN]; R];
    // SAFETY: parts hold `dim` × 16 keys and values, queries `dim` values; state arrays hold `first + R` rows.
    unsafe {
        let q: [*const u8; R] = std::array::from_fn(|r| queries[first + r].cast());
        let mut scores = [[S::zero(); PARTS]; R];
        for i in 0..dim / 2 {
            let k: [S::B; PARTS] = [
                S::load_b(span.keys[0].add(i * 2 * LANES).cast()),
                S::load_b(span.keys[1].add(i * 2 * LANES).cast()),
                S::load_b(span.keys[2].add(i * 2 * LANES).cast()),
                S::load_b(span.keys[3].add(i * 2 * LANES).cast()),
            ];
            for r in 0..R {
                let q = S::splat_b(q[r].add(4 * i));
                for p in 0..PARTS {
                    scores[r][p] = S::dot_bf16(scores[r][p], k[p], q);
                }
            }
        }
        let mut shrink = [S::zero(); R];
        for r in 0..R {
            let row = first + r;
            let mut s = [S::zero(); PARTS];
            let from = seen[row].start.saturating_sub(span.start);
            let until = seen[row].end.saturating_sub(span.start);
            for p in 0..PARTS {
                s[p] = job.scores.of::<S>(scores[r][p]);
                if until < (p + 1) * LANES || from > p * LANES {
                    let at = |token: usize| token.saturating_sub(p * LANES).min(LANES);
                    s[p] = S::mask_range(s[p], at(from), at(until));
                }
            }
            let highest = S::reduce_max(S::max(S::max(s[0], s[1]), S::max(s[2], s[3])));
            let max = if state.max[row] > highest { state.max[row] } else { highest };
            shrink[r] = S::exp2(S::splat(state.max[row] - max));
            state.max[row] = max;
            let mut sum = S::mul(S::load(state.sum[row].as_ptr()), shrink[r]);
            for p in 0..PARTS {
                let weight = S::exp2(S::sub(s[p], S::splat(max)));
                sum = S::add(sum, weight);
                S::store_bf16(weights[r].as_mut_ptr().add(p * LANES), weight);
            }
            S::store(state.sum[row].as_mut_ptr(), sum);
        }
        let mut d = 0;
        while d < dim {
            d += if dim - d >= 4 * LANES {
                weigh::<S, R, 4>(span, dim, d, &weights, &shrink, state.values.as_mut_ptr().add(first * dim));
                4 * LANES
            } else {
                weigh::<S, R, 2>(span, dim, d, &weights, &shrink, state.values.as_mut_ptr().add(first * dim));
                2 * LANES
            };
        }
    }
}

/// Adds a span's weighted values to dimensions `d..d + 16 V` of `R` rows.
#[inline(always)]
unsafe fn weigh<S: Simd, const R: usize, const V: usize>(
    span: &Span,
    dim: usize,
    d: usize,
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
        let pairs = span.tokens.div_ceil(2);
        for p in 0..PARTS {
            let first = p * LANES / 2;
            for pair in first..pairs.min(first + LANES / 2) {
                let at = span.values[p].add(((pair - first) * dim + d) * 2);
                let mut x = [S::load_b(at.cast()); V];
                for (v, x) in x.iter_mut().enumerate().skip(1) {
                    *x = S::load_b(at.add(v * 2 * LANES).cast());
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

#[inline(always)]
unsafe fn attend<S: Simd>(job: &Attend<'_>, item: Item, head: usize) {
    let (dim, padded) = (job.heads.head_dim, job.view.head_dim);
    let group = job.heads.heads / job.heads.kv_heads;
    let rows_max = ROWS_MAX.min(STATE_MAX / padded);
    let window = job.heads.window.unwrap_or(usize::MAX);
    let tables = &job.input.block_table_starts[item.sequence..];
    let table = &job.input.block_tables[tables[0] as usize..tables[1] as usize];
    let mut state = State::new();
    let mut total = State::new();
    for base in (0..item.tokens * group).step_by(rows_max) {
        let rows = rows_max.min(item.tokens * group - base);
        let mut queries = [std::ptr::null::<u16>(); ROWS_MAX];
        // Positions each row sees: both ends ascend.
        let mut seen = [const { 0..0 }; ROWS_MAX];
        for r in 0..rows {
            let row = item.first_row + (base + r) / group;
            let query = row * job.heads.heads + head * group + (base + r) % group;
            queries[r] = job.queries[query * padded..][..padded].as_ptr();
            let end = job.input.positions[row] as usize + 1;
            seen[r] = end.saturating_sub(window)..end;
        }
        let context = seen[rows - 1].end;
        let begin = seen[0].start / SPAN * SPAN;
        state.clear(rows, padded);
        let mut merged = false;
        let mut first = 0;
        for start in (begin..context).step_by(SPAN) {
            // SAFETY: `S` is available; tables cover the context; see `update`.
            unsafe {
                if start > begin && start % PARTITION == 0 {
                    if !merged {
                        total.clear(rows, padded);
                    }
                    total.merge::<S>(&state, rows, padded);
                    state.clear(rows, padded);
                    merged = true;
                }
                let part = |p: usize| {
                    // Parts past the end repeat the first: every token of theirs is masked.
                    let at = if start + p * LANES < context { start + p * LANES } else { start };
                    (table[at / job.view.block_size] as usize, at % job.view.block_size)
                };
                let span = Span {
                    start,
                    tokens: SPAN.min(context - start),
                    keys: std::array::from_fn(|p| job.view.keys(part(p).0, head, part(p).1)),
                    values: std::array::from_fn(|p| job.view.values(part(p).0, head, part(p).1)),
                };
                while seen[first].end <= start {
                    first += 1;
                }
                let mut r = first;
                while r < rows {
                    let left = rows - r;
                    let at = (&mut state, r);
                    r += if S::TILE_QUERIES >= 6 && left >= 6 {
                        update::<S, 6>(job, &span, &queries, &seen, at);
                        6
                    } else if S::TILE_QUERIES >= 4 && left >= 4 {
                        update::<S, 4>(job, &span, &queries, &seen, at);
                        4
                    } else if S::TILE_QUERIES >= 3 && left >= 3 {
                        update::<S, 3>(job, &span, &queries, &seen, at);
                        3
                    } else if left >= 2 {
                        update::<S, 2>(job, &span, &queries, &seen, at);
                        2
                    } else {
                        update::<S, 1>(job, &span, &queries, &seen, at);
                        1
                    };
                }
            }
        }
        // SAFETY: as above; each output row and head belongs to this item.
        unsafe {
            let whole = if merged {
                total.merge::<S>(&state, rows, padded);
                &mut total
            } else {
                &mut state
            };
            for r in 0..rows {
                let sum = S::splat(S::reduce_add(S::load(whole.sum[r].as_ptr())));
                let values = whole.values.as_mut_ptr().add(r * padded);
                for d in (0..padded).step_by(LANES) {
                    S::store(values.add(d), S::div(S::load(values.add(d)), sum));
                }
                let row = item.first_row + (base + r) / group;
                job.out.put::<S>(row, (head * group + (base + r) % group) * dim, values, dim);
            }
        }
    }
}

/// # Safety
/// `isa` is available; the item is one of this step's; its output rows of these heads are nobody else's.
unsafe fn attend_item(isa: Isa, job: &Attend<'_>, item: Item, head: usize) {
    // SAFETY: forwarded.
    unsafe { dispatch!(isa, fn attend(job: &Attend<'_>, item: Item, head: usize)) }
}
