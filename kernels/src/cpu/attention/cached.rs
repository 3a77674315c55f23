//! What attention needs of a kind of cache: to put queries, keys and values there, and to multiply with them.

use super::super::kv_cache::Geometry;
use super::super::simd::{LANES, Simd};
use super::plan::SPAN;

/// 16-token parts a span.
pub(super) const PARTS: usize = SPAN / LANES;

/// A span of one sequence and KV head: where its tokens are, and those of the next one.
pub(super) struct Span {
    pub start: usize,
    pub head: usize,
    /// Block and offset of each part. Parts past the end repeat the first: every token of theirs is masked.
    pub parts: [(usize, usize); PARTS],
    pub next: [(usize, usize); PARTS],
}

/// A cache and this step's queries in the form that meets it, as the pieces of a job see both.
///
/// # Safety
/// For every method: `S` is available; slots, blocks and queries are inside the cache and the step; what is read was
/// written and what is written is nobody else's.
pub(super) trait Cached: Copy {
    fn geometry(&self) -> Geometry;

    /// Takes a rotated query, filled up with zeros.
    unsafe fn put_query<S: Simd>(&self, query: usize, x: *const f32);

    /// Writes a token's key and value of one head. `last`: no later token of the sequence is written in this step.
    unsafe fn put<S: Simd>(&self, slot_and_head: (usize, usize), key: *const f32, value: *const f32, last: bool);

    /// Rows of an item that go through a span at once.
    fn tile_rows<S: Simd>() -> usize;

    /// Dot products of `R` queries from `query` on with the keys of `P` parts of a span, whose values are on their way meanwhile.
    unsafe fn scores<S: Simd, const R: usize, const P: usize>(&self, span: &Span, query: usize) -> [[S::F; P]; R];

    /// `out` = `out` · shrink + weights · values for the first `tokens` of a span, `R` rows of `head_dim`; the next
    /// span's keys are on their way meanwhile.
    unsafe fn add_values<S: Simd, const R: usize, const P: usize>(
        &self,
        span: (&Span, usize),
        weights: &[[S::F; P]; R],
        shrink: &[S::F; R],
        out: *mut f32,
    );
}
