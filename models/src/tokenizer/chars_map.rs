//! What SentencePiece replaces in a text before cutting it up: its `precompiled_charsmap`, a trie in a double array
//! (Aoe 1989; as darts-clone lays it out) and the replacements its leaves point at.
//!
//! ```text
//! u32 bytes of the trie | u32 nodes… | replacements, each ended by a NUL
//! node   31 a value, in its low bits   30–10 offset   9 the offset counts 256   8 has a leaf   7–0 the byte that leads here
//! ```

pub(super) struct CharsMap {
    nodes: Vec<u32>,
    replacements: String,
}

impl CharsMap {
    /// `None` if it is not laid out so.
    pub fn new(bytes: &[u8]) -> Option<CharsMap> {
        let (len, rest) = bytes.split_first_chunk::<4>()?;
        let (nodes, replacements) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        let nodes = nodes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Some(CharsMap { nodes, replacements: String::from_utf8(replacements.to_vec()).ok()? })
    }

    /// The longest beginning of `text` that is replaced: its length in bytes, and what by.
    pub fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let offset = |node: u32| (node >> 10) << ((node & (1 << 9)) >> 6);
        let mut place = offset(*self.nodes.first()?);
        let mut found = None;
        for (at, byte) in text.bytes().enumerate() {
            place ^= u32::from(byte);
            let Some(&node) = self.nodes.get(place as usize) else { break };
            // The top bit marks a value, which no byte leads to.
            if byte == 0 || node & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            place ^= offset(node);
            if node >> 8 & 1 == 1 {
                let value = self.nodes.get(place as usize)? & !(1 << 31);
                found = Some((at + 1, value as usize));
            }
        }
        let (len, start) = found.filter(|&(len, _)| text.is_char_boundary(len))?;
        Some((len, self.replacements.get(start..)?.split('\0').next()?))
    }
}

#[cfg(test)]
mod tests {
    use super::CharsMap;
    use proptest::prelude::*;

    #[test]
    fn what_is_cut_short_is_no_map() {
        assert!(CharsMap::new(&[]).is_none() && CharsMap::new(&[8, 0, 0, 0, 1]).is_none());
        assert!(CharsMap::new(&[0, 0, 0, 0]).is_some_and(|map| map.longest("a").is_none()));
    }

    proptest! {
        #[test]
        fn no_map_is_followed_out_of_its_bounds(nodes in prop::collection::vec(any::<u32>(), 0..40), text in "\\PC{0,8}") {
            let mut bytes = (nodes.len() as u32 * 4).to_le_bytes().to_vec();
            bytes.extend(nodes.iter().flat_map(|node| node.to_le_bytes()));
            bytes.extend(b"a\0\xc3\xa9\0");
            let map = CharsMap::new(&bytes).expect("whole nodes");
            if let Some((len, _)) = map.longest(&text) {
                prop_assert!(len > 0 && text.is_char_boundary(len));
            }
        }
    }
}
