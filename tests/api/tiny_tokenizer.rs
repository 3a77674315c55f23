//! A byte-level BPE tokenizer of 263 tokens: every byte, a few merges, three control tokens.

use std::sync::Arc;

use rill_models::Tokenizer;
use serde_json::{Map, Value, json};

pub const END_OF_TEXT: u32 = 260;
pub const IM_START: u32 = 261;
pub const IM_END: u32 = 262;
pub const VOCAB_SIZE: usize = 263;

/// GPT-2's printable stand-in for each byte.
fn byte_chars() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut stand_in = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                stand_in += 1;
                stand_in - 1
            };
            char::from_u32(code).expect("below the surrogates")
        })
        .collect()
}

/// Ids 0 to 255 are the bytes themselves; 256 to 259 are `he`, `ll`, `hell`, `hello`.
pub fn tokenizer() -> Arc<Tokenizer> {
    made(Value::Null)
}

/// The same, which begins texts with `<|endoftext|>`.
pub fn beginning_tokenizer() -> Arc<Tokenizer> {
    let token = "<|endoftext|>";
    let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
    let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
    made(json!({
        "type": "TemplateProcessing", "single": [special, sequence], "pair": [special, sequence, sequence],
        "special_tokens": {token: {"id": token, "ids": [END_OF_TEXT], "tokens": [token]}},
    }))
}

fn made(post_processor: Value) -> Arc<Tokenizer> {
    let mut vocab: Map<String, Value> =
        byte_chars().iter().enumerate().map(|(byte, c)| (c.to_string(), json!(byte))).collect();
    for (token, id) in [("he", 256), ("ll", 257), ("hell", 258), ("hello", 259)] {
        vocab.insert(token.to_owned(), json!(id));
    }
    let added: Vec<Value> = [("<|endoftext|>", END_OF_TEXT), ("<|im_start|>", IM_START), ("<|im_end|>", IM_END)]
        .into_iter()
        .map(|(content, id)| {
            vocab.insert(content.to_owned(), json!(id));
            json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": post_processor, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": ["h e", "l l", "he ll", "hell o"],
        },
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, file.to_string()).expect("the temporary folder takes files");
    let config = json!({"bos_token": "<|endoftext|>"}).to_string();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("the temporary folder takes files");
    Arc::new(Tokenizer::from_json_file(&path).expect("the tokenizer is sound"))
}
