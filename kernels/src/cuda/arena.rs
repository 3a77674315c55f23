//! Which parts of one large piece of device memory are taken: offsets only, so it needs no device.

use std::collections::BTreeMap;

/// Every piece begins at a multiple of this many bytes.
const ALIGNMENT: usize = 256;

/// First fit over the free pieces; neighbours that become free are one piece again.
#[derive(Debug)]
pub struct Arena {
    /// Offset → bytes, no two of them touching.
    free: BTreeMap<usize, usize>,
    taken: BTreeMap<usize, usize>,
}

impl Arena {
    /// All `bytes` free.
    pub fn new(bytes: usize) -> Arena {
        let bytes = bytes / ALIGNMENT * ALIGNMENT;
        let free = if bytes > 0 { BTreeMap::from([(0, bytes)]) } else { BTreeMap::new() };
        Arena { free, taken: BTreeMap::new() }
    }

    pub fn free_bytes(&self) -> usize {
        self.free.values().sum()
    }

    /// The offset of `bytes` that were free; `None` if no free piece is that long.
    pub fn take(&mut self, bytes: usize) -> Option<usize> {
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGNMENT)?;
        let (&offset, &len) = self.free.iter().find(|(_, len)| **len >= bytes)?;
        self.free.remove(&offset);
        if len > bytes {
            self.free.insert(offset + bytes, len - bytes);
        }
        self.taken.insert(offset, bytes);
        Some(offset)
    }

    /// Gives back what `take` gave; anything else is left alone.
    pub fn give_back(&mut self, offset: usize) {
        let Some(mut len) = self.taken.remove(&offset) else { return };
        let mut start = offset;
        if let Some(next) = self.free.remove(&(offset + len)) {
            len += next;
        }
        if let Some((&before, &bytes)) = self.free.range(..offset).next_back()
            && before + bytes == offset
        {
            start = before;
            len += bytes;
        }
        self.free.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pieces_never_overlap_and_all_of_it_comes_back(steps in prop::collection::vec((0..3_u8, 0..5000_usize), 1..200)) {
            let mut arena = Arena::new(100_000);
            let whole = arena.free_bytes();
            let mut held: Vec<(usize, usize)> = Vec::new();
            for (what, number) in steps {
                if what == 0 && !held.is_empty() {
                    arena.give_back(held.swap_remove(number % held.len()).0);
                } else if let Some(offset) = arena.take(number) {
                    prop_assert_eq!(offset % ALIGNMENT, 0);
                    prop_assert!(offset + number <= whole);
                    prop_assert!(held.iter().all(|&(o, n)| offset + number.max(1) <= o || o + n.max(1) <= offset));
                    held.push((offset, number));
                }
                let taken: usize = held.iter().map(|(_, n)| n.max(&1).next_multiple_of(ALIGNMENT)).sum();
                prop_assert_eq!(arena.free_bytes() + taken, whole);
            }
            held.iter().for_each(|&(offset, _)| arena.give_back(offset));
            prop_assert_eq!(arena.take(whole), Some(0), "one piece again");
            prop_assert_eq!(arena.take(1), None);
        }
    }
}
