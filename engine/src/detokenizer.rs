//! Token bytes → valid UTF-8 text, piece by piece: the pieces concatenated are the lossy decoding of all bytes.

use rill_models::Tokenizer;

/// What the engine needs of a tokenizer to turn ids into text.
pub trait TokenText: Send + Sync {
    /// The bytes `id` contributes to a text; empty for an unknown id.
    fn token_bytes(&self, id: u32) -> &[u8];

    /// Whether `id` is a control token.
    fn is_special(&self, id: u32) -> bool;

    /// Whether a generated text loses one leading space. SentencePiece vocabularies drop the space before the first
    /// word of a text; a generated text continues its prompt, so by default its first word keeps it.
    fn strips_leading_space(&self) -> bool {
        false
    }
}

impl TokenText for Tokenizer {
    fn token_bytes(&self, id: u32) -> &[u8] {
        Tokenizer::token_bytes(self, id)
    }

    fn is_special(&self, id: u32) -> bool {
        Tokenizer::is_special(self, id)
    }
}

/// Holds back the bytes of a character that is not complete yet.
#[derive(Debug)]
pub struct Detokenizer {
    /// The start of an incomplete UTF-8 sequence: at most three bytes between calls.
    pending: Vec<u8>,
    skip_special: bool,
    /// The next byte is the text's first, and a space there is dropped.
    strip_space: bool,
}

impl Detokenizer {
    pub fn new(skip_special: bool, strips_leading_space: bool) -> Detokenizer {
        Detokenizer { pending: Vec::new(), skip_special, strip_space: strips_leading_space }
    }

    /// Appends to `out` the text that `token` completes.
    pub fn push(&mut self, token: u32, text: &dyn TokenText, out: &mut String) {
        if self.skip_special && text.is_special(token) {
            return;
        }
        let mut bytes = text.token_bytes(token);
        if self.strip_space
            && let Some(&first) = bytes.first()
        {
            self.strip_space = false;
            bytes = if first == b' ' { &bytes[1..] } else { bytes };
        }
        if self.pending.is_empty() {
            let incomplete = decode(bytes, out);
            self.pending.extend_from_slice(incomplete);
        } else {
            self.pending.extend_from_slice(bytes);
            let incomplete = decode(&self.pending, out).len();
            self.pending.drain(..self.pending.len() - incomplete);
        }
    }

    /// The end of the text: what is still incomplete stays so.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Appends `bytes` to `out` with invalid sequences replaced, and returns the end that more bytes could complete.
fn decode<'a>(mut bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                return &[];
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                // Valid by the error's own account, so nothing is replaced here.
                out.push_str(&String::from_utf8_lossy(valid));
                let Some(invalid) = error.error_len() else { return rest };
                out.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[invalid..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Token `i` stands for the `i`th piece; the marked ones are special.
    struct Pieces(Vec<(Vec<u8>, bool)>);

    impl TokenText for Pieces {
        fn token_bytes(&self, id: u32) -> &[u8] {
            &self.0[id as usize].0
        }

        fn is_special(&self, id: u32) -> bool {
            self.0[id as usize].1
        }
    }

    fn run(pieces: &Pieces, skip_special: bool, strip: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(skip_special, strip);
        let mut deltas = Vec::new();
        for id in 0..pieces.0.len() as u32 {
            let mut out = String::new();
            detokenizer.push(id, pieces, &mut out);
            deltas.push(out);
        }
        let mut out = String::new();
        detokenizer.finish(&mut out);
        deltas.push(out);
        deltas
    }

    fn plain(pieces: &[&[u8]]) -> Pieces {
        Pieces(pieces.iter().map(|piece| (piece.to_vec(), false)).collect())
    }

    #[test]
    fn a_split_character_appears_when_it_is_whole() {
        let pieces = plain(&[b"a\xf0\x9f", b"\x98", b"\x80b", b"\xe2\x82"]);
        assert_eq!(run(&pieces, false, false), ["a", "", "\u{1f600}b", "", "\u{fffd}"]);
    }

    #[test]
    fn a_leading_space_goes_only_where_it_leads() {
        for (pieces, want) in [(&[&b" a"[..], b" b"][..], "a b"), (&[b"", b" a"], "a"), (&[b"a", b" b"], "a b")] {
            assert_eq!(run(&plain(pieces), false, true).concat(), want);
        }
        assert_eq!(run(&plain(&[b" a"]), false, false).concat(), " a");
    }

    proptest! {
        #[test]
        fn deltas_concatenate_to_the_lossy_text(
            pieces in prop::collection::vec(
                (
                    prop_oneof![
                        prop::collection::vec(any::<u8>(), 0..5),
                        prop::collection::vec(prop::sample::select(&b"a\xf0\x9f\x98\x80\xe2\x82\xac\xc3\xa9\xff\xed\xa0"[..]), 0..5),
                        "[a-z\u{e9}\u{20ac}\u{1f600}]{0,3}".prop_map(String::into_bytes),
                    ],
                    prop::bool::weighted(0.1),
                ),
                0..24,
            ),
            skip_special: bool,
        ) {
            let bytes: Vec<u8> =
                pieces.iter().filter(|p| !(skip_special && p.1)).flat_map(|p| p.0.clone()).collect();
            let text = run(&Pieces(pieces), skip_special, false).concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
