//! The other kinds of vocabulary: SentencePiece, WordPiece and tokenizer.json, each on one small enough to check by hand.

use crate::gguf_writer::{Gguf, Value};
use proptest::prelude::*;
use rill_models::{FillInTheMiddle, GgufFile, Tokenizer};
use serde_json::{Value as Json, json};

fn from_gguf(file: &Gguf) -> Result<Tokenizer, String> {
    let (_dir, path) = file.write();
    Tokenizer::from_gguf(&GgufFile::open(path).unwrap()).map_err(|e| e.to_string())
}

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER: i32 = 4;
const BYTE: i32 = 6;

/// A SentencePiece vocabulary: specials, all bytes, then `pieces` with their scores.
fn spm(pieces: &[(&str, f32, i32)]) -> Gguf {
    let bytes: Vec<String> = (0..=255u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    let (mut scores, mut kinds) = (vec![0.0; 3], vec![2, CONTROL, CONTROL]);
    tokens.extend(bytes.iter().map(String::as_str));
    scores.extend([0.0; 256]);
    kinds.extend([BYTE; 256]);
    for &(piece, score, kind) in pieces {
        tokens.push(piece);
        scores.push(score);
        kinds.push(kind);
    }
    Gguf::new()
        .set("tokenizer.ggml.model", Value::Str("llama"))
        .set("tokenizer.ggml.tokens", Value::Strs(tokens))
        .set("tokenizer.ggml.scores", Value::F32s(scores))
        .set("tokenizer.ggml.token_type", Value::I32s(kinds))
}

fn small_spm() -> Gguf {
    spm(&[
        ("▁", -10.0, NORMAL),
        ("a", -11.0, NORMAL),
        ("b", -12.0, NORMAL),
        ("ab", -2.0, NORMAL),
        ("▁a", -1.0, NORMAL),
        ("ba", -3.0, NORMAL),
        ("▁▁", -4.0, NORMAL),
        ("▁▁▁", -5.0, NORMAL),
        ("<tool>", 0.0, USER),
    ])
}

/// Spellings of the tokens of `text`.
fn spelled(tokenizer: &Tokenizer, text: &str, add_special: bool, parse_special: bool) -> Vec<String> {
    let ids = tokenizer.encode(text, add_special, parse_special).unwrap();
    ids.iter().map(|&id| tokenizer.token_text(id).unwrap().to_owned()).collect()
}

#[test]
fn fill_in_the_middle_tokens_are_known_by_their_spelling() {
    let of = |pieces: &[(&str, f32, i32)]| {
        let tokenizer = from_gguf(&spm(pieces)).unwrap();
        let ends: Vec<String> = FillInTheMiddle::ends(&tokenizer)
            .into_iter()
            .map(|id| tokenizer.token_text(id).unwrap().to_owned())
            .collect();
        (FillInTheMiddle::of_vocabulary(&tokenizer).map(|found| [found.prefix, found.suffix, found.middle]), ends)
    };
    let control = |token: &'static str| (token, 0.0, CONTROL);
    // The first piece has id 259.
    for [prefix, suffix, middle, end] in [
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"],
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"],
        ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"],
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<EOT>"],
    ] {
        let found = of(&[control(suffix), control(middle), control(end), control(prefix)]);
        assert_eq!(found, (Some([262, 259, 260]), vec![end.to_owned()]), "{prefix}");
    }
    assert_eq!(of(&[control("<fim_prefix>"), control("<fim_suffix>")]).0, None);
    let text = [("<fim_prefix>", 0.0, NORMAL), control("<fim_suffix>"), control("<fim_middle>")];
    assert_eq!(of(&text).0, None, "one that is mere text");
}

#[test]
fn sentencepiece_merges_by_score() {
    let tokenizer = from_gguf(&small_spm()).unwrap();
    let check =
        |text: &str, expected: &[&str]| assert_eq!(spelled(&tokenizer, text, false, true), expected, "{text:?}");
    check("", &[]);
    check("a", &["▁a"]);
    // The space and the first a have the better score than a and b.
    check("ab", &["▁a", "b"]);
    check("bab", &["▁", "b", "ab"]);
    check("b ab", &["▁", "b", "▁a", "b"]);
    // Equal ranks merge from the left: three of the four spaces, not the last three.
    check("   b", &["▁▁", "▁▁", "b"]);
    check("  b", &["▁▁▁", "b"]);
    check("é", &["▁", "<0xC3>", "<0xA9>"]);
    check("\n", &["▁", "<0x0A>"]);
    // A special token is followed as the text's beginning is.
    check("<s>a", &["<s>", "▁a"]);
    check("b<tool>a", &["▁", "b", "<tool>", "▁a"]);
}

#[test]
fn sentencepiece_beginnings_and_ends() {
    let check = |file: Gguf, expected: &[&str]| {
        assert_eq!(spelled(&from_gguf(&file).unwrap(), "a", true, false), expected);
    };
    check(small_spm(), &["<s>", "▁a"]);
    check(small_spm().set("tokenizer.ggml.add_bos_token", Value::Bool(false)), &["▁a"]);
    check(small_spm().set("tokenizer.ggml.add_eos_token", Value::Bool(true)), &["<s>", "▁a", "</s>"]);
    let bare = small_spm().set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    check(bare.clone(), &["<s>", "a"]);
    assert!(!from_gguf(&bare).unwrap().strips_leading_space());
    let tokenizer = from_gguf(&small_spm()).unwrap();
    assert!(tokenizer.strips_leading_space());
    let ids = (tokenizer.bos_token_id(), tokenizer.eos_token_id(), tokenizer.unk_token_id());
    assert_eq!(ids, (Some(1), Some(2), Some(0)));
}

#[test]
fn sentencepiece_bytes_and_specials() {
    let tokenizer = from_gguf(&small_spm()).unwrap();
    let bytes = |spelling: &str| tokenizer.token_bytes(tokenizer.token_id(spelling).unwrap());
    assert_eq!(bytes("▁a"), b" a");
    assert_eq!(bytes("<0xC3>"), [0xc3]);
    assert_eq!((bytes("<tool>"), bytes("<s>")), (&b"<tool>"[..], &b"<s>"[..]));
    assert!(tokenizer.is_special(1) && tokenizer.is_special(0));
    assert!(!tokenizer.is_special(tokenizer.token_id("<tool>").unwrap()));
    let plain = tokenizer.encode("<s>a</s>", false, false).unwrap();
    assert!(plain.iter().all(|&id| !tokenizer.is_special(id)));
    assert_eq!(tokenizer.decode(&plain, true), "<s>a</s>");
}

fn small_unigram() -> Gguf {
    let tokens = vec!["<pad>", "</s>", "<unk>", "▁", "a", "b", "ab", "▁a", "aba", "<tool>"];
    Gguf::new()
        .set("tokenizer.ggml.model", Value::Str("t5"))
        .set("tokenizer.ggml.tokens", Value::Strs(tokens))
        .set("tokenizer.ggml.scores", Value::F32s(vec![0.0, 0.0, 0.0, -2.0, -3.0, -3.0, -4.0, -2.5, -5.0, 0.0]))
        .set(
            "tokenizer.ggml.token_type",
            Value::I32s([&[CONTROL, CONTROL, 2][..], &[NORMAL; 6], &[USER]].concat()),
        )
}

#[test]
fn unigrams_are_the_likeliest_way_to_spell_a_text() {
    let tokenizer = from_gguf(&small_unigram()).unwrap();
    let check =
        |text: &str, expected: &[&str]| assert_eq!(spelled(&tokenizer, text, true, true), expected, "{text:?}");
    check("", &["</s>"]);
    check("a", &["▁a", "</s>"]);
    // −2.5 − 3 against −2 − 4.
    check("ab", &["▁a", "b", "</s>"]);
    check("bab", &["▁", "b", "ab", "</s>"]);
    // −2 − 5 against −2.5 − 3 − 3.
    check("aba", &["▁", "aba", "</s>"]);
    check("xyza", &["▁", "<unk>", "a", "</s>"]);
    check("a  b<tool>a</s>", &["▁a", "▁", "▁", "b", "<tool>", "▁a", "</s>", "</s>"]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("ab a", true, false).unwrap(), true), "ab a");
    let merging = small_unigram().set("tokenizer.ggml.remove_extra_whitespaces", Value::Bool(true));
    assert_eq!(spelled(&from_gguf(&merging).unwrap(), "  a   b ", false, false), ["▁a", "▁", "b"]);
    let bare = merging.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    assert_eq!(spelled(&from_gguf(&bare).unwrap(), " ab b", false, false), ["ab", "▁", "b"]);
}

#[test]
fn control_and_byte_tokens_never_come_of_merging() {
    let pieces = ["<", "s", ">", "<s", "0", "x", "A", "<0", "<0x", "<0x0", "<0x0A"];
    let pieces: Vec<_> = pieces.iter().map(|&piece| (piece, 0.0, NORMAL)).collect();
    let tokenizer = from_gguf(&spm(&pieces).set("tokenizer.ggml.add_space_prefix", Value::Bool(false))).unwrap();
    assert_eq!(spelled(&tokenizer, "<s>", false, false), ["<s", ">"]);
    assert_eq!(spelled(&tokenizer, "<0x0A>", false, false), ["<0x0A", ">"]);
}

#[test]
fn word_pieces_are_the_longest_from_the_start() {
    let tokens = vec!["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁un", "▁want", "ed", "want", "▁,", "▁running", "▁e"];
    let mut kinds = vec![NORMAL; tokens.len()];
    kinds[..4].copy_from_slice(&[CONTROL, 2, CONTROL, CONTROL]);
    let file = Gguf::new()
        .set("tokenizer.ggml.model", Value::Str("bert"))
        .set("tokenizer.ggml.tokens", Value::Strs(tokens))
        .set("tokenizer.ggml.token_type", Value::I32s(kinds))
        .set("tokenizer.ggml.bos_token_id", Value::U32(2))
        .set("tokenizer.ggml.seperator_token_id", Value::U32(3))
        .set("tokenizer.ggml.unknown_token_id", Value::U32(1));
    let tokenizer = from_gguf(&file).unwrap();
    assert_eq!(
        spelled(&tokenizer, "UNwanted,running xyz É", true, false),
        ["[CLS]", "▁un", "want", "ed", "▁,", "▁running", "[UNK]", "▁e", "[SEP]"]
    );
    let ids = tokenizer.encode("unwanted running", false, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "unwanted running");
    assert_eq!(tokenizer.encode(&"x".repeat(1 << 20), false, false).unwrap(), [1]);
}

/// A byte-level vocabulary with a few merges, and the rule `pre`.
fn bpe(pre: &str) -> Gguf {
    let alphabet: Vec<String> = (0x21u32..=0x7e).filter_map(char::from_u32).map(String::from).collect();
    let mut tokens: Vec<&str> = alphabet.iter().map(String::as_str).collect();
    tokens.extend(["Ġ", "Ċ", "he", "ll", "hell", "hello", "Ġhello", "<|end|>", "12"]);
    let mut kinds = vec![NORMAL; tokens.len()];
    kinds[alphabet.len() + 7] = CONTROL;
    Gguf::new()
        .set("tokenizer.ggml.model", Value::Str("gpt2"))
        .set("tokenizer.ggml.pre", Value::Str(pre))
        .set("tokenizer.ggml.tokens", Value::Strs(tokens))
        .set("tokenizer.ggml.token_type", Value::I32s(kinds))
        .set("tokenizer.ggml.merges", Value::Strs(vec!["h e", "l l", "he ll", "hell o", "no where", "1 2"]))
}

#[test]
fn byte_pairs_merge_by_rank_within_words() {
    let tokenizer = from_gguf(&bpe("gpt-2")).unwrap();
    assert_eq!(spelled(&tokenizer, "hello hello", false, false), ["hello", "Ġ", "hello"]);
    assert_eq!(spelled(&tokenizer, "12<|end|>", false, true), ["12", "<|end|>"]);
    assert_eq!(spelled(&tokenizer, "\n", false, false), ["Ċ"]);
    // Digits one by one, so they cannot merge.
    assert_eq!(spelled(&from_gguf(&bpe("smollm")).unwrap(), "12", false, false), ["1", "2"]);
    // Llama 3 takes a word that is a token whole, merges or not.
    let llama3 = bpe("llama-bpe").set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    assert_eq!(spelled(&from_gguf(&llama3).unwrap(), "hello hello", true, false), ["hello", "Ġhello"]);
}

#[test]
fn what_a_vocabulary_lacks_is_named() {
    let check = |file: Gguf, parts: &[&str]| {
        let message = from_gguf(&file).err().expect("is refused");
        assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} not in {message}");
    };
    check(bpe("zebra"), &["tokenizer.ggml.pre", "zebra", "llama-bpe", "qwen2"]);
    check(bpe("gpt-2").set("tokenizer.ggml.model", Value::Str("rwkv")), &["rwkv", "gpt2, llama, t5 and bert"]);
    check(small_unigram().without("tokenizer.ggml.scores"), &["tokenizer.ggml.scores"]);
    let map = Value::I32s(vec![1, 2, 3]);
    check(small_unigram().set("tokenizer.ggml.precompiled_charsmap", map), &["precompiled_charsmap is no map"]);
    check(bpe("gpt-2").without("tokenizer.ggml.merges"), &["tokenizer.ggml.merges"]);
    check(bpe("gpt-2").without("tokenizer.ggml.model"), &["tokenizer.ggml.model"]);
    check(bpe("gpt-2").without("tokenizer.ggml.tokens"), &["tokenizer.ggml.tokens"]);
    check(bpe("gpt-2").set("tokenizer.ggml.tokens", Value::Strs(vec![])), &["tokens is empty"]);
    check(bpe("gpt-2").set("tokenizer.ggml.token_type", Value::I32s(vec![1])), &["token_type has 1"]);
    check(bpe("gpt-2").set("tokenizer.ggml.merges", Value::Strs(vec!["ab"])), &["merges", "\"ab\""]);
    check(bpe("llama-bpe"), &["add_bos_token is true", "bos_token_id is missing"]);
    check(small_spm().without("tokenizer.ggml.scores"), &["tokenizer.ggml.scores"]);
    check(small_spm().set("tokenizer.ggml.scores", Value::F32s(vec![0.0])), &["scores has 1"]);
}

fn byte_level_json() -> Json {
    let mut vocab = serde_json::Map::new();
    let alphabet = (0x21u32..=0x7e).chain([0x120, 0x10a]).filter_map(char::from_u32).map(String::from);
    for token in alphabet.chain(["he".to_owned(), "Ġhe".to_owned(), "Ã".to_owned(), "©".to_owned()]) {
        vocab.insert(token, vocab.len().into());
    }
    let first = vocab.len() as u32;
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0",
        "added_tokens": [added(first, "<s>", true), added(first + 1, "</s>", true), added(first + 2, "<think>", false)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [first], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [first + 1], "tokens": ["</s>"]}}},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["h", "e"], ["Ġ", "he"]]}
    })
}

fn from_json(tokenizer: &Json, config: Option<Json>) -> Result<Tokenizer, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    if let Some(config) = config {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    }
    Tokenizer::from_json_file(&path).map_err(|e| e.to_string())
}

#[test]
fn tokenizer_json_byte_level() {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null});
    let tokenizer = from_json(&byte_level_json(), Some(config)).unwrap();
    assert_eq!(spelled(&tokenizer, "he he", true, false), ["<s>", "he", "Ġhe", "</s>"]);
    assert_eq!(spelled(&tokenizer, "é", false, false), ["Ã", "©"]);
    assert_eq!(spelled(&tokenizer, "<s>he<think>", false, true), ["<s>", "he", "<think>"]);
    assert_eq!(spelled(&tokenizer, "<s>he<think>", false, false), ["<", "s", ">", "he", "<think>"]);
    assert_eq!(spelled(&tokenizer, "", false, true), Vec::<String>::new());
    assert_eq!(tokenizer.token_bytes(tokenizer.token_id("Ġhe").unwrap()), b" he");
    assert_eq!(tokenizer.token_bytes(tokenizer.token_id("Ã").unwrap()), [0xc3]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("é<s> he", true, false).unwrap(), true), "é<s> he");
    assert!(tokenizer.is_special(100) && !tokenizer.is_special(102) && !tokenizer.is_special(9_999));
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(100), Some(101)));
    assert_eq!((tokenizer.pad_token_id(), tokenizer.unk_token_id()), (None, None));
    assert!(!tokenizer.strips_leading_space());
    assert_eq!(tokenizer.vocab_size(), 103);
}

#[test]
fn tokenizer_json_sentencepiece() {
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "<0xC3>", "<0xA9>", "▁", "a", "▁a"] {
        vocab.insert(token.to_owned(), vocab.len().into());
    }
    let file = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "unk_token": "<unk>", "byte_fallback": true}
    });
    let tokenizer = from_json(&file, None).unwrap();
    assert_eq!(spelled(&tokenizer, "a aé", false, false), ["▁a", "▁a", "<0xC3>", "<0xA9>"]);
    assert!(tokenizer.strips_leading_space());
    let ids = tokenizer.encode("a aé", false, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "a aé");
    assert_eq!((tokenizer.token_bytes(1), tokenizer.token_bytes(5)), (&[0xc3][..], &b" a"[..]));
}

#[test]
fn tokenizer_json_word_piece() {
    let file = json!({
        "version": "1.0", "added_tokens": [],
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "un": 1, "##able": 2, "to": 3}}
    });
    let tokenizer = from_json(&file, None).unwrap();
    let ids = tokenizer.encode("unable to", false, false).unwrap();
    assert_eq!(ids, [1, 2, 3]);
    assert_eq!((tokenizer.decode(&ids, true).as_str(), tokenizer.token_bytes(2)), ("unable to", &b"able"[..]));
}

#[test]
fn a_broken_tokenizer_json_is_refused() {
    let check = |file: Json, part: &str| {
        let message = from_json(&file, None).err().expect("is refused");
        assert!(message.contains(part), "{part:?} not in {message}");
    };
    check(json!({}), "");
    let with = |field: &str, value: Json| {
        let mut file = byte_level_json();
        file[field] = value;
        file
    };
    check(
        with("decoder", json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": true})),
        "CTC",
    );
    let mut no_decoder = with("decoder", Json::Null);
    assert!(from_json(&no_decoder, None).is_ok(), "the pre-tokenizer says how");
    no_decoder["pre_tokenizer"] = Json::Null;
    check(no_decoder, "no decoder");
    let mut far = byte_level_json();
    far["model"]["vocab"]["he"] = json!(4_000_000_000u32);
    check(far, "the highest id is 4000000000");
    let message = from_json(&byte_level_json(), Some(json!("x"))).err();
    assert_eq!(message, None, "a config that names no tokens names none");
}

proptest! {
    #[test]
    fn sentencepiece_gives_any_text_back(text in "[ab <s>/▁é漢\\PC]{0,60}", parse_special: bool) {
        let tokenizer = from_gguf(&small_spm()).unwrap();
        let ids = tokenizer.encode(&text, false, parse_special).unwrap();
        // The vocabulary has one spelling for a space and for its own sign for it; and a space is added after specials.
        if !parse_special && !text.contains("<tool>") {
            prop_assert_eq!(tokenizer.decode(&ids, false), text.replace('▁', " "));
        }
    }
}
