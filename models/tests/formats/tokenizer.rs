//! The default model's own vocabulary against llama.cpp's tokenizer, id for id.

use std::collections::HashSet;
use std::path::Path;

use crate::default_model;
use proptest::prelude::*;
use rill_models::Tokenizer;

/// A text, and its ids with control tokens taken as text and as tokens.
#[derive(serde::Deserialize)]
struct Case {
    text: String,
    plain: Vec<u32>,
    special: Vec<u32>,
}

/// Made by make_tokenizer_fixture.py.
fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer_smollm2.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(&default_model::open()).unwrap()
}

/// Bytes with a token of their own. This vocabulary lacks some that its training text lacked; every implementation
/// leaves those out.
fn known_bytes(tokenizer: &Tokenizer) -> HashSet<u8> {
    let tokens = (0..tokenizer.vocab_size() as u32).map(|id| tokenizer.token_bytes(id));
    tokens.filter(|bytes| bytes.len() == 1).map(|bytes| bytes[0]).collect()
}

#[test]
fn agrees_with_llama_cpp_id_for_id() {
    let (tokenizer, cases) = (tokenizer(), cases());
    assert!(cases.len() >= 200);
    let mut differing = Vec::new();
    for Case { text, plain, special } in &cases {
        for (parse_special, expected) in [(false, plain), (true, special)] {
            let ids = tokenizer.encode(text, true, parse_special).unwrap();
            if ids != *expected {
                differing.push(format!("{text:?} ({parse_special}): {ids:?}, expected {expected:?}"));
            }
        }
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

#[test]
fn decoding_gives_the_text_back() {
    let tokenizer = tokenizer();
    let known = known_bytes(&tokenizer);
    let mut whole = 0;
    for Case { text, .. } in cases() {
        if text.bytes().all(|byte| known.contains(&byte)) {
            for parse_special in [false, true] {
                let ids = tokenizer.encode(&text, true, parse_special).unwrap();
                assert_eq!(tokenizer.decode(&ids, false), text);
            }
            whole += 1;
        }
    }
    assert!(whole >= 300, "only {whole} texts are spelled in known bytes");
}

#[test]
fn control_tokens_in_text_stay_text_unless_asked_for() {
    let tokenizer = tokenizer();
    let text = "<|im_start|>user\nhi<|im_end|>";
    let plain = tokenizer.encode(text, false, false).unwrap();
    assert!(plain.iter().all(|&id| !tokenizer.is_special(id)));
    assert_eq!(tokenizer.decode(&plain, true), text);
    let parsed = tokenizer.encode(text, false, true).unwrap();
    assert_eq!(parsed.first(), tokenizer.token_id("<|im_start|>").as_ref());
    assert_eq!(parsed.last(), tokenizer.token_id("<|im_end|>").as_ref());
    assert_eq!(tokenizer.decode(&parsed, true), "user\nhi");
    assert_eq!(tokenizer.decode(&parsed, false), text);
}

#[test]
fn tokens_and_ids_name_each_other() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    for id in 0..49_152 {
        assert_eq!(tokenizer.token_id(tokenizer.token_text(id).unwrap()), Some(id));
    }
    assert_eq!(tokenizer.token_text(49_152), None);
    assert_eq!(tokenizer.token_bytes(49_152), b"");
    assert_eq!(tokenizer.bos_token_id(), Some(1));
    assert_eq!(tokenizer.eos_token_id(), Some(2));
    assert_eq!(tokenizer.token_text(2), Some("<|im_end|>"));
    assert!(!tokenizer.strips_leading_space());
}

#[test]
fn long_hostile_texts_take_seconds_at_most() {
    let tokenizer = tokenizer();
    let mib = 1 << 20;
    let texts = [
        " ".repeat(mib),
        "a".repeat(mib),
        "\n".repeat(mib),
        "ab".repeat(mib / 2),
        "🏳️‍🌈".repeat(mib / 14),
        "<|im_start|>".repeat(mib / 12),
        "<|".repeat(mib / 2),
        "word 123 ".repeat(mib / 9),
    ];
    for text in texts {
        for parse_special in [false, true] {
            let started = std::time::Instant::now();
            let ids = tokenizer.encode(&text, true, parse_special).unwrap();
            assert!(started.elapsed().as_secs() < 10, "{:?}…", text.chars().take(9).collect::<String>());
            assert_eq!(tokenizer.decode(&ids, false), text);
        }
    }
}

proptest! {
    #[test]
    fn any_text_encodes_and_comes_back(text in ".{0,200}", parse_special: bool) {
        let tokenizer = shared();
        let ids = tokenizer.encode(&text, true, parse_special).unwrap();
        let known = known_bytes(tokenizer);
        if text.bytes().all(|byte| known.contains(&byte)) {
            prop_assert_eq!(tokenizer.decode(&ids, false), text);
        }
    }

    #[test]
    fn any_ids_decode_as_their_bytes_do(ids in prop::collection::vec(0u32..60_000, 0..50)) {
        let tokenizer = shared();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
        prop_assert_eq!(tokenizer.decode(&ids, false), String::from_utf8_lossy(&bytes));
    }
}

/// One tokenizer for all threads and cases, as the server has.
fn shared() -> &'static Tokenizer {
    static SHARED: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(tokenizer);
    &SHARED
}
