//! The merge loop that byte-pair and SentencePiece vocabularies share: best-ranked neighbours first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Marks a symbol that is no token (yet), and the missing neighbour at either end.
pub(super) const NONE: u32 = u32::MAX;

/// A stretch of the text being tokenised.
#[derive(Debug, Clone, Copy)]
pub(super) struct Symbol {
    /// First byte in the text.
    pub start: u32,
    /// Bytes; 0 once merged into its left neighbour.
    pub len: u32,
    /// The token it is, or [`NONE`].
    pub id: u32,
    prev: u32,
    next: u32,
}

/// Which neighbours may become one token.
pub(super) trait Merges {
    /// The rank (lower merges first) and id of the token that `left` and `right` form together.
    fn join(&self, left: &Symbol, right: &Symbol) -> Option<(u32, u32)>;
}

/// A possible merge, ordered by rank, then by position: equal ranks merge from the left.
type Candidate = Reverse<(u32, u32, u32, u32, u32)>;

/// Buffers for merging, kept from one word to the next.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Candidate>,
}

impl Merger {
    pub fn clear(&mut self) {
        self.symbols.clear();
    }

    /// Appends a symbol of `len` bytes right after the last one.
    pub fn push(&mut self, start: u32, len: u32, id: u32) {
        let index = self.symbols.len() as u32;
        if let Some(last) = self.symbols.last_mut() {
            last.next = index;
        }
        self.symbols.push(Symbol { start, len, id, prev: index.checked_sub(1).unwrap_or(NONE), next: NONE });
    }

    /// Merges until nothing more can be, in `O(n log n)`; then gives the remaining symbols in order.
    pub fn run(&mut self, merges: &impl Merges) -> impl Iterator<Item = &Symbol> {
        self.queue.clear();
        for left in 1..self.symbols.len() as u32 {
            self.consider(left - 1, left, merges);
        }
        while let Some(Reverse((_, left, right, len, id))) = self.queue.pop() {
            let (l, r) = (self.symbols[left as usize], self.symbols[right as usize]);
            // A merge on either side since this one was queued has changed the pair.
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            self.symbols[right as usize].len = 0;
            let merged = &mut self.symbols[left as usize];
            merged.len = len;
            merged.id = id;
            merged.next = r.next;
            if r.next != NONE {
                self.symbols[r.next as usize].prev = left;
                self.consider(left, r.next, merges);
            }
            if l.prev != NONE {
                self.consider(l.prev, left, merges);
            }
        }
        self.symbols.iter().filter(|symbol| symbol.len > 0)
    }

    fn consider(&mut self, left: u32, right: u32, merges: &impl Merges) {
        let (l, r) = (&self.symbols[left as usize], &self.symbols[right as usize]);
        if let Some((rank, id)) = merges.join(l, r) {
            self.queue.push(Reverse((rank, left, right, l.len + r.len, id)));
        }
    }
}
