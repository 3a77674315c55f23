//! How a step's attention is cut up: rows into items that go through their context together, items into pieces that
//! threads take. Nothing here changes a result.

use super::state::State;
use crate::backend::{ATTENTION_SPAN, AttentionShape, StepInput};
use crate::memory::{Buffer, Shared};
use crate::pool::share;
use std::ops::Range;
use std::sync::atomic::AtomicU32;

/// Tokens a softmax update covers.
pub(super) const SPAN: usize = ATTENTION_SPAN;
/// Tokens whose softmax state is kept apart before it is merged.
pub(super) const PARTITION: usize = 256;
/// Query rows (tokens × heads) that go through the context together.
pub(super) const ROWS_MAX: usize = 24;
/// Their accumulators, in values: fits the first-level cache beside a span's keys and values.
pub(super) const STATE_MAX: usize = 2048;
/// Rounds in which a thread takes its share of the pieces.
const ROUNDS: usize = 5;
/// Pieces a thread should find at least, to even out what others lose to neighbours.
const PIECES_PER_THREAD: usize = 4;

/// Consecutive query tokens of one sequence, or some heads of one token: `rows` are pairs (token, query head of a KV
/// head) counted from `first_row`.
#[derive(Clone)]
pub(super) struct Item {
    pub sequence: usize,
    pub first_row: usize,
    pub rows: Range<usize>,
    /// Positions any of its rows sees.
    pub context: Range<usize>,
}

impl Item {
    /// The step's row and the query head in its KV head's group of each of its rows; `group` heads share a KV head.
    #[inline(always)]
    pub(super) fn pairs(&self, group: usize) -> impl Iterator<Item = (usize, usize)> {
        let mut next = (self.first_row + self.rows.start / group, self.rows.start % group);
        self.rows.clone().map(move |_| {
            let pair = next;
            next = if pair.1 + 1 < group { (pair.0, pair.1 + 1) } else { (pair.0 + 1, 0) };
            pair
        })
    }

    /// Partitions it sees anything of.
    pub(super) fn partitions(&self) -> Range<usize> {
        self.context.start / PARTITION..self.context.end.div_ceil(PARTITION)
    }

    /// What a KV head of it costs, in any unit.
    fn cost(&self) -> usize {
        let spans = self.context.end.div_ceil(SPAN) - self.context.start / SPAN;
        // Keys and values are read once for all rows.
        spans * (self.rows.len() + 3)
    }
}

/// What a thread does at a time: some heads of an item.
pub(super) struct Piece {
    pub item: usize,
    pub heads: Range<usize>,
    /// One partition of the context, where several threads share a head; all of it otherwise.
    pub part: Option<Part>,
}

/// A partition whose state is left for the last one of its head to merge.
pub(super) struct Part {
    pub partition: usize,
    /// Index of the head's counter.
    pub counter: usize,
    /// Where the states of the head's partitions begin, in values.
    pub states: usize,
}

/// The cut of one step, for all layers of a kind.
#[derive(Default)]
pub(in crate::cpu) struct Plan {
    pub(super) items: Vec<Item>,
    pieces: Vec<Piece>,
    /// Where each thread's run of pieces ends: runs cost about the same, and a sequence's pieces stay with the thread that wrote
    /// its keys if all sequences are alike.
    ends: Vec<usize>,
    /// Whether pieces store what they read: every row is the only one of its sequence, and a KV head of it one piece's.
    pub(super) stores: bool,
    /// Pieces of a shared head that are not done, and how many there are.
    pub(super) pending: Vec<(AtomicU32, u32)>,
    states: Buffer<f32>,
}

impl Plan {
    /// Cuts up a batch.
    pub(in crate::cpu) fn make(&mut self, input: StepInput<'_>, heads: AttentionShape, threads: usize) {
        self.list_items(input, heads);
        self.pieces.clear();
        self.pending.clear();
        let mut states = 0;
        let total: usize = self.items.iter().map(|item| item.cost() * heads.kv_heads).sum();
        let fair = total / (threads * PIECES_PER_THREAD);
        for (index, item) in self.items.iter().enumerate() {
            if threads == 1 || item.cost() * heads.kv_heads <= fair {
                self.pieces.push(Piece { item: index, heads: 0..heads.kv_heads, part: None });
                continue;
            }
            let partitions = item.partitions();
            for head in 0..heads.kv_heads {
                if item.cost() <= fair || partitions.len() == 1 {
                    self.pieces.push(Piece { item: index, heads: head..head + 1, part: None });
                    continue;
                }
                for partition in partitions.clone() {
                    let part = Part { partition, counter: self.pending.len(), states };
                    self.pieces.push(Piece { item: index, heads: head..head + 1, part: Some(part) });
                }
                self.pending.push((AtomicU32::new(0), partitions.len() as u32));
                states += partitions.len() * State::len(item.rows.len(), heads.padded_dim());
            }
        }
        let rows = input.positions.len();
        self.stores = rows == input.context_lens.len() && rows == self.items.len() && self.pending.is_empty();
        self.states.reserve(states);
        self.share_out(threads);
    }

    fn share_out(&mut self, threads: usize) {
        let cost = |piece: &Piece| {
            let item = &self.items[piece.item];
            let parts = if piece.part.is_some() { item.partitions().len() } else { 1 };
            item.cost() * piece.heads.len() / parts
        };
        let total: usize = self.pieces.iter().map(cost).sum();
        self.ends.clear();
        let mut before = 0;
        for (index, piece) in self.pieces.iter().enumerate() {
            // Where less than half of a piece is on this side of a thread's fair end, it is the next one's.
            while (2 * before + cost(piece)) * threads > 2 * total * (self.ends.len() + 1) {
                self.ends.push(index);
            }
            before += cost(piece);
        }
        self.ends.resize(threads, self.pieces.len());
    }

    /// Chunks for the pool: see [`Plan::chunk`].
    pub(super) fn chunks(&self) -> usize {
        ROUNDS * self.ends.len()
    }

    /// What a chunk computes. A thread begins at the end of its run: the longest contexts of a prompt come last.
    pub(super) fn chunk(&self, chunk: usize) -> impl Iterator<Item = &Piece> {
        let (round, thread) = (chunk / self.ends.len(), chunk % self.ends.len());
        let start = if thread == 0 { 0 } else { self.ends[thread - 1] };
        let run = &self.pieces[start..self.ends[thread]];
        let some = share(run.len(), (ROUNDS, 1), round);
        run[run.len() - some.end..run.len() - some.start].iter().rev()
    }

    fn list_items(&mut self, input: StepInput<'_>, heads: AttentionShape) {
        self.items.clear();
        let group = heads.heads / heads.kv_heads;
        let rows_max = ROWS_MAX.min(STATE_MAX / heads.padded_dim());
        let tokens_max = (rows_max / group).max(1);
        let window = heads.window.unwrap_or(usize::MAX);
        for (sequence, rows) in input.query_starts.windows(2).enumerate() {
            let (mut first_row, end) = (rows[0] as usize, rows[1] as usize);
            while first_row < end {
                let tokens = tokens_max.min(end - first_row);
                let first = input.positions[first_row] as usize + 1;
                let last = input.positions[first_row + tokens - 1] as usize + 1;
                let context = first.saturating_sub(window)..last;
                for start in (0..tokens * group).step_by(rows_max) {
                    let rows = start..(start + rows_max).min(tokens * group);
                    self.items.push(Item { sequence, first_row, rows, context: context.clone() });
                }
                first_row += tokens;
            }
        }
    }

    /// Sets the counters for a layer, and gives the memory for states.
    pub(super) fn begin(&mut self) -> (&Plan, Shared<f32>) {
        for (left, pieces) in &mut self.pending {
            *left.get_mut() = *pieces;
        }
        let states = Shared::new(&mut self.states);
        (self, states)
    }
}
