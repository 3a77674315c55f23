//! Every published way of splitting words, SentencePiece and WordPiece, each on a small trained vocabulary, against the
//! `tokenizers` and `sentencepiece` packages: fixtures/vocabularies.json, made by make_vocabulary_fixture.py.

use crate::gguf_writer::{Gguf, Value};
use rill_models::{GgufFile, Tokenizer};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Deserialize)]
struct Fixture {
    text_bytes_max: usize,
    bpe: BytePairs,
    spm: Vec<SentencePieces>,
    unigram: Vec<Unigrams>,
    word_piece: Vec<WordPieces>,
}

#[derive(Deserialize)]
struct BytePairs {
    tokens: Vec<String>,
    merges: Vec<String>,
    rules: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct SentencePieces {
    tokens: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i32>,
    add_space_prefix: bool,
    ids: String,
}

#[derive(Deserialize)]
struct Unigrams {
    #[serde(flatten)]
    pieces: SentencePieces,
    remove_extra_whitespaces: bool,
    charsmap: Vec<i32>,
}

#[derive(Deserialize)]
struct WordPieces {
    tokens: Vec<String>,
    lowercase: bool,
    ids: String,
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn texts(bytes_max: usize) -> Vec<String> {
    let cases: Vec<serde_json::Value> = read("tokenizer_smollm2.json");
    let texts = cases.iter().map(|case| case["text"].as_str().unwrap().to_owned());
    texts.filter(|text| text.len() <= bytes_max).collect()
}

/// Texts whose ids have another hash than the reference's.
fn differing(file: &Gguf, texts: &[String], hashes: &str) -> Vec<String> {
    let (_dir, path) = file.write();
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(path).unwrap()).unwrap();
    let hashes: Vec<&str> = hashes.split(' ').collect();
    assert_eq!(hashes.len(), texts.len(), "the fixtures belong together");
    let differs = |(text, hash): (&String, &str)| {
        let ids = tokenizer.encode(text, false, false).unwrap();
        let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
        let own = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let pieces = || ids.iter().map(|&id| tokenizer.token_text(id).unwrap()).collect::<Vec<_>>();
        (format!("{own:016x}") != hash).then(|| format!("{text:?} {:?}", pieces()))
    };
    texts.iter().zip(hashes).filter_map(differs).collect()
}

fn strs(tokens: &[String]) -> Value<'_> {
    Value::Strs(tokens.iter().map(String::as_str).collect())
}

#[test]
fn every_way_of_splitting_words_is_its_reference() {
    let fixture: Fixture = read("vocabularies.json");
    let texts = texts(fixture.text_bytes_max);
    let mut wrong = Vec::new();
    for (rule, hashes) in &fixture.bpe.rules {
        let file = Gguf::new()
            .set("tokenizer.ggml.model", Value::Str("gpt2"))
            .set("tokenizer.ggml.pre", Value::Str(rule))
            .set("tokenizer.ggml.add_bos_token", Value::Bool(false))
            .set("tokenizer.ggml.tokens", strs(&fixture.bpe.tokens))
            .set("tokenizer.ggml.merges", strs(&fixture.bpe.merges));
        wrong.extend(differing(&file, &texts, hashes).into_iter().map(|text| format!("{rule}: {text}")));
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn sentence_pieces_are_their_reference() {
    let fixture: Fixture = read("vocabularies.json");
    let texts = texts(fixture.text_bytes_max);
    for spm in &fixture.spm {
        let file = Gguf::new()
            .set("tokenizer.ggml.model", Value::Str("llama"))
            .set("tokenizer.ggml.tokens", strs(&spm.tokens))
            .set("tokenizer.ggml.scores", Value::F32s(spm.scores.clone()))
            .set("tokenizer.ggml.token_type", Value::I32s(spm.kinds.clone()))
            .set("tokenizer.ggml.add_space_prefix", Value::Bool(spm.add_space_prefix));
        let wrong = differing(&file, &texts, &spm.ids);
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }
}

#[test]
fn unigrams_are_their_reference() {
    let fixture: Fixture = read("vocabularies.json");
    let texts = texts(fixture.text_bytes_max);
    for Unigrams { pieces, remove_extra_whitespaces, charsmap } in &fixture.unigram {
        let file = Gguf::new()
            .set("tokenizer.ggml.model", Value::Str("t5"))
            .set("tokenizer.ggml.tokens", strs(&pieces.tokens))
            .set("tokenizer.ggml.scores", Value::F32s(pieces.scores.clone()))
            .set("tokenizer.ggml.token_type", Value::I32s(pieces.kinds.clone()))
            .set("tokenizer.ggml.add_space_prefix", Value::Bool(pieces.add_space_prefix))
            .set("tokenizer.ggml.remove_extra_whitespaces", Value::Bool(*remove_extra_whitespaces))
            .set("tokenizer.ggml.precompiled_charsmap", Value::I32s(charsmap.clone()));
        let wrong = differing(&file, &texts, &pieces.ids);
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }
}

#[test]
fn word_pieces_are_their_reference() {
    let fixture: Fixture = read("vocabularies.json");
    let texts = texts(fixture.text_bytes_max);
    for pieces in &fixture.word_piece {
        let kind = |token: &String| match token.as_str() {
            "[UNK]" => 2,
            "[PAD]" | "[CLS]" | "[SEP]" => 3,
            _ => 1,
        };
        let file = Gguf::new()
            .set("tokenizer.ggml.model", Value::Str("bert"))
            .set("tokenizer.ggml.tokens", strs(&pieces.tokens))
            .set("tokenizer.ggml.token_type", Value::I32s(pieces.tokens.iter().map(kind).collect()))
            .set("tokenizer.ggml.bos_token_id", Value::U32(2))
            .set("tokenizer.ggml.seperator_token_id", Value::U32(3))
            .set("tokenizer.ggml.unknown_token_id", Value::U32(1))
            .set("tokenizer.ggml.normalizer.lowercase", Value::Bool(pieces.lowercase));
        let mut wrong = differing(&file, &texts, &pieces.ids);
        // Such files mark the beginning of a word with this very character: where it is in the text, nothing tells the two
        // apart.
        wrong.retain(|line| !line.starts_with("\"\u{2581}"));
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// A vocabulary as large as the largest in use loads in well under a second.
#[test]
fn a_vocabulary_of_262_144_tokens_loads_quickly() {
    const SIZE: usize = 1 << 18;
    // Byte letters, then every token made of two earlier ones, as merges make them.
    let mut tokens: Vec<String> = (0x21..=0x7e_u8).map(|b| char::from(b).to_string()).collect();
    let letters = tokens.len();
    let mut merges = Vec::with_capacity(SIZE);
    let mut known: std::collections::HashSet<String> = tokens.iter().cloned().collect();
    let mut next = 0_usize;
    while tokens.len() < SIZE {
        let (left, right) = (&tokens[next / letters], &tokens[next % letters]);
        let joined = format!("{left}{right}");
        if known.insert(joined.clone()) {
            merges.push(format!("{left} {right}"));
            tokens.push(joined);
        }
        next += 1;
    }
    let file = Gguf::new()
        .set("tokenizer.ggml.model", Value::Str("gpt2"))
        .set("tokenizer.ggml.pre", Value::Str("qwen2"))
        .set("tokenizer.ggml.tokens", strs(&tokens))
        .set("tokenizer.ggml.merges", strs(&merges));
    let (_dir, path) = file.write();
    let started = std::time::Instant::now();
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(path).unwrap()).unwrap();
    let took = started.elapsed();
    assert_eq!(tokenizer.vocab_size(), SIZE);
    println!("{SIZE} tokens in {} ms", took.as_millis());
    // A bound that holds on a busy machine in a build with assertions.
    assert!(took.as_secs_f64() < 5.0, "{took:?}");
}
